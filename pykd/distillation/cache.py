"""Teachers on disk: what a teacher says about a training set, written once, read by every student."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykd.data.bundle import DataBundle
from pykd.distillation import cache_files as files
from pykd.distillation.teacher import Teacher, fixed
from pykd.distillation.teacher_cache import TeacherCache
from pykd.errors import DataError, nearest
from pykd.models.adapter import logits, move
from pykd.training.labels import IGNORED
from pykd.training.record import require_finite_weights


def cache_teacher(
    teacher: nn.Module,
    data: DataBundle,
    path: str | Path,
    *,
    k: int = 64,
    dtype: str = "float16",
    temperature: float = 1.0,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    shard_bytes: int = 64 * 2**20,
    resume: bool = True,
    progress: bool | None = None,
) -> TeacherCache:
    """Write what the teacher says about every training example: its k likeliest classes, or a sample of them.

    With P = softmax(logits / temperature), for every position (one of each example; of a token model those where
    attention_mask is not 0; of an encoder-decoder and a masked model those with a label): the ids and log P of the k
    likeliest classes (all, if there are no more) and the mass of the others; or, with `samples`, as many draws from P
    (Anshumann et al., 2025, arXiv 2503.16870): the ids drawn and log(times drawn / samples), an unbiased estimate of P.
    `seed` then fixes each example's draws.

    dtype: of the logarithms, "float16" or "bfloat16". A class kept costs 4 bytes, 5 from 65536 classes on, and a
    position 2. `shard_bytes`: about the size of a file, and the work that an interruption can lose. A run that was
    killed goes on after its last whole shard, and a finished one returns at once, if `resume`.

    Raises ArtifactError for a folder that holds another cache (other teacher, data or options) or foreign files and for
    a full disk; DataError for a training set without a fingerprint, or one that differs each time it is read;
    ValueError for options out of range and a teacher that gives NaN.

    >>> import tempfile
    >>> from pykd.data.bundle import stack
    >>> items = [{"pixel_values": torch.randn(4), "labels": 0} for _ in range(10)]
    >>> data = DataBundle(items, items, stack, ["a", "b"], "noise", fingerprint="noise-10")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ids, log_probs = cache_teacher(nn.Linear(4, 100), data, f"{folder}/cache", k=8, progress=False)[3]
    >>> ids.shape, log_probs.dtype
    (torch.Size([8]), torch.float16)
    """
    from tqdm import tqdm

    _check_options(dtype, temperature, k=k, samples=1 if samples is None else samples, batch_size=batch_size,
                   shard_bytes=shard_bytes)  # fmt: skip
    _check_data(data)
    require_finite_weights(teacher, "teacher")
    folder = Path(path)
    manifest = files.begin(folder, _identity(teacher, data, k, dtype, temperature, samples, seed), resume=resume)
    files.check_shards(folder, manifest, contents=False)
    done = manifest["shards"][-1]["last"] if manifest["shards"] else 0
    total, disable = len(data.train), None if progress is None else not progress
    first, parts = done, list[dict[str, Tensor]]()
    with (
        Teacher([teacher], data).frozen(),
        tqdm(desc="teacher cache", initial=done, total=total, unit="example", disable=disable, leave=False) as bar,
    ):
        for start in range(done, total, batch_size):
            rows = range(start, min(start + batch_size, total))
            part, facts = _describe(teacher, data, rows, manifest)
            parts.append(part)
            manifest |= facts
            if sum(t.nbytes for p in parts for t in p.values()) >= shard_bytes or rows.stop == total:
                files.add_shard(folder, manifest, _joined(parts, facts["per_position"]), first=first, last=rows.stop)
                first, parts = rows.stop, []
            bar.update(len(rows))
    return TeacherCache(folder, verify=False)


def _check_options(dtype: str, temperature: float, **counts: int) -> None:
    if dtype not in files.DTYPES:
        raise ValueError(nearest("dtype", dtype, files.DTYPES))
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _check_data(data: DataBundle) -> None:
    if not isinstance(data, DataBundle):
        raise TypeError(f"data must be a DataBundle, whose examples have an index, got {type(data).__name__}")
    if not data.fingerprint:
        raise DataError(f"{data.name!r} has no fingerprint: give DataBundle one, so that other data can be refused")
    if not fixed(data.train):
        raise DataError(
            f"the training set of {data.name!r} differs each time it is read: cache it without augmentation"
        )


def _identity(
    teacher: nn.Module, data: DataBundle, k: int, dtype: str, temperature: float, samples: int | None, seed: int
) -> dict[str, Any]:
    """What must be equal for a run to go on with a cache."""
    return {
        "kind": "top-k" if samples is None else "sampled",
        "k": k if samples is None else samples,
        "seed": None if samples is None else seed,
        "missing": "tail" if samples is None else "zero",
        "dtype": dtype,
        "temperature": temperature,
        "counted": counted_by(teacher),
        "teacher": {"class": type(teacher).__name__, "sha256": files.fingerprint(teacher)},
        "data": {"name": data.name, "fingerprint": data.fingerprint, "examples": len(data.train)},
    }


def _describe(
    teacher: nn.Module, data: DataBundle, rows: range, manifest: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of some examples, with `lengths` (positions of each), and what the logits tell about the model."""
    batch = move(data.collate([data.train[row] for row in rows]), next(teacher.parameters()).device)
    with torch.no_grad():
        scores = logits(teacher, batch)
    by_position = scores.dim() > 2
    counted = counted_positions(batch, manifest["counted"]) if by_position else scores.new_ones(len(scores)).bool()
    log_p = (scores[counted].float() / manifest["temperature"]).log_softmax(-1)
    if bool(log_p.isnan().any()):
        raise ValueError(f"the teacher gives NaN for an example among {rows.start}..{rows.stop - 1}: nothing to learn")
    lengths = counted.reshape(len(rows), -1).sum(1)
    classes = log_p.shape[1]
    if manifest["kind"] == "top-k":
        values, ids = log_p.topk(min(manifest["k"], classes))
        rest = {"tail": log_p.exp().scatter(1, ids, 0.0).sum(1).half()} if ids.shape[1] < classes else {}
    else:
        values, ids = _sample(log_p.exp(), lengths.tolist(), rows, manifest["k"], manifest["seed"])
        rest = {}
    part = {"log_probs": values.to(files.DTYPES[manifest["dtype"]]), "lengths": lengths, **rest}
    part |= files.pack_ids(ids, classes)
    facts = {"classes": classes, "columns": ids.shape[1], "per_position": scores.dim() > 2}
    return {name: tensor.cpu() for name, tensor in part.items()}, facts


def counted_by(teacher: nn.Module) -> str:
    """What says which positions of a token model count: its labels where the others are never learned from."""
    config = getattr(teacher, "config", None)
    labelled = getattr(config, "is_encoder_decoder", False) or type(teacher).__name__.endswith("ForMaskedLM")
    return "labels" if labelled else "attention_mask"


def counted_positions(batch: Mapping[str, Tensor], counted: str) -> Tensor:
    """Bool (examples, time): the positions whose teacher is kept, by the labels (not -100) or the attention mask."""
    if counted == "labels":
        return batch["labels"] != IGNORED
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _sample(p: Tensor, lengths: list[int], rows: range, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """log(times drawn / samples) and ids (positions, samples) of draws from p; -1 where an id was drawn repeatedly."""
    drawn = []
    for row, part in zip(rows, torch.split(p, lengths), strict=True):
        digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
        generator = torch.Generator(p.device).manual_seed(int.from_bytes(digest[:7], "little"))
        drawn.append(torch.multinomial(part, samples, replacement=True, generator=generator) if len(part) else
                     part.new_empty((0, samples), dtype=torch.int64))  # fmt: skip
    draws = torch.cat(drawn).sort(1).values
    new = torch.ones_like(draws, dtype=torch.bool)
    new[:, 1:] = draws[:, 1:] != draws[:, :-1]
    group = new.cumsum(1) - 1
    ids = torch.full_like(draws, -1).scatter(1, group, draws)
    times = torch.zeros_like(p[:, :1]).expand(draws.shape).scatter_add(1, group, torch.ones_like(draws, dtype=p.dtype))
    return (times / samples).log(), ids


def _joined(parts: list[dict[str, Tensor]], per_position: bool) -> dict[str, Tensor]:
    """Tensors of a shard from those of its batches."""
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    lengths = tensors.pop("lengths")
    if per_position:
        tensors["offsets"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return tensors
