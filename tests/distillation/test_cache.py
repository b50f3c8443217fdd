"""Cached teachers: what is kept is the teacher's, on few bytes, whole or refused, and read by several processes."""

from __future__ import annotations

import dataclasses
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd.data.bundle import DataBundle, stack
from pykd.distillation import TeacherCache, cache_teacher
from pykd.distillation import cache_files as files
from pykd.errors import ArtifactError, DataError

from .cached import OPTIONS, Mortal, bundle


def log_softmax(model: nn.Module, data: DataBundle, temperature: float = 1.0) -> Tensor:
    x = torch.stack([data.train[i]["pixel_values"] for i in range(len(data.train))])
    with torch.no_grad():
        return (model.eval()(x) / temperature).log_softmax(-1)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# What is kept.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (5, 1.0), (5, 2.5), (12, 1.0), (64, 1.0)])
def test_top_k_of_a_classifier(tmp_path: Path, k: int, temperature: float, dtype: str) -> None:
    data, teacher = bundle(), Mortal()
    teacher.train()
    cache = cache_teacher(teacher, data, tmp_path / "c", **OPTIONS | {"k": k, "temperature": temperature,
                                                                      "dtype": dtype})  # fmt: skip
    assert teacher.training
    want = log_softmax(teacher, data, temperature)
    values, indices = want.topk(min(k, 12))
    assert len(cache) == 80 and (cache.k, cache.classes, cache.temperature) == (min(k, 12), 12, temperature)
    ids, log_probs = cache.batch(range(80))
    assert ids.dtype == torch.int32 and log_probs.dtype == getattr(torch, dtype)
    assert torch.equal(ids, indices.int())
    torch.testing.assert_close(log_probs, values.to(log_probs.dtype), rtol=4e-3, atol=1e-3)
    mass = torch.stack([cache.tail(i) for i in range(80)]).float()
    torch.testing.assert_close(mass, 1 - values.exp().sum(1), rtol=1e-3, atol=1e-6)
    assert torch.equal(cache[79][0], ids[79]) and torch.equal(cache[79][1], log_probs[79])


def test_sampled_weights_are_an_unbiased_estimate(tmp_path: Path) -> None:
    data, teacher = bundle(40), Mortal()
    cache = cache_teacher(teacher, data, tmp_path / "c", samples=4000, **OPTIONS)
    assert cache.missing == "zero" and cache.k == 4000
    ids, log_probs = cache.batch(range(40))
    weights = torch.where(ids >= 0, log_probs.float().exp(), 0.0)
    torch.testing.assert_close(weights.sum(1), torch.ones(40), rtol=2e-3, atol=0)
    estimate = torch.zeros(40, 13).scatter_add(1, torch.where(ids >= 0, ids, 12).long(), weights)[:, :12]
    p = log_softmax(teacher, data).exp()
    assert bool(((estimate - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all())
    distinct = [row[row >= 0] for row in ids]
    assert all(len(row) == len(set(row.tolist())) for row in distinct)  # what was drawn repeatedly is one entry
    assert cache.tail(3).item() == 0


def test_draws_depend_on_seed_and_example_alone(tmp_path: Path) -> None:
    runs = {}
    for name, changes in {"a": {}, "b": {"batch_size": 7, "shard_bytes": 300}, "c": {"seed": 1}}.items():
        options = OPTIONS | {"samples": 6} | changes
        runs[name] = cache_teacher(Mortal(), bundle(), tmp_path / name, **options).batch(range(80))[0]
    assert torch.equal(runs["a"], runs["b"]) and not torch.equal(runs["a"], runs["c"])


class Speaker(nn.Module):
    """A token model: logits (batch, time, vocabulary)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.head = nn.Embedding(50, 4), nn.Linear(4, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        scores: Tensor = self.head(self.embedding(input_ids))
        return scores


def sentences(side: str = "right", *, lengths: tuple[int, ...] = (3, 7, 1, 5, 2, 6, 4)) -> DataBundle:
    generator = torch.Generator().manual_seed(5)
    items = [{"input_ids": torch.randint(1, 50, (n,), generator=generator)} for n in lengths]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(item["input_ids"]) for item in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, item in zip(ids, batch, strict=True):
            n = len(item["input_ids"])
            (row[:n] if side == "right" else row[longest - n :]).copy_(item["input_ids"])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    return DataBundle(items, items, collate, ["only"], "text", fingerprint=f"text-{side}-{lengths}")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("vocabulary", [60, 65_535, 65_536, 70_000])
def test_token_models_without_their_padding(tmp_path: Path, side: str, vocabulary: int) -> None:
    data, teacher = sentences(side), Speaker(vocabulary)
    cache = cache_teacher(teacher, data, tmp_path, k=6, batch_size=3, shard_bytes=150, progress=False)
    assert len(cache.manifest["shards"]) == 3 and sum(s["positions"] for s in cache.manifest["shards"]) == 28
    assert [len(cache[i][0]) for i in range(7)] == [3, 7, 1, 5, 2, 6, 4]
    batch = data.collate([data.train[i] for i in (5, 0, 2)])
    counted = batch["attention_mask"].bool()
    ids, log_probs = cache.batch([5, 0, 2], counted)
    want = teacher(batch["input_ids"]).log_softmax(-1).topk(6)
    assert torch.equal(ids[counted], want.indices[counted].int())
    torch.testing.assert_close(log_probs[counted].float(), want.values[counted], rtol=1e-3, atol=1e-3)
    assert bool((ids[~counted] == -1).all() and (log_probs[~counted] == -torch.inf).all())
    assert cache.tail(1).shape == (7,)
    with pytest.raises(DataError, match=r"example 5 has 3 positions in this batch and 6 in .*: truncate it as when"):
        cache.batch([5, 0, 2], counted[[1, 1, 2]])


def test_without_a_mask_every_position_counts(tmp_path: Path) -> None:
    items = [{"input_ids": torch.randint(0, 50, (4,))} for _ in range(3)]
    data = DataBundle(items, items, stack, ["only"], "text", fingerprint="text")
    cache = cache_teacher(Speaker(60), data, tmp_path, k=2, progress=False)
    assert cache.batch([2, 0])[0].shape == (2, 4, 2)


@pytest.mark.parametrize(("classes", "k"), [(2, 64), (12, 3), (30_000, 64), (70_000, 64), (70_000, 8)])
@pytest.mark.parametrize("samples", [None, 12])
def test_at_most_six_bytes_on_disk_for_a_kept_logit(tmp_path: Path, classes: int, k: int, samples: int | None) -> None:
    size = 2000 if classes < 100 else 400
    cache = cache_teacher(Mortal(classes=classes), bundle(size), tmp_path, k=k, samples=samples, progress=False)
    on_disk = sum(file.stat().st_size for file in tmp_path.rglob("*"))
    assert on_disk <= 6 * size * cache.k
    ids = torch.arange(-1, min(classes, 69_999)).view(-1, 1)
    packed = files.pack_ids(ids, classes)
    assert torch.equal(files.unpack_ids(packed["ids"], packed.get("ids_high")), ids.int())


# Interruptions.


def test_a_killed_run_resumes_without_recomputing_finished_shards(tmp_path: Path) -> None:
    want = cache_teacher(Mortal(), bundle(), tmp_path / "whole", **OPTIONS)
    assert len(want.manifest["shards"]) > 4
    script = Path(__file__).with_name("cached.py")
    dead = subprocess.run([sys.executable, script, tmp_path / "c", "44"], capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    done = json.loads((tmp_path / "c" / files.MANIFEST).read_text())["shards"][-1]["last"]
    assert 0 < done <= 44
    with pytest.raises(ArtifactError, match=f"is not finished: it holds {done} of 80 examples; run cache_teacher"):
        TeacherCache(tmp_path / "c")
    (tmp_path / "c" / f".{files.MANIFEST}.abc.tmp").write_text("half")  # what a death while writing leaves
    (tmp_path / "c" / ".shard-00003.safetensors.abc.tmp").write_text("half")
    teacher = Mortal()
    cache_teacher(teacher, bundle(), tmp_path / "c", **OPTIONS)
    assert teacher.seen == 80 - done
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    cache_teacher(teacher, bundle(), tmp_path / "c", **OPTIONS)
    assert teacher.seen == 80 - done  # nothing was left to do


def test_a_shard_that_no_manifest_names_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.safetensors").write_text("a process died between the shard and the manifest")
    assert len(cache_teacher(Mortal(), bundle(), tmp_path, **OPTIONS)) == 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5}, "holds a cache of another run: k was 4, is now 5; choose another folder"),
        ({"samples": 4}, "kind was top-k, is now sampled"),
        ({"dtype": "bfloat16"}, "dtype was float16, is now bfloat16"),
        ({"temperature": 2.0}, "temperature was 1.0, is now 2.0"),
        ({"teacher": Mortal(classes=13)}, "teacher was .*, is now "),
        ({"data": bundle(81)}, "data was .*'noise-80'.*, is now .*'noise-81'"),
        ({"resume": False}, "already holds a cache; continue it with resume=True, or choose another folder"),
    ],
)
def test_another_cache_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    good = {"teacher": Mortal(), "data": bundle(), "path": tmp_path} | OPTIONS
    cache_teacher(**good)
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        cache_teacher(**(good | changes))
    assert contents(tmp_path) == before


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ArtifactError, match=r"holds files that pykd did not write there \(thesis.txt\)"):
        cache_teacher(Mortal(), bundle(), tmp_path, **OPTIONS)


# Damage.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cache_teacher(Mortal(), bundle(), tmp_path / "c", **OPTIONS)
    return tmp_path / "c"


def test_damaged_shards_are_named(folder: Path) -> None:
    shard = folder / "shard-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"shard-00002.safetensors is truncated or altered: expected \d+ bytes"):
        TeacherCache(folder, verify=False)
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"shard-00002.safetensors is altered: its sha256 is not the one in"):
        TeacherCache(folder)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00002.safetensors is missing, though"):
        cache_teacher(Mortal(), bundle(), folder, **OPTIONS)


def test_damaged_manifests(folder: Path, tmp_path: Path) -> None:
    manifest = folder / files.MANIFEST
    good = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(good | {"format_version": 2}))
    with pytest.raises(ArtifactError, match="has format_version 2, this pykd reads 1; cache again"):
        TeacherCache(folder)
    manifest.write_text("{")
    with pytest.raises(
        ArtifactError, match=r"pykd_teacher_cache.json cannot be read as JSON .*; copy the folder again"
    ):
        TeacherCache(folder)
    with pytest.raises(ArtifactError, match=r"has no pykd_teacher_cache.json; write a cache there with"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize("index", [-1, 80])
def test_an_index_outside_the_cache(folder: Path, index: int) -> None:
    with pytest.raises(IndexError, match=rf"the cache holds examples 0..79, got {index}"):
        TeacherCache(folder)[index]


class Broken(Mortal):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs().neg().log()


class Restless:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return {"pixel_values": torch.randn(6), "labels": 0}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dtype": "float8"}, ValueError, "unknown dtype 'float8'"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"shard_bytes": 0}, ValueError, "shard_bytes must be at least 1, got 0"),
        ({"data": []}, TypeError, "data must be a DataBundle, whose examples have an index, got list"),
        ({"data": dataclasses.replace(bundle(), fingerprint="")}, DataError, "'noise' has no fingerprint: give"),
        ({"data": dataclasses.replace(bundle(), train=Restless())}, DataError, "'noise' differs each time it is read"),
        ({"teacher": Broken()}, ValueError, r"the teacher gives NaN for an example among 0..3: nothing to learn"),
    ],
)
def test_errors(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cache_teacher(**({"teacher": Mortal(), "data": bundle(), "path": tmp_path} | OPTIONS | changes))


def test_a_teacher_with_nan_weights_is_refused(tmp_path: Path) -> None:
    teacher = Mortal()
    with torch.no_grad():
        teacher.body[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the teacher's 'body.0.weight' holds NaN"):
        cache_teacher(teacher, bundle(), tmp_path, **OPTIONS)


# Several processes.


class Pairs:
    """A training set beside its cached teacher, as a DataLoader reads it."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.cache[index]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_data_loader_read_the_same(folder: Path) -> None:
    cache = TeacherCache(folder)
    want = cache.batch(range(80))  # the files are open in this process when the workers start
    loader = torch.utils.data.DataLoader(Pairs(cache), batch_size=16, num_workers=2)
    got = [torch.cat(parts) for parts in zip(*loader, strict=True)]
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy[79][0], want[0][79])
