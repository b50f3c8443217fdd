"""What the ops share that return the loss of each row and its gradient by the student's logits, computed together.

Such an op is `op(student, *teacher, labels, scale, need_grad, *options) -> (losses, gradient)`, its in-place form
`op_(student, *teacher, labels, scale, *options) -> losses` writes the gradient over the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pykd.ops import memory
from pykd.ops.dispatch import lib


class OnlyOnce(torch.autograd.Function):
    """Identity on the gradient; differentiating it once more is an error instead of a silent zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, op: str) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.op} has no second derivative: drop create_graph=True, or write the loss in plain torch"
        )


def register_autograd(op: str) -> None:
    """Backward of the op: its second output times the upstream gradient of each row."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or autograd would fill a second buffer of the gradient's size with zeros
        ctx.save_for_backward(output[1])
        ctx.need_grad = output[1].dim() == 2
        ctx.constants = [None] * (len(inputs) - 1)

    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None, *ctx.constants)
        if not ctx.need_grad:
            raise RuntimeError(f"{op} ran with need_grad=False, so there is no gradient: call it with need_grad=True")
        return (_chain(op, ctx.saved_tensors[0], upstream), *ctx.constants)

    torch.library.register_autograd(f"pykd::{op}", backward, setup_context=setup_context, lib=lib)


def _chain(op: str, gradient: Tensor, upstream: Tensor) -> Tensor:
    plain = type(gradient) is Tensor and type(upstream) is Tensor
    if plain and torch.is_grad_enabled():  # create_graph=True
        twice = (gradient * upstream.detach().unsqueeze(1)).to(gradient.dtype)
        return OnlyOnce.apply(twice.requires_grad_(), op)  # type: ignore[no-untyped-call, no-any-return]
    if plain and upstream.device.type == "cpu":
        return scale_gradient(gradient, upstream)
    return (gradient * upstream.unsqueeze(1)).to(gradient.dtype)


def scale_gradient(gradient: Tensor, upstream: Tensor) -> Tensor:
    """`gradient * upstream` per row on the CPU; the gradient itself, without a sweep, where upstream is all ones."""
    if bool((upstream == 1).all()):
        return gradient
    result = memory.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    return torch.mul(gradient, upstream.unsqueeze(1), out=result)


def call(
    op: str,
    student: Tensor,
    teacher: Mapping[str, Tensor],
    labels: Tensor | None,
    scale: Tensor,
    options: tuple[Any, ...],
    inplace: bool,
) -> Tensor:
    """Row losses of the op under autograd; `teacher` holds its tensors, flat in rows, by the names callers know."""
    need_grad = student.requires_grad and torch.is_grad_enabled()
    inputs = (*teacher.values(), labels, scale)
    if inplace and need_grad and not torch.compiler.is_compiling():
        check_inplace(student, teacher)
        return _overwrite(student, getattr(torch.ops.pykd, f"{op}_"), inputs, options)
    flat = student.reshape(-1, student.shape[-1])
    return getattr(torch.ops.pykd, op)(flat, *inputs, need_grad, *options)[0]  # type: ignore[no-any-return]


def check_inplace(student: Tensor, teacher: Mapping[str, Tensor]) -> None:
    """ValueError where writing the gradient over the logits would be unsafe."""
    base = student._base
    if student.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError("inplace=True would overwrite a leaf tensor that requires a gradient: use inplace=False")
    if not student.is_contiguous():
        raise ValueError(f"inplace=True needs contiguous student_logits, got strides {student.stride()}")
    if base is not None and base.numel() != student.numel():
        raise ValueError("inplace=True would overwrite part of a larger tensor that student_logits is a view of")
    for name, tensor in teacher.items():
        if student.numel() > 0 and student.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            raise ValueError(f"inplace=True would overwrite {name}, which share memory with student_logits")


def _overwrite(student: Tensor, operator: Callable[..., Tensor], inputs: tuple[Any, ...], options: Any) -> Tensor:
    """Row losses; the student's memory holds their gradient, and using it in another term of a loss is an error."""
    held = _Held(student.detach().view(-1, student.shape[-1]))
    losses: Tensor = _InPlace.apply(student, operator, inputs, options, held)  # type: ignore[no-untyped-call]
    _Overwritten.apply(student)  # type: ignore[no-untyped-call]
    held.version = held.gradient._version
    return losses


class _Held:
    """The gradient until backward hands it on, and the version of that memory: whoever changes it is found out."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient, self.version = gradient, -1


class _Overwritten(torch.autograd.Function):
    """Stands between the logits and what is made of them after the loss; to autograd they have changed in place."""

    @staticmethod
    def forward(ctx: Any, student: Tensor) -> Tensor:
        ctx.mark_dirty(student)  # tensors that earlier operations saved are now invalid
        return student

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "student_logits were used again after the loss (inplace=True) had written their gradient over them: "
            "use them before the loss, or inplace=False"
        )


class _InPlace(torch.autograd.Function):
    """An in-place op under autograd: the student's memory holds its gradient until backward hands it on."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        operator: Callable[..., Tensor],
        inputs: tuple[Tensor | None, ...],
        options: tuple[Any, ...],
        held: _Held,
    ) -> Tensor:
        ctx.shape, ctx.held = student.shape, held
        return operator(held.gradient, *inputs, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        held, ctx.held = ctx.held, None
        if held is None or torch.is_grad_enabled():
            raise RuntimeError(
                "the loss (inplace=True) keeps one gradient for one backward: a second backward, or create_graph=True, "
                "needs inplace=False"
            )
        gradient = held.gradient
        if gradient._version != held.version:
            raise RuntimeError(
                "student_logits were changed after the loss (inplace=True) had written their gradient over them: "
                "leave them alone until backward, or inplace=False"
            )
        (upstream,) = grads
        if upstream.device.type != "cpu" or not bool((upstream == 1).all()):
            gradient.mul_(upstream.unsqueeze(1))
        return gradient.view(ctx.shape), None, None, None, None
