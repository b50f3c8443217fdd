"""linear_kd_loss: the value and every gradient of kd_loss on the logits, without the logits."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pykd
from pykd.ops import linear_kd as op
from pykd.ops import linear_kd_head, row_loss
from pykd.ops.linear_kd_head import Gradients, Head
from pykd.ops.linear_kd_loss import CHUNK_BYTES

ALL = 10**9


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def unfused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor | None,
    *,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    **options: Any,
) -> Tensor:
    wanted = capped(F.linear(*teacher), teacher_softcap)
    if labels is None:
        options = {"alpha": 1.0} | options
    return pykd.kd_loss(capped(F.linear(hidden, weight, bias), softcap), wanted, labels, **options)


def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Any, labels: Any, **options: Any) -> Tensor:
    biases = {"student_bias": bias, "teacher_bias": teacher[2]}
    return pykd.linear_kd_loss(hidden, weight, teacher[0], teacher[1], labels, **biases, **options)


class Case:
    """Student (leaves) and teacher of different widths, and labels of which some do not count."""

    def __init__(self, *rows: int, classes: int = 30, teacher_classes: int = 30, dtype: torch.dtype = torch.float32):
        self.hidden, self.weight, self.bias = (
            torch.randn(*shape).to(dtype).requires_grad_() for shape in ((*rows, 8), (classes, 8), (classes,))
        )
        self.teacher = tuple(
            torch.randn(*shape).to(dtype) for shape in ((*rows, 12), (teacher_classes, 12), (teacher_classes,))
        )
        self.labels = torch.randint(0, classes, rows)
        self.labels[torch.rand(rows) < 0.2] = -100

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def run(self, loss: Any, **options: Any) -> tuple[Tensor, ...]:
        """The loss and its three gradients, for an upstream gradient that is not 1."""
        value = loss(*self.leaves, self.teacher, options.pop("labels", self.labels), **options)
        upstream = torch.linspace(0.5, -2.0, value.numel()).view(value.shape)
        return value.detach(), *torch.autograd.grad(value, self.leaves, upstream)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"direction": "reverse", "temperature": 1.0},
    "jsd": {"direction": "jsd", "beta": 0.3, "alpha": 0.8},
    "tv": {"direction": "tv", "scale_t2": False},
    "softcap": {"softcap": 2.0, "teacher_softcap": 3.0},
    "smoothing": {"label_smoothing": 0.2, "alpha": 0.1},
    "shift": {"shift": True, "ignore_index": -1},
    "mask": {"mask": torch.arange(40).view(8, 5) % 3 > 0, "weights": torch.linspace(0, 2, 40).view(8, 5)},
    "num_items": {"num_items": 17, "temperature": 2.0},
    "labels alone": {"alpha": 0.0},
    "no labels": {"labels": None},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "softcap": 2.0},
}


@pytest.mark.parametrize("chunk_bytes", [1, 3000, ALL], ids=["1 row", "11 rows", "all"])
@pytest.mark.parametrize("name", OPTIONS)
def test_value_and_gradients_are_those_of_kd_loss(name: str, chunk_bytes: int) -> None:
    case, options = Case(8, 5), OPTIONS[name]
    case.labels[case.labels == -100] = options.get("ignore_index", -100)
    want = case.run(unfused, **options)
    got = case.run(fused, chunk_bytes=chunk_bytes, **options)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    assert bool(want[0].isfinite().all()) and all(bool((x != 0).any()) for x in want)


@pytest.mark.parametrize(("classes", "teacher_classes"), [(30, 37), (37, 30)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd", "tv"])
def test_vocabularies_of_different_width(direction: str, classes: int, teacher_classes: int) -> None:
    case = Case(40, classes=classes, teacher_classes=teacher_classes)
    want = case.run(unfused, direction=direction)
    torch.testing.assert_close(case.run(fused, direction=direction, chunk_bytes=3000), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd", "tv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth_than_unfused(dtype: torch.dtype, direction: str) -> None:
    half, exact = Case(300, classes=400, teacher_classes=400, dtype=dtype), Case(300)
    exact.labels = half.labels
    exact.hidden, exact.weight, exact.bias = (x.detach().double().requires_grad_() for x in half.leaves)
    exact.teacher = tuple(x.double() for x in half.teacher)
    options = {"direction": direction, "softcap": 5.0}
    truth = exact.run(unfused, **options)
    peer = half.run(unfused, **options)
    for chunk_bytes in (50_000, ALL):
        got = half.run(fused, chunk_bytes=chunk_bytes, **options)
        for mine, other, true, leaf in zip(got, peer, truth, (got[0], *half.leaves), strict=True):
            assert mine.dtype == leaf.dtype
            mine_error, peer_error = ((x.double() - true).abs() for x in (mine, other))
            assert mine_error.mean() <= 1.03 * peer_error.mean() + 1e-7
            assert mine_error.max() <= 2 * peer_error.max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_gradient_adds_up_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_kd_head, "BLOCK", 64)  # more than one block of columns, the last one short
    case = Case(2048, classes=200, teacher_classes=3, dtype=dtype)
    options = {"num_items": 16}  # clear of float16's subnormal numbers
    want = case.run(unfused, **options)[2].float()
    got = case.run(fused, chunk_bytes=16 * 406, **options)[2].float()
    ulp = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal
    assert bool(((got - want).abs() <= 1.01 * ulp).all())
    assert (got == want).float().mean() > 0.9  # 128 roundings of partial sums would leave few alike


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    classes=st.integers(1, 40),
    teacher_classes=st.integers(1, 40),
    chunk_bytes=st.integers(1, 2000),
    reduction=st.sampled_from(["batchmean", "sum", "none"]),
)
def test_any_shape(rows: list[int], classes: int, teacher_classes: int, chunk_bytes: int, reduction: str) -> None:
    case = Case(*rows, classes=classes, teacher_classes=teacher_classes)
    want = case.run(unfused, reduction=reduction)
    got = case.run(fused, reduction=reduction, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(got, want, rtol=5e-6, atol=5e-6)


def test_float64_is_exact() -> None:
    case = Case(6, classes=7, teacher_classes=5, dtype=torch.float64)
    teacher, labels = case.teacher, case.labels
    assert torch.autograd.gradcheck(
        lambda *leaves: fused(*leaves, teacher, labels, chunk_bytes=300, softcap=3.0), case.leaves
    )


def test_all_ignored_is_zero_whatever_the_hidden_states_hold() -> None:
    case = Case(6)
    case.labels[:] = -100
    with torch.no_grad():
        case.hidden.fill_(math.nan)
        case.teacher[0].fill_(math.inf)
    assert all(bool((x == 0).all()) for x in case.run(fused))


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
def test_ignored_positions_may_hold_nan(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(40)
    want = case.run(fused)
    with torch.no_grad():
        case.hidden[case.labels == -100] = math.nan
        case.teacher[0][case.labels == -100] = math.nan
    if device == "elsewhere":  # what a GPU does, where the host does not know which positions count
        monkeypatch.setattr(op, "_counted", lambda scale: None)
        monkeypatch.setattr(op, "_take", lambda hidden, chunk, scale: op.counted_only(hidden[chunk], scale))
    torch.testing.assert_close(case.run(fused, chunk_bytes=3000), want)


def test_ignored_positions_cost_nothing_on_the_cpu() -> None:
    case = Case(64)
    case.labels[5:] = -100
    case.labels[:5] = 0
    with Live() as live:
        case.run(fused, chunk_bytes=ALL)
    assert live.most_rows == 5


# The neighbours: autograd, compiler, autocast; test_distributed.py has DDP.


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[bool]] = []
    original = Gradients.__init__

    def record(self: Gradients, student: Head, needs: list[bool]) -> None:
        asked.append(needs)
        original(self, student, needs)

    monkeypatch.setattr(Gradients, "__init__", record)
    case = Case(40)
    want = case.run(unfused)[1:]
    for place in range(3):
        leaves = [x if place == i else x.detach() for i, x in enumerate(case.leaves)]
        loss = fused(*leaves, case.teacher, case.labels, chunk_bytes=3000)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves[place])[0] * 0.5, want[place])
        assert asked.pop() == [place == i for i in range(3)]
    with torch.no_grad():
        assert not fused(*case.leaves, case.teacher, case.labels).requires_grad
    assert not fused(*(x.detach() for x in case.leaves), case.teacher, case.labels).requires_grad
    assert asked == []


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_backward_twice_and_double_use(reduction: str) -> None:
    case = Case(40)

    def total(loss: Any) -> Tensor:
        hidden = case.hidden * 2
        first = loss(hidden, case.weight, case.bias, case.teacher, case.labels, reduction=reduction).sum()
        again = loss(hidden * 0.5, case.weight, None, case.teacher, None, alpha=1.0)
        return first + 3 * again + hidden.square().mean() + case.weight.sum()

    want = torch.autograd.grad(total(unfused), case.leaves)
    value = total(fused)
    for keep in (True, True, False):
        got = torch.autograd.grad(value, case.leaves, retain_graph=keep)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_accumulated_micro_batches_are_the_whole() -> None:
    case = Case(40)
    items = int((case.labels != -100).sum())
    want = torch.autograd.grad(fused(*case.leaves, case.teacher, case.labels), case.leaves)
    for part in (slice(0, 13), slice(13, 40)):
        inputs = (case.hidden[part], case.weight, case.bias, (case.teacher[0][part], *case.teacher[1:]))
        fused(*inputs, case.labels[part], num_items=items).backward()
    torch.testing.assert_close(tuple(x.grad for x in case.leaves), want)


def test_a_weight_tied_between_student_and_teacher() -> None:
    hidden, teacher_hidden = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    want = pykd.kd_loss(F.linear(hidden, weight), F.linear(teacher_hidden, weight), None, alpha=1.0)
    got = pykd.linear_kd_loss(hidden, weight, teacher_hidden, weight, chunk_bytes=2000)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want)]
    torch.testing.assert_close(*gradients)
    assert teacher_hidden.grad is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own compiler uses it
@pytest.mark.parametrize(("autocast", "options"), [(False, {}), (True, {"reduction": "none", "softcap": 2.0})], ids=str)
def test_compiles_without_graph_break(autocast: bool, options: dict[str, Any]) -> None:
    case = Case(8, 5)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return fused(hidden * 1.5, weight, bias, case.teacher, case.labels, chunk_bytes=3000, **options).sum() * 2.0

    want = step(*case.leaves)
    got = torch.compile(step, fullgraph=True)(*case.leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, case.leaves), torch.autograd.grad(want, case.leaves))


def test_exports() -> None:
    class Loss(nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
            return pykd.linear_kd_loss(hidden, weight, hidden * 2, weight)

    inputs = torch.randn(6, 4), torch.randn(9, 4)
    program = torch.export.export(Loss(), inputs)
    assert any("pykd.linear_kd" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Loss()(*inputs))


@pytest.mark.parametrize("each", [False, True])
def test_opcheck(each: bool) -> None:
    case = Case(6)
    options = (4.0, "forward", 0.5, 8.0, 0.5, 0.1)
    inputs = (*case.leaves, 3.0, *case.teacher, None, case.labels.clamp(min=0), torch.rand(6), each)
    needs = [not each] * 3
    opcheck(torch.ops.pykd.linear_kd, (*inputs, needs, 1000, None, *options))


def test_autocast_computes_in_its_type_and_keeps_the_weights_gradient_exact() -> None:
    case = Case(300)
    narrow = Case(300, dtype=torch.bfloat16)
    narrow.labels = case.labels
    narrow.hidden, narrow.weight, narrow.bias = (x.detach().bfloat16().requires_grad_() for x in case.leaves)
    narrow.teacher = tuple(x.bfloat16() for x in case.teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, peer = case.run(fused, chunk_bytes=5000), case.run(unfused)
    inside = narrow.run(fused, chunk_bytes=5000)
    torch.testing.assert_close(got[0], inside[0], rtol=0, atol=0)
    assert [x.dtype for x in got] == [torch.float32] * 4
    torch.testing.assert_close(got, peer, rtol=2e-2, atol=2e-3)
    assert bool((got[2] != got[2].bfloat16()).any())  # never rounded to the type of autocast
    double = Case(6, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves float64 alone
        torch.testing.assert_close(double.run(fused), double.run(unfused))


# Memory: counted at the full size on the meta device, where a tensor has a shape and no content.


class Live(TorchDispatchMode):
    """Counts the bytes of every tensor alive that operations inside made, and the rows of the largest logits."""

    def __init__(self, classes: int = 30) -> None:
        super().__init__()
        self.classes, self.live_bytes, self.peak_bytes, self.most_rows = classes, 0, 0, 0
        self.tensors: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.pykd.linear_kd.default:
            with self:  # look inside
                return op._linear_kd(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.tensors:
                self.tensors[tensor.untyped_storage()._cdata] = 1  # made outside: never counted
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.tensors:
            if tensor.dim() == 2 and tensor.shape[1] == self.classes:
                self.most_rows = max(self.most_rows, len(tensor))
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.tensors[key] = self.tensors.get(key, 0) + 1
        weakref.finalize(tensor, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self.tensors[key] -= 1
        if self.tensors[key] == 0:
            del self.tensors[key]
            self.live_bytes -= size


def peak_bytes(loss: Any, **options: Any) -> tuple[int, int]:
    """Most bytes alive at once in forward and backward beyond inputs and returned gradients; rows of the logits."""
    positions, features, classes = 2048, 1024, 151_936
    leaves = [torch.empty(shape, device="meta", requires_grad=True) for shape in ((positions, features),
              (classes, features), (classes,))]  # fmt: skip
    teacher = (torch.empty(positions, features, device="meta"), torch.empty(classes, features, device="meta"), None)
    with Live(classes) as live:
        value = loss(*leaves, teacher, None, **options)
        value.backward()
    return live.peak_bytes - sum(x.nbytes for x in leaves), live.most_rows


def test_peak_memory_is_an_eighth_of_the_unfused_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_loss, "check_inplace", lambda *_: None)  # it compares addresses, which meta tensors lack
    mine, rows = peak_bytes(fused)
    whole, all_rows = peak_bytes(unfused, inplace=True)
    logits_bytes = 2048 * 151_936 * 4
    assert all_rows == 2048 and 1.4 * logits_bytes < whole < 2.1 * logits_bytes  # it counts what is there
    assert 128 <= rows <= 2048 / 8 and mine <= CHUNK_BYTES + 2**20 and mine * 8 <= whole
    assert peak_bytes(lambda *inputs: 3 * fused(*inputs))[0] <= mine + 2**20  # an upstream gradient copies no weight


def test_the_budget_rules() -> None:
    head = [Head(torch.empty(0, 4), torch.empty(classes, 4, dtype=dtype), None, None)
            for classes, dtype in ((100, torch.float32), (50, torch.bfloat16))]  # fmt: skip
    assert op.chunk_rows(*head, 1000, 1, 1) == 1
    assert op.chunk_rows(*head, 1000, 500 * 64, 1) == 64
    assert op.chunk_rows(*head, 1000, 900 * 64, 2) == 64
    assert op.chunk_rows(*head, 70, 500 * 64, 1) == 48  # 2 chunks of about equal size, not 64 + 6
    assert op.chunk_rows(*head, 60, 500 * 64, 1) == 60
    assert op.chunk_rows(*head, 0, 500, 1) == 1


# Errors.

H, W, B, Y = torch.zeros(4, 3), torch.zeros(6, 3), torch.zeros(6), torch.zeros(4, dtype=torch.int64)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_hidden": Y}, TypeError, "student_hidden must be floating point, got torch.int64"),
    ({"teacher_weight": W.long()}, TypeError, "teacher_weight must be floating point, got torch.int64"),
    ({"student_weight": W.half()}, TypeError, "student_weight is torch.float16 and student_hidden torch.float32: conv"),
    ({"teacher_bias": B.to("meta")}, ValueError, "teacher_bias is on meta and teacher_hidden on cpu: move one"),
    ({"student_weight": W[:, :2]}, ValueError, r"student_weight must have shape \(classes, features\) for student_hid"),
    ({"student_weight": B}, ValueError, r"at least 1 of each, got \(6,\) and \(4, 3\)"),
    ({"teacher_weight": W[:0]}, ValueError, r"teacher_weight must have shape .* got \(0, 3\) and \(4, 3\)"),
    ({"student_bias": B[:5]}, ValueError, r"student_bias must have shape \(6,\), got \(5,\)"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0: None switches it off"),
    ({"teacher_softcap": math.inf}, ValueError, "teacher_softcap must be positive and finite, got inf"),
    ({"teacher_hidden": H[:3]}, ValueError, r"student_hidden \(4, 3\) and teacher_hidden \(3, 3\) must agree in every"),
    ({"teacher_hidden": H.to("meta"), "teacher_weight": W.to("meta")}, ValueError, "cpu, teacher_hidden on meta: move"),
    ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be positive, got 0"),
    ({"alpha": 2.0}, ValueError, r"alpha must lie in \[0, 1\], got 2.0"),
    ({"labels": None, "alpha": 0.5}, ValueError, r"labels are needed for the label term: .* \(got alpha=0.5\)"),
    ({"labels": Y + 6, "chunk_bytes": 1}, ValueError, r"labels must lie in \[0, 6\) .* position 0 holds 6"),
    ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1.0"),
    ({"mask": Y}, TypeError, r"mask must be bool \(True counts\), got torch.int64"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"student_hidden": H, "student_weight": W, "teacher_hidden": H, "teacher_weight": W, "labels": Y}
    with pytest.raises(error, match=message):
        pykd.linear_kd_loss(**(good | changes))


def test_a_bad_label_is_named_by_its_position_in_the_batch() -> None:
    labels = torch.tensor([-100, 0, 1, 9])
    with pytest.raises(ValueError, match="position 3 holds 9"):
        pykd.linear_kd_loss(H, W, H, W, labels, chunk_bytes=1)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_there_is_no_second_derivative(reduction: str) -> None:
    case = Case(4)
    loss = fused(*case.leaves, case.teacher, case.labels, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, case.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_kd_loss has no second derivative: drop create_graph=True"):
        gradient.sum().backward()


def test_a_gradient_that_was_not_asked_for() -> None:
    case = Case(4)
    options = (4.0, "forward", 0.5, 8.0, 0.0, 0.0)
    head = (*case.leaves, None, *case.teacher, None, None)
    loss = torch.ops.pykd.linear_kd(*head, torch.ones(4), False, [True, False, False], 1000, None, *options)[0]
    with pytest.raises(RuntimeError, match="linear_kd ran without a gradient that is wanted now"):
        loss.backward()
