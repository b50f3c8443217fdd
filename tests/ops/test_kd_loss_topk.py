"""kd_loss_topk: every line of its table, what it has in common with kl_div_loss, its reductions, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykd

INF = float("inf")


def case(*shape: int, kept: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student leaf, the teacher's full log-probabilities, and its top-k."""
    teacher = (torch.randn(*shape) * 2).log_softmax(-1)
    top = teacher.topk(kept, -1)
    return torch.randn(*shape, requires_grad=True), teacher, top.indices, top.values


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def same(got: Tensor, want: Tensor, leaf: Tensor, **tolerance: Any) -> None:
    torch.testing.assert_close(got, want, **tolerance)
    torch.testing.assert_close(gradient(got.sum(), leaf), gradient(want.sum(), leaf), **tolerance)


def zero(student: Tensor, ids: Tensor, log_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """D of missing="zero" at the stored temperature per position, for distinct ids, by torch."""
    log_p = (student / temperature).log_softmax(-1).gather(-1, ids)
    return (log_probs.exp() * (log_probs - log_p)).sum(-1)


@pytest.mark.parametrize("missing", ["zero", "tail"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_whole_vocabulary_is_kl_div_loss(missing: str, temperature: float) -> None:
    student, logits = torch.randn(2, 3, 11, requires_grad=True), torch.randn(2, 3, 11)
    top = (logits / temperature).log_softmax(-1).topk(11, -1)
    for reduction in ("batchmean", "none"):
        got = pykd.kd_loss_topk(student, top.indices, top.values, missing=missing, temperature=temperature,
                                stored_temperature=temperature, reduction=reduction)  # fmt: skip
        same(got, pykd.kl_div_loss(student, logits, temperature=temperature, reduction=reduction), student)


def test_whole_vocabulary_stored_at_another_temperature() -> None:
    student, logits = torch.randn(5, 11, requires_grad=True), torch.randn(5, 11)
    top = (logits / 2).log_softmax(-1).topk(11, -1)
    got = pykd.kd_loss_topk(student, top.indices, top.values, temperature=5.0, stored_temperature=2.0)
    same(got, pykd.kl_div_loss(student, logits, temperature=5.0), student)


def test_whole_vocabulary_with_labels_is_kd_loss() -> None:
    student, logits = torch.randn(4, 6, 11, requires_grad=True), torch.randn(4, 6, 11)
    labels = torch.randint(0, 11, (4, 6))
    labels[0, :3] = -100
    common: dict[str, Any] = {"temperature": 2.0, "alpha": 0.3, "label_smoothing": 0.1, "shift": True}
    every = torch.arange(11).expand(4, 6, 11)
    got = pykd.kd_loss_topk(student, every, (logits / 2).log_softmax(-1), labels, stored_temperature=2.0, **common)
    same(got, pykd.kd_loss(student, logits, labels, **common), student)


def test_sampled_with_repetition_is_the_sum_of_the_weights() -> None:
    student, teacher, _, _ = case(5, 40)
    draws = torch.multinomial(teacher.exp(), 30, replacement=True)
    counts = torch.zeros(5, 40).scatter_add(1, draws, torch.ones(5, 30))
    log_probs = torch.full((5, 30), -math.log(30))
    got = pykd.kd_loss_topk(student, draws, log_probs, reduction="none")
    target = counts / 30
    want = (torch.xlogy(target, target) - target * student.log_softmax(-1)).sum(-1)
    same(got, want, student)
    tempered = pykd.kd_loss_topk(student, draws, log_probs, temperature=2.0)
    once = pykd.kd_loss_topk(student, torch.arange(40).expand(5, 40), target.log(), temperature=2.0)
    same(tempered, once, student)


def test_sampled_gradient_is_unbiased() -> None:
    student, teacher, _, _ = case(1, 6)
    draws = torch.multinomial(teacher.exp(), 20_000, replacement=True)
    got = pykd.kd_loss_topk(student, draws, torch.full((1, 20_000), -math.log(20_000)))
    want = gradient(pykd.kl_div_loss(student, teacher), student)
    torch.testing.assert_close(gradient(got, student), want, rtol=0, atol=0.02)


def test_tail_is_the_divergence_of_the_buckets() -> None:
    student, teacher, ids, log_probs = case(7, 30)
    others = torch.ones(7, 30, dtype=torch.bool).scatter(1, ids, False)

    def buckets(log_p: Tensor) -> Tensor:
        tail = log_p.masked_fill(~others, -INF).logsumexp(-1, keepdim=True)
        return torch.cat([log_p.gather(1, ids), tail], -1)

    want = F.kl_div(buckets(student.log_softmax(-1)), buckets(teacher), log_target=True, reduction="none").sum(-1)
    got = pykd.kd_loss_topk(student, ids, log_probs, missing="tail", reduction="none")
    same(got, want, student)
    assert bool((got >= 0).all())
    one = pykd.kd_loss_topk(student, ids[:, :0], log_probs[:, :0], missing="tail")
    assert one.item() == 0 and bool((gradient(one, student) == 0).all())


def test_zero_takes_what_was_not_kept_as_zero() -> None:
    student, _, ids, log_probs = case(4, 5, 30)
    got = pykd.kd_loss_topk(student, ids, log_probs, stored_temperature=2.0, temperature=2.0)
    same(got, 4 * zero(student, ids, log_probs, 2.0).mean(), student)
    got = pykd.kd_loss_topk(student, ids, log_probs, stored_temperature=2.0, temperature=2.0, scale_t2=False)
    torch.testing.assert_close(got, zero(student, ids, log_probs, 2.0).mean())


def test_temperature_keeps_the_kept_mass() -> None:
    student, _, ids, log_probs = case(4, 30)
    mass = log_probs.exp().sum(-1, keepdim=True)
    tempered = mass.log() + (log_probs / 3).log_softmax(-1)
    got = pykd.kd_loss_topk(student, ids, log_probs, temperature=3.0)
    same(got, 9 * zero(student, ids, tempered, 3.0).mean(), student)


def test_padding_is_no_entry() -> None:
    student, _, ids, log_probs = case(4, 30)
    for missing in ("zero", "tail"):
        want = pykd.kd_loss_topk(student, ids[:, :2], log_probs[:, :2], missing=missing)
        padded, hidden = ids.clone(), log_probs.clone()
        padded[:, 2:], hidden[:, 2:] = -1, math.nan
        same(pykd.kd_loss_topk(student, padded, hidden, missing=missing), want, student)


def test_mask_weights_labels_and_num_items() -> None:
    student, _, ids, log_probs = case(2, 6, 9)
    mask, weights = torch.rand(2, 6) > 0.4, torch.rand(2, 6)
    labels = torch.randint(0, 9, (2, 6))
    labels[1, 2:4] = 255
    used = mask & (labels != 255)
    entropy = F.cross_entropy(student.transpose(1, 2), labels, ignore_index=255, reduction="none")
    each = 0.4 * zero(student, ids, log_probs) + 0.6 * entropy
    options: dict[str, Any] = {"mask": mask, "weights": weights, "alpha": 0.4, "ignore_index": 255}
    same(
        pykd.kd_loss_topk(student, ids, log_probs, labels, **options),
        (each * weights)[used].sum() / used.sum(),
        student,
    )
    same(pykd.kd_loss_topk(student, ids, log_probs, labels, **options, num_items=5),
         (each * weights)[used].sum() / 5, student)  # fmt: skip
    summed = pykd.kd_loss_topk(student, ids, log_probs, labels, **options, reduction="sum")
    same(summed, (each * weights)[used].sum(), student)


def test_shift_moves_labels_and_not_the_teacher() -> None:
    student, _, ids, log_probs = case(2, 6, 9)
    labels = torch.randint(0, 9, (2, 6))
    want = pykd.kd_loss_topk(student[:, :-1], ids[:, :-1], log_probs[:, :-1], labels[:, 1:], alpha=0.5)
    same(pykd.kd_loss_topk(student, ids, log_probs, labels, alpha=0.5, shift=True), want, student)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8, torch.uint16])
def test_types_of_ids(dtype: torch.dtype) -> None:
    student, _, ids, log_probs = case(3, 50)
    want = pykd.kd_loss_topk(student, ids, log_probs)
    torch.testing.assert_close(pykd.kd_loss_topk(student, ids.to(dtype), log_probs), want, rtol=0, atol=0)
    half = pykd.kd_loss_topk(student.bfloat16(), ids.to(dtype), log_probs.half())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("missing", ["zero", "tail"])
def test_gradcheck(missing: str) -> None:
    leaf, _, ids, log_probs = case(3, 7, kept=3)
    leaf, log_probs = leaf.detach().double().requires_grad_(), log_probs.double()
    ids[0, 1], ids[1, 2] = ids[0, 0], -1
    temperature = 1.0 if missing == "tail" else 2.5

    def loss(x: Tensor) -> Tensor:
        return pykd.kd_loss_topk(x, ids, log_probs, torch.arange(3), missing=missing, temperature=temperature,
                                 alpha=0.4, label_smoothing=0.2)  # fmt: skip

    assert torch.autograd.gradcheck(loss, leaf)


def test_nothing_to_count_is_zero() -> None:
    student, _, ids, log_probs = case(3, 7)
    for loss in (
        pykd.kd_loss_topk(student, ids, log_probs, mask=torch.zeros(3, dtype=torch.bool)),
        pykd.kd_loss_topk(student[:0], ids[:0], log_probs[:0]),
        pykd.kd_loss_topk(student[:0] * 1, ids[:0].clone(), log_probs[:0].clone(), inplace=True),
        pykd.kd_loss_topk(student, ids * 0 - 1, log_probs),
    ):
        assert loss.item() == 0
        assert bool((gradient(loss, student) == 0).all())
    single = pykd.kd_loss_topk(student[0], ids[0], log_probs[0])
    torch.testing.assert_close(single, zero(student[0], ids[0], log_probs[0]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own compiler uses it
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_graph_break(inplace: bool) -> None:
    leaf, _, ids, log_probs = case(4, 9)
    labels = torch.tensor([0, -100, 2, 3])

    def step(x: Tensor) -> Tensor:
        return pykd.kd_loss_topk(x * 1.5, ids, log_probs, labels, missing="tail", alpha=0.5, inplace=inplace) * 2.0

    same(torch.compile(step, fullgraph=True)(leaf), step(leaf), leaf)


def test_logits_used_twice_under_autocast() -> None:
    weight, x = torch.randn(8, 9, requires_grad=True), torch.randn(4, 8)
    _, _, ids, log_probs = case(4, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = x @ weight
        got = pykd.kd_loss_topk(student, ids, log_probs, torch.arange(4), alpha=0.5) + student.float().square().mean()
    assert student.dtype == torch.bfloat16 and got.dtype == torch.float32
    exact = student.detach().double().requires_grad_()
    want = 0.5 * zero(exact, ids, log_probs.double()).mean() + 0.5 * F.cross_entropy(exact, torch.arange(4))
    (want + exact.square().mean()).backward()
    torch.testing.assert_close(gradient(got, weight).double(), x.double().t() @ exact.grad, rtol=2e-2, atol=2e-2)


def test_exports() -> None:
    class Loss(torch.nn.Module):
        def forward(self, student: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
            return pykd.kd_loss_topk(student, ids, log_probs, missing="tail")

    student, _, ids, log_probs = case(3, 9)
    inputs = (student.detach(), ids, log_probs)
    program = torch.export.export(Loss(), inputs)
    assert any("pykd.kl_div_topk" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Loss()(*inputs))


def test_inplace_writes_the_gradient_over_the_logits() -> None:
    leaf, _, ids, log_probs = case(5, 7, 30)
    labels = torch.randint(0, 30, (5, 7))
    options: dict[str, Any] = {"alpha": 0.5, "shift": True, "temperature": 2.0}
    want = gradient(3 * pykd.kd_loss_topk(leaf * 2, ids, log_probs, labels, **options), leaf)
    student = leaf * 2
    loss = 3 * pykd.kd_loss_topk(student, ids, log_probs, labels, **options, inplace=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf, retain_graph=True)[0], want)
    torch.testing.assert_close(student.detach(), want / 2)  # the chain rule's factor of leaf * 2
    with pytest.raises(RuntimeError, match=r"inplace=True\) keeps one gradient for one backward"):
        torch.autograd.grad(loss, leaf)
    with pytest.raises(ValueError, match="overwrite a leaf tensor"):
        pykd.kd_loss_topk(leaf, ids, log_probs, inplace=True)
    shared = leaf * 2
    with pytest.raises(ValueError, match="overwrite teacher_log_probs, which share memory"):
        pykd.kd_loss_topk(shared, torch.zeros_like(shared, dtype=torch.int64), shared.detach(), inplace=True)


S, K, L, Y = torch.zeros(4, 6), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2), torch.zeros(4).long()
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_logits": Y}, TypeError, "student_logits must be floating point, got torch.int64: pass logits"),
    ({"student_logits": S[:, :0]}, ValueError, "student_logits needs a last dimension of at least one class"),
    ({"teacher_ids": L}, TypeError, "teacher_ids must be integers, got torch.float32: pass class indices"),
    ({"teacher_log_probs": K}, TypeError, "teacher_log_probs must be floating point, got torch.int64: pass natural"),
    ({"teacher_ids": K[:, :1]}, ValueError, r"shape \(4, 'k'\) for student_logits \(4, 6\), got \(4, 1\) and \(4, 2\)"),
    ({"teacher_ids": K[:3], "teacher_log_probs": L[:3]}, ValueError, r"must both have shape \(4, 'k'\)"),
    ({"teacher_ids": K[0, 0], "teacher_log_probs": L[0, 0]}, ValueError, r"must both have shape .* got \(\) and \(\)"),
    ({"teacher_ids": K.to("meta")}, ValueError, "teacher_ids are on meta and student_logits on cpu: move one"),
    ({"teacher_log_probs": L.to("meta")}, ValueError, "teacher_log_probs are on meta and student_logits on cpu"),
    (
        {"teacher_ids": K + 6},
        ValueError,
        r"teacher_ids must lie in \[0, 6\), or be -1 .* position 0 holds 6: the teach",
    ),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"stored_temperature": INF}, ValueError, "stored_temperature must be positive and finite, got inf"),
    ({"missing": "rest"}, ValueError, "missing must be one of zero, tail, got 'rest'"),
    ({"missing": "tail", "temperature": 2.0}, ValueError, "needs temperature == stored_temperature, got 2.0 and 1.0"),
    ({"alpha": 1.5}, ValueError, r"alpha must lie in \[0, 1\], got 1.5"),
    ({"label_smoothing": -1}, ValueError, r"label_smoothing must lie in \[0, 1\], got -1"),
    ({"labels": None, "alpha": 0.5}, ValueError, r"labels are needed for the label term: pass labels, or alpha=1"),
    ({"labels": Y + 6, "alpha": 0.5}, ValueError, r"labels must lie in \[0, 6\) or equal ignore_index"),
    ({"reduction": "mean"}, ValueError, "reduction must be one of batchmean, sum, none, got 'mean'"),
    ({"mask": Y}, TypeError, r"mask must be bool \(True counts\), got torch.int64"),
    ({"weights": S}, ValueError, r"weights must have one entry per position, shape \(4,\), got \(4, 6\)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"student_logits": S, "teacher_ids": K, "teacher_log_probs": L, "labels": Y}
    with pytest.raises(error, match=message):
        pykd.kd_loss_topk(**(good | changes))
