"""The kinds of stages: each takes the model as the stage before left it and calls one verb."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pykd.data import DataBundle
from pykd.data.bundle import batches, permutation
from pykd.distillation import distill, distill_chain
from pykd.distillation.chain import INDEX as CHAIN_INDEX
from pykd.pipeline.compress import compress_to
from pykd.pipeline.sources import build_model, make_student
from pykd.pruning import prune
from pykd.quantization import assign_bits, convert_qat, prepare_qat, quantize
from pykd.recipe.guarded import Guarded
from pykd.recipe.router import Calibrate
from pykd.recipe.schema import MIXED, Chain, CompressTo, Distill, Prune, Qat, Quantize, Recipe, Stage
from pykd.recipe.train import Train
from pykd.training.checkpoint import has_checkpoint
from pykd.training.guarded import Change, guarded_change
from pykd.training.watched import watched

logger = logging.getLogger("pykd.pipeline")


@dataclass(frozen=True)
class Context:
    """What a stage may use besides the model it changes."""

    recipe: Recipe
    data: DataBundle
    teacher: nn.Module
    checkpoints: Path
    progress: bool | None
    name: str
    log: Path | None = None


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
        "log_file": context.log,
    }


def _distill(settings: Any, model: nn.Module, context: Context) -> nn.Module:
    assert isinstance(settings, Distill)
    return distill(
        model,
        [context.teacher, *_further_teachers(settings, context)],
        context.data,
        teacher_weights=[settings.teacher_weight, *(each.weight for each in settings.teachers)],
        guard=settings.guard.guard() if settings.guard is not None else None,
        prune=settings.gradual.gradual(context.recipe.seed) if settings.gradual is not None else None,
        **_loss_options(settings),
        **train_options(settings, context),
    )


def _chain(settings: Any, model: nn.Module, context: Context) -> nn.Module:
    assert isinstance(settings, Chain)
    options = link_options(settings, context)
    for name in ("checkpoint_dir", "resume", "label"):
        del options[name]
    made = distill_chain(
        context.teacher,
        {name: student_maker(settings, name, context) for name in settings.students},
        context.data,
        arms=settings.arms,
        metric=settings.metric,
        output_dir=context.checkpoints,
        resume=(context.checkpoints / CHAIN_INDEX).exists(),
        **options,
    )
    logger.info("the chain:\n%s", made.table())
    return made.student


def link_options(settings: Chain, context: Context) -> dict[str, Any]:
    """What every training of a chain takes."""
    guard = {} if settings.guard is None else {"guard": settings.guard.guard()}
    return {**_loss_options(settings), **train_options(settings, context), **guard}


def student_maker(settings: Chain, name: str, context: Context) -> Callable[[nn.Module], nn.Module]:
    """From the teacher to one student of a chain, untrained."""
    key = f"stages[0].chain.students.{name}"
    return lambda teacher: make_student(settings.students[name], context.recipe, teacher, context.data, key=key)


def _loss_options(settings: Distill) -> dict[str, Any]:
    names = ("temperature", "alpha", "method", "teacher_scheme")
    return {name: getattr(settings, name) for name in names}


def _further_teachers(settings: Distill, context: Context) -> list[nn.Module]:
    return [
        build_model(spec, context.recipe, context.data, key=f"{context.name}: teachers[{number}]").eval()
        for number, spec in enumerate(settings.teachers)
    ]


def _prune(settings: Any, model: nn.Module, context: Context) -> nn.Module:
    assert isinstance(settings, Prune)

    def change(model: nn.Module, exclude: Sequence[str]) -> nn.Module:
        return prune(
            model,
            method=settings.method,
            sparsity=settings.sparsity,
            scope=settings.scope,
            pattern=settings.pattern,
            importance=settings.importance,
            data=context.data,
            samples=settings.samples,
            batch_size=settings.batch_size,
            seed=context.recipe.seed,
            include=settings.include,
            exclude=[*(settings.exclude or ()), *exclude] or None,
            example=context.data.example(2),
            rows=settings.rows,
        )

    return _guarded(settings.guard, model, change, context)


def _quantize(settings: Any, model: nn.Module, context: Context) -> nn.Module:
    assert isinstance(settings, Quantize)

    def change(model: nn.Module, exclude: Sequence[str]) -> nn.Module:
        return _quantized(settings, model, context, exclude)

    return _guarded(settings.guard, model, change, context)


def _guarded(settings: Guarded | None, model: nn.Module, change: Change, context: Context) -> nn.Module:
    """The change, or as much of it as the guard lets pass."""
    if settings is None:
        return change(model, ())
    validate, guard = watched(None, settings.guard(), context.data, teacher=context.teacher)
    assert validate is not None and guard is not None
    return guarded_change(model, change, validate, guard, bisect=settings.bisect, label=context.name)


def _quantized(settings: Quantize, model: nn.Module, context: Context, exclude: Sequence[str]) -> nn.Module:
    scheme: Any = settings.scheme
    if scheme == MIXED:
        scheme = assign_bits(
            model,
            context.data,
            candidates=settings.candidates,
            bits=settings.bits,
            seed=context.recipe.seed,
            group_size=settings.group_size,
            symmetric=settings.symmetric,
            include=settings.include,
            exclude=[*(settings.exclude or ()), *exclude] or None,
        )
    return quantize(
        model,
        scheme=scheme,
        method=settings.method,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        observer=settings.observer,
        data=context.data,
        samples=settings.samples,
        batch_size=settings.batch_size,
        seed=context.recipe.seed,
        embeddings=settings.embeddings,
        include=settings.include,
        exclude=[*(settings.exclude or ()), *exclude] or None,
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


def _compress_to(settings: Any, model: nn.Module, context: Context) -> nn.Module:
    assert isinstance(settings, CompressTo)
    options = train_options(settings, context)
    for name in ("checkpoint_dir", "resume", "label"):
        del options[name]
    names = ("depths", "prunings", "schemes", "embeddings", "group_size", "max_candidates", "max_seconds")
    found = compress_to(
        model,
        settings.target(),
        context.data,
        teacher=context.teacher,
        method=settings.quantization,
        loss=_loss_options(settings),
        latency_rounds=context.recipe.evaluate.latency_rounds,
        output_dir=context.checkpoints,
        **{name: getattr(settings, name) for name in names},
        **options,
    )
    return found.model


def _calibrate(settings: Any, model: nn.Module, context: Context) -> nn.Module:
    assert isinstance(settings, Calibrate)
    from pykd.models.router_threshold import calibrate

    chosen = permutation(len(context.data.test), seed=context.recipe.seed)[: settings.samples]
    rows = [context.data.test[row] for row in chosen]
    calibrate(model, batches(rows, context.data.collate, settings.batch_size), deep_share=settings.deep_share)
    return model


STAGES: dict[str, Callable[[Any, nn.Module, Context], nn.Module]] = {
    "distill": _distill,
    "chain": _chain,
    "prune": _prune,
    "recover": _distill,
    "quantize": _quantize,
    "qat": _qat,
    "compress_to": _compress_to,
    "calibrate": _calibrate,
}
