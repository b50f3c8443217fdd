"""No path leads out of the roots, and no weights are unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pykd.errors import ArtifactError
from pykd.serve.roots import INDEX, OutsideRootsError, below_roots, check_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "model").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "way_out").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "circle").symlink_to(tmp_path / "root" / "circle")
    (tmp_path / "root" / "alias").symlink_to("model")
    return tmp_path / "root"


def test_what_lies_below_is_found_by_every_name(root: Path) -> None:
    for name in ("model", "./model", "alias", "model/../model", str(root / "model")):
        assert below_roots(name, [root.parent / "outside", root]) == root / "model"


@pytest.mark.parametrize(
    "name", ["..", "../outside", "way_out", "model/../../outside", "/etc", "none", "circle", "a\0b", "a" * 5000, "~"]
)
def test_nothing_else_is(root: Path, name: str) -> None:
    with pytest.raises(OutsideRootsError, match="is not below an allowed folder"):
        below_roots(name, [root])
    with pytest.raises(OutsideRootsError):
        below_roots("model", [])


def test_a_folder_next_to_the_root_is_not_below_it(root: Path) -> None:
    (root.parent / "root2").mkdir()
    with pytest.raises(OutsideRootsError):
        below_roots("../root2", [root])


def test_weights_are_safetensors(root: Path) -> None:
    model = root / "model"
    with pytest.raises(ArtifactError, match=r"model holds no config.json, so it is no saved model"):
        check_folder(model)
    (model / "config.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="read from safetensors only, never unpickled"):
        check_folder(model)
    index = model / INDEX
    for names, message in (
        ({"a": "part.bin"}, "names 'part.bin': weights are read from safetensors only"),
        ({"a": "../part.safetensors"}, "names '../part.safetensors'"),
        ({"a": 5}, "cannot be read"),
        ([], "cannot be read"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(ArtifactError, match=message):
            check_folder(model)
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    check_folder(model)
    index.unlink()
    (model / "model.safetensors").write_bytes(b"")
    check_folder(model, [root])


def test_a_folder_that_speaks_of_files_elsewhere_is_refused(root: Path) -> None:
    model = root / "model"
    for name in ("../../outside/secret", "/etc/passwd"):
        (model / "pykd_manifest.json").write_text(json.dumps({"format_version": 1, "files": {name: {}}}))
        with pytest.raises(ArtifactError, match=f"of model names '{name}', which lies outside"):
            check_folder(model)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    with pytest.raises(ArtifactError, match="model holds an adapter, whose model lies elsewhere"):
        check_folder(model)


def test_files_that_lead_out_of_the_roots_are_refused(root: Path) -> None:
    model = root / "model"
    (model / "config.json").write_text("{}")
    os.link(model / "config.json", root.parent / "outside" / "weights")
    (model / "model.safetensors").symlink_to(root.parent / "outside" / "weights")
    check_folder(model)  # the user's own choice on the command line
    with pytest.raises(ArtifactError, match=r"model.safetensors in model leads out of the allowed folders"):
        check_folder(model, [root])
