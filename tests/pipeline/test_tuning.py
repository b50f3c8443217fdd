"""`search`: trials chosen by Optuna, resumed after a stop, and the recipe carried out with the best values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pykd.errors import RecipeError
from pykd.pipeline import parts, run_study
from pykd.pipeline.ranking import trial_score
from pykd.recipe import load_recipe


@pytest.fixture
def searched(tiny: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "stages[0].distill.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "stages[0].distill.temperature": {"low": 1, "high": 8},
        "student.hidden_size": [16, 24, 32],
    }
    return {
        **tiny,
        "student": {"hidden_size": 16},
        "stages": [{"distill": {"max_steps": 4, "batch_size": 32, "lr": 1e-3}}],
        "search": {"trials": 6, "values": values, "short": {"stages[0].distill.max_steps": 2}},
    }


@pytest.mark.usefixtures("pageless")
def test_a_search_goes_on_where_it_was_stopped(
    searched: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_study(searched, output_dir=tmp_path / "whole", progress=False)
    (told,) = whole.run.findings
    assert [row[0] for row in told.cells] == ["trial", *map(str, range(6))]
    assert told.cells[1][1:4] == ["0.001", "4", "16"], "the first trial has the recipe's own values"
    assert float(told.cells[-1][-1]) == max(float(row[4]) for row in told.cells[1:])
    best = max(told.cells[1:], key=lambda row: float(row[4]))
    assert told.sentences[0].startswith(f"search: best is trial {best[0]} with stages[0].distill.lr {best[1]}")
    assert "importance by PED-ANOVA" in told.sentences[-1] and not whole.ranking
    distill = whole.run.recipe.stages[0].distill
    assert distill is not None and distill.max_steps == 4 and f"{distill.lr:.6g}" == best[1]
    assert len(whole.run.measured) == 2 and whole.run.reload.identical
    assert not list((tmp_path / "whole" / "search").glob("trial-*/stages/*/*")), "weights of trials are not kept"

    made, real = [], parts.make

    def make(recipe: Any, folder: Path, **options: Any) -> None:
        made.append(folder.name)
        if made == ["trial-0", "trial-1", "trial-2"]:
            raise KeyboardInterrupt
        real(recipe, folder, **options)

    monkeypatch.setattr(parts, "make", make)
    with pytest.raises(KeyboardInterrupt):
        run_study(searched, output_dir=tmp_path / "again", progress=False)
    again = run_study(searched, output_dir=tmp_path / "again", resume=True, progress=False)
    assert made == ["trial-0", "trial-1", *[f"trial-{number}" for number in (2, 2, 3, 4, 5)]]
    assert again.run.findings == whole.run.findings and again.run.final.predictions == whole.run.final.predictions


@pytest.mark.usefixtures("pageless")
def test_trials_that_cannot_be_made_are_left_out(
    searched: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = {"trials": 2, "values": {"student.hidden_size": [64, 99]}}
    with pytest.raises(RecipeError, match=r"none of the 2 trials could be made; .*search has what each said"):
        run_study({**searched, "search": search}, output_dir=tmp_path / "x", progress=False)
    assert "left out: student: hidden_size must be between 1 and the teacher's 32" in caplog.text


def test_what_a_search_may_say(searched: dict[str, Any], tmp_path: Path) -> None:
    def refuse(match: str, **search: Any) -> None:
        with pytest.raises(RecipeError, match=match):
            run_study({**searched, "search": {**searched["search"], **search}}, output_dir=tmp_path / "x")

    refuse(
        r"a range needs low below high, and log one above 0, got 0 to 1",
        values={"seed": {"low": 0, "high": 1, "log": True}},
    )
    refuse(r"a range needs low below high, got 3 to 1", values={"seed": {"low": 3, "high": 1}})
    refuse("a list of choices needs two or more, got \\[1\\]", values={"seed": [1]})
    refuse("explanations are not measured in trials, weigh them 0", weights={"explanations": 1})
    refuse("search.weights: at least one weight must be above 0", weights={"quality": 0, "speed": 0, "size": 0})


@pytest.mark.usefixtures("pageless")
def test_a_key_that_does_not_go_into_the_recipe(searched: dict[str, Any], tmp_path: Path) -> None:
    wrong = {"stages[0].distill.temprature": [1, 2]}
    with pytest.raises(
        RecipeError, match=r"search\.values\.stages\[0\]\.distill\.temprature: .*did you mean 'temperature'"
    ):
        run_study({**searched, "search": {"values": wrong}}, output_dir=tmp_path / "x", progress=False)


def test_the_score_of_a_trial(searched: dict[str, Any]) -> None:
    class Numbers:
        def __init__(self, scores: list[float], size: int, faster: float) -> None:
            self.name, self.size_bytes, self.speedup_over = "teacher", size, {"teacher": faster}
            self._scores = scores

        def scores(self) -> list[float]:
            return self._scores

    teacher: Any = Numbers([1.0, 0.0, 1.0, 0.0], 100, 1.0)
    small: Any = Numbers([1.0, 1.0, 0.0, 1.0], 25, 4.0)
    assert trial_score(small, teacher, {"quality": 1.0, "size": 0.0, "speed": 0.0}) == 0.5
    assert trial_score(small, teacher, {"quality": 1.0, "size": 1.0, "speed": 2.0}) == pytest.approx(
        (0.5 + 3 * 0.75) / 4
    )
    assert load_recipe(searched).search.weights.quality == 1.0  # type: ignore[union-attr]
