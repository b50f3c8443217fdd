"""The manifest names what is wrong with a folder: missing, truncated, altered, newer, not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pykd.errors import ArtifactError
from pykd.io.manifest import MANIFEST, owned, read_manifest, verify, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"0123456789")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "vocab.txt").write_text("a\nb\n")
    write_manifest(tmp_path, provenance={"teacher": "resnet18"}, stages=[{"stage": "prune", "sparsity": 0.5}])
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_was_written_is_verified_and_returned(folder: Path) -> None:
    (folder / "README.md").write_text("added later, by the user")
    manifest = verify(folder)
    assert manifest["provenance"] == {"teacher": "resnet18"}
    assert manifest["stages"] == [{"stage": "prune", "sparsity": 0.5}]
    assert set(manifest["files"]) == {"model.safetensors", "sub/vocab.txt"}
    assert manifest["files"]["model.safetensors"]["bytes"] == 10
    assert owned(folder) == {MANIFEST, "model.safetensors", "sub/vocab.txt"}


def test_a_truncated_file_is_named_with_its_sizes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"012345678")
    with pytest.raises(ArtifactError, match=r"model\.safetensors is truncated or altered: expected 10 bytes, found 9;"):
        verify(folder)


def test_an_altered_file_is_named_with_its_digests(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"0123456780")
    with pytest.raises(
        ArtifactError, match=r"model\.safetensors is altered: expected sha256 84d8\w+, found 8f\w+|sha256"
    ):
        verify(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "sub" / "vocab.txt").unlink()
    with pytest.raises(ArtifactError, match=r"vocab\.txt is missing, though pykd_manifest\.json lists it"):
        verify(folder)


def test_a_newer_format_asks_for_a_newer_pykd(folder: Path) -> None:
    rewrite(folder, format_version=2)
    with pytest.raises(ArtifactError, match="has format_version 2, which a newer pykd wrote; this one reads up to 1"):
        verify(folder)


@pytest.mark.parametrize("version", [None, "1", True, 0])
def test_a_format_version_is_a_positive_integer(folder: Path, version: object) -> None:
    rewrite(folder, format_version=version)
    with pytest.raises(ArtifactError, match="no valid format_version"):
        read_manifest(folder)


def test_a_damaged_manifest_is_refused(folder: Path) -> None:
    rewrite(folder, files=None)
    with pytest.raises(ArtifactError, match="does not list the files"):
        read_manifest(folder)
    rewrite(folder, files={}, provenance=[])
    with pytest.raises(ArtifactError, match="does not say where the model comes from"):
        read_manifest(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        read_manifest(folder)
    assert owned(folder) is None


def test_a_folder_that_pykd_did_not_write(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no pykd_manifest\.json, so it was not written by pykd"):
        verify(tmp_path)


@pytest.mark.parametrize("stages", [[{"loss": float("nan")}], [{"weights": {1, 2}}]])
def test_stages_must_be_json(tmp_path: Path, stages: list[dict[str, Any]]) -> None:
    with pytest.raises(ArtifactError, match="must hold JSON values only"):
        write_manifest(tmp_path, provenance={}, stages=stages)
