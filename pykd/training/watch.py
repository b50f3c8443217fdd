"""Validation during a run, and what the guard makes of it: new best, carry on, roll back, or stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pykd.errors import TrainingError
from pykd.evaluation.direction import HIGHER_IS_BETTER, improvement
from pykd.training.events import EventLog
from pykd.training.guard import Guard, Verdict, judge
from pykd.training.rng import preserved_rng
from pykd.training.run import Run

logger = logging.getLogger(__name__)

#: validate(model) -> metrics by name, the one that counts first, and if it likes ``examples`` (a list of dicts) of the
#: worst errors and ``wrong`` (numbers of the examples that the model has wrong).
Validate = Callable[[nn.Module], Mapping[str, Any]]


class Watch:
    """Validates a run when it is due, keeps its best state, and takes it back there when the guard says so.

    What it has decided is in ``history.validations``, so that a resumed run decides as an uninterrupted one does.
    """

    def __init__(self, run: Run, validate: Validate | None, guard: Guard | None, log: EventLog) -> None:
        if guard is not None and validate is None:
            raise ValueError("guard needs validate: a function of the model that returns the metrics to be guarded")
        self.run, self.validate, self.guard, self.log = run, validate, guard, log

    @property
    def stopped(self) -> bool:
        """Whether the guard has ended the run."""
        entries = self.run.history.validations
        return bool(entries) and entries[-1]["action"] == "stop"

    @property
    def _best(self) -> dict[str, Any] | None:
        found = [entry for entry in self.run.history.validations if entry["action"] == "best"]
        return found[-1] if found else None

    def check(self) -> bool:
        """Validate if it is due; True when steps were taken back, so that the batches must begin again."""
        if self.validate is None or not self._due():
            return False
        with preserved_rng():
            result = dict(self.validate(self.run.owned))
        result = self.run.engine.agree(result)
        examples, wrong = result.pop("examples", []), result.pop("wrong", None)
        metrics = {name: float(value) for name, value in result.items() if isinstance(value, (int, float, Tensor))}
        if not metrics:
            raise ValueError(f"validate must return metrics by name, got {sorted(map(str, result)) or 'none'}")
        name = self.guard.metric if self.guard is not None and self.guard.metric is not None else next(iter(metrics))
        if name not in metrics:
            raise ValueError(f"the guard's metric {name!r} is not among those of validate: {', '.join(metrics)}")
        if not math.isfinite(metrics[name]) and self._best is None:
            raise TrainingError(
                f"the first validation's {name} is {metrics[name]}, so there is no good model to go back to: look for "
                "NaN in the weights or in the data"
            )
        extra = {"examples": examples, **self._changed(wrong)} if examples or wrong is not None else {}
        return self._act(self._judge(name, metrics[name]), name, metrics, extra)

    def failed(self, error: TrainingError) -> None:
        """A loss or gradient was not finite: what the guard makes of it. Raises it again where nothing can be done."""
        best = self._best
        if self.guard is None or best is None:
            raise error
        verdict = judge(self.guard, best["metric"], math.nan, best["value"], **self._past(best))
        sentence = f"{str(error).partition(':')[0]}{verdict.sentence[verdict.sentence.rindex(': ') :]}"
        self._act(Verdict(verdict.action, sentence, None, None), best["metric"], {}, {})

    def finish(self) -> None:
        """With a guard, leave the best model rather than the last, and say so."""
        best, history = self._best, self.run.history
        if self.guard is None or best is None:
            return
        last = history.validations[-1]
        if int(best["step"]) != history.steps or self.stopped:
            if not self.stopped:
                self.run.restore_weights(self.run.store.load(best=True))
            history.kept_step = int(best["step"])
        count = sum(entry["action"] == "roll back" for entry in history.validations)
        how = "stopped by the guard" if self.stopped else "finished"
        kept = best["retention"]
        share = f", {100 * kept:.1f} % of the teacher's" if kept is not None else ""
        history.outcome = (
            f"{how} after {count} rollback{'s' if count != 1 else ''} with the model of step {best['step']}: "
            f"{best['metric']} {best['value']:.6g}{share}"
        )
        if kept is not None and kept < self.guard.retention:
            history.outcome += f", less than the {100 * self.guard.retention:g} % it was to keep"
        if not self._settled(best["step"]):
            history.outcome += ", before its final sparsity was reached"
        worse = self.stopped or last["action"] != "best" or (kept is not None and kept < self.guard.retention)
        logger.log(logging.WARNING if worse else logging.INFO, "%s: %s", self.log.run, history.outcome)

    def _due(self) -> bool:
        """Every ``validate_steps``, by default every epoch, at the end, and with a guard before the first step."""
        run, history = self.run, self.run.history
        if self.stopped or ((best := self._best) is not None and best["step"] == history.steps):
            return False
        if history.steps == 0:
            return self.guard is not None
        entries = history.validations
        back = max((index for index, entry in enumerate(entries) if entry["action"] == "roll back"), default=-1)
        if any(entry["step"] == history.steps for entry in entries[back + 1 :]):
            return False
        every = run.config.validate_steps or run.source.steps_per_epoch
        return history.steps % every == 0 or history.steps == history.total_steps

    def _past(self, best: dict[str, Any]) -> dict[str, int]:
        back = sum(entry["action"] == "roll back" for entry in self.run.history.validations)
        return {"best_step": best["step"], "rolled_back": back}

    def _settled(self, step: int) -> bool:
        """Whether a state may be compared with others: not while sparsity rises, which is meant to cost quality."""
        prune = self.run.prune
        return prune is None or prune.settled(step, self.run.history.total_steps)

    def _judge(self, name: str, value: float) -> Verdict:
        best = self._best
        if self.guard is None and name not in HIGHER_IS_BETTER:
            return Verdict("keep", f"{name} {value:.6g}", None, None)
        if math.isfinite(value) and not self._settled(self.run.history.steps):
            found = judge(self.guard or Guard(), name, value, None)
            return replace(found, sentence=f"{name} {value:.6g} while sparsity rises, compared with no other")
        if math.isfinite(value) and best is not None and not self._settled(best["step"]):
            best = None
        past = self._past(best) if best is not None else {}
        verdict = judge(self.guard or Guard(), name, value, best["value"] if best is not None else None, **past)
        if self.guard is None and best is not None and verdict.action in ("roll back", "stop"):
            text = f"{name} {value:.6g}, best {best['value']:.6g} at step {best['step']}, unguarded"
            return Verdict("keep", text, verdict.change, None)
        return verdict

    def _changed(self, wrong: list[int] | None) -> dict[str, int]:
        """How many examples went wrong, and how many right, since the validation before."""
        if wrong is None:
            return {}
        before, self.run.history.wrong = self.run.history.wrong, sorted(wrong)
        if before is None:
            return {}
        return {"newly_wrong": len({*wrong} - {*before}), "newly_right": len({*before} - {*wrong})}

    def _act(self, verdict: Verdict, name: str, metrics: dict[str, float], extra: dict[str, Any]) -> bool:
        run, history = self.run, self.run.history
        last = next((entry for entry in reversed(history.validations) if entry["metrics"]), None)
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        change = None
        if last is not None and finite.get(name) is not None and last["metrics"].get(name) is not None:
            higher = self.guard.higher_is_better if self.guard is not None else None
            higher = HIGHER_IS_BETTER.get(name) if higher is None else higher
            if higher is not None:
                change = _finite(improvement(metrics[name], last["metrics"][name], higher=higher))
        entry = {
            "step": history.steps,
            "metrics": finite,
            "metric": name,
            "value": finite.get(name),
            "action": verdict.action,
            "sentence": verdict.sentence,
            "change": _finite(verdict.change),
            "last_change": change,
            "retention": _finite(verdict.retention),
            **extra,
        }
        history.validations.append(entry)
        self.log.write("validation", **entry)
        bad = verdict.action in ("roll back", "stop")
        level = logging.WARNING if bad else logging.INFO
        logger.log(level, "%s: step %d: %s", self.log.run, history.steps, verdict.sentence)
        if verdict.action == "best":
            run.save(best=True)
        if bad:
            assert self.guard is not None
            run.restore(run.store.load(best=True))
            run.lr_scale *= self.guard.lr_factor
            run.save()
        return bad


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
