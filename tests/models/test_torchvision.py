"""torchvision imports beside this torch, its models are built by its own registry, and failures say what to do."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pykd.errors import ModelLoadError
from pykd.models import torchvision as ours
from pykd.models.torchvision import build, ensure_torchvision, load_torchvision, missing_schemas

IMPORTS = """
import torch, pykd, torchvision
from torchvision.extension import _has_ops
real = _has_ops()
assert hasattr(torch.ops.torchvision, "nms") == real, "a schema was left behind, or a real operator removed"
assert torchvision.models.resnet18(num_classes=2).fc.out_features == 2
if not real:
    library = torch.library.Library("torchvision", "DEF")  # what torchvision's compiled part does when it loads
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", lambda dets, scores, iou_threshold: scores.argsort(descending=True)[:1], "CPU")
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1]])
assert torch.ops.torchvision.nms(boxes, torch.tensor([0.1, 0.9]), 0.5).tolist() == [1]
"""


def test_torchvision_imports_in_a_new_process_and_real_operators_may_come_later() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_schemas_come_and_go() -> None:
    def present() -> bool:
        return hasattr(torch.ops.torchvision, "qnms")

    before = present()
    with missing_schemas():
        assert present()
        with missing_schemas():  # real ones, as far as the inner one can tell: it must not touch them
            assert present()
        assert present()
    assert present() == before


def test_import_failure_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModelLoadError, match=r"torchvision cannot be imported .*pip install 'pykd\[vision\]'"):
        ensure_torchvision()


def test_a_model_remembers_its_origin() -> None:
    model = load_torchvision("mobilenet_v2", 7, width_mult=0.5)
    kwargs = {"num_classes": 7, "width_mult": 0.5}
    assert model.pykd_origin == {"source": "torchvision", "name": "mobilenet_v2", "kwargs": kwargs}
    with torch.device("meta"):
        again = build(model.pykd_origin)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_random_models_download_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a download was started")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetch)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    assert build({"source": "torchvision", "name": "lraspp_mobilenet_v3_large", "kwargs": {"num_classes": 2}})


def test_unknown_names_and_arguments() -> None:
    with pytest.raises(ModelLoadError, match="unknown model 'resnet81': did you mean 'resnet18'"):
        load_torchvision("resnet81")
    with pytest.raises(
        ModelLoadError, match=r"'resnet18' cannot be built with \{'width': 2\}.*Pass what its builder takes"
    ):
        load_torchvision("resnet18", width=2)
    with pytest.raises(ModelLoadError, match="not JSON serializable"):
        load_torchvision("resnet18", norm_layer=nn.BatchNorm2d)
    with pytest.raises(ModelLoadError, match=r"unknown weights 'DEFALT': did you mean 'DEFAULT'.*given by its path"):
        load_torchvision("resnet18", weights="DEFALT")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_are_loaded_and_another_head_stays_new(suffix: str, tmp_path: Path) -> None:
    source = load_torchvision("squeezenet1_1", 4)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    same = load_torchvision("squeezenet1_1", 4, weights=path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), same.parameters(), strict=True))
    other = load_torchvision("squeezenet1_1", 6, weights=path)
    differing = [k for k, v in other.state_dict().items() if not torch.equal(v[:4], source.state_dict()[k][:4])]
    assert differing == ["classifier.1.weight", "classifier.1.bias"] or differing == ["classifier.1.weight"]
    assert other.state_dict()["classifier.1.weight"].shape[0] == 6


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(load_torchvision("squeezenet1_1", 4).state_dict(), path)
    with pytest.raises(
        ModelLoadError, match=r"does not hold weights of torchvision's 'squeezenet1_0'.*of another shape"
    ):
        load_torchvision("squeezenet1_0", 4, weights=path)
    with pytest.raises(ModelLoadError, match=r"does not hold weights of torchvision's 'resnet18': \d+ tensors missing"):
        load_torchvision("resnet18", 4, weights=path)


def test_unreadable_weights_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"cannot be read from /no/such\.pth .*No such file"):
        load_torchvision("resnet18", weights="/no/such.pth")
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelLoadError, match=r"cannot be read from .*expected a state dict"):
        load_torchvision("resnet18", weights=path)


class Everything:
    """What a pickle with code in it would build."""

    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_pickled_code_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": Everything()}, path)
    with pytest.raises(ModelLoadError, match="cannot be read from"):
        load_torchvision("resnet18", weights=path)
    assert capsys.readouterr().out == ""


def test_a_failing_download_names_the_address_and_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    message = (
        r"'DEFAULT' of torchvision's 'resnet18' could not be had from https://.*resnet18.*\.pth .*no route to host"
    )
    with pytest.raises(ModelLoadError, match=message + r".*download that file elsewhere and pass its path"):
        load_torchvision("resnet18", 10, weights="DEFAULT")


def test_official_weights_go_through_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    state = load_torchvision("resnet18", 1000).state_dict()
    asked = []

    def fetch(self: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        asked.append((self.url, kwargs))
        return dict(state)

    monkeypatch.setattr(ensure_torchvision().models.WeightsEnum, "get_state_dict", fetch)
    model = load_torchvision("resnet18", 10, weights="IMAGENET1K_V1")
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"])
    assert model.pykd_origin["kwargs"] == {"num_classes": 10}
    assert asked == [
        (
            ours.ensure_torchvision().models.ResNet18_Weights.IMAGENET1K_V1.url,
            {"progress": True, "check_hash": True, "weights_only": True},
        )
    ]
