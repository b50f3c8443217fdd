"""A recipe without one of its components: what `ablate` names, as recipes of their own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pykd.errors import RecipeError, nearest
from pykd.recipe.load import load_recipe, set_key
from pykd.recipe.schema import Recipe

Content = dict[str, Any]
Edit = Callable[[Content], None]

#: Stages that train with a teacher.
TRAININGS = ("distill", "chain", "recover", "qat", "compress_to")
#: Groups of components: each one of them in turn.
GROUPS = ("stages", "losses", "students")
#: Components of the dual-branch router -> the values of its configuration that take them away.
ROUTER: dict[str, dict[str, Any]] = {
    "experts": {"experts": 0},
    "router": {"routing": "deep"},
    "losses.load": {"load_weight": 0.0},
    "losses.balance": {"balance_weight": 0.0},
}
#: What decides the teacher and how anything is measured.
GROUND = ("data", "seed", "teacher", "evaluate")


@dataclass(frozen=True)
class Variant:
    """A recipe without one component. shared: how many of its first stages are those of the whole recipe, the teacher's
    being number 0; -1 where not even the teacher is the same."""

    name: str
    recipe: Recipe
    shared: int


def variants(recipe: Recipe) -> list[Variant]:
    """One recipe for each component that ``recipe.ablate`` names, without that component.

    The comparisons that a chain is trained beside are left out, and so is what runs after it. Raises RecipeError for a
    component that the recipe does not have, and where the rest is no recipe.

    >>> recipe = {"name": "r", "data": {"kind": "digits"}, "teacher": {"source": "torchvision", "name": "resnet18",
    ...           "train": {}}, "stages": [{"prune": {}}, {"recover": {}}], "ablate": ["stages", "losses.labels"]}
    >>> [(each.name, each.shared) for each in variants(load_recipe(recipe))]
    [('stages.prune', 0), ('stages.recover', 1), ('losses.labels', 1)]
    """
    whole = recipe.model_dump(mode="json", exclude_unset=True)
    parts = components(whole)
    found: dict[str, Edit] = {}
    for entry in recipe.ablate:
        named = _custom(entry) if isinstance(entry, dict) else _known(entry, parts)
        found.update(named)
    return [_variant(name, edit, whole) for name, edit in found.items()]


def components(content: Content) -> dict[str, Edit]:
    """What can be left out of a recipe by name, and how."""
    stages = [next(iter(stage)) for stage in content["stages"]]
    found = {}
    if len(stages) > 1:
        for index, kind in enumerate(stages):
            name = f"stages.{kind}" if stages.count(kind) == 1 else f"stages.{index + 1}-{kind}"
            found[name] = _without_stage(index)
    for loss in dict.fromkeys(loss for stage in content["stages"] for loss in _losses(stage)):
        found[f"losses.{loss}"] = _without_loss(loss)
    if _routers(content):
        found |= {name: _of_routers(values) for name, values in ROUTER.items()}
    students = list(content["stages"][0].get("chain", {}).get("students", ()))
    if len(students) > 1:
        found |= {f"students.{name}": _without_student(name) for name in students}
    return found


def _routers(content: Content) -> list[Content]:
    """The sections that describe a router: configurations of the family, and students made of a teacher's layers."""
    models = [content.get("teacher"), content.get("student")]
    models += (content["stages"][0].get("chain") or {}).get("students", {}).values()
    configs = [model["config"] for model in models if model and model.get("config")]
    sections = [model["router"] for model in models if model and model.get("router") is not None]
    return [config for config in configs if config.get("model_type") == "pykd-router"] + sections


def _known(entry: str, parts: dict[str, Edit]) -> dict[str, Edit]:
    chosen = {name: edit for name, edit in parts.items() if entry in (name, name.partition(".")[0])}
    if not chosen:
        groups = [group for group in GROUPS if any(name.startswith(f"{group}.") for name in parts)]
        raise RecipeError(f"ablate: {nearest('component', entry, [*groups, *parts])}")
    return chosen


def _custom(entry: dict[str, dict[str, Any]]) -> dict[str, Edit]:
    """Components that the recipe describes itself, by the keys that take them away."""
    for name in entry:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is None:
            raise RecipeError(f"ablate: {name!r} would name a folder: use letters, digits, dots, dashes, underscores")
    return {name: _setting(name, values) for name, values in entry.items()}


def _variant(name: str, edit: Edit, whole: Content) -> Variant:
    content = copy.deepcopy(whole)
    for key in ("ablate", "search", "study", "short", "then"):
        content.pop(key, None)
    edit(content)
    for stage in content["stages"]:
        if "chain" in stage:
            stage["chain"]["arms"] = []
    try:
        recipe = load_recipe(content)
    except RecipeError as error:
        raise RecipeError(f"ablate: without {name} the rest is no recipe: {error}") from None
    return Variant(name, recipe, _shared(whole, content))


def _shared(whole: Content, part: Content) -> int:
    if any(whole.get(key) != part.get(key) for key in GROUND):
        return -1
    same = 0
    if whole.get("student") == part.get("student"):
        for one, other in zip(whole["stages"], part["stages"], strict=False):
            if one != other:
                break
            same += 1
    return same


def _without_stage(index: int) -> Edit:
    def edit(content: Content) -> None:
        del content["stages"][index]

    return edit


def _without_student(name: str) -> Edit:
    def edit(content: Content) -> None:
        del content["stages"][0]["chain"]["students"][name]

    return edit


def _setting(name: str, values: dict[str, Any]) -> Edit:
    def edit(content: Content) -> None:
        for key, value in values.items():
            set_key(content, key, value, where=f"ablate: {name}")

    return edit


def _of_routers(values: dict[str, Any]) -> Edit:
    """These values in every router; where no router is left, no threshold is drawn either."""

    def edit(content: Content) -> None:
        for section in _routers(content):
            section.update(values)
        if "routing" in values:
            content["stages"] = [stage for stage in content["stages"] if "calibrate" not in stage]

    return edit


def _without_loss(loss: str) -> Edit:
    """No training has this loss. The one of logits holds the labels' term: ``alpha`` takes either away."""

    def edit(content: Content) -> None:
        for stage in content["stages"]:
            if loss in _losses(stage):
                settings = next(iter(stage.values()))
                if loss in ("logits", "labels"):
                    settings["alpha"] = 0.0 if loss == "logits" else 1.0
                else:
                    del settings["method"][loss]

    return edit


def _losses(stage: Content) -> Iterator[str]:
    """The losses of one stage, where there is one beside them."""
    kind, settings = next(iter(stage.items()))
    if kind not in TRAININGS:
        return
    method = (settings or {}).get("method", "logits")
    named = [method] if isinstance(method, str) else list(method)
    alpha = (settings or {}).get("alpha", 0.5)
    if "logits" in named and alpha < 1 and alpha > 0:
        yield from ("logits", "labels")
    if len(named) > 1:
        yield from (name for name in named if name != "logits")
