"""From a YAML file, a dict and ``key=value`` settings to a checked Recipe, or one sentence that says why not."""

from __future__ import annotations

import copy
import hashlib
import json
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from pykd.errors import RecipeError, nearest
from pykd.recipe.data_kinds import KINDS
from pykd.recipe.schema import Recipe

RecipeLike = str | pathlib.Path | Mapping[str, Any] | Recipe


def load_recipe(recipe: RecipeLike, *, overrides: Sequence[str] = (), short: bool = False) -> Recipe:
    """Read and check a recipe.

    recipe: YAML file, mapping, or a Recipe (returned as it is unless something is to be set).
    overrides: ``key=value`` pairs; the key is a path such as ``data.path`` or ``stages[1].prune.sparsity``, the value
    is YAML. short: apply the recipe's own ``short`` settings first.

    Raises RecipeError: one sentence with the path of the key, what came, and the nearest valid name.

    >>> load_recipe("recipes/digits.yaml", overrides=["seed=3"]).seed  # doctest: +SKIP
    3
    """
    if isinstance(recipe, Recipe) and not overrides and not short:
        return recipe
    content, where = _content(recipe)
    if short:
        if not content.get("short"):
            raise RecipeError(f"{where}: --short needs a section `short` in the recipe, and there is none")
        for key, value in dict(content["short"]).items():
            set_key(content, str(key), value, where=f"{where}: short")
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator:
            raise RecipeError(f"--set {item}: expected key=value, for instance --set data.path=texts.csv")
        set_key(content, key.strip(), _yaml(text, f"--set {key}"), where="--set")
    return _checked(content, where)


def changed(recipe: Recipe, values: Mapping[str, Any], *, where: str) -> Recipe:
    """A recipe with other values under some paths of keys, checked. ``where``: what an error begins with.

    >>> changed(load_recipe("recipes/digits.yaml"), {"seed": 3}, where="here").seed  # doctest: +SKIP
    3
    """
    content = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        set_key(content, key, copy.deepcopy(value), where=where)
    return _checked(content, where)


def _checked(content: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_sentence(error)}") from None


def recipe_hash(recipe: Recipe) -> str:
    """Identity of what a recipe computes: 16 hex digits over everything but its description, what comes after it, and
    the weights of a ranking, which only judge what was computed."""
    apart: dict[str, Any] = dict.fromkeys(("description", "then", "short", "ablate"), True)
    content = recipe.model_dump(mode="json", exclude={**apart, "study": {"weights"}})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    import yaml

    content = recipe.model_dump(mode="json", exclude_unset=True)
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def set_key(content: dict[str, Any], key: str, value: Any, *, where: str) -> None:
    """Set one value by its path, in place: ``teacher.train.epochs``, ``stages[1].prune.sparsity``."""
    steps = [int(number) if number else name for name, number in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key)]
    if not steps or not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[\d+\])*", key):
        raise RecipeError(f"{where} {key}: not a path of keys; write it like data.path or stages[1].prune.sparsity")
    place: Any = content
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if isinstance(step, int):
            if not isinstance(place, list) or step >= len(place):
                size = f"{len(place)} entries" if isinstance(place, list) else "no list"
                raise RecipeError(f"{where} {key}: there is no entry [{step}], the recipe has {size} there")
        elif not isinstance(place, dict):
            raise RecipeError(f"{where} {key}: {step!r} would be a key of {place!r}, which is not a section")
        if following is None:
            place[step] = value
        else:
            if isinstance(step, str) and place.get(step) is None:
                place[step] = {}
            place = place[step]


def get_key(content: Any, key: str) -> Any:
    """The value under a path of keys, as :func:`set_key` takes them; None where there is none.

    >>> get_key({"stages": [{"prune": {"sparsity": 0.5}}]}, "stages[0].prune.sparsity"), get_key({}, "a.b")
    (0.5, None)
    """
    for name, number in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key):
        if number:
            content = content[int(number)] if isinstance(content, list) and int(number) < len(content) else None
        else:
            content = content.get(name) if isinstance(content, dict) else None
    return content


def _content(recipe: RecipeLike) -> tuple[dict[str, Any], str]:
    """A copy that may be edited, and how to name the recipe in an error."""
    if isinstance(recipe, Recipe):
        return recipe.model_dump(mode="json", exclude_unset=True), "recipe"
    if isinstance(recipe, Mapping):
        return copy.deepcopy(dict(recipe)), "recipe"
    path = pathlib.Path(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise RecipeError(f"cannot read the recipe {path}: {reason}; the ready ones are in recipes/") from None
    content = _yaml(text, str(path))
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, got {type(content).__name__}")
    return content, str(path)


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise RecipeError(f"{where}: not valid YAML{line}: {problem}") from None


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, with the path of its key; how many more there are."""
    problems = error.errors()
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    path, known = _locate(first["loc"])
    kind = first["type"]
    if kind == "extra_forbidden":
        text = nearest("key", first["loc"][-1], known)
    elif kind == "missing":
        text = f"the key is missing; the section's keys are {', '.join(known)}"
    elif kind == "value_error":
        text = str(first["ctx"]["error"])
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        text = f"expected a section of keys, got {first['input']!r}; write {{}} for the defaults"
    elif kind in ("union_tag_not_found", "union_tag_invalid"):
        came = first["input"].get("kind") if isinstance(first["input"], Mapping) else first["input"]
        path = f"{path}.kind"
        text = nearest("kind", came, KINDS) if came is not None else f"the key is missing: one of {', '.join(KINDS)}"
    else:
        text = f"{first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']!r}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{path}: {text}{more}" if path else f"{text}{more}"


def _locate(loc: Sequence[int | str]) -> tuple[str, list[str]]:
    """Path of a problem as one writes it, and the keys of the section that holds it."""
    path, known = "", list(Recipe.model_fields)
    candidates: list[Any] = [Recipe]
    for step in loc:
        sections = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        tagged = [kind for kind in sections if _tag(kind) == step] if len(sections) > 1 else []
        if tagged:
            candidates = tagged
            known = list(tagged[0].model_fields)
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
        if isinstance(step, str) and sections:
            known = list(sections[0].model_fields)
            field = sections[0].model_fields.get(step)
            candidates = _flatten(field.annotation) if field is not None else []
    return path, known


def _tag(kind: type[BaseModel]) -> Any:
    field = kind.model_fields.get("kind")
    return typing.get_args(field.annotation)[0] if field is not None else None


def _flatten(annotation: Any) -> list[Any]:
    """The classes inside Optional, unions and lists."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, typing.Annotated):
        return [kind for part in typing.get_args(annotation) for kind in _flatten(part)]
    return [annotation]
