"""The op kl_div: native kernel and reference against float64 autograd, at every instruction-set level."""

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

from pykd.ops import kl_div as op
from pykd.ops.kl_div_reference import DIRECTIONS, kl_div_reference

INF = float("inf")
KL, CE, SMOOTHING, BETA = 3.0, 0.7, 0.1, 0.3


def truth(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, options: op.Options) -> Tensor:
    """Row losses in the inputs' own precision, as one would write them down; finite logits, autograd differentiates."""
    beta = options.beta
    log_p, log_q = ((x / options.temperature).log_softmax(-1) for x in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logsumexp(torch.stack([log_q + math.log(beta), log_p + math.log(1 - beta)]), 0)
    divergence = {
        "forward": lambda: (q * (log_q - log_p)).sum(-1),
        "reverse": lambda: (p * (log_p - log_q)).sum(-1),
        "jsd": lambda: (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1),
        "tv": lambda: (p - q).abs().sum(-1) / 2,
    }[options.direction]()
    loss = options.kl_weight * divergence
    if labels is not None:
        smoothing = options.label_smoothing
        loss = loss + options.ce_weight * F.cross_entropy(student, labels, reduction="none", label_smoothing=smoothing)
    return scale * loss


def differentiate(student: Tensor, *rest: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    teacher, labels, scale, options = rest
    leaf = student.detach().to(dtype).requires_grad_()
    losses = truth(leaf, teacher.to(dtype), labels, scale.to(dtype), options)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach().double(), gradient.double()


def case(rows: int, classes: int, *, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> tuple[Tensor, ...]:
    student, teacher = (torch.randn(rows, classes) * spread for _ in range(2))
    labels = torch.randint(0, classes, (rows,))
    return student.to(dtype), teacher.to(dtype), labels, torch.rand(rows) + 0.5


def options(direction: str = "forward", temperature: float = 4.0, **changes: Any) -> op.Options:
    return op.Options(temperature, direction, BETA, KL, CE, SMOOTHING)._replace(**changes)


def assert_close(got: Tensor, want: Tensor, peer: Tensor, tolerance: Tensor | float, what: str) -> None:
    """err(got) <= err(peer) + tolerance, elementwise, both against `want` (float64)."""
    error, allowed = (got.double() - want).abs(), (peer.double() - want).abs().nan_to_num(0.0, INF) + tolerance
    if not bool((error <= allowed).all()):
        worst = (error - allowed).nan_to_num(INF).argmax()
        index = torch.unravel_index(worst, error.shape)
        raise AssertionError(f"{what} {[int(i) for i in index]}: got {got[index]}, want {want[index]}")


def rounding(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, options: op.Options) -> Tensor:
    """What float32 costs each element: probabilities to 3e-7, and half an ulp of the logits' differences in them."""
    logs = [(x.double() / options.temperature).log_softmax(-1) for x in (student, teacher)]
    terms = sum(x.exp() * (3e-7 + 1.2e-7 * x.abs()) for x in logs)
    if options.direction in ("reverse", "jsd"):
        terms = terms * (1 + (logs[0] - logs[1]).abs().amax(-1, keepdim=True))
    terms = terms * options.kl_weight / options.temperature
    if labels is not None:
        log_p = student.double().log_softmax(-1)
        target = F.one_hot(labels, student.shape[1]) + options.label_smoothing / student.shape[1]
        label_terms = log_p.exp() * (3e-7 + 1.2e-7 * log_p.abs()) + 1.2e-7 * target
        terms = terms + options.ce_weight * label_terms
    return terms * scale.unsqueeze(1)


def check(got: tuple[Tensor, Tensor], student: Tensor, *rest: Any) -> None:
    losses, gradient = differentiate(student, *rest, dtype=torch.float64)
    peer_losses, peer_gradient = differentiate(student, *rest, dtype=torch.float32)
    assert got[1].dtype == student.dtype
    assert_close(got[0], losses, peer_losses, 1e-6 * losses.abs() + 1e-6, "loss of row")
    info = torch.finfo(student.dtype)
    half_ulp = 0.51 * info.eps * gradient.abs() + info.smallest_normal * info.eps
    assert_close(got[1], gradient, peer_gradient, half_ulp + rounding(student, *rest), "gradient")


def run(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, options: op.Options) -> Any:
    return torch.ops.pykd.kl_div(student, teacher, labels, scale, True, *options)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.0, 3.0, 4.0, 20.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (3, 7), (2, 4099)])
def test_value_and_gradient(isa: str, rows: int, classes: int, direction: str, temperature: float) -> None:
    inputs = (*case(rows, classes), options(direction, temperature))
    check(run(*inputs), *inputs)


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["forward", "jsd"])
def test_types_in_any_mixture(isa: str, dtype: torch.dtype, teacher_dtype: torch.dtype, direction: str) -> None:
    student, teacher, labels, scale = case(4, 2100, dtype=dtype)
    inputs = (student, teacher.to(teacher_dtype), labels, scale, options(direction))
    check(run(*inputs), *inputs)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mean_error_is_below_torch(isa: str, direction: str) -> None:
    inputs = (*case(8, 5000), options(direction, 4.0))
    want = differentiate(*inputs, dtype=torch.float64)[1]
    mine = (run(*inputs)[1].double() - want).abs().mean()
    assert mine < (differentiate(*inputs, dtype=torch.float32)[1] - want).abs().mean()


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_jsd_of_almost_equal_distributions(isa: str, temperature: float, beta: float) -> None:
    teacher = torch.randn(32, 4099) * 3
    student = teacher + 0.7 + 0.01 * torch.randn_like(teacher)
    chosen = options("jsd", temperature, beta=beta, kl_weight=1.0, ce_weight=0.0)
    inputs = (student, teacher, None, torch.ones(32), chosen)
    want = differentiate(*inputs, dtype=torch.float64)[0]
    mine, peer = run(*inputs)[0].double(), differentiate(*inputs, dtype=torch.float32)[0]
    assert (mine - want).abs().mean() <= min(0.01 * float(want.mean()), float((peer - want).abs().mean()))


@pytest.mark.parametrize("implementation", ["op", "reference"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_large_logits(isa: str, implementation: str, direction: str, temperature: float) -> None:
    call = run if implementation == "op" else (lambda *inputs: kl_div_reference(*inputs[:4], *inputs[4]))
    student, teacher, labels, scale = case(4, 333)
    inputs = (student * 10 + 1e4, teacher * 10 - 1e4, labels, scale, options(direction, temperature))
    check(call(*inputs), *inputs)
    wide = (student * 3e3, teacher * 3e3, labels, scale, options(direction, temperature))
    losses, gradient = call(*wide)
    assert bool(losses.isfinite().all() and gradient.isfinite().all())
    check((losses, gradient), *wide)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    student_classes=st.integers(1, 70),
    teacher_classes=st.integers(1, 70),
    direction=st.sampled_from(list(DIRECTIONS)),
    labelled=st.booleans(),
)
def test_any_shape_is_the_reference(
    rows: int, student_classes: int, teacher_classes: int, direction: str, labelled: bool
) -> None:
    student, labels, scale = torch.randn(rows, student_classes), torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    arguments = (student, torch.randn(rows, teacher_classes), labels if labelled else None, scale, options(direction))
    want = kl_div_reference(*(x.double() if x is not None and x.is_floating_point() else x for x in arguments[:4]),
                            *arguments[4])  # fmt: skip
    losses, gradient = run(*arguments)
    torch.testing.assert_close(losses.double(), want[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), want[1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reference_is_the_truth(direction: str, temperature: float) -> None:
    student, teacher, labels, scale = (x.double() if x.is_floating_point() else x for x in case(4, 37))
    chosen = options(direction, temperature)
    want = differentiate(student, teacher, labels, scale, chosen, dtype=torch.float64)
    got = kl_div_reference(student, teacher, labels, scale, *chosen)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def rows_with_gaps() -> tuple[Tensor, Tensor]:
    """Rows: nothing missing; missing on both sides; in the student; in the teacher; a chunk that is -inf throughout."""
    student, teacher = torch.randn(5, 5000), torch.randn(5, 5000)
    student[1, 10:20] = teacher[1, 10:20] = -INF
    student[2, 4090] = -INF
    teacher[3, 4090] = -INF
    student[4, :2048] = teacher[4, :2048] = -INF
    return student, teacher


@pytest.mark.parametrize("implementation", ["op", "reference"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0, 7.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_minus_infinity(isa: str, implementation: str, direction: str, temperature: float) -> None:
    student, teacher = rows_with_gaps()
    labels, scale, chosen = torch.full((5,), 3000), torch.ones(5), options(direction, temperature, label_smoothing=0.0)
    if implementation == "op":
        losses, gradient = run(student, teacher, labels, scale, chosen)
    else:
        losses, gradient = kl_div_reference(student.double(), teacher.double(), labels, scale, *chosen)
    infinite = {"forward": [2], "reverse": [3]}.get(direction, [])
    assert not bool(gradient.isnan().any())
    assert losses.isinf().nonzero().flatten().tolist() == infinite and bool((losses[infinite] > 0).all())

    # Far enough below, a finite logit has probability 0 too, and the float64 formula stays free of NaN.
    far = -1e6 * max(temperature, 1.0)
    finite = (student.clamp(min=far), teacher.clamp(min=far), labels, scale, chosen)
    want_losses, want = differentiate(*finite, dtype=torch.float64)
    others = [row for row in range(5) if row not in infinite]
    torch.testing.assert_close(losses[others].double(), want_losses[others], rtol=2e-6, atol=2e-6)
    checked = others if direction == "reverse" else range(5)
    tolerance = 2 * rounding(*finite)
    for row in checked:
        assert_close(gradient[row], want[row], want[row], tolerance[row], f"gradient of row {row}")
    if direction == "reverse":  # the infinite row has the gradient of its cross entropy alone
        only_ce = run(student, teacher, labels, scale, chosen._replace(kl_weight=0.0))[1]
        torch.testing.assert_close(gradient[3].float(), only_ce[3])
    assert bool((gradient[1, 10:20] == 0).all() and (gradient[4, :2048] == 0).all())


@pytest.mark.parametrize("implementation", ["op", "reference"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_without_any_finite_logit(isa: str, implementation: str, direction: str) -> None:
    student, teacher = torch.randn(3, 77), torch.randn(3, 77)
    student[0] = teacher[1] = student[2] = teacher[2] = -INF
    call = run if implementation == "op" else (lambda *inputs: kl_div_reference(*inputs[:4], *inputs[4]))
    losses, gradient = call(student, teacher, None, torch.ones(3), options(direction))
    assert losses.tolist() == [INF, INF, 0.0]
    assert bool((gradient == 0).all())
    losses, gradient = call(student, teacher, torch.zeros(3, dtype=torch.int64), torch.ones(3), options(direction))
    assert bool(losses.isinf().all() and (losses > 0).all())  # no class has a probability, so the label has none
    assert bool((gradient[[0, 2]] == 0).all() and gradient[1].isfinite().all())


@pytest.mark.parametrize("implementation", ["op", "reference"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_propagates_and_a_skipped_row_does_not(isa: str, direction: str, side: int, implementation: str) -> None:
    student, teacher, labels, scale = case(3, 100)
    (student, teacher)[side][1, 17] = math.nan
    (student, teacher)[side][0] = torch.where(torch.arange(100) == 17, math.nan, -INF)
    scale[1] = 0
    call = run if implementation == "op" else (lambda *inputs: kl_div_reference(*inputs[:4], *inputs[4]))
    losses, gradient = call(student, teacher, labels, scale, options(direction))
    assert bool(losses[0].isnan() and gradient[0].isnan().any())
    assert losses[1] == 0 and bool((gradient[1] == 0).all())
    assert bool(losses[2].isfinite() and gradient[2].isfinite().all())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("student_classes", "teacher_classes"), [(5001, 4090), (4090, 5001), (9, 2049), (2049, 9)])
def test_narrower_vocabulary_is_padded_with_minus_infinity(
    isa: str, direction: str, student_classes: int, teacher_classes: int
) -> None:
    student, teacher = torch.randn(3, student_classes), torch.randn(3, teacher_classes)
    labels, scale, chosen = torch.tensor([0, 1, 8]), torch.ones(3), options(direction, label_smoothing=0.0)
    classes = max(student_classes, teacher_classes)
    padded = [F.pad(x, (0, classes - x.shape[1]), value=-INF) for x in (student, teacher)]
    losses, gradient = run(student, teacher, labels, scale, chosen)
    want_losses, want = run(*padded, labels, scale, chosen)
    assert gradient.shape == student.shape
    torch.testing.assert_close(losses, want_losses)
    torch.testing.assert_close(gradient, want[:, :student_classes])


def test_strides_need_no_contiguous_input(isa: str) -> None:
    student, teacher, labels, scale = case(6, 50)
    want = run(
        student[::2, 3:40].contiguous(), teacher[::2, 3:40].contiguous(), labels[::2] % 37, scale[::2], options()
    )
    sliced = run(student[::2, 3:40], teacher[::2, 3:40], labels[::2] % 37, scale[::2], options())
    columns = run(student[::2, 3:40].t().contiguous().t(), teacher[:1, 3:40].expand(3, 37), labels[::2] % 37,
                  scale[::2], options())  # fmt: skip
    repeated = run(student[::2, 3:40], teacher[:1, 3:40].repeat(3, 1), labels[::2] % 37, scale[::2], options())
    torch.testing.assert_close(sliced, want, rtol=0, atol=0)
    torch.testing.assert_close(columns, repeated, rtol=0, atol=0)


def test_threads_do_not_change_a_bit(isa: str) -> None:
    inputs = (*case(37, 3001), options())
    want = run(*inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.testing.assert_close(run(*inputs), want, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_place_writes_the_same_gradient(isa: str, dtype: torch.dtype) -> None:
    student, teacher, labels, scale = case(5, 2111, dtype=dtype)
    scale = scale.to(torch.promote_types(dtype, torch.float32))
    losses, gradient = run(student, teacher, labels, scale, options())
    got = torch.ops.pykd.kl_div_(student, teacher, labels, scale, *options())
    torch.testing.assert_close((got, student), (losses, gradient), rtol=0, atol=0)


def test_without_gradient(isa: str) -> None:
    inputs = (*case(5, 2111), options())
    losses, gradient = torch.ops.pykd.kl_div(*inputs[:4], False, *inputs[4])
    assert gradient.numel() == 0
    torch.testing.assert_close(losses, run(*inputs)[0], rtol=0, atol=0)


def test_teacher_of_weight_zero_does_not_count(isa: str) -> None:
    student, teacher, labels, scale = case(2, 30)
    teacher[:] = math.nan
    losses, gradient = run(student, teacher, labels, scale, options(kl_weight=0.0))
    wanted = (student, student, labels, scale, options(kl_weight=0.0))
    check((losses, gradient), *wanted)


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (*case(3, 40), options())
    want = run(*inputs)
    monkeypatch.setattr(op, "native", None)
    torch.testing.assert_close(run(*inputs), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_opcheck(direction: str) -> None:
    student, teacher, labels, scale = case(3, 7)
    chosen = options(direction)
    opcheck(torch.ops.pykd.kl_div.default, (student.requires_grad_(), teacher, labels, scale, True, *chosen))
    opcheck(torch.ops.pykd.kl_div.default, (student.detach(), teacher, None, scale, False, *chosen))
    opcheck(torch.ops.pykd.kl_div_.default, (student.detach().clone(), teacher, labels, scale, *chosen))


def test_upstream_gradient_and_two_backward_passes() -> None:
    student, teacher, labels, scale = case(4, 33, dtype=torch.bfloat16)
    student.requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5])
    losses, gradient = run(student, teacher, labels, scale, options())
    want = (gradient.float() * upstream.unsqueeze(1)).to(torch.bfloat16)
    for _ in range(2):
        (got,) = torch.autograd.grad(losses, student, upstream, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    (got,) = torch.autograd.grad(losses.sum(), student)
    torch.testing.assert_close(got, gradient, rtol=0, atol=0)


def test_unused_loss_has_no_gradient() -> None:
    student, teacher, labels, scale = case(4, 3)
    student.requires_grad_()
    losses, gradient = run(student, teacher, labels, scale, options())
    assert losses.requires_grad and not gradient.requires_grad


def test_second_derivative_is_an_error() -> None:
    student, teacher, labels, scale = case(4, 3)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(
        run(student, teacher, labels, scale, options())[0].sum(), student, create_graph=True
    )
    with pytest.raises(RuntimeError, match="kl_div has no second derivative: drop create_graph=True"):
        gradient.sum().backward()


def test_backward_without_need_grad_is_an_error() -> None:
    student, teacher, labels, scale = case(4, 3)
    student.requires_grad_()
    losses, _ = torch.ops.pykd.kl_div(student, teacher, labels, scale, False, *options())
    with pytest.raises(RuntimeError, match="ran with need_grad=False, so there is no gradient"):
        losses.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label", [-1, 7, -100])
def test_label_out_of_range_changes_nothing(isa: str, dtype: torch.dtype, label: int) -> None:
    student, teacher, labels, scale = case(4, 7, dtype=dtype)
    scale = scale.to(dtype)
    labels[2] = label
    before = student.clone()
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 7\) .* position 2 holds {label}: "):
        torch.ops.pykd.kl_div_(student, teacher, labels, scale, *options())
    torch.testing.assert_close(student, before, rtol=0, atol=0)
    scale[2] = 0  # a row that does not count may hold any label
    assert bool(torch.ops.pykd.kl_div_(student, teacher, labels, scale, *options()).isfinite().all())
