"""Sparsity that rises during training: the schedule, masks that hold, interruptions, and what is left at the end."""

from __future__ import annotations

import copy
import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd import convert_qat, distill, finetune, prepare_qat
from pykd.data.bundle import DataBundle
from pykd.errors import ArtifactError
from pykd.nn.fake_quantized import QATLinear
from pykd.nn.masked import Masked, MaskedConv2d, MaskedLinear
from pykd.nn.sparse_conv import SparseConv2d
from pykd.nn.sparse_linear import SparseLinear
from pykd.pruning import Gradual, prune
from pykd.pruning.gradual import cubic_sparsity
from pykd.training import Guard, History, TrainConfig, fit
from pykd.training.engine import Engine

from ..training import killed


def quiet(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    return nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]), {}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def zeros(model: nn.Module) -> tuple[int, int]:
    weights = [model[index].weight for index in (0, 2)]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


# The schedule.


def test_the_cubic_schedule_is_fast_at_first_and_ends_exactly() -> None:
    values = [cubic_sparsity(p / 10, initial=0.1, final=0.9) for p in range(-2, 13)]
    assert values[:3] == [pytest.approx(0.1)] * 3 and values[-3:] == [pytest.approx(0.9)] * 3
    steps = [b - a for a, b in itertools.pairwise(values[2:13])]
    assert all(a > b > 0 for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("method", ["magnitude", "movement", "random"])
def test_sparsity_rises_and_the_model_is_sparse_afterwards(method: str) -> None:
    model, masks = network(), list[list[Tensor]]()

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        masks.append([module.mask.clone() for module in model.modules() if isinstance(module, Masked)])
        return quiet(model, batch)

    config = TrainConfig(max_steps=20, batch_size=8, weight_decay=0.1)
    gradual = Gradual(method, sparsity=0.8, begin=0.1, end=0.6, every=2)
    history = fit(model, killed.bundle(), loss_fn, config, prune=gradual, progress=False)
    gone, total = zeros(model)
    assert isinstance(model[0], SparseLinear) and type(model[4]) is nn.Linear
    assert gone == round(0.8 * total) and not any(isinstance(module, Masked) for module in model.modules())
    course = [record["sparsity"] for record in history.records]
    assert course[:2] == [0, 0] and course[12:] == [pytest.approx(0.8, abs=0.01)] * 8
    assert course == sorted(course) and len(set(course)) == 6
    if method != "movement":
        for before, after in itertools.pairwise(masks):
            assert not any(bool((a & ~b).any()) for a, b in zip(after, before, strict=True))
    entry = model.pykd_report[-1]
    assert entry["method"] == f"gradual {method}" and entry["parameters"]["end"] == 0.6
    assert entry["nonzero_before"] - entry["nonzero_after"] == gone


def test_patterns_scopes_and_layers_that_were_sparse(tmp_path: Path) -> None:
    model = prune(network(), sparsity=0.3, scope="row", include=["2"])
    before = model[2].weight == 0
    gradual = Gradual(pattern="1:4", include=["2"], every=1)
    fit(model, killed.bundle(), quiet, TrainConfig(max_steps=6, batch_size=8), prune=gradual, progress=False)
    assert bool(((model[2].weight != 0).view(8, 4, 4).sum(2) <= 1).all()) and bool((model[2].weight[before] == 0).all())
    model = network()
    gradual = Gradual(sparsity=0.5, scope="layer", initial=0.25, every=3)
    fit(model, killed.bundle(), quiet, TrainConfig(max_steps=1, batch_size=8), prune=gradual, progress=False)
    assert [int((model[index].weight == 0).sum()) for index in (0, 2)] == [48, 64]


def test_convolutions_and_layers_that_lose_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight += 100
    items = [{"pixel_values": torch.randn(1, 4, 4), "labels": index % 3} for index in range(8)]
    data = [{"pixel_values": torch.stack([i["pixel_values"] for i in items]), "labels": torch.arange(8) % 3}]
    finetune(model, data, lr=1e-4, prune=Gradual(sparsity=0.1), progress=False)
    assert isinstance(model[0], SparseConv2d) and type(model[2]) is nn.Linear
    assert model.pykd_report[0]["skipped"] == {"2": "none of its weights is among those that go"}
    assert [entry["stage"] for entry in model.pykd_report] == ["prune", "finetune"]


# Movement.


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_scores_learn_by_the_gradient_of_the_masked_weight_times_the_weight(kind: type[nn.Module]) -> None:
    layer: Any
    if kind is nn.Linear:
        layer, x = MaskedLinear.from_linear(nn.Linear(5, 3), learn_scores=True), torch.randn(7, 5)
    else:
        layer, x = MaskedConv2d.from_conv2d(nn.Conv2d(2, 3, 3), learn_scores=True), torch.randn(2, 2, 5, 5)
    layer.mask.copy_(torch.rand(layer.mask.shape) < 0.5)
    effective = (layer.weight * layer.mask).detach().requires_grad_()
    twin = nn.functional.linear if kind is nn.Linear else nn.functional.conv2d
    out = layer(x)
    want = twin(x, effective, layer.bias)
    torch.testing.assert_close(out, want)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    (gradient,) = torch.autograd.grad(want, effective, upstream)
    torch.testing.assert_close(layer.weight.grad, gradient * layer.mask)
    torch.testing.assert_close(layer.scores.grad, gradient * layer.weight)


def test_movement_keeps_small_weights_that_grow_and_drops_large_ones_that_shrink() -> None:
    """The task needs inputs 0..2; the weights begin large for inputs 3..5 and small for those."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.1, 0.1, 0.1, 0.6, 0.6, 0.6]).repeat(4, 1))
        model[1].weight.fill_(0.5)
    x = torch.randn(64, 6)
    data = [{"pixel_values": x, "labels": x[:, :3].sum(1, keepdim=True)}] * 40

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return (model(batch["pixel_values"]) - batch["labels"]).square().mean(), {}

    for method, kept in (("movement", [True] * 3 + [False] * 3), ("magnitude", [False] * 3 + [True] * 3)):
        trained = copy.deepcopy(model)
        config = TrainConfig(lr=2e-3, weight_decay=0.0, clip_norm=None, max_steps=40)
        gradual = Gradual(method, sparsity=0.5, begin=0.2, include=["0"], scope="row", every=2)
        fit(trained, data, loss_fn, config, prune=gradual, progress=False)
        assert (trained[0].weight != 0).tolist() == [kept] * 4


# Interruptions.


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What the killed process computes with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, one_thread: None) -> None:
    method = "movement"
    want = killed.train(None, method=method)
    words = [sys.executable, str(Path(killed.__file__)), str(tmp_path), "7", "fresh", method]
    died = subprocess.run(words, capture_output=True, timeout=120)
    assert died.returncode == -signal.SIGKILL
    assert killed.train(tmp_path, resume=True, method=method) == want != killed.train(None)


def test_another_schedule_is_another_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        killed.train(tmp_path, die_at=5, how=signal.SIGINT, method="magnitude")
    with pytest.raises(ArtifactError, match=r"settings was .*'method': 'magnitude'.*, is now .*'method': 'movement'"):
        killed.train(tmp_path, resume=True, method="movement")


def test_an_interrupted_model_is_sparse_too() -> None:
    model, gradual = network(), Gradual(sparsity=0.5, every=1)
    calls = 0

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the cat is on the keyboard")
        return quiet(model, batch)

    with pytest.raises(RuntimeError, match="the cat"):
        fit(model, killed.bundle(), loss_fn, TrainConfig(max_steps=9), prune=gradual, progress=False)
    assert isinstance(model[0], SparseLinear) and 0 < zeros(model)[0] < 112
    model(torch.randn(2, 6))


# With a teacher, and what is refused.


def test_distillation_prunes_meanwhile() -> None:
    data: DataBundle = killed.bundle()
    student = distill(network(), killed.network(), data, max_steps=6, prune=Gradual(sparsity=0.5), progress=False)
    gone, total = zeros(student)
    assert gone == total // 2 and [entry["stage"] for entry in student.pykd_report] == ["prune", "distill"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "movment"}, "unknown method of gradual pruning 'movment': did you mean 'movement'"),
    ({"begin": 0.7}, "begin and end are shares of the steps, 0 <= begin < end <= 1, got 0.7, 0.7"),
    ({"initial": 0.6}, "initial is a sparsity between 0 and the final 0.5, got 0.6"),
    ({"pattern": "4x1"}, r"gradual pruning takes patterns N:M, as '2:4', got '4x1'; prune\(\) takes blocks"),
    ({"every": 0}, "every is a number of steps, at least 1, got 0"),
    ({"method": "movement", "scope": "all"}, "unknown scope 'all'"),
    ({"pattern": "2:4", "sparsity": 0.6}, "pattern '2:4' removes 0.5 of the weights"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_what_it_refuses(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Gradual(**options)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "bf16"])
def test_rounded_layers_are_pruned_meanwhile(scheme: str) -> None:
    """Quantization-aware training of a model whose weights go: what is packed computes as what was trained."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 3))
    model = prepare_qat(wide, scheme, group_size=32)
    assert isinstance(model[0], QATLinear) and isinstance(model[2], QATLinear)
    gradual = Gradual(sparsity=0.75, every=1)
    history = fit(model, killed.bundle(), quiet, TrainConfig(max_steps=12, batch_size=8), prune=gradual, progress=False)
    course = [record["sparsity"] for record in history.records]
    assert course == sorted(course) and course[-1] == pytest.approx(0.75, abs=1e-3)
    x = torch.randn(5, 6)
    with torch.no_grad():
        want = model.eval()(x)
        found = convert_qat(model)(x)
    packed: Any = model[2]
    gone = sum(int((layer.weight == 0).sum()) for layer in (model[0], packed))
    assert gone >= 0.75 * (6 * 128 + 128 * 64) - 1 and packed.nnz is not None
    assert (found - want).norm() <= 0.02 * want.norm()  # a rounded activation may fall to the other side
    assert [entry["stage"] for entry in model.pykd_report] == ["prepare_qat", "prune", "quantize"]


def test_movement_does_not_go_with_rounded_layers_and_what_loses_nothing_has_no_mask() -> None:
    torch.manual_seed(0)
    model = prepare_qat(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)))
    with pytest.raises(ValueError, match="layers of quantization-aware training have no place: take 'magnitude'"):
        Gradual("movement").attach(model)
    layer: Any = model[0]
    assert layer.kept is None and bool(layer.mask.all())
    gradual = Gradual()
    gradual.attach(model)
    gradual.detach(model)
    assert layer.kept is None and [entry["stage"] for entry in model.pykd_report] == ["prepare_qat"]


# Under a guard.


def guarded(scores: list[float], *, broken: tuple[int, ...] = (), **options: Any) -> tuple[nn.Sequential, History]:
    """Twelve steps, validated every two with these accuracies; the masks of the seventh are final. broken: losses, by
    the number of the call, that are not finite."""
    model, told, calls = network(), iter(scores), itertools.count()

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        loss, noted = quiet(model, batch)
        return (loss * torch.nan if next(calls) in broken else loss), noted

    def validate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": next(told)}

    config = TrainConfig(max_steps=12, batch_size=8, validate_steps=2)
    gradual, guard = Gradual(sparsity=0.8, end=0.5, every=1), Guard(metric="accuracy", **options)
    return model, fit(model, killed.bundle(), loss_fn, config, validate=validate, guard=guard, prune=gradual,
                      progress=False)  # fmt: skip


def test_a_guard_compares_only_models_of_the_final_sparsity() -> None:
    model, history = guarded([0.9, 0.8, 0.5, 0.4, 0.6, 0.5, 0.58, 0.59])
    assert [(entry["step"], entry["action"]) for entry in history.validations] == [
        *((step, "best") for step in (0, 2, 4, 6, 8)), (10, "roll back"), (10, "keep"), (12, "keep"),
    ]  # fmt: skip
    said = [entry["sentence"] for entry in history.validations]
    assert said[3] == "accuracy 0.4 while sparsity rises, compared with no other"
    assert said[4] == "accuracy 0.6 is the first" and "against the best, 0.6 at step 8" in said[5]
    gone, total = zeros(model)
    assert history.kept_step == 8 and gone == round(0.8 * total)
    assert history.outcome == "finished after 1 rollback with the model of step 8: accuracy 0.6"


def test_a_guard_goes_back_to_the_newest_state_while_sparsity_rises() -> None:
    model, history = guarded([0.9, 0.8, 0.5, 0.4, 0.3, 0.35, 0.36], broken=(5,))
    assert [entry["action"] for entry in history.validations] == ["best"] * 3 + ["roll back"] + ["best"] * 4
    assert "rolled back to step 4" in history.validations[3]["sentence"] and history.steps == 12
    gone, total = zeros(model)
    assert gone == round(0.8 * total)
    model, history = guarded([0.9, 0.8, 0.5], broken=(5,), rollbacks=0)
    assert 0 < zeros(model)[0] < round(0.8 * total) and history.kept_step == 4
    assert history.outcome is not None and history.outcome.endswith("0.5, before its final sparsity was reached")


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data, options = killed.bundle(), {"prune": Gradual(), "progress": False}
    monkeypatch.setattr(Engine, "own", lambda engine, model: network())
    model = network()
    with pytest.raises(ValueError, match="prune needs whole weights in every process: run under DDP, not FSDP2"):
        fit(model, data, quiet, **options)
    assert type(model[0]) is nn.Linear and not hasattr(model, "pykd_report")
