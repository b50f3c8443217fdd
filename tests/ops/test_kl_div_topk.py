"""The op kl_div_topk: native kernel and reference against float64 autograd, at every instruction-set level."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from pykd.ops import kl_div_topk as op
from pykd.ops.kl_div_topk_reference import kl_div_topk_reference

INF = float("inf")
KL, CE, SMOOTHING = 3.0, 0.7, 0.1
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, op.Options]


def options(temperature: float = 4.0, *, tail: bool = False, **changes: Any) -> op.Options:
    return op.Options(temperature, 1.0, tail, KL, CE, SMOOTHING)._replace(**changes)


def case(rows: int, classes: int, kept: int, *, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Any:
    """Student, distinct kept ids in no order, log-probabilities of mass below 1, labels (some of them kept), scale."""
    student = (torch.randn(rows, classes) * spread).to(dtype)
    chosen = torch.stack([torch.randperm(classes)[:kept] for _ in range(rows)]) if rows else torch.empty(0, kept).long()
    log_probs = (torch.randn(rows, classes) * spread).log_softmax(-1).gather(1, chosen)
    labels = torch.randint(0, classes, (rows,))
    if kept:
        labels[::2] = chosen[::2, 0]
    return student, chosen, log_probs, labels, torch.rand(rows) + 0.5


def truth(student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, scale: Tensor,
          chosen: op.Options) -> Tensor:  # fmt: skip
    """Row losses in the student's precision, one row and one entry at a time; autograd differentiates."""
    losses = []
    for r in range(len(student)):
        log_p = (student[r] / chosen.temperature).log_softmax(-1)
        weights: dict[int, Tensor] = {}
        for i, log_prob in zip(ids[r].tolist(), log_probs[r].to(student.dtype), strict=True):
            if i >= 0:
                weights[i] = weights.get(i, torch.zeros_like(log_prob)) + log_prob.exp()
        mass = sum(weights.values(), torch.zeros((), dtype=student.dtype))
        powers = {i: w**chosen.power for i, w in weights.items()}
        total = sum(powers.values(), torch.zeros((), dtype=student.dtype))
        value = log_p.sum() * 0
        for i, w in powers.items():
            q = w * mass / total
            value = value + torch.xlogy(q, q) - q * log_p[i]
        others = [i for i in range(len(log_p)) if i not in weights]
        if chosen.tail and others:
            rest = (1 - mass).clamp(min=0)
            value = value + torch.xlogy(rest, rest) - rest * log_p[others].logsumexp(0)
        value = chosen.kl_weight * value
        if labels is not None:
            entropy = F.cross_entropy(student[r], labels[r], label_smoothing=chosen.label_smoothing)
            value = value + chosen.ce_weight * entropy
        losses.append(scale[r] * value)
    return torch.stack(losses) if losses else student.sum(-1)


def differentiate(student: Tensor, *rest: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ids, log_probs, labels, scale, chosen = rest
    leaf = student.detach().to(dtype).requires_grad_()
    losses = truth(leaf, ids, log_probs.to(dtype), labels, scale.to(dtype), chosen)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach().double(), gradient.double()


def assert_close(got: Tensor, want: Tensor, peer: Tensor, tolerance: Tensor | float, what: str) -> None:
    """err(got) <= err(peer) + tolerance, elementwise, both against `want` (float64)."""
    error, allowed = (got.double() - want).abs(), (peer.double() - want).abs().nan_to_num(0.0, INF) + tolerance
    if not bool((error <= allowed).all()):
        worst = (error - allowed).nan_to_num(INF).argmax()
        index = torch.unravel_index(worst, error.shape)
        raise AssertionError(f"{what} {[int(i) for i in index]}: got {got[index]}, want {want[index]}")


def rounding(student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, scale: Tensor,
             chosen: op.Options) -> Tensor:  # fmt: skip
    """What float32 costs each element: exponentials to 3e-7, and half an ulp of the differences of logits in them."""
    uniform = 0.0 if labels is None else chosen.ce_weight * chosen.label_smoothing / student.shape[1]
    cost = torch.full_like(student, 1.2e-7 * uniform, dtype=torch.float64)
    kept = torch.zeros(len(student), student.shape[1] + 1, dtype=torch.bool)
    kept = kept.scatter(1, torch.where(ids < 0, student.shape[1], ids), True)[:, :-1]
    for temperature, weight in (
        (chosen.temperature, chosen.kl_weight / chosen.temperature),
        (1.0, chosen.ce_weight * (labels is not None)),
    ):
        log_p = (student.double() / temperature).log_softmax(-1)
        of_tail = log_p - log_p.masked_fill(kept, -INF).logsumexp(-1, keepdim=True)
        for logs in (log_p, of_tail.masked_fill(kept, -INF)):
            p = logs.exp()
            cost += weight * p * (3e-7 + 1.2e-7 * logs.clamp(min=-200).abs())
    return cost * scale.unsqueeze(1)


def check(got: tuple[Tensor, Tensor], student: Tensor, *rest: Any) -> None:
    losses, gradient = differentiate(student, *rest, dtype=torch.float64)
    peer_losses, peer_gradient = differentiate(student, *rest, dtype=torch.float32)
    assert got[1].dtype == student.dtype
    assert_close(got[0], losses, peer_losses, 1e-6 * losses.abs() + 1e-6, "loss of row")
    info = torch.finfo(student.dtype)
    half_ulp = 0.51 * info.eps * gradient.abs() + info.smallest_normal * info.eps
    assert_close(got[1], gradient, peer_gradient, half_ulp + rounding(student, *rest), "gradient")


def run(
    student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, scale: Tensor, chosen: op.Options
) -> Any:
    return torch.ops.pykd.kl_div_topk(student, ids, log_probs, labels, scale, True, *chosen)


def reference(*inputs: Any) -> Any:
    return kl_div_topk_reference(*inputs[:5], *inputs[5])


@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.0, 3.0, 4.0, 20.0])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("rows", "classes", "kept"), [(1, 1, 1), (3, 7, 1), (2, 29, 29), (2, 4099, 50)])
def test_value_and_gradient(isa: str, rows: int, classes: int, kept: int, tail: bool, temperature: float) -> None:
    inputs = (*case(rows, classes, kept), options(temperature, tail=tail))
    check(run(*inputs), *inputs)


@pytest.mark.parametrize("power", [0.05, 0.5, 4.0])
def test_tempered_target(isa: str, power: float) -> None:
    inputs = (*case(3, 300, 20), options(3.0, power=power))
    inputs[1][:, 4] = inputs[1][:, 5]  # weights of one id add up before the power
    inputs[1][:, 6] = -1
    inputs[2][0, 7] = -INF
    check(run(*inputs), *inputs)
    torch.testing.assert_close(run(*inputs), reference(*inputs), rtol=1e-5, atol=1e-6)
    nothing = (*inputs[:2], torch.full_like(inputs[2], -INF), *inputs[3:])
    for losses, gradient in (run(*nothing), reference(*nothing)):
        assert bool(losses.isfinite().all() and gradient.isfinite().all())


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", [False, True])
def test_types_in_any_mixture(isa: str, dtype: torch.dtype, teacher_dtype: torch.dtype, tail: bool) -> None:
    student, ids, log_probs, labels, scale = case(4, 2100, 16, dtype=dtype)
    inputs = (student, ids, log_probs.to(teacher_dtype), labels, scale, options(tail=tail))
    check(run(*inputs), *inputs)


@pytest.mark.parametrize("tail", [False, True])
def test_mean_error_is_below_torch(isa: str, tail: bool) -> None:
    inputs = (*case(4, 5000, 64), options(4.0, tail=tail))
    want = differentiate(*inputs, dtype=torch.float64)[1]
    mine = (run(*inputs)[1].double() - want).abs().mean()
    assert mine < (differentiate(*inputs, dtype=torch.float32)[1] - want).abs().mean()


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_large_logits(isa: str, tail: bool, temperature: float) -> None:
    student, *rest = case(4, 333, 5)
    inputs = (student * 10 + 1e4, *rest, options(temperature, tail=tail))
    check(run(*inputs), *inputs)
    wide = (student * 3e3, *rest, options(temperature, tail=tail))
    losses, gradient = run(*wide)
    assert bool(losses.isfinite().all() and gradient.isfinite().all())
    check((losses, gradient), *wide)


@pytest.mark.parametrize("implementation", [run, reference])
def test_tail_far_below_float32_keeps_its_value_and_gradient(isa: str, implementation: Any) -> None:
    student, ids, log_probs, _, scale = case(3, 100, 4)
    student.scatter_(1, ids, 500.0)  # the other classes have probability e^-500
    inputs = (student, ids, log_probs, None, scale, options(1.0, tail=True))
    losses, gradient = implementation(*inputs)
    want_losses, want = differentiate(*inputs, dtype=torch.float64)
    torch.testing.assert_close(losses.double(), want_losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), want, rtol=2e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 4),
    classes=st.integers(1, 70),
    kept=st.integers(0, 90),
    tail=st.booleans(),
    labelled=st.booleans(),
    power=st.sampled_from([1.0, 0.5]),
)
def test_any_list_is_the_reference(
    rows: int, classes: int, kept: int, tail: bool, labelled: bool, power: float
) -> None:
    """Any length, with repeated ids and -1 anywhere."""
    student, ids = torch.randn(rows, classes), torch.randint(-1, classes, (rows, kept))
    labels, scale = torch.zeros(rows, dtype=torch.int64) if labelled else None, torch.ones(rows)
    log_probs = torch.rand(rows, kept).log() - math.log(max(kept, 1))
    chosen = options(tail=tail, power=1.0 if tail else power)
    want = reference(student.double(), ids, log_probs.double(), labels, scale.double(), chosen)
    losses, gradient = run(student, ids, log_probs, labels, scale, chosen)
    torch.testing.assert_close(losses.double(), want[0], rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(gradient.double(), want[1], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("tail", [False, True])
def test_reference_is_the_truth(tail: bool, temperature: float) -> None:
    inputs = [x.double() if x.is_floating_point() else x for x in case(4, 37, 6)]
    inputs[1][:, 2] = inputs[1][:, 1]
    inputs[1][1:, 3] = -1
    inputs[1][2] = -1
    for chosen in (options(temperature, tail=tail), options(temperature, power=1.0 if tail else 0.3, tail=tail)):
        want = differentiate(*inputs, chosen, dtype=torch.float64)
        torch.testing.assert_close(reference(*inputs, chosen), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("implementation", [run, reference])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0, 7.0])
@pytest.mark.parametrize("tail", [False, True])
def test_minus_infinity(isa: str, implementation: Any, tail: bool, temperature: float) -> None:
    """Rows: nothing missing; other classes; a kept one; every other one; a kept one of weight 0; whole chunks."""
    student, ids, log_probs, labels, scale = case(6, 5000, 3)
    ids[:] = torch.tensor([4090, 17, 3000])
    labels[:] = 3000
    student[1, 20:40] = -INF
    student[2, 17] = -INF
    student[3] = torch.full_like(student[3], -INF).scatter(0, ids[3], student[3, ids[3]])
    student[4, 17] = log_probs[4, 1] = -INF
    student[5, :2900] = -INF
    student[5, 17] = 1.0
    chosen = options(temperature, tail=tail, label_smoothing=0.0)
    losses, gradient = implementation(student, ids, log_probs, labels, scale, chosen)
    infinite = [2, 3] if tail else [2]
    assert losses.isinf().nonzero().flatten().tolist() == infinite and bool((losses[infinite] > 0).all())
    assert bool(gradient.isfinite().all())
    assert bool((gradient[1, 20:40] == 0).all() and (gradient[3].ne(0).sum() <= 3) and (gradient[5, :17] == 0).all())

    # Far enough below, a finite logit has probability 0 too, and the float64 formula stays free of NaN.
    finite = (student.clamp(min=-1e6 * max(temperature, 1.0)), ids, log_probs, labels, scale, chosen)
    want_losses, want = differentiate(*finite, dtype=torch.float64)
    others = [row for row in range(6) if row not in infinite]
    torch.testing.assert_close(losses[others].double(), want_losses[others], rtol=3e-6, atol=3e-6)
    if tail:  # nothing says how the missing tail would share its gradient
        want[3] = want[3].where(torch.zeros(5000).scatter(0, ids[3], 1.0).bool(), 0.0)
    tolerance = 3 * rounding(*finite) + 3e-7 * want.abs()
    assert_close(gradient, want, want, tolerance, "gradient")


@pytest.mark.parametrize("implementation", [run, reference])
@pytest.mark.parametrize("tail", [False, True])
def test_rows_without_any_finite_logit(isa: str, implementation: Any, tail: bool) -> None:
    student, ids, log_probs, labels, scale = case(2, 77, 3)
    student[:] = -INF
    ids[1] = -1
    losses, gradient = implementation(student, ids, log_probs, None, scale, options(tail=tail))
    assert losses.tolist() == [INF, INF if tail else 0.0]
    assert bool((gradient == 0).all())
    losses, gradient = implementation(student, ids, log_probs, labels, scale, options(tail=tail))
    assert losses.tolist() == [INF, INF]  # no class has a probability, so the label has none
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("implementation", [run, reference])
@pytest.mark.parametrize("where", ["kept", "other", "teacher"])
@pytest.mark.parametrize("tail", [False, True])
def test_nan_propagates_and_a_skipped_row_does_not(isa: str, tail: bool, where: str, implementation: Any) -> None:
    student, ids, log_probs, labels, scale = case(4, 100, 3)
    ids[:] = torch.tensor([4, 90, 7])
    ids[3] = -1
    if where == "teacher":
        log_probs[:2, 1] = math.nan
        log_probs[3] = math.nan  # no entry, so not read
    else:
        student[:2, 90 if where == "kept" else 17] = math.nan
    scale[1] = 0
    ids[1, 0], labels[1] = 1000, -5  # a row that does not count may hold anything
    losses, gradient = implementation(student, ids, log_probs, labels, scale, options(tail=tail))
    assert bool(losses[0].isnan() and gradient[0].isnan().any())
    assert losses[1] == 0 and bool((gradient[1] == 0).all())
    assert bool(losses[2:].isfinite().all() and gradient[2:].isfinite().all())
    student[3, 2] = math.nan  # also where nothing was kept
    losses, gradient = implementation(student, ids, log_probs, None, scale, options(tail=tail))
    assert bool(losses[3].isnan() and gradient[3].isnan().any())


def test_strides_need_no_contiguous_input(isa: str) -> None:
    student, ids, log_probs, labels, scale = case(6, 50, 8)
    ids, labels = ids % 37, labels % 37
    want = run(student[::2, 3:40].contiguous(), ids[::2, :5].contiguous(), log_probs[::2, :5].contiguous(),
               labels[::2].contiguous(), scale[::2].contiguous(), options())  # fmt: skip
    sliced = run(student[::2, 3:40], ids[::2, :5], log_probs[::2, :5], labels[::2], scale[::2], options())
    columns = run(student[::2, 3:40].t().contiguous().t(), ids[::2, :5], log_probs[::2, :5], labels[::2], scale[::2],
                  options())  # fmt: skip
    torch.testing.assert_close(sliced, want, rtol=0, atol=0)
    torch.testing.assert_close(columns, want, rtol=0, atol=0)


def test_threads_do_not_change_a_bit(isa: str) -> None:
    inputs = (*case(37, 3001, 9), options(tail=True))
    want = run(*inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.testing.assert_close(run(*inputs), want, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_place_writes_the_same_gradient(isa: str, dtype: torch.dtype) -> None:
    student, ids, log_probs, labels, scale = case(5, 2111, 7, dtype=dtype)
    scale = scale.to(torch.promote_types(dtype, torch.float32))
    losses, gradient = run(student, ids, log_probs, labels, scale, options())
    got = torch.ops.pykd.kl_div_topk_(student, ids, log_probs, labels, scale, *options())
    torch.testing.assert_close((got, student), (losses, gradient), rtol=0, atol=0)


def test_without_gradient(isa: str) -> None:
    inputs = (*case(5, 2111, 7), options())
    losses, gradient = torch.ops.pykd.kl_div_topk(*inputs[:5], False, *inputs[5])
    assert gradient.numel() == 0
    torch.testing.assert_close(losses, run(*inputs)[0], rtol=0, atol=0)


@pytest.mark.parametrize("implementation", [run, reference])
def test_teacher_of_weight_zero_does_not_count(isa: str, implementation: Any) -> None:
    student, ids, log_probs, labels, scale = case(2, 30, 4)
    inputs = (student, ids, log_probs * math.nan, labels, scale, options(kl_weight=0.0))
    leaf = student.double().requires_grad_()
    want = CE * scale * F.cross_entropy(leaf, labels, reduction="none", label_smoothing=SMOOTHING)
    losses, gradient = implementation(*inputs)
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(want.sum(), leaf)[0], rtol=1e-5, atol=1e-7)


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (*case(3, 40, 5), options())
    want = run(*inputs)
    monkeypatch.setattr(op, "native", None)
    torch.testing.assert_close(run(*inputs), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", [False, True])
def test_opcheck(tail: bool) -> None:
    student, ids, log_probs, labels, scale = case(3, 7, 2)
    call, chosen = torch.ops.pykd.kl_div_topk, options(tail=tail)
    opcheck(call.default, (student.requires_grad_(), ids, log_probs, labels, scale, True, *chosen))
    opcheck(call.default, (student.detach(), ids, log_probs, None, scale, False, *chosen))
    opcheck(torch.ops.pykd.kl_div_topk_.default, (student.detach().clone(), ids, log_probs, labels, scale, *chosen))


def test_upstream_gradient() -> None:
    inputs = (*case(4, 33, 5, dtype=torch.bfloat16), options())
    inputs[0].requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5])
    losses, gradient = run(*inputs)
    (got,) = torch.autograd.grad(losses, inputs[0], upstream)
    torch.testing.assert_close(got, (gradient.float() * upstream.unsqueeze(1)).bfloat16(), rtol=0, atol=0)


def test_second_derivative_is_an_error() -> None:
    inputs = (*case(4, 3, 2), options())
    inputs[0].requires_grad_()
    (gradient,) = torch.autograd.grad(run(*inputs)[0].sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="kl_div_topk has no second derivative: drop create_graph=True"):
        gradient.sum().backward()


def test_backward_without_need_grad_is_an_error() -> None:
    inputs = (*case(4, 3, 2), options())
    inputs[0].requires_grad_()
    losses, _ = torch.ops.pykd.kl_div_topk(*inputs[:5], False, *inputs[5])
    with pytest.raises(RuntimeError, match="kl_div_topk ran with need_grad=False, so there is no gradient"):
        losses.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", [-2, 7, 2**40])
@pytest.mark.parametrize("which", ["ids", "labels"])
def test_index_out_of_range_changes_nothing(isa: str, dtype: torch.dtype, wrong: int, which: str) -> None:
    student, ids, log_probs, labels, scale = case(4, 7, 3, dtype=dtype)
    scale = scale.to(dtype)
    (ids[2] if which == "ids" else labels)[2 if which == "labels" else 1] = wrong
    before = student.clone()
    message = r"teacher_ids must lie in \[0, 7\), or be -1 for no entry, but" if which == "ids" else "labels must lie"
    with pytest.raises(ValueError, match=rf"{message}.* position 2 holds {wrong}: "):
        torch.ops.pykd.kl_div_topk_(student, ids, log_probs, labels, scale, *options())
    torch.testing.assert_close(student, before, rtol=0, atol=0)
