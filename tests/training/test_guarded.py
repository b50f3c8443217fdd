"""A change of structure under the guard: accepted, done to fewer layers, or undone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from pykd.training import Guard
from pykd.training.guarded import guarded_change
from pykd.training.record import add_record

LAYERS = ["0", "1", "2", "3", "4", "5", "6"]


class Stack(nn.Sequential):
    """Seven layers whose weights say how much quality a change of each costs."""

    def __init__(self, *costs: float) -> None:
        super().__init__(*(nn.Linear(1, 1, bias=False) for _ in costs))
        with torch.no_grad():
            for layer, cost in zip(self, costs, strict=True):
                layer.weight.fill_(cost)  # type: ignore[operator]


def spoil(model: nn.Module, exclude: Sequence[str]) -> nn.Module:
    changed = [name for name in LAYERS if name not in exclude]
    for name in changed:
        model.get_submodule(name).weight.data.neg_()  # type: ignore[operator, union-attr]
    add_record(model, stage="prune", method="spoil", parameters={}, changed={name: {} for name in changed}, skipped={})
    return model


def validate(model: nn.Module) -> dict[str, Any]:
    """1 less the costs of the layers that were changed."""
    lost = sum(max(0.0, -p.item()) for p in model.parameters())
    return {"accuracy": 1 - lost, "loss": 1 + lost}


def changed(model: nn.Module) -> list[str]:
    return [name for name in LAYERS if model.get_submodule(name).weight < 0]  # type: ignore[operator]


def test_a_harmless_change_is_kept() -> None:
    model = Stack(*[0.001] * 7)
    found = guarded_change(model, spoil, validate, Guard())
    assert changed(found) == LAYERS and changed(model) == []
    entry = found.pykd_report[-1]
    assert entry["guard"]["outcome"] == "kept" and len(entry["guard"]["decisions"]) == 1
    assert entry["outcome"] == "kept: all layers: 0.993, before 1, -0.70 %: accepted"
    json.dumps(entry, allow_nan=False)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("bad", [[2], [0, 6], [1, 2, 5]])
def test_the_layers_that_did_it_are_left_as_they_are(bad: list[int], metric: str) -> None:
    model = Stack(*[0.3 if layer in bad else 0.002 for layer in range(7)])
    found = guarded_change(model, spoil, validate, Guard(metric=metric))
    assert changed(found) == [name for name in LAYERS if int(name) not in bad]
    entry = found.pykd_report[-1]
    assert entry["guard"]["outcome"] == f"kept, but for {', '.join(map(str, bad))}"
    assert entry["outcome"].startswith(f"kept, but for {', '.join(map(str, bad))}: all layers: ")
    assert not entry["guard"]["decisions"][0]["accepted"]


def test_what_is_harmless_alone_may_be_too_much_together() -> None:
    found = guarded_change(Stack(*[0.02] * 7), spoil, validate, Guard(drop=0.05))
    assert len(changed(found)) == 2 and validate(found)["accuracy"] == pytest.approx(0.96)


@pytest.mark.parametrize("bisect", [True, False])
def test_a_change_that_always_does_harm_is_undone(bisect: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Stack(*[0.2] * 7)
    found = guarded_change(model, spoil, validate, Guard(), bisect=bisect, label="2-prune")
    assert found is model and changed(model) == []
    entry = model.pykd_report[-1]
    assert entry["method"] == "undone by the guard" and entry["outcome"].startswith("undone: all layers: -0.4")
    assert len(entry["guard"]["decisions"]) == (1 if not bisect else 13)
    assert "2-prune: undone" in caplog.text


def test_a_metric_that_is_not_measured_is_said() -> None:
    with pytest.raises(ValueError, match=r"the guard's metric 'f1' is not among those of validate: \w+"):
        guarded_change(Stack(*[0.001] * 7), spoil, validate, Guard(metric="f1"))


def test_the_teachers_share_counts_too() -> None:
    guard = Guard(drop=1.0, teacher=1.0, retention=0.95)
    found = guarded_change(Stack(0.1, *[0.001] * 6), spoil, validate, guard)
    assert changed(found) == LAYERS[1:]
    assert "of the teacher's: refused" in found.pykd_report[-1]["guard"]["decisions"][0]["sentence"]


@pytest.mark.parametrize("said", ["units", "tied_to"])
def test_what_changes_together_is_left_together(said: str) -> None:
    """An exclusion of one of a unit leaves the others alone too, so one of them alone proves nothing."""
    tied = {"1": "1", "4": "1", "5": "1"}

    def together(model: nn.Module, exclude: Sequence[str]) -> nn.Module:
        spoil(model, [*exclude, *(tied if set(exclude) & set(tied) else ())])
        entry = model.__dict__["pykd_report"][-1]
        if said == "units":
            entry["units"] = [[name] for name in LAYERS if name not in tied] + [list(tied)]
        else:
            entry["changed"] = {name: {"tied_to": tied[name]} if name in tied else {} for name in LAYERS}
        return model

    found = guarded_change(Stack(0.001, 0.001, 0.001, 0.001, 0.3, 0.001, 0.3), together, validate, Guard())
    assert changed(found) == ["0", "2", "3"]
    entry = found.pykd_report[-1]
    assert sorted(entry["guard"]["outcome"].removeprefix("kept, but for ").split(", ")) == ["1", "4", "5", "6"]
    assert not any(each["layers"] in tied for each in entry["guard"]["decisions"])
