"""The router in ONNX: ONNX Runtime sends the same rows deep, and answers them alike, at any batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pykd import export, quantize
from pykd.errors import ArtifactError
from pykd.io.export.onnx import compare
from pykd.io.export.onnx_model import OnnxModel
from pykd.models.adapter import call, logits
from pykd.models.router import calibrate

from ... import routers


@pytest.mark.parametrize("rounded", [{}, {"scheme": "w8a8"}, {"scheme": "w4a8", "group_size": 16}])
def test_onnx_runtime_routes_and_answers_alike(tmp_path: Path, rounded: dict[str, Any]) -> None:
    model: Any = routers.router().eval()
    if rounded:
        quantize(model, **rounded)
    calibrate(model, [routers.batch(64)], deep_share=0.4)
    record = export(model, tmp_path / "onnx", data=routers.data(), latency_rounds=0)
    assert record["check"]["labels"] == 64 and record["check"]["different_labels"] == 0
    found, batch = OnnxModel(tmp_path / "onnx" / "model.onnx"), routers.batch(40)
    with torch.no_grad():
        want, got, deep = logits(model, batch), logits(found, batch), call(model, batch).deep
        for rows in (slice(0, 1), deep, ~deep, deep & ~deep):  # one row, all deep, all fast, none at all
            part = {name: value[rows] for name, value in batch.items()}
            assert torch.equal(logits(found, part).argmax(-1), want[rows].argmax(-1))
    assert deep.any() and not deep.all() and torch.equal(got.argmax(-1), want.argmax(-1))
    outputs = found.outputs(batch)
    assert torch.equal(outputs["scores"] > model.config.threshold, deep)
    chosen = (int(deep.sum()) * batch["input_ids"].shape[1], model.config.experts_per_token)
    assert outputs["expert_choices"].shape == (len(model.body.deep), *chosen)


def graph(model: Any) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """What a router answers, by the names that its file has for it."""

    def answer(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = call(model, batch)
        none = torch.zeros(len(model.body.deep), 0, model.config.experts_per_token, dtype=torch.long)
        experts = none if out.expert_choices is None else out.expert_choices
        return {"logits": out.logits, "scores": out.scores, "expert_choices": experts}

    return answer


BATCH = {name: value for name, value in routers.batch(64).items() if name != "labels"}
#: Rows without padding, which a graph that is exported would count among its tokens.
FULL = {name: value[BATCH["attention_mask"].bool().all(1)] for name, value in BATCH.items()}


def nearly_equal_experts(model: Any, sign: float) -> Any:
    """Two experts between which 1e-6 decides, for most tokens of every deep layer."""
    noise = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for layer in model.body.deep:
        gate = layer.feed_forward.gate.weight.data
        gate[1] = gate[0] + sign * 1e-6 * noise
    return model


def at_the_threshold(model: Any) -> Any:
    """One row of FULL with a score just above the threshold."""
    with torch.no_grad():
        model.config.threshold = float(call(model, FULL).scores.sort().values[3]) - 1e-7
    return model


def test_a_choice_between_equals_may_differ() -> None:
    model = at_the_threshold(nearly_equal_experts(routers.router(experts_per_token=1).eval(), 1.0))
    other = nearly_equal_experts(copy.deepcopy(model), -1.0)
    with torch.no_grad():
        other.router[-1].bias.sub_(1e-6)
        apart = (logits(model, FULL) - logits(other, FULL)).abs().max() / logits(model, FULL).abs().max()
        fast = {name: value[~call(model, FULL).deep] for name, value in FULL.items()}
    check = compare(model, graph(other), [FULL, fast], bound=1e-3)
    assert apart > 0.01 > 0.001 > check["largest_difference"]
    assert check["tokens_between_experts"] > 10 and check["rows_at_threshold"] == 1


def swapped_experts(model: Any) -> None:
    gate = model.body.deep[0].feed_forward.gate.weight.data
    gate[:2] = gate[:2].flip(0)


def other_experts(model: Any) -> None:
    for expert in model.body.deep[1].feed_forward.experts:
        expert.fc2.weight.data.mul_(1.5)


def another_threshold(model: Any) -> None:
    model.router[-1].bias.data.add_(0.1)


@pytest.mark.parametrize(
    ("broken", "what"), [(swapped_experts, "choices"), (another_threshold, "choices"), (other_experts, "logits")]
)
def test_what_no_rounding_explains_is_refused(broken: Callable[[Any], None], what: str) -> None:
    model: Any = routers.router(experts_per_token=1).eval()
    calibrate(model, [FULL], deep_share=0.6)
    other = copy.deepcopy(model)
    broken(other)
    with pytest.raises(ArtifactError, match=f"{what} .*differ by"):
        compare(model, graph(other), [FULL], bound=1e-3)
    assert compare(model, graph(copy.deepcopy(model)), [FULL], bound=1e-3)["largest_difference"] == 0
    assert not model.router[-1]._forward_hooks  # the model is as it was
