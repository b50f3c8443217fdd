"""Distillation without the teacher in memory: its part is read from a cache, batch by batch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pykd.data.bundle import DataBundle
from pykd.distillation.cache import counted_positions
from pykd.distillation.methods import Weighted
from pykd.distillation.teacher import ROW, Rows, with_rows
from pykd.distillation.teacher_cache import TeacherCache
from pykd.models.adapter import num_classes
from pykd.ops.kd_loss_topk import kd_loss_topk
from pykd.training.record import require_finite_weights
from pykd.training.source import Batch, Loader


class Offline:
    """What a cached teacher says about the batches of the training set that it was cached for."""

    def __init__(self, cache: TeacherCache, data: DataBundle | Loader) -> None:
        if not isinstance(data, DataBundle):
            raise TypeError(
                f"a cached teacher needs a DataBundle, whose examples have an index, got {type(data).__name__}"
            )
        if (data.fingerprint, len(data.train)) != (cache.fingerprint, len(cache)):
            raise ValueError(
                f"{cache.path} was cached for data {cache.fingerprint!r} of {len(cache)} examples, not for "
                f"{data.fingerprint!r} of {len(data.train)}: cache the teacher on this data"
            )
        self.cache = cache
        self.data = dataclasses.replace(data, train=Rows(data.train), collate=with_rows(data))

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids and log probabilities of a batch, on its device."""
        rows = batch.pop(ROW).tolist()
        labels = batch["labels"]
        counted = counted_positions(batch, self.cache.manifest["counted"]).cpu() if self.cache.per_position else None
        ids, log_probs = self.cache.batch(rows, counted)
        return ids.to(labels.device), log_probs.to(labels.device)

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """There is no model to keep still."""
        return contextlib.nullcontext()

    def loss(
        self, scores: Tensor, kept: tuple[Tensor, Tensor], labels: Tensor, *, temperature: float, alpha: float,
        shift: bool,
    ) -> Tensor:  # fmt: skip
        """`logits_loss` with what was kept of the teacher in place of its logits."""
        cache = self.cache
        return kd_loss_topk(scores, *kept, labels, missing=cache.missing, stored_temperature=cache.temperature,
                            temperature=temperature, alpha=alpha, shift=shift)  # fmt: skip


def check_offline(
    student: nn.Module, cache: TeacherCache, *, methods: Sequence[Weighted], temperature: float, **options: Any
) -> int:
    """The classes of both, if the student can learn from the cache in this way; else ValueError.

    options: those of `distill` that need the teacher itself, None where they were left out.
    """
    require_finite_weights(student, "student")
    named = " + ".join(each.name for each in methods)
    if named != "logits":
        raise ValueError(f"a cached teacher has no logits for method {named!r}: use method='logits', or the teacher")
    given = [name for name, value in options.items() if value is not None]
    if methods[0].weight != 1.0 or methods[0].method.options:
        given.append(f"method {named!r} with a weight or options")
    if given:
        raise ValueError(f"{' and '.join(given)} would change nothing with a cached teacher: leave it out")
    if num_classes(student) != cache.classes:
        raise ValueError(f"the student has {num_classes(student)} classes, the cached teacher {cache.classes}")
    if cache.missing == "tail" and temperature != cache.temperature:
        raise ValueError(
            f"the teacher was cached at temperature {cache.temperature}, and its tail cannot be tempered to "
            f"{temperature}: pass temperature={cache.temperature}, or cache it again"
        )
    return cache.classes
