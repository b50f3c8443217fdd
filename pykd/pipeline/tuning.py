"""`search:` of a study: values that Optuna looks for, each trial a run of the recipe, judged on data it did not see."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pykd.errors import RecipeError
from pykd.evaluation.intervals import paired_test
from pykd.evaluation.page import plain
from pykd.evaluation.report import Report
from pykd.pipeline.directory import SEARCH, WORKERS, RunDirectory
from pykd.pipeline.optuna_study import asked, importance, opened
from pykd.pipeline.parts import finished, part_of, results
from pykd.pipeline.ranking import sentence, trial_score
from pykd.pipeline.result import Finding
from pykd.pipeline.runner import Pipeline
from pykd.pipeline.workers import carry_out
from pykd.recipe import Recipe
from pykd.recipe.ablations import GROUND
from pykd.recipe.load import changed, get_key
from pykd.recipe.studies import Choice, Range

logger = logging.getLogger("pykd.pipeline")

#: Optuna's records, beside the trials.
STORAGE = "optuna.sqlite3"


def tuned(recipe: Recipe, directory: RunDirectory, *, workers: int = 1, **options: Any) -> tuple[Recipe, Finding]:
    """The recipe with the best values that were found, and how they were found.

    Trials are scored on every second held-out example, and on the others the best one is compared with the recipe as
    it was: on those the choice was not made. Each is a run under ``search/``; what is finished, also before a kill, is
    not made again, and goes on with the values that it began with. ``workers`` trials are made at a time; the next ones
    are chosen from those that are finished. options: as for Pipeline.

    Raises RecipeError when no trial could be made, or a key does not go into the recipe.
    """
    bare = recipe.model_copy(update={"ablate": [], "search": None})
    whole = Pipeline(bare, directory, **options)
    search = _Tuning(recipe, whole, workers)
    search.check()
    whole.prepare()
    whole.teach()
    best = whole.together.shared(search.known)
    if best is None:
        search.run()
        best = whole.together.shared(search.conclude)
    found = Finding(best["title"], best["cells"], tuple(best["sentences"]))
    return changed(recipe, best["values"], where="search"), found


class _Tuning:
    """One search: Optuna asks, runs answer."""

    def __init__(self, recipe: Recipe, whole: Pipeline, workers: int) -> None:
        assert recipe.search is not None
        self.recipe, self.whole, self.workers, self.search = recipe, whole, workers, recipe.search
        self.folder = whole.directory.path / SEARCH

    def check(self) -> None:
        """Every first value gives a recipe; RecipeError for one that does not."""
        for key, space in self.search.values.items():
            first = space.low if isinstance(space, Range) else space[0]
            changed(self.recipe, {key: first}, where=f"search.values.{key}")
        self.trial_recipe({})

    def trial_recipe(self, values: Mapping[str, Choice]) -> Recipe:
        """The recipe of a trial: only the last student of a chain counts."""
        keys: dict[str, Any] = {**self.search.short, **values}
        bare = self.recipe.model_copy(update={"ablate": [], "search": None, "study": None})
        if bare.stages[0].kind == "chain":
            keys = {"stages[0].chain.arms": [], **keys}
        return changed(bare, keys, where="search")

    def known(self) -> dict[str, Any] | None:
        """What an earlier search has concluded."""
        file = self.folder / "search.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def run(self) -> None:
        """Make the trials that are missing, as many at a time as there are workers."""
        while batch := self.whole.together.shared(self._next):
            recipes = {number: self._possible(number, values) for number, values in batch.items()}
            parts = [
                part_of(
                    self.whole, f"trial-{number}", recipe, self._place(number), shared=self._shared(), may_fail=True
                )
                for number, recipe in recipes.items()
                if recipe is not None
            ]
            carry_out(parts, self.whole.directory.path / WORKERS, workers=self.workers)
            self.whole.together.once(functools.partial(self._tell, recipes))

    def conclude(self) -> dict[str, Any]:
        """The best trial, the course of the search, and what it gained where it did not look; also written down."""
        with self._study() as study:
            done = [trial for trial in study.trials if trial.value is not None]
            if not done:
                raise RecipeError(
                    f"none of the {len(study.trials)} trials could be made; {self.folder} has what each said"
                )
            best = study.best_trial
            told = {
                "title": "Search",
                "values": best.params,
                "cells": self._cells(study.trials),
                "sentences": [*self._said(best), *importance(study)],
            }
        text = json.dumps(told, indent=1) + "\n"
        self.whole.directory.write(f"{SEARCH}/search.json", text)
        return told

    def _place(self, number: int) -> Path:
        return self.folder / f"trial-{number}"

    def _possible(self, number: int, values: Mapping[str, Choice]) -> Recipe | None:
        try:
            return self.trial_recipe(values)
        except RecipeError as error:
            logger.warning("trial-%d: left out: %s", number, error)
            return None

    def _shared(self) -> int:
        """Trials have the run's own teacher, unless one of their keys changes it."""
        keys = {re.split(r"[.\[]", key)[0] for key in (*self.search.values, *self.search.short)}
        return -1 if keys & set(GROUND) else 0

    def _next(self) -> dict[int, dict[str, Choice]]:
        """Trials that were begun and not finished, else new ones; none when there are enough."""
        from optuna.trial import TrialState

        with self._study() as study:
            begun = study.get_trials(states=(TrialState.RUNNING,))
            found = {trial.number: trial.params for trial in begun}
            ended = len(study.trials) - len(begun) - len(study.get_trials(states=(TrialState.WAITING,)))
            while len(found) < min(self.workers, self.search.trials - ended):
                seed = 1000 * self.recipe.seed + ended + len(found)
                trial = asked(study, self.search.values, seed=seed, together=self.workers)
                found[trial.number] = trial.params
            return found

    def _tell(self, recipes: Mapping[int, Recipe | None]) -> None:
        """Scores of the trials that were made; their weights are deleted, their measurements stay."""
        from optuna.trial import TrialState

        with self._study() as study:
            for number, recipe in recipes.items():
                folder = self._place(number)
                if recipe is None or not finished(recipe, folder):
                    study.tell(number, state=TrialState.FAIL)
                    continue
                teacher, *_, final = [entry.report for entry in results(recipe, folder)]
                value = trial_score(final, teacher, self.search.weights.model_dump())
                study.tell(number, value)
                logger.info("trial-%d: %s: score %.4f", number, study.trials[number].params, value)
                for stage in (folder / "stages").iterdir():
                    if stage.is_dir():
                        shutil.rmtree(stage)

    def _cells(self, trials: Sequence[Any]) -> list[list[str]]:
        """The course of the search: every trial, its values, its score, and the best one so far."""
        keys = list(self.search.values)
        rows, best = [["trial", *keys, "score", "best so far"]], -float("inf")
        for trial in trials:
            best = max(best, -float("inf") if trial.value is None else trial.value)
            values = [plain(trial.params.get(key)) for key in keys]
            shown = "could not be made" if trial.value is None else f"{trial.value:.4f}"
            rows.append([str(trial.number), *values, shown, f"{best:.4f}"])
        return rows

    def _said(self, best: Any) -> list[str]:
        """What the best trial has over the recipe's own values on the examples that the search did not look at."""
        values = ", ".join(f"{key} {plain(value)}" for key, value in best.params.items())
        said = [f"search: best is trial {best.number} with {values}, score {best.value:.4f}"]
        own = self._own()
        if best.number and own is not None and finished(self.trial_recipe(own), self._place(0)):
            one, other = (self._final(number, params) for number, params in ((best.number, best.params), (0, own)))
            test = paired_test(one.scores()[1::2], other.scores()[1::2])
            said.append(
                f"search: on the {len(one.scores()) // 2} held-out examples that it did not look at, the best trial "
                f"has {sentence(test)} over the recipe's own values"
            )
        return said

    def _final(self, number: int, values: Mapping[str, Choice]) -> Report:
        return results(self.trial_recipe(values), self._place(number))[-1].report

    def _own(self) -> dict[str, Choice] | None:
        """The recipe's own values where all are among those that are searched: the first trial."""
        content = self.recipe.model_dump(mode="json")
        own = {key: get_key(content, key) for key in self.search.values}
        inside = all(
            value in space
            if isinstance(space, list)
            else isinstance(value, (int, float)) and space.low <= value <= space.high
            for value, space in zip(own.values(), self.search.values.values(), strict=True)
        )
        return own if inside else None

    def _study(self) -> contextlib.AbstractContextManager[Any]:
        return opened(self.folder / STORAGE, self.recipe.name, self._own())
