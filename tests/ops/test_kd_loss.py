"""kl_div_loss and kd_loss: every line of their tables, their reductions, and their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykd

INF = float("inf")


def logits(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, requires_grad=True), torch.randn(*shape)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward divergence per position, by torch."""
    logs = [(x / temperature).log_softmax(-1) for x in (student, teacher)]
    return F.kl_div(*logs, log_target=True, reduction="none").sum(-1)


def test_kl_div_loss_is_torch_kl_div_over_positions() -> None:
    student, teacher = logits(4, 5, 11)
    want = kl(student, teacher, 2.0)
    for reduction, reduced in (("batchmean", want.mean()), ("sum", want.sum()), ("none", want)):
        got = pykd.kl_div_loss(student, teacher, temperature=2.0, reduction=reduction)
        torch.testing.assert_close(got, 4 * reduced)
        if reduction != "none":
            torch.testing.assert_close(gradient(got, student), gradient(4 * reduced, student))
    torch.testing.assert_close(pykd.kl_div_loss(student, teacher, temperature=2.0, scale_t2=False), want.mean())


def test_gradient_of_reduction_none() -> None:
    student, teacher = logits(4, 5, 11)
    upstream = torch.randn(4, 5)
    got = gradient((pykd.kl_div_loss(student, teacher, reduction="none") * upstream).sum(), student)
    torch.testing.assert_close(got, gradient((kl(student, teacher) * upstream).sum(), student))


def test_kd_loss_is_the_mixture() -> None:
    student, teacher = logits(6, 9)
    labels = torch.tensor([0, 8, -100, 3, 3, -100])
    used = labels != -100
    want = 0.3 * 9 * kl(student, teacher, 3.0)[used].mean() + 0.7 * F.cross_entropy(
        student, labels, label_smoothing=0.2
    )
    got = pykd.kd_loss(student, teacher, labels, temperature=3.0, alpha=0.3, label_smoothing=0.2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient(got, student), gradient(want, student))
    other = pykd.kd_loss(student, teacher, torch.where(used, labels, 255), ignore_index=255, temperature=3.0, alpha=0.3,
                         label_smoothing=0.2)  # fmt: skip
    torch.testing.assert_close(other, want)


def test_beta_chooses_between_forward_and_reverse() -> None:
    student, teacher = logits(3, 8)
    for beta, direction in ((0.0, "forward"), (1.0, "reverse")):
        mixed = pykd.kl_div_loss(student, teacher, direction="jsd", beta=beta)
        torch.testing.assert_close(mixed, pykd.kl_div_loss(student, teacher, direction=direction), rtol=0, atol=0)
    swapped = pykd.kl_div_loss(teacher, student.detach(), direction="jsd")
    torch.testing.assert_close(pykd.kl_div_loss(student, teacher, direction="jsd").detach(), swapped)


def test_mask_and_weights() -> None:
    student, teacher = logits(2, 6, 5)
    mask, weights = torch.rand(2, 6) > 0.4, torch.rand(2, 6, requires_grad=True)
    want = (kl(student, teacher) * weights * mask).sum() / mask.sum()
    got = pykd.kl_div_loss(student, teacher, mask=mask, weights=weights)
    assert torch.autograd.grad(got, weights, allow_unused=True, retain_graph=True) == (None,)  # constants
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient(got, student), gradient(want, student))
    with torch.no_grad():
        hidden = student.clone()
        hidden[~mask] = math.nan
        torch.testing.assert_close(pykd.kl_div_loss(hidden, teacher, mask=mask, weights=weights), want.detach())


def test_mask_and_ignore_index_join() -> None:
    student, teacher = logits(4, 5)
    labels, mask = torch.tensor([1, -100, 2, 3]), torch.tensor([True, True, False, True])
    want = pykd.kd_loss(student[[0, 3]], teacher[[0, 3]], labels[[0, 3]])
    torch.testing.assert_close(pykd.kd_loss(student, teacher, labels, mask=mask), want)


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_nothing_left_is_zero(reduction: str) -> None:
    student, teacher = logits(3, 7)
    for loss in (
        pykd.kd_loss(student, teacher, torch.full((3,), -100), reduction=reduction),
        pykd.kl_div_loss(student, teacher, mask=torch.zeros(3, dtype=torch.bool), reduction=reduction),
        pykd.kl_div_loss(student[:0], teacher[:0], reduction=reduction),
        pykd.kd_loss(student[:0] * 1, teacher[:0].clone(), None, alpha=1.0, reduction=reduction, inplace=True),
    ):
        assert loss.item() == 0
        assert bool((gradient(loss, student) == 0).all())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulated_micro_batches_are_the_whole(as_tensor: bool) -> None:
    student, teacher = logits(10, 13)
    labels = torch.tensor([0, 1, -100, 3, 4, -100, -100, 7, 8, 9])
    whole = pykd.kd_loss(student, teacher, labels)
    items = torch.tensor(7) if as_tensor else 7
    parts = [slice(0, 3), slice(3, 7), slice(7, 10)]
    total = sum(pykd.kd_loss(student[part], teacher[part], labels[part], num_items=items) for part in parts)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradient(total, student), gradient(whole, student), rtol=1e-6, atol=1e-9)


def test_shift_scores_a_position_against_the_next_label() -> None:
    student, teacher = logits(2, 6, 5)
    labels, weights = torch.randint(0, 5, (2, 6)), torch.rand(2, 6)
    labels[0, 3] = -100
    mask = torch.rand(2, 6) > 0.2
    want = pykd.kd_loss(student[:, :-1], teacher[:, :-1], labels[:, 1:], mask=mask[:, 1:], weights=weights[:, 1:])
    got = pykd.kd_loss(student, teacher, labels, mask=mask, weights=weights, shift=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient(got, student), gradient(want, student))
    assert bool((gradient(got, student)[:, -1] == 0).all())
    each = pykd.kd_loss(student, teacher, labels, shift=True, reduction="none")
    assert each.shape == (2, 6) and bool((each[:, -1] == 0).all())


def test_only_distillation_needs_no_labels() -> None:
    student, teacher = logits(3, 4)
    got = pykd.kd_loss(student, teacher, None, alpha=1.0)
    torch.testing.assert_close(got, pykd.kl_div_loss(student, teacher, temperature=4.0))
    torch.testing.assert_close(
        pykd.kd_loss(student, teacher * math.nan, torch.zeros(3, dtype=torch.int32), alpha=0.0),
        F.cross_entropy(student, torch.zeros(3, dtype=torch.int64)),
    )


def test_single_position_and_no_grad() -> None:
    student, teacher = torch.randn(5), torch.randn(5)
    loss = pykd.kl_div_loss(student, teacher)
    torch.testing.assert_close(loss, kl(student, teacher))
    assert not loss.requires_grad
    with torch.no_grad():
        assert not pykd.kl_div_loss(student.requires_grad_(), teacher).requires_grad


def test_types() -> None:
    student, teacher = logits(3, 50)
    half = pykd.kl_div_loss(student.bfloat16(), teacher.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, pykd.kl_div_loss(student.bfloat16().float(), teacher.half().float()))
    leaf, constant = student.detach()[:, :4].double().requires_grad_(), teacher[:, :4].double()
    assert torch.autograd.gradcheck(lambda x: pykd.kd_loss(x, constant, torch.arange(3), direction="jsd"), leaf)


def test_logits_used_twice() -> None:
    leaf, teacher = logits(3, 8)
    student = leaf * 2
    labels = torch.tensor([0, 1, 2])
    got = pykd.kd_loss(student, teacher, labels) + student.square().mean()
    want = 8 * kl(student, teacher, 4.0).mean() + 0.5 * F.cross_entropy(student, labels) + student.square().mean()
    torch.testing.assert_close(gradient(got, leaf), gradient(want, leaf))


def test_inside_autocast() -> None:
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = x @ weight
        loss = pykd.kd_loss(student, x, torch.arange(4))
    assert student.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert bool(gradient(loss, weight).isfinite().all())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own compiler uses it
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_graph_break(inplace: bool) -> None:
    leaf, teacher = logits(4, 9)
    labels = torch.tensor([0, -100, 2, 3])

    def step(x: Tensor) -> Tensor:
        return pykd.kd_loss(x * 1.5, teacher, labels, inplace=inplace, direction="jsd") * 2.0

    want = step(leaf)
    got = torch.compile(step, fullgraph=True)(leaf)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient(got, leaf), gradient(want, leaf))


def test_exports() -> None:
    class Loss(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return pykd.kl_div_loss(student, teacher, temperature=2.0)

    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    program = torch.export.export(Loss(), (student, teacher))
    assert any("pykd.kl_div" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(student, teacher), kl(student, teacher, 2.0).mean() * 4)


def test_inplace_writes_the_gradient_over_the_logits() -> None:
    leaf, teacher = logits(5, 7, 30)
    labels = torch.randint(0, 30, (5, 7))
    want = gradient(3 * pykd.kd_loss(leaf * 2, teacher, labels, shift=True), leaf)
    student = leaf * 2
    loss = 3 * pykd.kd_loss(student, teacher, labels, shift=True, inplace=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], want)
    torch.testing.assert_close(student.detach(), want / 2)  # the chain rule's factor of leaf * 2
    with torch.no_grad():  # no gradient wanted, nothing overwritten
        kept = leaf * 2
        pykd.kd_loss(kept, teacher, labels, inplace=True)
        torch.testing.assert_close(kept, leaf * 2, rtol=0, atol=0)


def test_inplace_is_seen_by_earlier_operations() -> None:
    leaf, teacher = logits(5, 7)
    student = leaf.exp()  # saves its result for backward
    loss = pykd.kd_loss(student, teacher, torch.arange(5), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


#: How models return their logits: as they are made, or as views of what was made.
RETURNED: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x * 2,
    "view": lambda x: (x * 2).view(1, 5, 7)[0],
    "linear of three dimensions": lambda x: F.linear(x.view(1, 5, 7), 2 * torch.eye(7), torch.zeros(7)).view(-1, 7),
}


@pytest.mark.parametrize("returned", RETURNED)
def test_logits_in_another_term_belong_before_the_inplace_loss(returned: str) -> None:
    leaf, teacher = logits(5, 7)
    labels, make = torch.arange(5), RETURNED[returned]
    student = make(leaf)
    other = 0.3 * student.sum()
    got = gradient(pykd.kd_loss(student, teacher, labels, inplace=True) + other, leaf)
    torch.testing.assert_close(got, gradient(pykd.kd_loss(leaf * 2, teacher, labels) + 0.3 * (leaf * 2).sum(), leaf))
    student = make(leaf)
    loss = pykd.kd_loss(student, teacher, labels, inplace=True) + student.square().mean()
    with pytest.raises(RuntimeError, match=r"student_logits were used again after the loss \(inplace=True\) had"):
        loss.backward()


def test_what_the_inplace_loss_wrote_stays_until_backward() -> None:
    leaf, teacher = logits(5, 7)
    student = leaf * 2
    loss = pykd.kd_loss(student, teacher, torch.arange(5), inplace=True)
    with torch.no_grad():
        student.clamp_(min=0)
    with pytest.raises(RuntimeError, match=r"student_logits were changed after the loss \(inplace=True\) had written"):
        loss.backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_inplace_has_one_backward(create_graph: bool) -> None:
    leaf, teacher = logits(5, 7)
    loss = pykd.kd_loss(leaf * 2, teacher, torch.arange(5), inplace=True)
    if not create_graph:
        torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"inplace=True\) keeps one gradient for one backward"):
        torch.autograd.grad(loss, leaf, create_graph=create_graph)


UNSAFE: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], str]] = {
    "leaf": (lambda x: (x, x.detach() + 1), "overwrite a leaf tensor"),
    "view of a leaf": (lambda x: (x.view(-1, 6), torch.zeros(4, 6)), "overwrite a leaf tensor"),
    "strided": (lambda x: ((x * 2).t(), torch.zeros(6, 4)), "needs contiguous student_logits, got strides"),
    "part": (lambda x: ((x * 2)[:2], torch.zeros(2, 6)), "overwrite part of a larger tensor"),
    "shared": (lambda x: (y := x * 2, y.detach()), "overwrite teacher_logits, which share memory"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_inplace_is_refused(case: str) -> None:
    build, message = UNSAFE[case]
    student, teacher = build(torch.randn(4, 6, requires_grad=True))
    with pytest.raises(ValueError, match=message):
        pykd.kd_loss(student, teacher, torch.zeros(len(student), dtype=torch.int64), inplace=True)


def test_torch_refuses_to_overwrite_what_split_returned() -> None:
    (student,) = (torch.randn(4, 6, requires_grad=True) * 2).split(4)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        pykd.kd_loss(student, torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64), inplace=True)


S, T, Y = torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_logits": Y}, TypeError, "student_logits must be floating point, got torch.int64: pass logits"),
    ({"teacher_logits": torch.zeros(4, 0)}, ValueError, "teacher_logits needs a last dimension of at least one class"),
    ({"student_logits": torch.tensor(1.0)}, ValueError, "student_logits needs a last dimension"),
    ({"teacher_logits": torch.zeros(3, 6)}, ValueError, r"\(4, 6\) and teacher_logits \(3, 6\) must agree in every"),
    ({"teacher_logits": T.to("meta")}, ValueError, "are on cpu and teacher_logits on meta: move one"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": INF}, ValueError, "temperature must be positive and finite, got inf"),
    ({"direction": "backward"}, ValueError, "must be one of forward, reverse, jsd, tv, got 'backward'"),
    ({"beta": 0.5}, ValueError, "beta belongs to direction='jsd', got direction='forward': drop beta"),
    ({"direction": "jsd", "beta": 1.5}, ValueError, r"beta must lie in \[0, 1\], got 1.5"),
    ({"alpha": -0.1}, ValueError, r"alpha must lie in \[0, 1\], got -0.1"),
    ({"label_smoothing": 2}, ValueError, r"label_smoothing must lie in \[0, 1\], got 2"),
    ({"reduction": "mean"}, ValueError, "reduction must be one of batchmean, sum, none, got 'mean'"),
    ({"reduction": "sum", "num_items": 3}, ValueError, "num_items is the divisor of reduction='batchmean'"),
    ({"num_items": 0}, ValueError, "num_items must be positive, got 0"),
    ({"num_items": torch.ones(2)}, ValueError, r"num_items must be one number, got a tensor of shape \(2,\)"),
    ({"labels": None}, ValueError, r"labels are needed for the label term: pass labels, or alpha=1 \(got alpha=0.5\)"),
    ({"labels": S[:, 0]}, TypeError, "labels must be integers, got torch.float32"),
    ({"labels": Y[:3]}, ValueError, r"labels must have one entry per position, shape \(4,\), got \(3,\)"),
    ({"labels": Y.to("meta")}, ValueError, "labels are on meta and student_logits on cpu: move one"),
    ({"labels": Y + 6}, ValueError, r"labels must lie in \[0, 6\) or equal ignore_index, but position 0 holds 6"),
    ({"mask": Y}, TypeError, r"mask must be bool \(True counts\), got torch.int64"),
    ({"mask": Y[:3].bool()}, ValueError, r"mask must have one entry per position, shape \(4,\), got \(3,\)"),
    ({"weights": S}, ValueError, r"weights must have one entry per position, shape \(4,\), got \(4, 6\)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pykd.kd_loss(**({"student_logits": S, "teacher_logits": T, "labels": Y} | changes))


def test_shift_needs_time() -> None:
    with pytest.raises(ValueError, match=r"shift=True needs logits of shape \(\.\.\., time, classes\)"):
        pykd.kd_loss(torch.zeros(3), torch.zeros(3), torch.tensor(0), shift=True)


def test_large_fresh_gradient_in_pooled_memory() -> None:
    student, teacher = torch.randn(40, 40_000, requires_grad=True), torch.randn(40, 40_000)
    want = gradient(kl(student, teacher).mean(), student)
    torch.testing.assert_close(gradient(pykd.kl_div_loss(student, teacher), student), want)
