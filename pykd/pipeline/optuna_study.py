"""Optuna: its records in a file of the run, what it draws, and what it makes of the trials."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pykd.recipe.studies import Choice, Range

#: With fewer trials nothing is said of the importance of values.
LEAST_TRIALS = 5


@contextlib.contextmanager
def opened(file: Path, name: str, first: Mapping[str, Choice] | None) -> Iterator[Any]:
    """Optuna's study in a file of SQLite, made if need be; its first trial is to have the values ``first``."""
    import optuna

    file.parent.mkdir(parents=True, exist_ok=True)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
        if first is not None and not study.trials:
            study.enqueue_trial(dict(first))
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()
        optuna.logging.set_verbosity(level)


def asked(study: Any, values: Mapping[str, Range | Sequence[Choice]], *, seed: int, together: int) -> Any:
    """A new trial, drawn from the finished ones by the tree-structured Parzen estimator.

    The same seed and the same finished trials give the same values, in this process or in one that goes on after it.
    together: trials made at a time; with several, those that are not finished count as bad ones.
    """
    import optuna

    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=together > 1)
    return study.ask({key: distribution(space) for key, space in values.items()})


def distribution(space: Range | Sequence[Choice]) -> Any:
    """What Optuna draws from.

    >>> distribution(Range(low=1, high=4)), distribution([True, False])
    (IntDistribution(high=4, log=False, low=1, step=1), CategoricalDistribution(choices=(True, False)))
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(space, Range):
        return CategoricalDistribution(list(space))
    if space.whole:
        return IntDistribution(int(space.low), int(space.high), log=space.log)
    return FloatDistribution(float(space.low), float(space.high), log=space.log)


def importance(study: Any) -> list[str]:
    """How much of the difference between trials goes with each value, where there are trials enough to tell."""
    import optuna

    done = [trial for trial in study.trials if trial.value is not None]
    if len(done) < LEAST_TRIALS or len({trial.value for trial in done}) < 2:
        return []
    found = optuna.importance.get_param_importances(study)
    shares = ", ".join(f"{key} {share:.2f}" for key, share in found.items())
    return [f"search: importance by PED-ANOVA (Watanabe et al. 2023): {shares}"]
