"""Which options go with which method: what a method would not read is refused instead of ignored."""

from __future__ import annotations

from typing import Any

from pykd.errors import nearest
from pykd.nn.importance import Block, Pattern, pattern_of
from pykd.pruning.weights import SCOPES

#: Option -> the values that it takes, None where a rule of its own holds.
Options = dict[str, tuple[str, ...] | None]
#: Options of the methods that leave sparse layers, and of those that remove whole units.
SPARSE: Options = {"scope": SCOPES, "pattern": None, "rows": None}
UNITS: Options = {"importance": ("l1", "l2", "taylor", "activation")}
#: Method -> the options that it reads.
OPTIONS: dict[str, Options] = {
    "magnitude": SPARSE,
    "random": SPARSE,
    "wanda": {**SPARSE, "scope": ("layer", "row")},
    "sparsegpt": {**SPARSE, "scope": ("layer",)},
    "channels": UNITS,
    "heads": UNITS,
    "neurons": UNITS,
    "layers": {},
}
#: What each option is about, for the sentence that refuses it.
ABOUT = {
    "scope": "says over which single weights the share is met",
    "pattern": "says which single weights go together",
    "rows": "is for layers that are sparse",
    "importance": "scores whole units",
}


#: Methods and scores of units that look at examples.
CALIBRATED = ("wanda", "sparsegpt", "taylor", "activation")


def looks_at_data(method: object, importance: object) -> bool:
    """Whether pruning needs examples.

    >>> looks_at_data("heads", "taylor")
    True
    """
    return method in CALIBRATED or importance in CALIBRATED


def check_prune(method: object, sparsity: float | None, **options: Any) -> tuple[float, Pattern | Block | None]:
    """The share to remove (0.5 unless it or the pattern says otherwise) and the pattern of a method's options.

    Raises ValueError for an unknown method or value, an option that the method does not read, a sparsity out of range
    or one that is not the pattern's.

    >>> check_prune("wanda", None, pattern="1:4")
    (0.75, Pattern(kept=1, group=4))
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(method, str):
        if method == "movement":
            raise ValueError(
                "method 'movement' learns what goes while the model trains: give distill or finetune "
                "prune=Gradual(method='movement'), in a recipe `gradual:` under distill or recover"
            )
        if method not in OPTIONS:
            raise ValueError(nearest("method", method, OPTIONS))
        for name, value in given.items():
            _check_option(method, name, value)
    pattern = pattern_of(given["pattern"]) if "pattern" in given else None
    if sparsity is None:
        return (pattern.sparsity if isinstance(pattern, Pattern) else 0.5), pattern
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share removed, at least 0 and below 1, got {sparsity!r}")
    if isinstance(pattern, Pattern) and sparsity != pattern.sparsity:
        raise ValueError(
            f"pattern {given['pattern']!r} removes {pattern.sparsity:g} of the weights: leave sparsity out"
        )
    return sparsity, pattern


def _check_option(method: str, name: str, value: Any) -> None:
    takes = OPTIONS[method]
    if name not in takes:
        fitting = ", ".join(repr(other) for other, known in OPTIONS.items() if name in known)
        raise ValueError(f"{name} {ABOUT[name]}: it goes with method {fitting}, not {method!r}")
    values = takes[name]
    if values is not None and value not in values:
        raise ValueError(f"{nearest(name, value, values)} (method {method!r})")
