"""Settings of a run: the schedule, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn

from pykd.training.config import TrainConfig, learning_rate
from pykd.training.optimizer import adamw


def test_warm_up_then_half_a_cosine() -> None:
    rates = [learning_rate(step, 100, peak=2.0, warmup_ratio=0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_a_run_that_only_warms_up_and_one_that_never_does() -> None:
    assert learning_rate(0, 1, peak=1.0, warmup_ratio=1.0) == 1.0
    assert learning_rate(0, 1, peak=1.0, warmup_ratio=0.0) == 1.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs must be a finite number above 0, got 0"),
        ({"lr": math.nan}, "lr must be a finite number above 0, got nan"),
        ({"clip_norm": -1.0}, r"clip_norm must be a finite number above 0, got -1\.0"),
        ({"batch_size": 2.5}, r"batch_size must be a whole number of at least 1, got 2\.5"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1, got 0"),
        ({"checkpoint_steps": True}, "checkpoint_steps must be a whole number of at least 1, got True"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio is the share of steps that warm up, 0\.\.1, got 1\.5"),
        ({"autocast": "bfloat61"}, "unknown autocast 'bfloat61': did you mean 'bfloat16'"),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


def test_only_weights_are_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight  # tied
    model[2].bias.requires_grad_(False)
    groups = adamw(model, lr=1.0, weight_decay=0.5).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.5), (3, 0.0)]
    assert groups[0]["params"][0] is model[0].weight


def test_settings_are_plain_values() -> None:
    assert TrainConfig(lr=1).to_dict()["lr"] == 1
    assert TrainConfig().total_steps(7) == 7
