"""What a stage leaves of itself for the reports: the verb's own record, and the training that was a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pykd.pipeline.monitor import Monitor
from pykd.training.history import History

#: What a training says of its course.
COURSE = ("curve", "validations", "kept_step", "outcome", "steps", "first_loss", "last_loss")


def details_of(records: Sequence[Mapping[str, Any]], known: int = 0) -> dict[str, Any]:
    """The last record of a stage, with the notes of all; where it is of no training, with the course of the last one.

    records: of the model, the newest last; known: how many of them the stage began with. Quantization-aware training
    ends with the packing, a chain with the comparison of its arms: what was trained before is a part of both.

    >>> trained = {"stage": "distill", "method": "logits", "parameters": {"lr": 0.1}, "curve": [{"loss": 1.0}]}
    >>> details_of([{"stage": "derive"}, trained, {"stage": "quantize", "method": "qat"}], 1)["curve"]
    [{'loss': 1.0}]
    """
    own = list(records[max(0, known) :])
    if not own:
        return {}
    found, trained = dict(own[-1]), next((each for each in reversed(own) if "curve" in each), None)
    if notes := [note for each in own for note in each.get("notes") or ()]:
        found["notes"] = notes
    if trained is None or trained is own[-1]:
        return found
    course = {name: trained[name] for name in COURSE if name in trained}
    how = {name: trained[name] for name in ("stage", "method", "parameters") if name in trained}
    return {**course, **found, "training": how}


def curves_of(log: Path, names: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """The thinned curves of these trainings in a log of events; of those that are in it."""
    if not log.is_file():
        return {}
    monitor = Monitor(log)
    monitor.read()
    found = {}
    for name in names:
        if name in monitor.trainings and (records := monitor.trainings[name].records):
            plain = [{key: each[key] for key in each if key not in ("time", "run", "event")} for each in records]
            found[name] = History(total_steps=len(plain), records=plain).curve()
    return found
