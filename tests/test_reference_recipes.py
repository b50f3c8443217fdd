"""The recipes of the four reference models: official architectures, made tiny where they are large, really pruned."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pykd import from_pretrained
from pykd.pipeline import run
from pykd.recipe import load_recipe

from .shipped import FAST, RECIPES, TESTS, debian_rows

pytestmark = pytest.mark.usefixtures("quick")


def tokenizer_for(source: Path, columns: tuple[str, ...], folder: Path) -> Path:
    with source.open(encoding="utf-8", newline="") as file:
        texts = [row[column] for row in csv.DictReader(file) for column in columns]
    debian_rows.train_tokenizer(texts, 300).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "distilbert", "t5_small"])
def test_each_distils_prunes_structure_and_recovers_also_in_short(name: str) -> None:
    recipe, short = (load_recipe(RECIPES / f"reference_{name}.yaml", short=short) for short in (False, True))
    kinds = [stage.kind for stage in recipe.stages]
    assert kinds[0] == "distill" and kinds[-1] == "recover" and "prune" in kinds and recipe.name == f"reference_{name}"
    assert short.teacher.train is not None and short.teacher.train.max_steps is not None


def test_mobilenet_loses_channels(tmp_path: Path) -> None:
    overrides = ["data.test_size=20", "teacher.train.max_steps=2", "stages[0].distill.max_steps=2",
                 "stages[2].recover.max_steps=2", "teacher.train.batch_size=8", *FAST]  # fmt: skip
    done = run(
        RECIPES / "reference_mobilenet_v2.yaml", output_dir=tmp_path / "out", overrides=overrides, progress=False
    )
    sizes = [report.parameters for report in done.reports]
    assert done.reload.identical and sizes[0] > 2 * sizes[1] > 2 * sizes[2] == 2 * sizes[3]


def test_distilbert_loses_layers_heads_and_neurons(tmp_path: Path) -> None:
    source = TESTS / "data_files" / "debian_sections.csv"
    tokenizer = tokenizer_for(source, ("text",), tmp_path / "tokenizer")
    overrides = [
        f"data.path={source}", f"data.tokenizer={tokenizer}", "data.test_size=40", "teacher.config.dim=64",
        "teacher.config.hidden_dim=128", "teacher.config.n_heads=4", "teacher.train.max_steps=2",
        "stages[0].distill.max_steps=2", "stages[3].recover.max_steps=1", *FAST,
    ]  # fmt: skip
    done = run(RECIPES / "reference_distilbert.yaml", output_dir=tmp_path / "out", overrides=overrides, progress=False)
    assert done.reload.identical and [report.name for report in done.reports][1:4] == ["distill", "2-prune", "3-prune"]
    model = from_pretrained(done.directory / "model")
    layer = model.distilbert.transformer.layer
    assert len(layer) == 3 and layer[0].attention.q_lin.out_features == 48 and layer[0].ffn.lin1.out_features == 96


def test_t5_loses_layers_heads_and_neurons(tmp_path: Path) -> None:
    source = TESTS / "data_files" / "debian_pairs.csv"
    tokenizer = tokenizer_for(source, ("source", "target"), tmp_path / "tokenizer")
    overrides = [
        f"data.path={source}", f"data.tokenizer={tokenizer}", "data.max_target_length=8", "teacher.config.d_model=64",
        "teacher.config.d_kv=16", "teacher.config.d_ff=128", "teacher.config.num_heads=4", "teacher.train.max_steps=2",
        "stages[0].distill.max_steps=2", "stages[3].recover.max_steps=1", *FAST,
    ]  # fmt: skip
    done = run(RECIPES / "reference_t5_small.yaml", output_dir=tmp_path / "out", overrides=overrides, progress=False)
    assert done.reload.identical
    model = from_pretrained(done.directory / "model")
    assert len(model.encoder.block) == len(model.decoder.block) == 3
    assert model.decoder.block[0].layer[0].SelfAttention.n_heads == 3
    assert model.encoder.block[0].layer[-1].DenseReluDense.wo.in_features == 96
