"""The reference models from folders and caches, and why they are not there."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from pykd.errors import ArtifactError, ModelLoadError
from pykd.io.files import sha256
from pykd.pipeline import verify
from pykd.pipeline.references import REFERENCES, find_reference, load_reference
from pykd.pipeline.verified import check_reference

from .conftest import REVISION


@pytest.mark.parametrize(
    ("title", "spellings"),
    [("DistilBERT", ["distilbert", "DISTILBERT", "Distil-BERT", "distilbert-base-uncased",
                     "distilbert/distilbert-base-uncased"]),
     ("T5-small", ["t5-small", "T5 small", "t5small", "google-t5/t5-small", "t5"]),
     ("MobileNetV2", ["mobilenetv2", "MobileNet-V2", "mobilenet_v2", "mobilenet"]),
     ("ResNet-18", ["resnet18", "ResNet 18", "RESNET-18", "resnet"])],
)  # fmt: skip
def test_spellings(title: str, spellings: list[str]) -> None:
    for name in spellings:
        found = find_reference(name)
        assert found is not None and found.title == title


def test_other_names_are_unknown() -> None:
    assert [find_reference(name) for name in ("", "bert", "resnet50", "t5-base", "../t5")] == [None] * 5
    with pytest.raises(ArtifactError, match="unknown model 'resnet-19': did you mean 'resnet-18'"):
        check_reference("resnet-19")


def test_each_says_where_it_came_from(library: Path) -> None:
    found = {each.title: load_reference(each, library=library) for each in REFERENCES}
    assert found["DistilBERT"].source == str(library / "distilbert-base-uncased")
    assert found["T5-small"].source == "google-t5/t5-small" and found["T5-small"].revision == REVISION
    assert found["MobileNetV2"].revision == "none of torchvision's published weights"
    assert found["ResNet-18"].weights == (library / "checkpoints" / "resnet18-f37072fd.pth",)
    facts = check_reference("resnet18", library=library)
    assert facts["sha256"] == sha256(found["ResNet-18"].weights[0]) and facts["parameters"] == 11_689_512
    assert facts["forward"] == "logits (1, 1000), finite" and facts["class"] == "ResNet"


def test_printed(library: Path) -> None:
    facts = verify("T5 small", library=library)
    assert facts["source"] == "transformers google-t5/t5-small" and facts["forward"] == "logits (1, 8, 99), finite"
    assert "," in facts["parameters"] and "nonzero parameters" in facts


def test_without_a_network_the_reason_names_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"T5-small could not be had from .*\(google-t5/t5-small: .*; t5-small: "):
        load_reference(REFERENCES[1], library=tmp_path)
    with pytest.raises(ModelLoadError, match=r"weights of torchvision's 'resnet18' cannot be read from .*f37072fd.pth"):
        load_reference(REFERENCES[3], offline=True)
    with pytest.raises(ModelLoadError, match=r"MobileNetV2 was looked for in .*none, which is not a folder"):
        load_reference(REFERENCES[2], library=tmp_path / "none")


class Bomb:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_is_unpickled(library: Path, tmp_path: Path) -> None:
    shutil.copytree(library / "distilbert-base-uncased", tmp_path / "distilbert")
    weights = tmp_path / "distilbert" / "model.safetensors"
    for name in ("distilbert/pytorch_model.bin", "resnet18.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    assert load_reference(REFERENCES[0], library=tmp_path).weights == (weights,)
    weights.unlink()
    with pytest.raises(ModelLoadError, match=r"holds no model.safetensors: weights are read from safetensors only"):
        load_reference(REFERENCES[0], library=tmp_path)
    with pytest.raises(ModelLoadError, match=r"cannot be read from .*resnet18.pth"):
        load_reference(REFERENCES[3], library=tmp_path)


def test_a_name_that_is_neither_a_folder_nor_known() -> None:
    with pytest.raises(
        ArtifactError, match=r"distilbart is not a folder, and of reference models: .*mean 'distilbert'"
    ):
        verify("distilbart")
