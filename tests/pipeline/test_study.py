"""`pykd study`: every student of every arm measured and ranked, interrupted and continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pykd import cli
from pykd.errors import RecipeError
from pykd.pipeline import arms as module
from pykd.pipeline import run_study
from pykd.pipeline.ranking import Place, rank
from pykd.pipeline.result import Measured
from pykd.pipeline.study import StudyRun
from pykd.recipe import load_recipe


@pytest.fixture(scope="module")
def sizes(tiny: dict[str, Any]) -> dict[str, Any]:
    """A study of two students."""
    students = {"half": {"depth": 1}, "thin": {"depth": 1, "hidden_size": 16}}
    chain = {"students": students, "max_steps": 4, "batch_size": 32, "arms": ["labels", "direct"]}
    weights = {"quality": 0.5, "speed": 0.2, "size": 0.2, "explanations": 0.1}
    return {**tiny, "stages": [{"chain": chain}], "study": {"weights": weights, "explain": 2}}


@pytest.fixture(scope="module")
def done(pageless: None, sizes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyRun]:
    folder = tmp_path_factory.mktemp("study") / "sizes"
    return folder, run_study(sizes, output_dir=folder, progress=False)


def test_every_student_of_every_arm_is_saved_measured_and_ranked(done: tuple[Path, StudyRun]) -> None:
    folder, found = done
    names = {"half-chain", "half-labels", "thin-chain", "thin-labels", "thin-direct"}
    assert {place.name for place in found.ranking} == names
    assert {report.name for report in found.run.reports} == names | {"teacher"}
    assert all((folder / "stages" / name / "model.safetensors").exists() for name in names)
    assert found.run.final.name == found.ranking[0].name and found.run.reload.identical
    scores = [place.score for place in found.ranking]
    assert scores == sorted(scores, reverse=True) and 0 < scores[-1] <= scores[0] <= 1
    assert all(max(place.shares[name] for place in found.ranking) == pytest.approx(1) for name in ("quality", "size"))
    written = json.loads((folder / "study.json").read_text())
    assert written["recommended"] == found.ranking[0].name and len(written["ranking"]) == 5
    assert found.recommendation() in found.summary() and "lost / won" not in found.summary()
    assert not found.run.comparison.remarks, "students were not made from one another"
    assert all(len(entry.details["curve"]) == 4 and entry.details["parameters"]["max_steps"] == 4
               for entry in found.run.measured[1:])  # fmt: skip


def test_a_finished_study_is_read_back(
    sizes: dict[str, Any], done: tuple[Path, StudyRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = done
    monkeypatch.setattr(module, "evaluate", None)
    again = run_study(sizes, output_dir=folder, resume=True, progress=False)
    assert again.ranking == found.ranking and again.run.reports == found.run.reports


def test_other_weights_rank_again_what_was_trained(
    sizes: dict[str, Any], done: tuple[Path, StudyRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, found = done
    shutil.copytree(folder, tmp_path / "sizes")
    shutil.copytree(folder.parent / "teachers", tmp_path / "teachers")
    monkeypatch.setattr(module, "evaluate", None)
    before = found.ranking[0].name
    only = next(name for name in ("speed", "size", "quality", "explanations")
                if rank(found.run.measured[1:], {name: 1.0})[0].name != before)  # fmt: skip
    other = {**sizes, "study": {"weights": {"quality": 0.0, "speed": 0.0, "size": 0.0, only: 1.0}, "explain": 2}}
    again = run_study(other, output_dir=tmp_path / "sizes", resume=True, progress=False)
    assert again.ranking[0].name != before and again.run.final.name == again.ranking[0].name
    written = json.loads((tmp_path / "sizes" / "study.json").read_text())
    assert written["recommended"] == again.ranking[0].name and written["weights"][only] == 1.0
    reported = json.loads((tmp_path / "sizes" / "report.json").read_text())
    assert reported["settings"]["recipe"]["study"]["weights"][only] == 1.0
    saved = [tmp_path / "sizes" / place / "model.safetensors" for place in ("model", f"stages/{again.ranking[0].name}")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert load_recipe(tmp_path / "sizes" / "recipe.yaml").study.weights.quality == 0.0  # type: ignore[union-attr]


def test_an_interrupted_study_goes_on(
    sizes: dict[str, Any], done: tuple[Path, StudyRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, real = [], module.evaluate

    def stops(model: Any, data: Any, *, name: str, **options: Any) -> Any:
        if name == "thin-chain" and name not in measured:
            measured.append(name)
            raise KeyboardInterrupt
        measured.append(name)
        return real(model, data, name=name, **options)

    monkeypatch.setattr(module, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        run_study(sizes, output_dir=tmp_path / "sizes", progress=False)
    found = run_study(sizes, output_dir=tmp_path / "sizes", resume=True, progress=False)
    assert sorted(measured) == sorted([*(place.name for place in found.ranking), "thin-chain"])
    before = {report.name: report.predictions for report in done[1].run.reports}
    assert {report.name: report.predictions for report in found.run.reports} == before


def entry(name: str, **values: Any) -> Measured:
    class Numbers:
        def __init__(self) -> None:
            self.name, self.size_bytes = name, values.get("size", 100)
            self.speedup_over = {"teacher": values.get("speed", 1.0)}
            self.latency_p50_ms = 1.0

        def quality(self) -> float:
            return float(values.get("quality", 0.5))

    details = {"explanations": {"cosine": values["alike"]}} if "alike" in values else {}
    return Measured(name, Numbers(), 0.0, "", False, details)  # type: ignore[arg-type]


def test_the_weights_decide() -> None:
    good, fast = entry("good", quality=0.8, speed=1.0, size=200), entry("fast", quality=0.6, speed=4.0, size=100)
    assert [place.name for place in rank([good, fast], {"quality": 1.0})] == ["good", "fast"]
    best, second = rank([good, fast], {"quality": 1.0, "speed": 1.0})
    assert best == Place("fast", pytest.approx(0.875), {"quality": pytest.approx(0.75), "speed": 1.0, "size": 1.0})
    assert second.score == pytest.approx(0.625) and second.shares["size"] == 0.5


def test_explanations_count_where_they_are_measured() -> None:
    alike, not_alike = entry("alike", alike=0.9), entry("not", alike=-0.3)
    first, second = rank([not_alike, alike], {"explanations": 1.0})
    assert (first.name, first.score, second.score) == ("alike", 1.0, 0.0)
    with pytest.raises(RecipeError, match=r"needs explanations: set study\.explain above 0, or weigh it 0"):
        rank([entry("none")], {"explanations": 0.5})
    with pytest.raises(RecipeError, match="at least one weight must be above 0"):
        rank([entry("none")], {"quality": 0.0})


def test_other_recipes_are_refused(sizes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**sizes, "student": {"depth": 1}, "stages": [{"distill": {}}], "study": None}
    with pytest.raises(RecipeError, match="a study compares the students of one `chain` stage"):
        run_study(other, output_dir=tmp_path / "x")
    with pytest.raises(RecipeError, match="study ranks the students of a chain: it goes with a single stage, `chain`"):
        run_study({**other, "study": {}}, output_dir=tmp_path / "x")
    file = tmp_path / "other.yaml"
    file.write_text(json.dumps(other))
    assert cli.main(["study", str(file)]) == 2
    assert "a study compares the students" in capsys.readouterr().err
