"""What pykd raises when the input, not pykd, is wrong: one sentence that names the field, the value and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PykdError(Exception):
    """Base of every error that pykd raises on purpose, for callers who want to catch them all."""


class ModelLoadError(PykdError, RuntimeError):
    """A model could not be had: which one, from where, why, and how to supply a local path."""


class ArtifactError(PykdError, RuntimeError):
    """A file or folder is truncated, tampered with, of another format, or cannot be written."""


class DataError(PykdError, ValueError):
    """A data set does not hold what the task needs: a missing column, a label out of range, an empty split."""


class TrainingError(PykdError, RuntimeError):
    """Training cannot go on: the loss or a gradient is not finite."""


class RecipeError(PykdError, ValueError):
    """A recipe names something that does not exist or combines things that do not go together."""


def nearest(kind: str, name: object, known: Iterable[str]) -> str:
    """Sentence for an unknown name: what came, the nearest valid name if one is close, and every valid one.

    >>> nearest("scheme", "w4a61", ["w4a16", "nf4"])
    "unknown scheme 'w4a61': did you mean 'w4a16'? Known: nf4, w4a16."
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {kind} {name!r}: {hint}Known: {', '.join(names)}."
