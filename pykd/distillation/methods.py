"""The losses of a distillation: which there are, what of both models each compares, and how they are combined."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pykd.distillation.attention import attention_loss
from pykd.distillation.contrastive import contrastive_loss
from pykd.distillation.hidden import hidden_loss
from pykd.distillation.logits import logits_loss
from pykd.distillation.on_policy import on_policy_loss
from pykd.distillation.relation import relation_loss
from pykd.distillation.sequence import sequence_loss
from pykd.errors import nearest

Loss = Callable[..., Tensor]

#: What a loss may compare -> what it is called with, before its options.
COMPARES: dict[str, str] = {
    "logits": "student_logits, teacher_logits, labels, temperature=, alpha=, shift=",
    "hidden": "student states, teacher states, masks: lists over the layers of the map",
    "attention": "student maps, teacher maps, masks: lists over the layers of the map",
    "summary": "student rows, teacher rows: the mean of the last states",
    "teacher's sequences": "student_logits, labels, shift=",
    "student's sequences": "student_logits, teacher_logits, labels, shift=",
}


#: What a loss compares -> options of the generation of the texts, beside those of the loss.
GENERATION = {"teacher's sequences": ("beams",), "student's sequences": ("share",)}


@dataclass(frozen=True, eq=False)
class Method:
    """One loss of a distillation.

    loss: a function of tensors. compares: a key of COMPARES, which says what it is called with. projected: a linear map
    (a 1x1 convolution for feature maps) from the student's to the teacher's width is learned with the student and
    dropped at the end, where the widths differ. options: passed to the loss, by name; "beams" of the teacher's
    sequences, and "share" of the steps on the student's, go to the generation.

    Raises ValueError for an unknown ``compares``.

    >>> Method(logits_loss, "logits").projected
    False
    """

    loss: Loss
    compares: str = "logits"
    projected: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.compares not in COMPARES:
            raise ValueError(nearest("comparison", self.compares, COMPARES))


#: Name -> loss.
METHODS: dict[str, Method] = {
    "logits": Method(logits_loss),
    "hidden": Method(hidden_loss, "hidden", projected=True),
    "attention": Method(attention_loss, "attention"),
    "relation": Method(relation_loss, "summary"),
    "contrastive": Method(contrastive_loss, "summary", projected=True),
    "sequence": Method(sequence_loss, "teacher's sequences", options={"beams": 4}),
    "on_policy": Method(on_policy_loss, "student's sequences", options={"share": 0.5, "beta": 0.5}),
}

#: What `distill` takes: a name, a function like `logits_loss`, a Method, or several of them with a weight, or with a
#: weight and options, each.
MethodLike = str | Loss | Method
Methods = MethodLike | Mapping[Any, Any]


@dataclass(frozen=True)
class Weighted:
    """A method under its name, and its weight in the sum."""

    name: str
    method: Method
    weight: float


def resolve(methods: Methods) -> list[Weighted]:
    """Methods with their weights: ``"logits"``, ``{"logits": 1.0, "hidden": {"weight": 0.5, ...}}``, or functions.

    Raises ValueError for unknown names and options, no method at all, and weights that are not positive.

    >>> [(each.name, each.weight) for each in resolve({"logits": 1.0, "relation": {"weight": 0.1, "angle": 0.0}})]
    [('logits', 1.0), ('relation', 0.1)]
    """
    wanted = methods if isinstance(methods, Mapping) else {methods: 1.0}
    if not wanted:
        raise ValueError(f"no method to distil by: name some of {', '.join(METHODS)}")
    found = []
    for key, value in wanted.items():
        name, method = _named(key)
        options = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"the weight of method {name!r} must be a positive number, got {weight!r}")
        if options:
            _check_options(name, method, options)
        found.append(Weighted(name, dataclasses.replace(method, options={**method.options, **options}), float(weight)))
    return found


def _check_options(name: str, method: Method, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that neither the loss nor the generation takes."""
    takes = inspect.signature(method.loss).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        return
    known = [each.name for each in takes if each.kind is each.KEYWORD_ONLY or each.default is not each.empty]
    known += GENERATION.get(method.compares, ())
    for option in options:
        if option not in known:
            raise ValueError(f"method {name!r}: {nearest('option', option, ['weight', *known])}")


def _named(key: MethodLike) -> tuple[str, Method]:
    if isinstance(key, Method):
        return getattr(key.loss, "__name__", type(key.loss).__name__), key
    if callable(key):
        return getattr(key, "__name__", type(key).__name__), Method(key)
    if key not in METHODS:
        raise ValueError(nearest("method", key, METHODS))
    return key, METHODS[key]
