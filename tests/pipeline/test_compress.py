"""compress_to: targets that are met, targets that cannot be, searches that go on where they stopped."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pykd import from_pretrained
from pykd.data.bundle import DataBundle, stack
from pykd.errors import ArtifactError
from pykd.evaluation import StageRecord, compare, evaluate, measure, write_report
from pykd.evaluation.counting import saved_bytes
from pykd.pipeline.candidates import Candidate, default_depths, default_prunings, space
from pykd.pipeline.compress import Compressed, compress_to
from pykd.pipeline.search import Search
from pykd.pipeline.stages import Context, apply_stage
from pykd.pipeline.target import Point, Target
from pykd.recipe import load_recipe
from pykd.training import finetune


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_throughput", functools.partial(measure.measure_throughput, seconds=0.01))


def texts() -> DataBundle:
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(60):
        ids = torch.randint(8, 50, (9,), generator=generator)
        ids[1:4] = 3 + index % 3
        items.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 3})
    return DataBundle(items, items, stack, ["a", "b", "c"], "tokens", fingerprint="60 rows")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **shape))
    return finetune(model, texts(), epochs=8, lr=1e-3, batch_size=20, progress=False).eval()


#: Few candidates, and short training, of a small space.
SMALL: dict[str, Any] = {
    "depths": [None, 1],
    "prunings": [None, ("neurons", 0.5)],
    "schemes": [None, "w4a16"],
    "epochs": 1,
    "lr": 1e-3,
    "batch_size": 20,
    "progress": False,
    "latency_rounds": 5,
}


def test_a_method_chooses_the_codes_of_4_bit_candidates_alone(
    trained: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    one: dict[str, Any] = {"depths": [None], "prunings": [None], "latency_rounds": 2, "group_size": 32}
    with caplog.at_level(logging.INFO, "pykd"):
        found = compress_to(trained, {"ratio": 1.5}, texts(), schemes=["w8a8", "w4a16"], method="gptq", **one)
    assert "as it is: accuracy" in caplog.text and "2 candidates to look at before any is trained" in caplog.text
    assert "making 1 of at most 12" in caplog.text and "P95" in caplog.text
    assert found.skipped == {} and {each.candidate.scheme for each in found.measured} == {"w8a8", "w4a16"}
    report: Any = found.model.pykd_report
    methods = {entry["method"] for entry in report if entry["stage"] == "quantize"}
    assert methods == {"gptq" if found.best.candidate.scheme == "w4a16" else "rtn"}


def test_size_and_quality_together(trained: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    target = {"ratio": 3.0, "max_metric_drop": 0.05}
    found = compress_to(trained, target, texts(), output_dir=tmp_path, max_candidates=3, **SMALL)
    assert found.met and found.sentence == (
        f"{found.best.report.name} meets ratio 3 (reached: {found.base.size_bytes / found.best.report.size_bytes:.4g}) "
        f"and max_metric_drop 0.05 (reached: {found.base.accuracy - found.best.report.accuracy:.4g}), the best of "
        f"{len(found.measured)} measured candidates"
    )
    assert all(torch.equal(trained.state_dict()[name], tensor) for name, tensor in before.items())
    folder = tmp_path / "models" / found.best.candidate.key
    again = evaluate(from_pretrained(folder), texts(), latency_rounds=3, path=folder)
    assert (
        again.predictions
        == found.best.report.predictions
        == evaluate(found.model, texts(), latency_rounds=3).predictions
    )
    assert again.size_bytes == saved_bytes(folder) == found.best.report.size_bytes <= found.base.size_bytes / 3
    assert any("before training: ratio" in reason for reason in found.skipped.values())
    entry = found.model.pykd_report[-1]  # type: ignore[index]
    json.dumps(entry, allow_nan=False)
    assert entry["outcome"] == found.sentence and entry["parameters"]["target"] == target
    assert {c["name"] for c in entry["candidates"] if c["front"]} >= {one.report.name for one in found.front}
    page = (tmp_path / "report.html").read_text()
    assert found.sentence in page and "quality against size and latency" in page


def test_a_search_goes_on_where_it_stopped(trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {**SMALL, "output_dir": tmp_path, "max_candidates": 4}
    whole = Search.measure

    def stops(self: Search, candidate: Candidate, *, rounds: int) -> Any:
        if candidate.depth == 1:
            raise KeyboardInterrupt
        return whole(self, candidate, rounds=rounds)

    target = {"size_mb": saved_mb(trained, tmp_path / "x")}
    monkeypatch.setattr(Search, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        compress_to(trained, target, texts(), **options)
    monkeypatch.setattr(Search, "measure", whole)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "measured").iterdir()}
    assert len(kept) >= 2
    found = compress_to(trained, target, texts(), **options)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()) and len(found.measured) == 4
    fresh = compress_to(trained, target, texts(), **{**options, "output_dir": tmp_path / "other"})
    assert outcome(fresh) == outcome(found)  # the same twice, interrupted or not
    other = compress_to(trained, {"max_metric_drop": 0.5}, texts(), **options)  # another target, the same measurements
    assert other.met and other.best.report.size_bytes == min(one.report.size_bytes for one in other.measured)
    with pytest.raises(ArtifactError, match="holds a search with another model, data or settings"):
        compress_to(trained, target, texts(), **{**options, "seed": 1})


def saved_mb(model: nn.Module, folder: Path) -> float:
    from pykd import save_pretrained

    return saved_bytes(save_pretrained(model, folder)) / 1e6


def outcome(found: Compressed) -> list[tuple[str, float, int]]:
    return [(one.report.name, one.report.accuracy, one.report.size_bytes) for one in found.measured]


def test_a_target_out_of_reach_is_said(trained: nn.Module) -> None:
    found = compress_to(trained, {"ratio": 100}, texts(), **SMALL)
    assert not found.met and len(found.measured) == 1
    assert found.best.candidate == Candidate(1, ("neurons", 0.5), "w4a16")  # the smallest there is
    reached = found.base.size_bytes / found.best.report.size_bytes
    assert found.sentence == (
        "none of 1 measured candidates meets the target: 1 layers, neurons 50 %, w4a16 comes closest, misses ratio 100 "
        f"(reached: {reached:.4g})"
    )
    quick = compress_to(trained, {"latency_ms": 1e-4, "max_metric_drop": 1.0}, texts(), **{**SMALL, "epochs": 0})
    assert (
        not quick.met and "misses latency_ms 0.0001" in quick.sentence and "meets max_metric_drop 1" in quick.sentence
    )


def test_a_budget_ends_it(trained: nn.Module) -> None:
    options = {**SMALL, "depths": [None], "schemes": [None, "w8a8", "nf4"], "prunings": [None], "max_seconds": 0.0}
    found = compress_to(trained, {"max_metric_drop": 0.2}, texts(), **options)
    assert len(found.measured) == 1 and list(found.skipped.values()) == ["max_seconds=0 had passed"]
    options |= {"max_candidates": 1, "max_seconds": None}
    found = compress_to(trained, {"max_metric_drop": 0.2}, texts(), **options)
    assert len(found.measured) == 1 and list(found.skipped.values()) == ["max_candidates=1 were evaluated"]


def test_the_space_fits_the_model(trained: nn.Module) -> None:
    assert default_depths(trained) == [None, 2, 1] and default_prunings(trained)[1] == ("neurons", 0.3)
    convolutional = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    assert default_prunings(convolutional)[1] == ("channels", 0.3) and default_depths(convolutional) == [None]
    assert default_prunings(nn.Linear(2, 2))[1] == ("magnitude", 0.5)
    assert len(space(trained, None, None, [None, "nf4"])) == 17
    with pytest.raises(ValueError, match="leave no candidate but the model as it is: give one more"):
        space(trained, [None], [None], [None])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "a target is one or more of size_mb, ratio, latency_ms, max_metric_drop, got none"),
        ({"size": 3}, "unknown target 'size': did you mean 'size_mb'"),
        ({"ratio": -2}, "target ratio is a number from 0 on, got -2"),
        ({"size_mb": "2"}, "target size_mb is a number from 0 on, got '2'"),
        ({"latency_ms": 0}, "target latency_ms must be above 0, got 0"),
    ],
)
def test_what_is_no_target(trained: nn.Module, target: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_to(trained, target, texts())


def test_other_refusals(trained: nn.Module) -> None:
    for name, value in (("max_candidates", 0), ("epochs", -1)):
        with pytest.raises(ValueError, match=name):
            compress_to(trained, {"ratio": 2}, texts(), **{name: value})
    with pytest.raises(ValueError, match=r"no candidate can be made of this model: cannot be made: .*channels"):
        compress_to(trained, {"ratio": 2}, texts(), depths=[None], prunings=[("channels", 0.5)], schemes=[None])


def test_a_recipe_stage(trained: nn.Module, tmp_path: Path) -> None:
    content: dict[str, Any] = {"name": "found", "data": {"kind": "digits"}, "evaluate": {"latency_rounds": 3}}
    content["teacher"] = {"source": "huggingface", "name": "somewhere"}
    options = {"ratio": 4, "depths": [None], "prunings": [["magnitude", 0.5]], "schemes": ["w4a16"], "batch_size": 20}
    content["stages"] = [{"compress_to": {**options, "epochs": 1, "lr": 1e-3, "method": {"logits": 1, "hidden": 0.1}}}]
    recipe = load_recipe(content)
    data = texts()
    context = Context(
        recipe, data, trained, tmp_path / "checkpoints", False, "1-compress_to", tmp_path / "events.jsonl"
    )
    model = apply_stage(recipe.stages[0], trained, context)
    entry = model.pykd_report[-1]  # type: ignore[index]
    assert entry["stage"] == "compress_to" and "meets ratio 4" in entry["outcome"]
    assert entry["parameters"]["distill"]["method"] == {"logits": 1, "hidden": 0.1}
    report = evaluate(model, data, latency_rounds=3, name="compress_to")
    write_report(tmp_path, compare([report]), data, title="a run", stages={"compress_to": StageRecord(details=entry)})
    page = (tmp_path / "report.html").read_text()
    assert "compress_to: what was searched" in page and entry["outcome"] in page


def test_excess_is_a_share_of_the_limit() -> None:
    base, point = Point(0.9, 4_000_000, 10.0), Point(0.8, 2_000_000, 6.0)
    target = Target(size_mb=1.0, ratio=2.0, latency_ms=8.0, max_metric_drop=0.02)
    assert target.excess(point, base) == pytest.approx(
        {"size_mb": 1.0, "ratio": 0.0, "latency_ms": -0.25, "max_metric_drop": 0.08}
    )
    assert set(target.excess(Point(None, 1, 1.0), base)) == {"size_mb", "ratio", "latency_ms"}
