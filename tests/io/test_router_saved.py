"""Routers, whole, pruned and quantized, saved and loaded to the bit in new processes, in both orders of import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pykd import export, from_pretrained, prune, quantize, save_pretrained
from pykd.errors import ArtifactError
from pykd.models.adapter import logits
from pykd.models.router import calibrate
from pykd.nn import Linear4bit, Linear8bit

from .. import routers

IN_A_NEW_PROCESS = """
import pathlib, sys
root, order = pathlib.Path(sys.argv[1]), sys.argv[2]
if order == "transformers first":
    from transformers import AutoModelForSequenceClassification
import pykd
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from pykd.models.adapter import logits

for folder in sorted(root.iterdir()):
    batch = load_file(folder / "batch.safetensors")
    expected = batch.pop("expected")
    for load in (AutoModelForSequenceClassification.from_pretrained, pykd.from_pretrained):
        model = load(folder / "model")
        with torch.no_grad():
            assert torch.equal(logits(model, batch), expected), folder
    print(folder.name, model.config.threshold)
"""


def made(kind: str) -> Any:
    model = routers.router().eval()
    if kind == "magnitude":
        prune(model, method="magnitude", sparsity=0.5)
    elif kind == "neurons":
        prune(model, method="neurons", sparsity=0.4, example=routers.batch(2))
    elif kind != "whole":
        quantize(model, scheme=kind, group_size=16)
    calibrate(model, [routers.batch(64)])
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routers")
    for kind in ("whole", "magnitude", "neurons", "w8a8", "w4a16"):
        model, batch = made(kind), {k: v for k, v in routers.batch().items() if k != "labels"}
        save_pretrained(model, folder / kind / "model")
        with torch.no_grad():
            save_file(batch | {"expected": logits(model, batch)}, folder / kind / "batch.safetensors")
    return folder


@pytest.mark.parametrize("order", ["pykd first", "transformers first"])
def test_new_processes_load_them_to_the_bit(root: Path, order: str) -> None:
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(root), order]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    thresholds = dict(line.split() for line in done.stdout.splitlines())
    assert set(thresholds) == {"whole", "magnitude", "neurons", "w8a8", "w4a16"}
    assert float(thresholds["w8a8"]) == from_pretrained(root / "w8a8" / "model").config.threshold


def test_experts_are_quantized_and_pruned_and_the_router_is_left_alone(root: Path) -> None:
    for kind, layer in (("w8a8", Linear8bit), ("w4a16", Linear4bit)):
        model: Any = from_pretrained(root / kind / "model")
        expert = model.body.deep[1].feed_forward.experts[2]
        assert isinstance(expert.fc1, layer) and isinstance(expert.fc2, layer)
        assert isinstance(model.body.deep[0].attention.q_proj, layer)
        assert type(model.router[0]) is torch.nn.Linear and type(model.classifiers["fast"]) is torch.nn.Linear
    cut: Any = from_pretrained(root / "neurons" / "model")
    assert {expert.fc1.out_features for expert in cut.body.deep[0].feed_forward.experts} == {29}
    sparse: Any = from_pretrained(root / "magnitude" / "model")
    weight = sparse.body.deep[0].feed_forward.experts[0].fc1.weight
    assert 0.3 < float((weight == 0).float().mean()) < 0.7


def test_what_nothing_but_pykd_loads_says_so(root: Path, tmp_path: Path) -> None:
    card = (root / "whole" / "model" / "README.md").read_text(encoding="utf-8")
    assert "import pykd  # teaches transformers this kind of model\nfrom transformers import pipeline" in card
    for format in ("dense", "compressed-tensors"):
        with pytest.raises(ArtifactError, match="RouterForSequenceClassification is a family of pykd's own, which no"):
            export(made("w8a8"), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_transformers_saves_and_loads_it_by_itself(tmp_path: Path) -> None:
    model = made("whole")
    model.save_pretrained(tmp_path)
    found: Any = type(model).from_pretrained(tmp_path)
    assert found.config.threshold == model.config.threshold and found.config.encoder.hidden_size == 32
    with torch.no_grad():
        assert torch.equal(logits(found, routers.batch()), logits(model, routers.batch()))
