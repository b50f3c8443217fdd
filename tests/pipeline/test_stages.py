"""Stages of pruning by themselves: what a recipe says reaches the verbs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from pykd.data import load_digits
from pykd.models.huggingface import load_huggingface
from pykd.pipeline.stages import Context, apply_stage
from pykd.recipe import load_recipe

VIT = {
    "model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip


def after(stages: list[dict[str, Any]], folder: Path) -> nn.Module:
    """A tiny model after these stages."""
    recipe = load_recipe(
        {
            "name": "stages",
            "seed": 3,
            "data": {"kind": "digits", "image_size": 8, "test_size": 50},
            "teacher": {"source": "huggingface", "config": VIT, "train": {}},
            "stages": stages,
        }
    )
    data = load_digits(image_size=8, test_size=50)
    model = load_huggingface(None, "image-classification", num_labels=10, config=VIT)
    teacher = copy.deepcopy(model)
    for number, stage in enumerate(recipe.stages):
        name = f"{number}-{stage.kind}"
        model = apply_stage(stage, model, Context(recipe, data, teacher, folder / name, False, name))
    return model


def test_pruning_by_examples_from_a_recipe(tmp_path: Path) -> None:
    stages = [
        {"prune": {"method": "neurons", "importance": "taylor", "sparsity": 0.25, "samples": 8}},
        {"prune": {"method": "sparsegpt", "pattern": "2:4", "samples": 8, "batch_size": 4}},
    ]
    neurons, weights = after(stages, tmp_path).pykd_report
    assert neurons["parameters"]["importance"] == "taylor" and neurons["changed"] == {"vit.layers.0.mlp": [64, 48]}
    assert weights["parameters"]["pattern"] == "2:4" and len(weights["changed"]) == 6
    assert all(facts["sparsity"] == 0.5 for facts in weights["changed"].values())


def test_gradual_pruning_in_a_stage(tmp_path: Path) -> None:
    training = {"max_steps": 4, "batch_size": 8, "checkpoint_steps": 2}
    gradual = {"method": "movement", "sparsity": 0.75, "every": 1, "exclude": ["*fc1"]}
    pruned, distilled = after([{"recover": {**training, "gradual": gradual}}], tmp_path).pykd_report
    assert pruned["method"] == "gradual movement" and pruned["parameters"]["seed"] == 3
    assert len(pruned["changed"]) == 5 and not any("fc1" in name for name in pruned["changed"])
    assert distilled["stage"] == "distill" and (tmp_path / "0-recover").exists()
