"""The router learns: its losses reach every way of training, and without the load loss the split collapses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pykd import cache_teacher, distill, finetune, from_pretrained, prune, save_pretrained
from pykd.data.bundle import batches
from pykd.evaluation.latency import evaluating
from pykd.models.adapter import call
from pykd.models.layers import match_layers
from pykd.models.router import calibrate
from pykd.models.views import observe
from pykd.training.held_out import held_out

from .. import routers


def train(**options: Any) -> nn.Module:
    model = routers.router(**options)
    return distill(model, routers.teacher(), routers.data(), epochs=3, batch_size=64, lr=2e-3, progress=False)


def share_deep(model: nn.Module) -> float:
    """Share of the held-out rows that go deep."""
    data = routers.data()
    with evaluating(model):
        deep = torch.cat([call(model, batch).deep for batch in batches(data.test, data.collate, 100)])
    return float(deep.float().mean())


def test_the_load_loss_holds_the_split_and_without_it_the_split_collapses() -> None:
    held, free = train(), train(load_weight=0.0)
    assert share_deep(held) == pytest.approx(0.3, abs=0.15)
    assert share_deep(free) < 0.05 or share_deep(free) > 0.95
    calibrate(held, batches(routers.data().test, routers.data().collate, 100))
    assert share_deep(held) == pytest.approx(0.3, abs=0.005)
    assert held_out(held, routers.data())["accuracy"] > 0.8


def test_every_way_of_training_adds_and_notes_the_models_own_losses(tmp_path: Any) -> None:
    data, teacher = routers.data(), routers.teacher()
    options = {"max_steps": 2, "batch_size": 16, "progress": False}
    cached = cache_teacher(teacher, data, tmp_path, k=2, progress=False)
    trained = [
        finetune(routers.router(), data, **options),
        distill(routers.router(), teacher, data, **options),
        distill(routers.router(), cached, data, temperature=1.0, **options),
        distill(routers.router(), teacher, data, method={"logits": 1.0, "relation": 0.1}, **options),
    ]
    for model in trained:
        curve = model.pykd_report[-1]["curve"]
        assert all(step["load"] >= 0 and step["balance"] > 0 for step in curve)
        assert len(curve) == 2
    plain = distill(routers.router(load_weight=0.0, balance_weight=0.0), teacher, data, **options)
    first, other = trained[1].pykd_report[-1]["curve"][0], plain.pykd_report[-1]["curve"][0]
    assert first["loss"] == pytest.approx(other["loss"] + first["load"] + first["balance"], rel=1e-5)


def test_hidden_states_follow_the_teachers_layers_that_the_router_has(tmp_path: Path) -> None:
    teacher, batch = routers.teacher(), routers.batch()
    options = {"max_steps": 2, "batch_size": 16, "progress": False}
    for deep, followed in ((2, [0, 1, 2, 3]), (1, [0, 1, 3])):
        model = routers.router(deep_layers=deep).eval()
        assert match_layers(model, teacher) == [followed] and match_layers(model, model) == [list(range(2 + deep))]
        if deep == 2:  # all of the teacher's layers with their weights
            mine, its = (observe(each, batch, ["hidden"]).hidden[0] for each in (model, teacher))
            for one, other in zip(mine, its, strict=True):
                seen = batch["attention_mask"].bool()
                torch.testing.assert_close(one[seen], other[seen], rtol=1e-4, atol=1e-4)
        distill(model, teacher, routers.data(), method={"logits": 1.0, "hidden": 0.5}, **options)
        assert all(step["hidden"] > 0 for step in model.pykd_report[-1]["curve"])
        save_pretrained(model, tmp_path / str(deep))
        assert match_layers(from_pretrained(tmp_path / str(deep)), teacher) == [followed]
    small = prune(routers.router(), method="layers", sparsity=0.5, include=["body.deep.*"])
    assert match_layers(small, teacher) == [[0, 1, 2]]
    with pytest.raises(ValueError, match="RouterForSequenceClassification shows no attentions: distil it by other los"):
        distill(routers.router(), teacher, routers.data(), method="attention", **options)
