"""The recipes that a service may start: files of one folder, with changes that reach no file and no name outside."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykd.errors import RecipeError, nearest
from pykd.recipe import Recipe, load_recipe

#: Keys whose texts a request may change: each is a choice among methods or a pattern of layers, none a file or a model.
CHOICES = frozenset(
    {
        "autocast", "embeddings", "exclude", "importance", "include", "layers", "method", "metric", "observer",
        "pattern", "preset", "quantization", "scheme", "schemes", "scope", "teacher_scheme",
    }
)  # fmt: skip
#: Names that a request may bring into a section; some become folders of the run.
KEY = re.compile(r"[A-Za-z0-9_*][A-Za-z0-9_.*\[\]-]*")


@dataclass(frozen=True)
class Order:
    """A recipe that may be started: its file, what is changed in it, and the verb that carries it out."""

    file: Path
    overrides: tuple[str, ...]
    verb: str


class AllowedRecipes:
    """The YAML files directly inside ``folder``, by file name; links that lead out of it are not among them."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()

    def files(self) -> dict[str, Path]:
        """By name, as they are now."""
        found = sorted([*self.folder.glob("*.yaml"), *self.folder.glob("*.yml")])
        return {file.name: file for file in found if file.is_file() and file.resolve().parent == self.folder}

    def describe(self) -> list[dict[str, Any]]:
        """Every recipe that can be read: name, description, stages, whether it has settings for a quick try."""
        described: list[dict[str, Any]] = []
        for name, file in self.files().items():
            try:
                recipe = load_recipe(file)
            except RecipeError as error:
                described.append({"recipe": name, "error": " ".join(str(error).replace(str(file), name).split())})
                continue
            described.append(
                {
                    "recipe": name,
                    "description": recipe.description,
                    "stages": [stage.kind for stage in recipe.stages],
                    "short": bool(recipe.short),
                }
            )
        return described

    def order(self, name: str, changes: Mapping[str, Any], *, short: bool) -> Order:
        """Check a recipe and the changes to it, each by the recipe's own schema.

        changes: values by dotted key, as ``stages[0].distill.epochs``. Raises RecipeError for a name that is no file of
        the folder, for what the schema refuses, and for changes that name a file, a model or another text of the
        recipe's own choosing.
        """
        file = self.files().get(name)
        if file is None:
            raise RecipeError(
                nearest("recipe", name, self.files()) if self.files() else f"{self.folder} has no recipes"
            )
        for key in changes:
            if not KEY.fullmatch(key):
                raise RecipeError(f"set {key!r}: expected a dotted key, as stages[0].distill.epochs")
        overrides = tuple(f"{key}={_yaml(value)}" for key, value in changes.items())
        try:
            before = load_recipe(file, short=short)
            after = load_recipe(file, short=short, overrides=overrides)
        except RecipeError as error:
            raise RecipeError(str(error).replace(str(file), name)) from None  # where files are is no client's business
        _check_texts(before, after)
        return Order(file, overrides, "run" if after.study is None else "study")


def _check_texts(before: Recipe, after: Recipe) -> None:
    """Refuse texts and names that the recipe itself does not hold at the same place."""
    known = dict(_leaves(before.model_dump(mode="json")))
    for path, value in _leaves(after.model_dump(mode="json")):
        if path in known and known[path] == value:
            continue
        names = [step for step in path if isinstance(step, str)]
        shown = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
        wrong = next((name for name in names if not KEY.fullmatch(name)), None)
        if wrong is not None:
            raise RecipeError(f"set {shown!a}: {wrong!a} is no name of letters, digits and _ . * -")
        choice = CHOICES.intersection(names[-2:]) and "config" not in names
        if isinstance(value, str) and not choice:
            raise RecipeError(
                f"set {shown}: {value!a} cannot be set from outside, since it may name a file or a model; write it "
                f"into a recipe of the allowed folder. Texts can be set for {', '.join(sorted(CHOICES))}"
            )


def _leaves(content: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(path, value) of everything that is neither a mapping nor a list; empty ones are values."""
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(content, list) and content:
        for index, value in enumerate(content):
            yield from _leaves(value, (*path, index))
    else:
        yield path, content


def _yaml(value: Any) -> str:
    """A JSON value as one line of YAML that is read back as the same value."""
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()
