"""Files and folders are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pykd.errors import ArtifactError
from pykd.io.files import atomic_directory, atomic_write, sha256


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    atomic_write(target, "old")
    atomic_write(target, b"new")
    assert target.read_text() == "new"
    assert names(target.parent) == ["a.txt"]


def test_atomic_write_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    atomic_write(target, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"a\.txt could not be written: no space left on the disk; what was there"):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_atomic_write_says_why_it_may_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"could not be written: (Not a directory|File exists)"):
        atomic_write(tmp_path / "file" / "a.txt", "new")


def test_atomic_directory_appears_at_once(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert names(tmp_path) == ["model"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_whom_the_umask_permits_can_read_what_a_folder_holds(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "model") as folder:
            save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")  # makes a file for its owner alone
            (folder / "config.json").write_text("{}")
            (folder / "run.sh").write_text("true")
            (folder / "run.sh").chmod(0o700)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    assert modes == {"model.safetensors": mode, "config.json": mode, "run.sh": mode | 0o700}


def test_atomic_directory_leaves_nothing_behind_when_the_body_fails(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_directory(tmp_path / "model") as folder:
            (folder / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_atomic_directory_may_take_an_empty_folder(tmp_path: Path) -> None:
    with atomic_directory(tmp_path) as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path) == ["a"]


def test_atomic_directory_refuses_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"holds files that pykd did not write there \(thesis.tex\)"):
        atomic_directory(tmp_path, overwrite=True).__enter__()
    for extra in "abcd":
        (tmp_path / extra).write_text("")
    with pytest.raises(ArtifactError, match=r"\(a, b, c and 1 more\)"):
        atomic_directory(tmp_path, overwrite=True, owned=lambda folder: {"thesis.tex"}).__enter__()
    with pytest.raises(ArtifactError, match="exists and is not a folder"):
        atomic_directory(tmp_path / "a").__enter__()


def test_atomic_directory_overwrites_its_own_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(ArtifactError, match="already holds a saved model; pass overwrite=True"):
        atomic_directory(target, owned=lambda folder: {"a"}).__enter__()
    with atomic_directory(target, overwrite=True, owned=lambda folder: {"a"}) as folder:
        (folder / "b").write_text("new")
    assert names(target) == ["b"]
    assert names(tmp_path) == ["model"]


def test_atomic_directory_restores_the_old_one_when_the_new_cannot_move_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    rename = os.rename

    def failing(source: Path, destination: Path) -> None:
        if destination == target and (source / "b").exists():
            raise OSError(errno.EACCES, "Permission denied")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with (
        pytest.raises(ArtifactError, match="could not be written: Permission denied"),
        atomic_directory(target, overwrite=True, owned=lambda folder: {"a"}) as folder,
    ):
        (folder / "b").write_text("new")
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_an_error_of_the_body_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "model"):
        1 / 0  # noqa: B018


@pytest.mark.mount
def test_a_full_disk_is_one_sentence_and_no_debris(tiny_disk: Path) -> None:
    target = tiny_disk / "model"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("old")
    with (
        pytest.raises(ArtifactError, match="model could not be written: no space left on the disk") as caught,
        atomic_directory(target, overwrite=True, owned=lambda folder: {"a"}) as folder,
    ):
        save_file({"x": torch.zeros(100_000)}, folder / "a")
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="a could not be written: no space left on the disk"):
        atomic_write(target / "a", b"\0" * 100_000)
    assert (target / "a").read_text() == "old"
    assert names(tiny_disk) == ["model"]
