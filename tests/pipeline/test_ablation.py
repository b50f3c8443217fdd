"""`ablate`: recipes without one component, run beside the whole one and compared with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pykd import cli
from pykd.errors import RecipeError
from pykd.pipeline import run, run_study, runner
from pykd.recipe import load_recipe
from pykd.recipe.ablations import variants

TRAINING = {"max_steps": 4, "batch_size": 32}


def names(recipe: dict[str, Any], *ablate: Any) -> dict[str, int]:
    return {each.name: each.shared for each in variants(load_recipe({**recipe, "ablate": list(ablate)}))}


def test_components_are_named_by_the_recipe(tiny: dict[str, Any]) -> None:
    method = {"logits": 1.0, "hidden": 0.5}
    stages: list[Any] = [{"distill": {"method": method}}, {"prune": {}}, {"recover": {"alpha": 1.0}}, {"prune": {}}]
    recipe = {**tiny, "student": {"depth": 1}, "stages": stages}
    each = {"stages.distill": 0, "stages.2-prune": 1, "stages.recover": 2, "stages.4-prune": 3}
    assert names(recipe, "stages") == each
    assert names(recipe, "losses") == {"losses.logits": 0, "losses.labels": 0, "losses.hidden": 0}
    assert names(recipe, "stages.4-prune", {"small": {"student.depth": 2}}) == {"stages.4-prune": 3, "small": 0}
    assert names(recipe, {"other": {"teacher.config.hidden_size": 16}}) == {"other": -1}
    without = {one.name: one.recipe for one in variants(load_recipe({**recipe, "ablate": ["losses"], "then": "x"}))}
    trained: list[Any] = [
        without[name].stages[0].distill for name in ("losses.logits", "losses.labels", "losses.hidden")
    ]
    assert [stage.alpha for stage in trained] == [0.0, 1.0, 0.5]
    assert [stage.method for stage in trained] == [method, method, {"logits": 1.0}]
    assert without["losses.labels"].then is None and without["losses.labels"].ablate == []


def test_components_of_a_chain_and_of_a_router(tiny: dict[str, Any]) -> None:
    students = {"a": {"depth": 1}, "b": {"depth": 1}}
    chain = {**tiny, "stages": [{"chain": {"students": students, "alpha": 1.0}}], "study": {"explain": 2}}
    assert names(chain, "students") == {"students.a": 0, "students.b": 0}
    (first, _) = variants(load_recipe({**chain, "ablate": ["students"]}))
    assert first.recipe.stages[0].chain is not None and first.recipe.study is None
    assert list(first.recipe.stages[0].chain.students) == ["b"] and first.recipe.stages[0].chain.arms == ()
    config = {"model_type": "pykd-router", "encoder": {"model_type": "bert"}}
    router = {**tiny, "teacher": {**tiny["teacher"], "config": config}, "stages": [{"prune": {}}]}
    named = ["experts", "router", "losses"]
    assert list(names(router, *named)) == ["experts", "router", "losses.load", "losses.balance"]
    found = {one.name: one.recipe.teacher.config for one in variants(load_recipe({**router, "ablate": named}))}
    assert found["experts"] == {**config, "experts": 0} and found["router"] == {**config, "routing": "deep"}
    assert found["losses.load"] == {**config, "load_weight": 0.0}


def test_components_of_a_router_made_of_the_teacher(tiny: dict[str, Any]) -> None:
    student = {"router": {"experts": 4, "deep_share": 0.2}}
    stages: list[Any] = [{"distill": {"alpha": 1.0}}, {"quantize": {}}, {"calibrate": {}}]
    recipe = {**tiny, "student": student, "stages": stages, "ablate": ["experts", "router", "losses"]}
    found = {one.name: one.recipe for one in variants(load_recipe(recipe))}
    kept: dict[str, Any] = {name: one.student and one.student.router for name, one in found.items()}
    assert list(kept) == ["experts", "router", "losses.load", "losses.balance"]
    assert (kept["experts"].experts, kept["router"].routing, kept["router"].deep_share) == (0, "deep", 0.2)
    assert (kept["losses.load"].load_weight, kept["losses.balance"].balance_weight) == (0.0, 0.0)
    kinds = {name: [stage.kind for stage in one.stages] for name, one in found.items()}
    assert kinds["router"] == ["distill", "quantize"] and kinds["experts"][-1] == "calibrate", "nothing to draw there"
    chain = {**tiny, "stages": [{"chain": {"students": {"a.b": student, "c": {"depth": 1}}}}], "ablate": ["experts"]}
    (one,) = variants(load_recipe(chain))
    made = one.recipe.stages[0].chain
    assert made is not None and made.students["a.b"].router is not None and made.students["a.b"].router.experts == 0


def test_what_cannot_be_left_out_is_said_before_anything_runs(tiny: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**tiny, "stages": [{"prune": {}}, {"recover": {}}]}
    with pytest.raises(RecipeError, match=r"unknown component 'stages\.prine': did you mean 'stages\.prune'\?"):
        run({**recipe, "ablate": ["stages.prine"]}, output_dir=tmp_path / "x")
    with pytest.raises(RecipeError, match=r"without it the rest is no recipe: .*seed: input should be greater"):
        names(recipe, {"it": {"seed": -1}})
    with pytest.raises(RecipeError, match="'a/b' would name a folder: use letters, digits"):
        names(recipe, {"a/b": {"seed": 1}})
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("pageless")
def test_a_run_says_what_each_component_is_worth(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"distill": TRAINING}, {"prune": {"sparsity": 0.6}}, {"recover": TRAINING}]
    recipe = {**tiny, "student": {"depth": 1}, "stages": stages}
    done, trained, real = tmp_path / "tiny", [], runner.apply_stage

    def apply(stage: Any, model: Any, context: Any) -> Any:
        trained.append(context.checkpoints.parents[1].name + "/" + stage.kind)
        if trained[-1] == "stages.prune/recover" and trained.count(trained[-1]) == 1:
            raise KeyboardInterrupt
        return real(stage, model, context)

    monkeypatch.setattr(runner, "apply_stage", apply)
    with pytest.raises(KeyboardInterrupt):
        run({**recipe, "ablate": ["stages.prune", "stages.recover"]}, output_dir=done, progress=False)
    found = run({**recipe, "ablate": ["stages.prune", "stages.recover"]}, output_dir=done, resume=True, progress=False)
    whole = ["tiny/distill", "tiny/prune", "tiny/recover"]
    assert trained == [*whole, *["stages.prune/recover"] * 2], "the first stages are shared, and so is what is finished"
    (told,) = found.findings
    heads, *rows = told.cells
    assert [row[0] for row in rows] == ["stages.prune", "stages.recover"] and heads[4] == "with - without"
    assert float(rows[0][5]) > float(rows[0][6]), "without pruning the file is larger"
    assert rows[0][7].endswith("x") and "recover with stages.prune beside without" in told.sentences[0]
    report = json.loads((done / "report.json").read_text())
    assert report["tables"]["What each component is worth"] == told.cells
    assert "## What each component is worth" in (done / "report.md").read_text()
    assert "What each component is worth" in found.summary() and any("less on disk" in said for said in found.gains())
    folder, teachers = done / "ablations" / "stages.prune", str(tmp_path / "teachers")
    assert cli.main(["part", str(folder / "recipe.yaml"), str(tmp_path / "alone"), "--teachers", teachers]) == 0
    alone, beside = (json.loads((at / "stages" / "2-recover.json").read_text()) for at in (tmp_path / "alone", folder))
    assert alone["sha256"] == beside["sha256"], "a worker makes the same, from the beginning"
    trained.clear()
    again = run({**recipe, "ablate": ["stages"]}, output_dir=done, resume=True, progress=False)
    assert trained == ["stages.distill/prune", "stages.distill/recover"], "more may be left out later"
    assert again.findings[0].cells[1:3] != [] and len(again.findings[0].cells) == 4


@pytest.mark.usefixtures("pageless")
def test_a_study_without_one_of_its_assistants(tiny: dict[str, Any], tmp_path: Path) -> None:
    students = {"half": {"depth": 1}, "thin": {"depth": 1, "hidden_size": 16}}
    stages = [{"chain": {"students": students, "arms": ["labels"], **TRAINING}}]
    recipe = {**tiny, "stages": stages, "ablate": ["students.half"]}
    found = run_study(recipe, output_dir=tmp_path / "tiny", progress=False)
    gains, ranking, told = found.run.findings
    assert [row[0] for row in gains.cells] == ["student", "half", "thin"] and gains.cells[0][-1] == "chain - labels"
    assert len(ranking.cells) == 5 and told.cells[1][:2] == ["students.half", "thin-chain"]
    assert any("the chain over labels alone: better for" in said for said in found.run.gains())
