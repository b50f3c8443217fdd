"""The loop: what it learns, in which order, and that a run that was stopped ends as if it had not been."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pykd.data.bundle import DataBundle, stack
from pykd.errors import ArtifactError, DataError, TrainingError
from pykd.training import TrainConfig, fit
from pykd.training.labels import check_batch
from pykd.training.source import Source

SCRIPT = Path(__file__).parent / "killed.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("killed", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


killed = load_script()
UNINTERRUPTED = killed.train(None)


def quiet(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    return nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]), {"rows": len(batch["labels"])}


def bundle_of(size: int) -> DataBundle:
    items = [{"pixel_values": torch.full((6,), float(i)), "labels": i % 3} for i in range(size)]
    return DataBundle(items, items[:1], stack, ["a", "b", "c"], "counted")


# Learning.


def test_a_run_learns_and_tells_its_course() -> None:
    torch.manual_seed(0)
    centers = torch.randn(3, 6) * 3
    items = [{"pixel_values": centers[i % 3] + torch.randn(6), "labels": i % 3} for i in range(60)]
    model = killed.network().eval()
    history = fit(
        model, DataBundle(items, items, stack, ["a", "b", "c"], "blobs"), quiet, TrainConfig(epochs=10, lr=0.03)
    )
    assert history.records[-1]["loss"] < 0.5 * history.records[0]["loss"]
    assert history.steps == history.total_steps == 20
    assert history.records[0]["rows"] == 32 and history.records[1]["rows"] == 28
    assert history.records[-1]["epoch"] == 10 and history.seconds > 0
    assert not model.training  # as it was handed in


def test_part_of_an_epoch_and_a_number_of_steps() -> None:
    data = bundle_of(40)
    assert fit(killed.network(), data, quiet, TrainConfig(epochs=0.5, batch_size=8), progress=False).steps == 3
    assert fit(killed.network(), data, quiet, TrainConfig(max_steps=7, batch_size=8), progress=False).steps == 7


def test_the_curve_is_thinned_evenly_and_keeps_both_ends() -> None:
    history = fit(killed.network(), bundle_of(16), quiet, TrainConfig(max_steps=11, batch_size=8), progress=False)
    assert [record["step"] for record in history.curve(3)] == [1, 6, 11]
    summary = history.summary()
    assert summary["steps"] == 11 and summary["last_loss"] == history.records[-1]["loss"]
    json.dumps(summary, allow_nan=False)


def test_autocast_computes_in_bfloat16() -> None:
    seen = []

    def watch(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        seen.append(model(batch["pixel_values"]).dtype)
        return quiet(model, batch)

    fit(killed.network(), bundle_of(8), watch, TrainConfig(autocast="bfloat16", batch_size=8), progress=False)
    fit(killed.network(), bundle_of(8), watch, TrainConfig(batch_size=8), progress=False)
    assert seen == [torch.bfloat16, torch.float32]


def test_clipping_bounds_the_gradient() -> None:
    def steep(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return quiet(model, batch)[0] * 1e6, {}

    model = nn.Linear(6, 3)
    record = fit(model, bundle_of(8), steep, TrainConfig(max_steps=1, clip_norm=0.5), progress=False).records[0]
    assert record["grad_norm"] > 1e5
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.cat([g.flatten() for g in grads]).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_the_bar_shows_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    fit(killed.network(), bundle_of(16), quiet, TrainConfig(batch_size=8), progress=True, label="teacher")
    shown = capsys.readouterr()
    assert "teacher: 100%" in shown.err and "step/s" in shown.err and "loss=" in shown.err and shown.out == ""
    fit(killed.network(), bundle_of(16), quiet, TrainConfig(batch_size=8), progress=False)
    assert capsys.readouterr().err == ""


# Order.


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, start: int) -> list[float]:
        stream = Source(bundle_of(10), batch_size=4, seed=seed).stream(start, 6)
        return [value for ((batch, _),) in stream for value in batch["pixel_values"][:, 0].tolist()]

    first = order(0, 0)
    assert first == order(0, 0) and first != order(1, 0)
    assert sorted(first[:10]) == sorted(first[10:]) and first[:10] != first[10:]
    assert order(0, 4) == first[14:]


def test_a_shuffling_loader_is_repeatable_and_resumable() -> None:
    data = TensorDataset(torch.arange(10.0))

    def order(start: int) -> list[list[float]]:
        loader = DataLoader(data, batch_size=4, shuffle=True)
        return [batch[0].tolist() for ((batch, _),) in Source(loader, batch_size=1, seed=0).stream(start, 6)]

    assert order(0)[4:] == order(4)


def test_a_distributed_sampler_is_told_the_epoch() -> None:
    class Sampler(torch.utils.data.SequentialSampler):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    data = TensorDataset(torch.arange(4.0))
    list(Source(DataLoader(data, batch_size=2, sampler=Sampler(data)), batch_size=1, seed=0).stream(0, 4))
    assert Sampler.epochs == [0, 1]


def test_global_generators_are_left_as_found() -> None:
    model = killed.network()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    want = (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    fit(model, bundle_of(16), quiet, TrainConfig(batch_size=8), progress=False)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == want


# Stopping and going on.


@pytest.mark.parametrize("step", [1, 6])
def test_sigkill_then_resume_ends_with_identical_weights(tmp_path: Path, step: int) -> None:
    threads = torch.get_num_threads()
    dead = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(step), "fresh"], capture_output=True, timeout=120, check=False
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
    assert (tmp_path / "checkpoint.json").exists() == (step > 1)
    torch.set_num_threads(1)
    try:
        assert killed.train(tmp_path, resume=True) == killed.train(None)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("step", [0, 3, 4, 7, 11])
def test_ctrl_c_then_resume_ends_with_identical_weights(tmp_path: Path, step: int) -> None:
    with pytest.raises(KeyboardInterrupt, match=rf"stopped after step {step + 1} of 12; checkpoint in .* resume=True"):
        killed.train(tmp_path, die_at=step, how=signal.SIGINT)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["newest"][0]["step"] == step + 1
    assert killed.train(tmp_path, resume=True) == UNINTERRUPTED


def test_ctrl_c_without_a_checkpoint_directory() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 3 of 12$"):
        killed.train(None, die_at=2, how=signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_does_not_wait() -> None:
    def stuck(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        fit(killed.network(), bundle_of(8), stuck, progress=False)


def test_a_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    assert killed.train(tmp_path) == UNINTERRUPTED
    assert killed.train(tmp_path, resume=True, die_at=0) == UNINTERRUPTED  # no step is taken


def test_resume_without_a_checkpoint_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pykd"):
        assert killed.train(tmp_path / "new", resume=True) == UNINTERRUPTED
    assert "no checkpoint in" in caplog.text


def test_another_run_is_neither_overwritten_nor_continued(tmp_path: Path) -> None:
    killed.train(tmp_path)
    with pytest.raises(ArtifactError, match="already holds a run: pass resume=True"):
        killed.train(tmp_path)
    with pytest.raises(ArtifactError, match=r"belongs to another run: config was .* resume with the same settings"):
        fit(
            killed.network(),
            killed.bundle(),
            quiet,
            TrainConfig(epochs=3, lr=0.5),
            checkpoint_dir=tmp_path,
            resume=True,
        )
    with pytest.raises(ArtifactError, match="belongs to another run: data was noise-29"):
        fit(killed.network(), bundle_of(29), quiet, killed.CONFIG, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume=True needs checkpoint_dir"):
        killed.train(None, resume=True)


# Bad input.


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_it_reaches_the_weights(poison: str) -> None:
    calls = 0

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        loss, _ = quiet(model, batch)
        if calls < 3:
            return loss, {}
        root = (model[0].weight * 0).abs().sum().sqrt()  # zero, with an infinite derivative
        return (loss / 0 if poison == "loss" else loss + root), {}

    model = killed.network()
    with pytest.raises(TrainingError, match=rf"the {poison} is (inf|nan) at step 3 of 5: try a lower lr"):
        fit(model, bundle_of(40), loss_fn, TrainConfig(batch_size=8), progress=False)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_data_that_cannot_be_trained_on() -> None:
    with pytest.raises(TypeError, match="a DataBundle or a loader of batches with a length, got generator"):
        fit(killed.network(), (b for b in []), quiet)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the training set is empty"):
        fit(killed.network(), [], quiet)
    with pytest.raises(ValueError, match="no trainable parameter"):
        fit(killed.network().requires_grad_(False), bundle_of(4), quiet)


def test_batches_that_cannot_be_trained_on() -> None:
    with pytest.raises(DataError, match="a dict of tensors with 'labels', got list"):
        check_batch([1], classes=3)
    with pytest.raises(DataError, match=r"with 'labels', got a dict with \['x'\]"):
        check_batch({"x": torch.zeros(1)}, classes=3)
    with pytest.raises(DataError, match=r"labels must be whole numbers, got torch\.float32"):
        check_batch({"labels": torch.zeros(2)}, classes=3)
    with pytest.raises(DataError, match=r"label 3 is out of range: the model has 3 classes \(0..2\)"):
        check_batch({"labels": torch.tensor([0, 3])}, classes=3)
    with pytest.raises(DataError, match="label -1 is out of range"):
        check_batch({"labels": torch.tensor([-1])}, classes=3)
    check_batch({"labels": torch.tensor([2, -100])}, classes=3)
