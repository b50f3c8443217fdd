"""The op `linear_kd`: two linear heads and `kl_div` between their logits, a few positions at a time.

For each chunk of positions: both heads' logits into buffers that all chunks share, `kl_div_`, which writes the gradient
over the student's logits, and from that gradient the chunk's part of the gradients by hidden states, weight and bias.
A gradient that is not needed costs nothing, and no tensor has an entry for every (position, class).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pykd.ops.dispatch import TABLE, Route, lib
from pykd.ops.kl_div import Options, check_labels
from pykd.ops.linear_kd_head import Gradients, Head
from pykd.ops.row_loss import OnlyOnce

_HEADS = ", ".join(
    f"Tensor {side}_hidden, Tensor {side}_weight, Tensor? {side}_bias, float? {side}_softcap"
    for side in ("student", "teacher")
)
_OPTIONS = "float temperature, str direction, float beta, float kl_weight, float ce_weight, float label_smoothing"
#: each: one loss a position, whose gradients wait for backward; else the sum, with the gradients that `needs` asks for
#: (hidden, weight, bias). dtype: what both heads compute in, if not in their own type (autocast).
lib.define(  # type: ignore[no-untyped-call]
    f"linear_kd({_HEADS}, Tensor? labels, Tensor scale, bool each, bool[] needs, int chunk_bytes, ScalarType? dtype, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
#: A number of positions that the GEMM kernels of CPU and GPU divide without a remainder.
TILE = 16


def chunk_rows(student: Head, teacher: Head, rows: int, chunk_bytes: int, buffers: int) -> int:
    """Positions of a chunk: as many as the budget holds logits of both sides for, in chunks of about equal size."""
    classes_bytes = buffers * student.weight.shape[0] * student.weight.element_size()
    classes_bytes += teacher.weight.shape[0] * teacher.weight.element_size()
    most = max(1, chunk_bytes // classes_bytes)
    if rows <= most:
        return max(1, rows)
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // TILE) * TILE)


def _counted(scale: Tensor) -> Tensor | None:
    """The positions that count, on the CPU, unless all do. A GPU is not asked, because the host would have to wait."""
    if scale.device.type != "cpu":
        return None
    counted = scale.nonzero().squeeze(1)
    return counted if len(counted) < len(scale) else None


def counted_only(hidden: Tensor, scale: Tensor) -> Tensor:
    """Hidden states with zeros where a position does not count: it may hold NaN, and 0 * NaN is NaN."""
    return torch.where((scale != 0).unsqueeze(1), hidden, 0.0)


def _take(hidden: Tensor, chunk: slice | Tensor, scale: Tensor) -> Tensor:
    """A chunk of hidden states; on the CPU the chunks leave out what does not count."""
    return hidden[chunk] if hidden.device.type == "cpu" else counted_only(hidden[chunk], scale)


def _run(student: Head, teacher: Head, labels: Tensor | None, scale: Tensor, gradients: Gradients | None,
         chunk_bytes: int, options: Options) -> Tensor:  # fmt: skip
    """Losses (rows,) of all positions; their gradients are added to `gradients` unless it is None."""
    spare = student.softcap is not None and gradients is not None
    counted = _counted(scale)
    rows = len(scale if counted is None else counted)
    size = chunk_rows(student, teacher, rows, chunk_bytes, 1 + spare)
    mine, tanh = student.buffer(size), student.buffer(size) if spare else None
    its = teacher.buffer(size) if options.kl_weight != 0 else None
    losses = torch.zeros_like(scale, memory_format=torch.contiguous_format)
    for first in range(0, rows, size):
        chunk = slice(first, first + size) if counted is None else counted[first : first + size]
        part = scale[chunk]
        hidden = _take(student.hidden, chunk, part)
        bounded = None if tanh is None else tanh[: len(part)]
        logits = student.logits(hidden, mine, bounded)
        wanted = logits if its is None else teacher.logits(_take(teacher.hidden, chunk, part), its)
        chosen = None if labels is None else labels[chunk]
        if gradients is None:
            losses[chunk] = torch.ops.pykd.kl_div(logits, wanted, chosen, part, False, *options)[0]
            continue
        losses[chunk] = torch.ops.pykd.kl_div_(logits, wanted, chosen, part, *options)
        if bounded is not None:
            torch.ops.aten.tanh_backward.grad_input(logits, bounded, grad_input=logits)
        gradients.add(chunk, logits, hidden, student.weight)
    return losses


def _without_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else contextlib.nullcontext()


def _linear_kd(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, (labels, scale, each, needs, chunk_bytes, dtype), options = inputs[:8], inputs[8:14], inputs[14:]
    given = Head(*heads[:4])
    with torch.no_grad(), _without_autocast(scale.device.type):
        student, teacher = given.to(dtype), Head(*heads[4:]).to(dtype)
        gradients = Gradients(student, needs) if any(needs) else None
        check_labels(labels, scale, len(student.weight))  # here, where a position is that of the whole batch
        losses = _run(student, teacher, labels, scale, gradients, chunk_bytes, Options(*options))
        sums = (None, None, None) if gradients is None else (gradients.hidden, gradients.weight, gradients.bias)
        hidden, weight, bias = (
            scale.new_empty(0) if found is None or x is None else found.to(x.dtype)
            for found, x in zip(sums, given[:3], strict=True)
        )
        return losses if each else losses.sum(), hidden, weight, bias


lib.impl("linear_kd", _linear_kd, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
TABLE.append(Route("linear_kd", "any", "always", "torch's GEMMs around kl_div"))


@torch.library.register_fake("pykd::linear_kd", lib=lib)  # type: ignore[untyped-decorator]
def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    scale, each, needs = inputs[9:12]
    gradients = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else scale.new_empty(0)
        for need, x in zip(needs, inputs[:3], strict=True)
    )
    return (torch.empty_like(scale, memory_format=torch.contiguous_format) if each else scale.new_empty(()), *gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or autograd would fill second gradients with zeros
    ctx.each, ctx.needs = inputs[10:12]
    ctx.places = [place for place, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*(inputs[place] for place in ctx.places) if ctx.each else output[1:])


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    rest = [None] * (len(ctx.inputs) - 3)
    if upstream is None:
        return (None, None, None, *rest)
    wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
    if ctx.each:
        return (*_again(ctx, upstream, wanted), *rest)
    if any(want and not need for want, need in zip(wanted, ctx.needs, strict=True)):
        raise RuntimeError("linear_kd ran without a gradient that is wanted now: ask for it in needs")
    saved = zip(wanted, ctx.saved_tensors, strict=True)
    return (*(_chain(gradient, upstream) if want else None for want, gradient in saved), *rest)


def _again(ctx: Any, upstream: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """Gradients of single losses: the upstream gradient of a position is one more factor of its scale."""
    inputs = list(ctx.inputs)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        inputs[place] = tensor.detach()
    inputs[9:12] = [inputs[9] * upstream.detach(), False, wanted]
    gradients = torch.ops.pykd.linear_kd(*inputs)[1:]
    return [_refuse_twice(g) if want else None for want, g in zip(wanted, gradients, strict=True)]


def _refuse_twice(gradient: Tensor) -> Tensor:
    if type(gradient) is Tensor and torch.is_grad_enabled():  # create_graph=True
        return OnlyOnce.apply(gradient.requires_grad_(), "linear_kd_loss")  # type: ignore[no-untyped-call, no-any-return]
    return gradient


def _chain(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream, in the gradient's own memory (a weight's may be the largest tensor of all) if it can be."""
    plain = type(gradient) is Tensor and type(upstream) is Tensor
    if not plain or torch.is_grad_enabled():
        return _refuse_twice((gradient * upstream.detach()).to(gradient.dtype))
    if upstream.device.type == "cpu" and float(upstream) == 1:
        return gradient
    return (gradient * upstream).to(gradient.dtype) if _graph_is_kept() else gradient.mul_(upstream)


#: Whether the backward that is running may be run again (retain_graph=True); absent before torch 2.6.
_keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _graph_is_kept() -> bool:
    return bool(_keep_graph())


torch.library.register_autograd("pykd::linear_kd", _backward, setup_context=_setup_context, lib=lib)
