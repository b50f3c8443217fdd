"""One service a folder: two that write the same records would undo each other's."""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Callable
from pathlib import Path

from pykd.errors import ArtifactError


def hold(folder: Path) -> Callable[[], None]:
    """Make the folder, keep other services out of it, and return what lets go; so does the end of the process.

    Raises ArtifactError when another service holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be used ({error.strerror}): choose another --state") from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise ArtifactError(f"{folder} is in use by another service: stop it, or choose another --state") from None
    return functools.partial(os.close, held)
