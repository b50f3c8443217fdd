"""Which recipes a service starts, and which changes to them it takes from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pykd.errors import RecipeError
from pykd.recipe import load_recipe
from pykd.serve.allowed import AllowedRecipes, _yaml

RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.fixture
def allowed() -> AllowedRecipes:
    return AllowedRecipes(RECIPES)


def test_every_shipped_recipe_is_described(allowed: AllowedRecipes) -> None:
    found = {entry["recipe"]: entry for entry in allowed.describe()}
    assert found["digits.yaml"]["stages"] == ["distill", "prune", "recover", "quantize"]
    assert found["digits.yaml"]["short"] and all("error" not in entry for entry in found.values())


def test_a_recipe_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\n")
    assert "the key is missing" in AllowedRecipes(tmp_path).describe()[0]["error"]


def test_changes_are_checked_by_the_schema(allowed: AllowedRecipes) -> None:
    changes: dict[str, Any] = {"stages[0].distill.lr": 1e-05, "stages[3].quantize.scheme": "w8a8", "seed": 7,
                               "stages[3].quantize.group_size": None}  # fmt: skip
    order = allowed.order("digits.yaml", changes, short=False)
    assert order.verb == "run" and order.file == RECIPES / "digits.yaml"
    recipe = load_recipe(order.file, overrides=order.overrides)
    assert recipe.seed == 7 and recipe.stages[0].distill is not None and recipe.stages[0].distill.lr == 1e-05
    assert allowed.order("study.yaml", {}, short=True).verb == "study"
    with pytest.raises(RecipeError, match="did you mean 'temperature'"):
        allowed.order("digits.yaml", {"stages[0].distill.temprature": 2}, short=False)
    with pytest.raises(RecipeError, match="unknown scheme 'w4a61'"):
        allowed.order("digits.yaml", {"stages[3].quantize.scheme": "w4a61"}, short=False)


@pytest.mark.parametrize(
    "name", ["../recipes/digits.yaml", "/etc/passwd", "", ".", "digits", "digits.yaml\0", "../../pyproject.toml"]
)
def test_only_names_of_the_folder(allowed: AllowedRecipes, name: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe .*Known: digits\.yaml"):
        allowed.order(name, {}, short=False)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.yaml").write_text((RECIPES / "digits.yaml").read_text())
    (tmp_path / "in" / "link.yaml").symlink_to(tmp_path / "out.yaml")
    assert AllowedRecipes(tmp_path / "in").files() == {}
    with pytest.raises(RecipeError, match="in has no recipes"):
        AllowedRecipes(tmp_path / "in").order("link.yaml", {}, short=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher.name": "/etc"},
        {"teacher.weights": "weights.pth"},
        {"name": "other"},
        {"then": "../../etc/evil.yaml"},
        {"data": {"kind": "text", "path": "/etc/passwd", "tokenizer": "/etc"}},
        {"student": {"name": "mobilenet_v2"}},
        {"teacher.config.method": "text"},
        {"evaluate.bertscore_model": "/models"},
        {"stages[0].distill.teachers": [{"name": "somewhere/model"}]},
    ],
)
def test_files_and_models_are_not_named_from_outside(allowed: AllowedRecipes, changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"^set \S+: .* cannot be set from outside, since it may name a file"):
        allowed.order("digits.yaml", changes, short=False)


def test_names_that_become_folders_stay_inside(allowed: AllowedRecipes) -> None:
    students = {"../../evil": {"depth": 1}}
    with pytest.raises(RecipeError, match=r"'\.\./\.\./evil' is no name of letters, digits"):
        allowed.order("study.yaml", {"stages[0].chain.students": students}, short=False)
    for key in ("a=b", "", "../x", "a b"):
        with pytest.raises(RecipeError, match=r"expected a dotted key, as stages\[0\]\.distill\.epochs"):
            allowed.order("digits.yaml", {key: 1}, short=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(value=JSON)
def test_values_reach_the_recipe_as_they_came(value: Any) -> None:
    text = _yaml(value)
    assert "\n" not in text and "\0" not in text and yaml.safe_load(text) == value
