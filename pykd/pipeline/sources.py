"""From the words of a recipe to its data and its models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pykd.data import DataBundle, load_digits, load_language, load_pairs, load_text, load_tokens, with_replay
from pykd.data.bundle import Batch, permutation
from pykd.errors import RecipeError
from pykd.models.adapter import num_classes
from pykd.models.huggingface import load_huggingface
from pykd.models.layer_choice import BY_DATA
from pykd.models.sizes import preset_config
from pykd.models.students import derive
from pykd.models.torchvision import load_torchvision
from pykd.recipe.data_kinds import Digits, Language, Pairs, Text, Texts, Tokens
from pykd.recipe.models import FurtherTeacher, Model, Student, Teacher
from pykd.recipe.router import Router
from pykd.recipe.schema import Recipe

#: Kind of data -> the task a Hugging Face model is loaded for; plain texts name theirs.
TASK_OF = {
    "digits": "image-classification",
    "text": "sequence-classification",
    "tokens": "token-classification",
    "pairs": "seq2seq-lm",
}
#: Training examples, in batches, that layers and channels of a student are measured on.
MEASURED_BATCHES, MEASURED_ROWS = 4, 16


def build_data(recipe: Recipe, *, tokenizer: str | None = None) -> DataBundle:
    """The recipe's data set, read by ``tokenizer`` if one is given. Raises DataError or RecipeError, naming the key."""
    spec = recipe.data
    if isinstance(spec, Digits):
        return load_digits(image_size=spec.image_size, test_size=spec.test_size, seed=spec.seed, channels=spec.channels)
    reader = tokenizer or _tokenizer(spec, recipe.teacher)
    data = _load(spec, spec.path, spec.test_path, reader, None)
    if spec.replay is None:
        return data
    old = _load(spec, spec.replay.path, None, reader, data)
    return with_replay(data, old, share=spec.replay.share, seed=spec.seed)


def _load(spec: Texts, path: str, test_path: str | None, tokenizer: str, like: DataBundle | None) -> DataBundle:
    """Data of the kind of ``spec`` from ``path``, with the classes of the data that it is to be mixed with."""
    names = {"test_path", "kind", "replay", "path", "tokenizer"}
    options: dict[str, Any] = {name: getattr(spec, name) for name in type(spec).model_fields if name not in names}
    options |= {"tokenizer": tokenizer, "test_source": test_path}
    if like is not None and like.class_names:
        options["class_names"] = like.class_names
    return LOADERS[type(spec)](path, **options)


#: Section of a recipe -> the loader that takes its keys.
LOADERS: dict[type[Texts], Callable[..., DataBundle]] = {
    Text: load_text,
    Tokens: load_tokens,
    Pairs: load_pairs,
    Language: load_language,
}


def task_of(recipe: Recipe) -> str:
    """The task that the recipe's Hugging Face models are loaded for."""
    return recipe.data.task if isinstance(recipe.data, Language) else TASK_OF[recipe.data.kind]


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
            task_of(recipe),
            num_labels=None if _keeps_its_classes(spec) or not classes else classes,
            revision=spec.revision,
            config=_config(spec, data),
        )
        if classes and not _keeps_its_classes(spec):  # or other loaders call them LABEL_0, LABEL_1 ...
            config: Any = model.config
            config.id2label = {number: str(name) for number, name in enumerate(data.class_names)}
            config.label2id = {name: number for number, name in config.id2label.items()}
    if classes and num_classes(model) != classes:
        raise RecipeError(
            f"{key}: {spec.name} tells {num_classes(model)} classes apart, but the data has {classes}: give it a "
            f"`train` section to learn the data's classes, or name a model that was trained on them"
        )
    return model


def build_student(recipe: Recipe, teacher: nn.Module, data: DataBundle) -> nn.Module:
    """What is to become the small model: cut from the teacher, or another architecture."""
    assert recipe.student is not None
    return make_student(recipe.student, recipe, teacher, data, key="student")


def make_student(spec: Student, recipe: Recipe, teacher: nn.Module, data: DataBundle, *, key: str) -> nn.Module:
    """A student as its section says, named by ``key`` in errors."""
    if not spec.derived:
        return build_model(spec, recipe, data, key=key)
    if spec.router is not None:
        return _router(spec.router, recipe, teacher, key=key)
    names = ("preset", "depth", "layers", "hidden_size", "heads", "intermediate_size")
    options: dict[str, Any] = {name: getattr(spec, name) for name in names}
    by_data = isinstance(spec.layers, str) and spec.layers in BY_DATA
    if by_data or spec.hidden_size is not None or spec.preset is not None:
        options["batches"] = _measured(data, recipe.seed)
    try:
        return derive(teacher, example=data.example(2), width=spec.width or 1.0, **options)
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from error


def _router(spec: Router, recipe: Recipe, teacher: nn.Module, *, key: str) -> nn.Module:
    """A student with branches; transformers, which its family belongs to, is loaded for it alone."""
    from pykd.models.router_teacher import from_teacher

    try:
        made: nn.Module = from_teacher(teacher, seed=recipe.seed, **spec.model_dump())
    except ValueError as error:
        raise RecipeError(f"{key}.router: {error}") from error
    return made


def _measured(data: DataBundle, seed: int) -> list[Batch]:
    """Some training examples, chosen by the seed."""
    rows = permutation(len(data.train), seed=seed)[: MEASURED_BATCHES * MEASURED_ROWS]
    starts = range(0, len(rows), MEASURED_ROWS)
    return [data.collate([data.train[row] for row in rows[start : start + MEASURED_ROWS]]) for start in starts]


def _config(spec: Model, data: DataBundle) -> dict[str, Any]:
    """The model's configuration; from scratch with its preset's size, and what the tokenizer knows."""
    if "model_type" not in spec.config:
        return dict(spec.config)
    config = dict(spec.config)
    if spec.preset is not None:
        config = preset_config(spec.preset, config.pop("model_type"), **config)
    if data.tokenizer is not None:
        tokenizer = data.tokenizer
        known = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        known |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "sep_token_id")}
        if data.task == "seq2seq-lm":
            known["decoder_start_token_id"] = tokenizer.pad_token_id
        config = {name: value for name, value in known.items() if value is not None} | config
    return config


def teacher_key(recipe: Recipe, data: DataBundle) -> str:
    """Identity of a teacher that the run trains itself: data, architecture, training settings and seed."""
    parts = {"data": data.fingerprint, "seed": recipe.seed, "teacher": recipe.teacher.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _keeps_its_classes(spec: Model) -> bool:
    """A teacher that is used as it comes keeps its own head; everything else gets one for the data's classes."""
    as_it_comes = isinstance(spec, FurtherTeacher) or (isinstance(spec, Teacher) and spec.train is None)
    return as_it_comes and spec.name is not None


def _tokenizer(spec: Texts, teacher: Teacher) -> str:
    found = spec.tokenizer or teacher.name
    if found is None:
        raise RecipeError("data.tokenizer is missing: a teacher from scratch has none, so name one or give its folder")
    return found
