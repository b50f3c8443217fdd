"""The sum of losses that one distillation minimises: what is observed, matched, projected and added up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pykd.distillation.generation import written
from pykd.distillation.methods import Method, Weighted
from pykd.distillation.teacher import device_of
from pykd.models.adapter import unwrap
from pykd.models.layers import match_layers
from pykd.models.views import View, eager_attention, observe, stages_of
from pykd.training.finetune import with_auxiliary
from pykd.training.labels import check_shapes, predicts_next
from pykd.training.rng import preserved_rng
from pykd.training.source import Batch
from pykd.training.state import sharded

OBSERVED = ("hidden", "attention", "summary")


@dataclass
class Pairing:
    """How one teacher's layers go with the student's.

    layers: for each stack, the teacher's layer of every student layer; maps: for feature maps, positions (student's,
    teacher's) in their lists; stages: names of the modules that show them, of student and teacher.
    """

    layers: list[list[int]] = field(default_factory=list)
    maps: list[tuple[int, int]] = field(default_factory=list)
    stages: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))


class Terms:
    """The losses of a distillation against one teacher or several, and what is learned beside the student.

    ``modules`` holds the projections, which are trained with the student and are no part of it. Values of the terms
    against several teachers are averaged by ``shares``, which add up to 1.
    """

    def __init__(
        self,
        methods: Sequence[Weighted],
        student: nn.Module,
        teachers: Sequence[nn.Module],
        shares: Sequence[float],
        *,
        temperature: float,
        alpha: float,
        classes: int,
    ) -> None:
        self.methods, self.student, self.teachers, self.shares = list(methods), student, list(teachers), list(shares)
        self.temperature, self.alpha, self.classes = temperature, alpha, classes
        self.wanted = {each.method.compares for each in methods} & set(OBSERVED)
        self.pairings = [Pairing() for _ in teachers]
        self.modules: dict[str, nn.Module] = {}

    @property
    def logits_only(self) -> bool:
        """Whether the teacher's logits for the training data say everything."""
        return all(each.method.compares == "logits" for each in self.methods)

    @property
    def through_head(self) -> bool:
        """Whether the student's logits are compared, so that every one of its parameters has a gradient."""
        return any(each.method.compares not in OBSERVED for each in self.methods)

    @contextlib.contextmanager
    def ready(self, example: Batch, *, seed: int) -> Iterator[None]:
        """Prepared for batches like ``example``, and what is compared is shown while inside."""
        with self.shown():
            self.prepare(example, seed=seed)
            yield

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """Around passes of the models: attention is computed eagerly where its maps are compared."""
        return eager_attention(self.student, *self.teachers) if "attention" in self.wanted else contextlib.nullcontext()

    def prepare(self, example: Batch, *, seed: int) -> None:
        """Match layers and make projections for batches like ``example``, inside of :meth:`shown`."""
        if self.wanted:
            with preserved_rng(), torch.no_grad():
                torch.manual_seed(seed)
                for number, teacher in enumerate(self.teachers):
                    self._pair(number, teacher, example)

    def look(self, model: nn.Module, batch: Batch) -> View:
        """The student's pass over a batch, with all that the terms compare."""
        return observe(model, batch, self.wanted, self.pairings[0].stages[0])

    def __call__(
        self, model: nn.Module, batch: Batch, teacher_logits: Tensor | None = None, *, mine: View | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every term by its name where there are several.

        teacher_logits, mine (what :meth:`look` gave): if known already.
        """
        device = batch["labels"].device
        for teacher in self.teachers:  # launched processes have the batch on a device of their own
            if teacher_logits is None and device_of(teacher) != device:
                teacher.to(device)
        on_data = any(each.method.compares != "student's sequences" for each in self.methods)
        mine = self.look(model, batch) if on_data and mine is None else mine
        if mine is not None:
            check_shapes(mine.logits, batch["labels"])
        its = [View(teacher_logits)] if teacher_logits is not None else self._teach(batch)
        total, noted = torch.zeros((), device=device), dict[str, Tensor]()
        for place, each in enumerate(self.methods):
            value = self._value(place, each.method, model, mine, its, batch)
            total = total + each.weight * value
            noted[each.name] = value.detach()
        total, own = with_auxiliary(total, mine.auxiliary if mine is not None else {})
        return total, (noted if len(self.methods) > 1 else {}) | own

    def _teach(self, batch: Batch) -> list[View]:
        if all(each.method.compares.endswith("sequences") for each in self.methods):
            return []
        with torch.no_grad():
            return [
                observe(teacher, batch, self.wanted, pairing.stages[1])
                for teacher, pairing in zip(self.teachers, self.pairings, strict=True)
            ]

    def _value(
        self, place: int, method: Method, model: nn.Module, mine: View | None, its: Sequence[View], batch: Batch
    ) -> Tensor:
        options, shift = dict(method.options), predicts_next(unwrap(model))
        if method.compares == "student's sequences":
            mine, its, batch = self._on_policy(model, batch, mine, its, options.pop("share", 1.0))
        assert mine is not None
        if method.compares == "teacher's sequences":
            options.pop("beams", None)
            return method.loss(mine.logits[..., : self.classes], batch["labels"], shift=shift, **options)
        values = []
        for number, view in enumerate(its):
            arguments = self._arguments(place, number, method, mine, view, batch)
            if method.compares == "logits":
                options = {"temperature": self.temperature, "alpha": self.alpha, "shift": shift, **options}
            elif method.compares == "student's sequences":
                options = {"shift": shift, **options}
            values.append(self.shares[number] * method.loss(*arguments, **options))
        return torch.stack(values).sum()

    def _on_policy(
        self, model: nn.Module, batch: Batch, mine: View | None, its: Sequence[View], share: float
    ) -> tuple[View, Sequence[View], Batch]:
        """Both models on the student's own sequences, in this share of the steps, else on those of the data."""
        if sharded(model):  # processes would write for different numbers of passes, and wait for each other for ever
            raise ValueError("a student that writes needs whole weights in every process: run under DDP, not FSDP2")
        if torch.rand(()).item() < share:
            batch = written(model, batch, do_sample=True)
        elif mine is not None and its:
            return mine, its, batch
        with torch.no_grad():
            its = [observe(teacher, batch) for teacher in self.teachers]
        return observe(model, batch), its, batch

    def _arguments(
        self, place: int, number: int, method: Method, mine: View, its: View, batch: Mapping[str, Tensor]
    ) -> tuple[Any, ...]:
        """What the loss is called with, the student's part projected where there is a projection."""
        if method.compares in ("logits", "student's sequences"):
            return mine.logits[..., : self.classes], its.logits[..., : self.classes], batch["labels"]
        if method.compares == "summary":
            assert mine.summary is not None and its.summary is not None
            return self._projected(place, number, 0, mine.summary), its.summary
        pairs = self._pairs(method.compares, self.pairings[number], mine, its)
        own = [self._projected(place, number, at, s) for at, (s, _, _) in enumerate(pairs)]
        return own, [t for _, t, _ in pairs], [mask for _, _, mask in pairs]

    def _pairs(self, kind: str, pairing: Pairing, mine: View, its: View) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        if pairing.maps:
            return [(mine.hidden[0][s], its.hidden[0][t], None) for s, t in pairing.maps]
        pairs: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for stack, followed in enumerate(pairing.layers):
            own, other, mask = getattr(mine, kind)[stack], getattr(its, kind)[stack], mine.masks[stack]
            first = [(0, 0)] if kind == "hidden" else []  # the embeddings come before the layers
            places = [*first, *((s + len(first), t + len(first)) for s, t in enumerate(followed))]
            for s, t in places:
                positions = (own[s].shape[0], own[s].shape[-2])  # of states, and the queries of attention maps
                fits = mask if mask is not None and tuple(mask.shape) == positions else None
                pairs.append((own[s], other[t], fits))
        return pairs

    def _projected(self, place: int, number: int, at: int, value: Tensor) -> Tensor:
        module = self.modules.get(f"{place}-{number}-{at}")
        return value if module is None else module(value)

    def _pair(self, number: int, teacher: nn.Module, example: Batch) -> None:
        """Match one teacher's layers, and make the projections that its widths need."""
        stages = stages_of(self.student, example), stages_of(teacher, example)
        mine, its = (
            _quietly(model, example, self.wanted, names)
            for model, names in zip((self.student, teacher), stages, strict=True)
        )
        pairing = self.pairings[number] = Pairing(stages=stages)
        if {"hidden", "attention"} & self.wanted:
            _match(pairing, self.student, teacher, mine, its, self.wanted)
        for place, each in enumerate(self.methods):
            if each.method.projected and each.method.compares in OBSERVED:
                arguments = self._arguments(place, number, each.method, mine, its, example)
                own, other = (part if isinstance(part, list) else [part] for part in arguments[:2])
                for at, (s, t) in enumerate(zip(own, other, strict=True)):
                    axis = 1 if s.dim() == 4 else -1
                    if s.shape[axis] != t.shape[axis]:
                        self.modules[f"{place}-{number}-{at}"] = _projection(s, t, axis)


def _quietly(model: nn.Module, example: Batch, wanted: set[str], stages: list[str]) -> View:
    training = model.training
    try:
        return observe(model.eval(), example, wanted, stages)
    finally:
        model.train(training)


def _projection(mine: Tensor, its: Tensor, axis: int) -> nn.Module:
    if axis == 1:
        return nn.Conv2d(mine.shape[1], its.shape[1], 1, bias=False).to(mine.device)
    return nn.Linear(mine.shape[-1], its.shape[-1], bias=False).to(mine.device)


def _match(pairing: Pairing, student: nn.Module, teacher: nn.Module, mine: View, its: View, wanted: set[str]) -> None:
    names = f"{type(student).__name__} and {type(teacher).__name__}"
    if bool(pairing.stages[0]) != bool(pairing.stages[1]):
        raise ValueError(f"{names} are a transformer and a convolutional network: use 'relation' or 'contrastive'")
    if not pairing.stages[0]:
        pairing.layers = match_layers(student, teacher)
        lists = [(own, other) for kind in ("hidden", "attention") if kind in wanted
                 for own, other in zip(getattr(mine, kind), getattr(its, kind), strict=True)]  # fmt: skip
        if any(own[0].shape[-2] != other[0].shape[-2] for own, other in lists):
            raise ValueError(f"{names} see different numbers of positions: use 'relation' or 'contrastive'")
        return
    if "attention" in wanted:
        raise ValueError(f"{names} are convolutional networks without attention maps: use 'hidden'")
    sizes = [tuple(feature.shape[2:]) for feature in its.hidden[0]]
    pairing.maps = [(s, sizes.index(tuple(feature.shape[2:]))) for s, feature in enumerate(mine.hidden[0])
                    if tuple(feature.shape[2:]) in sizes]  # fmt: skip
    if not pairing.maps:
        raise ValueError(f"{names} share no resolution of feature maps: use 'relation' or 'contrastive'")
