"""The kinds of stages: each takes the model as the stage before left it and calls one verb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pykd.data import DataBundle
from pykd.distillation import distill
from pykd.pruning import prune
from pykd.quantization import convert_qat, prepare_qat, quantize
from pykd.recipe.schema import Distill, Prune, Qat, Quantize, Recipe, Stage, Train
from pykd.training.checkpoint import has_checkpoint


@dataclass(frozen=True)
class Context:
    """What a stage may use besides the model it changes."""

    recipe: Recipe
    data: DataBundle
    teacher: nn.Module
    checkpoints: Path
    progress: bool | None
    name: str


def apply_stage(stage: Stage, model: nn.Module, context: Context) -> nn.Module:
    """Run one stage on the model, in place. Raises ValueError or RuntimeError as the verb does."""
    return STAGES[stage.kind](stage.settings, model, context)


def train_options(settings: Train, context: Context) -> dict[str, Any]:
    """What every training of a run takes: the recipe's numbers and seed, and where its checkpoints are.

    A checkpoint can only be there if this very stage was interrupted: it is continued without asking.
    """
    names = list(Train.model_fields)
    return {name: getattr(settings, name) for name in names} | {
        "seed": context.recipe.seed,
        "checkpoint_dir": context.checkpoints,
        "resume": has_checkpoint(context.checkpoints),
        "progress": context.progress,
        "label": context.name,
    }


def _distill(settings: Any, model: nn.Module, context: Context) -> nn.Module:
    assert isinstance(settings, Distill)
    return distill(
        model,
        context.teacher,
        context.data,
        temperature=settings.temperature,
        alpha=settings.alpha,
        **train_options(settings, context),
    )


def _prune(settings: Any, model: nn.Module, context: Context) -> nn.Module:
    assert isinstance(settings, Prune)
    return prune(
        model,
        method=settings.method,
        sparsity=settings.sparsity,
        include=settings.include,
        exclude=settings.exclude,
        example=context.data.example(2),
    )


def _quantize(settings: Any, model: nn.Module, context: Context) -> nn.Module:
    assert isinstance(settings, Quantize)
    return quantize(
        model,
        scheme=settings.scheme,
        method=settings.method,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        data=context.data,
        samples=settings.samples,
        batch_size=settings.batch_size,
        seed=context.recipe.seed,
        embeddings=settings.embeddings,
        include=settings.include,
        exclude=settings.exclude,
    )


def _qat(settings: Any, model: nn.Module, context: Context) -> nn.Module:
    assert isinstance(settings, Qat)
    prepare_qat(
        model,
        settings.scheme,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        search_every=settings.search_every,
        include=settings.include,
        exclude=settings.exclude,
    )
    return convert_qat(_distill(settings, model, context))


STAGES: dict[str, Callable[[Any, nn.Module, Context], nn.Module]] = {
    "distill": _distill,
    "prune": _prune,
    "recover": _distill,
    "quantize": _quantize,
    "qat": _qat,
}
