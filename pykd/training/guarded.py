"""The guard over a change of structure: what costs too much is undone, or done to fewer layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from pykd.training.guard import Guard, Verdict, judge
from pykd.training.record import add_record
from pykd.training.watch import Validate

logger = logging.getLogger(__name__)

#: change(model, exclude) changes a model in place, but for the layers of these names, and records it in pykd_report.
Change = Callable[[nn.Module, Sequence[str]], nn.Module]
#: Names of layers that change together or not at all.
Unit = tuple[str, ...]


def guarded_change(
    model: nn.Module, change: Change, validate: Validate, guard: Guard, *, bisect: bool = True, label: str = "change"
) -> nn.Module:
    """A changed copy of ``model`` that keeps its quality, or ``model`` itself where no such change was found.

    The change is accepted when the guard's metric loses at most ``guard.drop`` against the model before, and keeps
    ``guard.retention`` of ``guard.teacher`` if the model before did. Else, with ``bisect``, the layers that did it are
    looked for: halves of the changed layers are tried on top of those found harmless, down to single layers, or those
    that can only change together, and the others are left as they are. What was decided, with its numbers, is the entry
    ``guard`` of the last record in ``pykd_report``. Raises ValueError for a metric that ``validate`` does not return.

    >>> from pykd.pruning import prune  # doctest: +SKIP
    >>> cut = lambda model, exclude: prune(model, sparsity=0.9, exclude=list(exclude) or None)
    >>> guarded_change(model, cut, validate, Guard(drop=0.02))  # doctest: +SKIP
    """
    metrics = dict(validate(model))
    name = guard.metric or next(iter(metrics))
    if name not in metrics:
        raise ValueError(f"the guard's metric {name!r} is not among those of validate: {', '.join(metrics)}")
    before, decisions = float(metrics[name]), []

    def attempt(excluded: Sequence[str], what: str) -> nn.Module | None:
        changed = change(copy.deepcopy(model), excluded)
        value = float(dict(validate(changed))[name])
        verdict = judge(replace(guard, rollbacks=0), name, value, before)
        accepted = verdict.action in ("best", "keep")
        decisions.append(_decision(verdict, what, value, before, accepted))
        logger.log(logging.INFO if accepted else logging.WARNING, "%s: %s", label, decisions[-1]["sentence"])
        return changed if accepted else None

    found = attempt((), "all layers")
    if found is None:
        found, left = _search(model, change, attempt) if bisect else (None, [])
        if found is None:
            found, outcome = model, "undone"
            add_record(model, stage=label, method="undone by the guard", parameters=asdict(guard))
        else:
            outcome = f"kept, but for {', '.join(left)}"
    else:
        outcome = "kept"
    logger.log(logging.INFO if outcome == "kept" else logging.WARNING, "%s: %s", label, outcome)
    report: list[dict[str, Any]] = found.__dict__["pykd_report"]
    report[-1]["guard"] = {"metric": name, "before": before, "outcome": outcome, "decisions": decisions}
    report[-1]["outcome"] = f"{outcome}: {decisions[-1]['sentence'] if outcome == 'kept' else decisions[0]['sentence']}"
    return found


def _search(
    model: nn.Module, change: Change, attempt: Callable[[Sequence[str], str], nn.Module | None]
) -> tuple[nn.Module | None, list[str]]:
    """The model with as many layers changed as are harmless together, and the layers that were left out."""
    tried = change(copy.deepcopy(model), ())
    units = _units(tried.__dict__["pykd_report"][-1])
    del tried
    best, harmless, left = None, set[Unit](), list[str]()
    open_ = [units[: len(units) // 2], units[len(units) // 2 :]] if len(units) > 1 else []
    while open_:
        group = open_.pop(0)
        chosen = harmless | set(group)
        others = [name for unit in units if unit not in chosen for name in unit]
        found = attempt(others, ", ".join(name for unit in group for name in unit))
        if found is not None:
            best, harmless = found, chosen
        elif len(group) == 1:
            left += group[0]
        else:
            open_ = [group[: len(group) // 2], group[len(group) // 2 :], *open_]
    return best, left


def _units(record: Mapping[str, Any]) -> list[Unit]:
    """The changed layers, those together that one exclusion leaves alone: what shares channels, heads or a weight."""
    if "units" in record:
        return [tuple(unit) for unit in record["units"]]
    units: dict[str, list[str]] = {}
    for name, facts in record["changed"].items():
        owner = facts.get("tied_to", name) if isinstance(facts, Mapping) else name
        units.setdefault(owner, []).append(name)
    return [tuple(unit) for unit in units.values()]


def _decision(verdict: Verdict, what: str, value: float, before: float, accepted: bool) -> dict[str, Any]:
    change = f"{100 * verdict.change:+.2f} %" if verdict.change is not None else "no change known"
    kept = f", {100 * verdict.retention:.1f} % of the teacher's" if verdict.retention is not None else ""
    sentence = f"{what}: {value:.6g}, before {before:.6g}, {change}{kept}: {'accepted' if accepted else 'refused'}"
    return {"layers": what, "value": value, "change": verdict.change, "accepted": accepted, "sentence": sentence}
