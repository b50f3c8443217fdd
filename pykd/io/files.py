"""Files and folders that are either complete or not there: temporary sibling, fsync, rename; and their checksums."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pykd.errors import ArtifactError


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits (FIPS 180-4).

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file: sha256(file.name)[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file so that `path` holds either its old content or all of `data` (text as UTF-8), at any moment.

    Raises ArtifactError where the disk is full or the folder cannot be written; the old content is then intact.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write(f"{folder}/a.txt", "whole")
    ...     Path(folder, "a.txt").read_text()
    'whole'
    """
    path = Path(path)
    temporary = _sibling(path)
    with writing(path):
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    owned: Callable[[Path], Collection[str] | None] = lambda folder: None,
) -> Iterator[Path]:
    """Give the body a temporary sibling folder to fill; when it ends well, that folder takes the place of `path`.

    An existing `path` must be an empty folder, or, with `overwrite`, hold nothing but the files that `owned(path)`
    names (relative paths; None: it is not ours). If the body raises, or the process dies, `path` is what it was. Files
    may be read by whom the umask permits, whatever wrote them.
    Raises ArtifactError for a path that is taken, a full disk, or a folder that cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with atomic_directory(f"{parent}/model") as folder:
    ...         _ = (folder / "a.txt").write_text("whole")
    ...     os.listdir(f"{parent}/model")
    ['a.txt']
    """
    path = Path(path).absolute()
    check_vacant(path, overwrite=overwrite, owned=owned)
    temporary = _sibling(path)
    with writing(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            permitted = temporary.stat().st_mode & 0o666  # what the process's umask leaves
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(stat.S_IMODE(file.stat().st_mode) | permitted)  # safetensors' are for their owner alone
                    _sync(file)
            _sync_folder(temporary)
            check_vacant(path, overwrite=overwrite, owned=owned)
            _take_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_vacant(
    path: Path,
    *,
    overwrite: bool = False,
    owned: Callable[[Path], Collection[str] | None] = lambda folder: None,
) -> None:
    """Raise ArtifactError if `path` holds something that a new folder in its place would destroy."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise ArtifactError(f"{path} exists and is not a folder; choose another path or move it away.")
    present = sorted(str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir())
    if not present:
        return
    ours = owned(path)
    foreign = present if ours is None else [file for file in present if file not in ours]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ArtifactError(
            f"{path} holds files that pykd did not write there ({', '.join(foreign[:3])}{more}); "
            "choose another folder, or move them away."
        )
    if not overwrite:
        raise ArtifactError(f"{path} already holds a saved model; pass overwrite=True, or choose another folder.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses while `path` is written into one sentence."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else _code_inside(error)
        if code is None:
            raise
        reason = "no space left on the disk" if code in (errno.ENOSPC, errno.EDQUOT) else os.strerror(code)
        raise ArtifactError(
            f"{path} could not be written: {reason}; what was there before is unchanged. "
            "Make room or permit writing there, or choose another path."
        ) from error


def _code_inside(error: Exception) -> int | None:
    """The errno that safetensors' writer mentions in its own exception, which is not an OSError."""
    if type(error).__name__ != "SafetensorError":
        return None
    _, found, rest = str(error).partition("(os error ")
    return int(rest.partition(")")[0]) if found else None


def _sibling(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"


def _take_place(new: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        os.rename(new, path)  # an empty folder is replaced in the same step
    else:
        old = _sibling(path)
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old)
    _sync_folder(path.parent)


def _sync(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
