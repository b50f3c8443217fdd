"""From the words of a recipe to its data and its models."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from pykd.data import DataBundle, load_digits, load_text
from pykd.errors import RecipeError
from pykd.models.adapter import num_classes
from pykd.models.huggingface import load_huggingface
from pykd.models.students import derive
from pykd.models.torchvision import load_torchvision
from pykd.recipe.schema import Digits, Model, Recipe, Teacher, Text

#: Kind of data -> the task a Hugging Face model is loaded for.
TASK_OF = {"digits": "image-classification", "text": "sequence-classification"}


def build_data(recipe: Recipe, *, tokenizer: str | None = None) -> DataBundle:
    """The recipe's data set, read by ``tokenizer`` if one is given. Raises DataError or RecipeError, naming the key."""
    spec = recipe.data
    if isinstance(spec, Digits):
        return load_digits(image_size=spec.image_size, test_size=spec.test_size, seed=spec.seed, channels=spec.channels)
    return load_text(
        spec.path,
        tokenizer=tokenizer or _tokenizer(spec, recipe.teacher),
        text_column=spec.text_column,
        label_column=spec.label_column,
        max_length=spec.max_length,
        test_source=spec.test_path,
        split_column=spec.split_column,
        test_size=spec.test_size,
        seed=spec.seed,
        subset=spec.subset,
    )


def build_model(spec: Model, recipe: Recipe, data: DataBundle, *, key: str) -> nn.Module:
    """A model by name, or from scratch with weights drawn from the recipe's seed. ``key`` names it in errors."""
    torch.manual_seed(recipe.seed)
    classes = len(data.class_names)
    if (spec.source or recipe.teacher.source) == "torchvision":
        if spec.name is None:
            raise RecipeError(f"{key}.name is missing: torchvision builds models by name, as resnet18")
        model = load_torchvision(spec.name, num_classes=classes, weights=spec.weights, **spec.config)
    else:
        model = load_huggingface(
            spec.name,
            TASK_OF[recipe.data.kind],
            num_labels=None if _keeps_its_classes(spec) else classes,
            revision=spec.revision,
            config=spec.config,
        )
    if num_classes(model) != classes:
        raise RecipeError(
            f"{key}: {spec.name} tells {num_classes(model)} classes apart, but the data has {classes}: give it a "
            f"`train` section to learn the data's classes, or name a model that was trained on them"
        )
    return model


def build_student(recipe: Recipe, teacher: nn.Module, data: DataBundle) -> nn.Module:
    """What is to become the small model: cut from the teacher, or another architecture."""
    spec = recipe.student
    assert spec is not None
    if not spec.derived:
        return build_model(spec, recipe, data, key="student")
    options: dict[str, Any] = {"width": spec.width or 1.0, "depth": spec.depth}
    try:
        return derive(teacher, example=data.example(2), **options)
    except ValueError as error:
        raise RecipeError(f"student: {error}") from error


def teacher_key(recipe: Recipe, data: DataBundle) -> str:
    """Identity of a teacher that the run trains itself: data, architecture, training settings and seed."""
    parts = {"data": data.fingerprint, "seed": recipe.seed, "teacher": recipe.teacher.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _keeps_its_classes(spec: Model) -> bool:
    """A teacher that is used as it comes keeps its own head; everything else gets one for the data's classes."""
    return isinstance(spec, Teacher) and spec.train is None and spec.name is not None


def _tokenizer(spec: Text, teacher: Teacher) -> str:
    found = spec.tokenizer or teacher.name
    if found is None:
        raise RecipeError("data.tokenizer is missing: a teacher from scratch has none, so name one or give its folder")
    return found
