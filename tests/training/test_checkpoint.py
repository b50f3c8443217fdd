"""Checkpoints: whole or absent, checked when they are read, and any optimizer's state comes back."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from pykd.errors import ArtifactError
from pykd.training import TrainConfig, checkpoint, fit, state


def test_tensors_and_values_come_back(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "plain": base,
        "tied": base,
        "view": base[1:],
        "strided": base.t(),
        "empty": torch.empty(0),
        "number": torch.tensor(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    file = checkpoint.save_checkpoint(tmp_path / "a" / "b", tensors, {"x": [1.5, None]}, step=7)
    assert file.name == "state-00000001.safetensors" and checkpoint.has_checkpoint(tmp_path / "a" / "b")
    loaded, plain = checkpoint.load_checkpoint(tmp_path / "a" / "b")
    assert plain == {"x": [1.5, None]} and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["half"].dtype == torch.bfloat16


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    big = torch.zeros(1000)
    one = checkpoint.save_checkpoint(tmp_path / "one", {"a": big}, {}, step=0).stat().st_size
    two = checkpoint.save_checkpoint(tmp_path / "two", {"a": big, "b": big}, {}, step=0).stat().st_size
    assert two < one + 100


def test_only_the_newest_stays_by_default(tmp_path: Path) -> None:
    (tmp_path / ".state-00000009.safetensors.tmp").write_text("left by a killed run")
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {"a": torch.full((2,), step)}, {}, step=step)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.json", "state-00000002.json", "state-00000002.safetensors"]


def test_a_run_killed_between_the_two_renames_keeps_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_checkpoint(tmp_path, {"a": torch.tensor([1.0])}, {}, step=1)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "atomic_write", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, {"a": torch.tensor([2.0])}, {}, step=2)
    monkeypatch.undo()
    assert checkpoint.load_checkpoint(tmp_path)[0]["a"].item() == 1
    checkpoint.save_checkpoint(tmp_path, {"a": torch.tensor([3.0])}, {}, step=2)
    assert checkpoint.load_checkpoint(tmp_path)[0]["a"].item() == 3


def test_a_full_disk_leaves_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_checkpoint(tmp_path, {"a": torch.tensor([1.0])}, {}, step=1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="no space left on the disk"):
        checkpoint.save_checkpoint(tmp_path, {"a": torch.tensor([2.0])}, {}, step=2)
    assert checkpoint.load_checkpoint(tmp_path)[0]["a"].item() == 1


def test_damage_is_noticed(tmp_path: Path) -> None:
    file = checkpoint.save_checkpoint(tmp_path, {"a": torch.zeros(4)}, {}, step=1)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="is missing or was changed"):
        checkpoint.load_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(ArtifactError, match="is missing or was changed"):
        checkpoint.load_checkpoint(tmp_path)
    index = tmp_path / "checkpoint.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format_version": 99}))
    with pytest.raises(ArtifactError, match="has format_version 99, this pykd reads 2"):
        checkpoint.load_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(ArtifactError, match="cannot read the checkpoint"):
        checkpoint.load_checkpoint(tmp_path)


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.save_checkpoint(
            tmp_path, {"a": torch.tensor([float(step)])}, {"at": step}, step=step, keep=2, best=step in (1, 3)
        )
    states = {file for file in os.listdir(tmp_path) if file.endswith(".safetensors")}
    assert states == {f"state-0000000{number}.safetensors" for number in (3, 5, 6)}
    assert checkpoint.load_checkpoint(tmp_path)[1] == {"at": 6}
    tensors, plain = checkpoint.load_checkpoint(tmp_path, best=True)
    assert plain == {"at": 3} and tensors["a"].item() == 3


def test_without_a_best_one(tmp_path: Path) -> None:
    checkpoint.save_checkpoint(tmp_path, {"a": torch.zeros(1)}, {}, step=1)
    with pytest.raises(ArtifactError, match="holds no best checkpoint"):
        checkpoint.load_checkpoint(tmp_path, best=True)


def test_a_damaged_newest_is_passed_over_for_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        file = checkpoint.save_checkpoint(tmp_path, {"a": torch.tensor([float(step)])}, {"at": step}, step=step, keep=2)
    file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint.load_checkpoint(tmp_path)[1] == {"at": 1}
    assert "state-00000002.safetensors of step 2 is missing or was changed" in caplog.text


@pytest.mark.mount
def test_a_disk_that_fills_up_stops_a_run_with_its_last_checkpoint(tiny_disk: Path) -> None:
    model = nn.Linear(30, 30)  # 11 KB with both moments of Adam: two states fit beside what arrives at step 3
    data = [{"x": torch.randn(4, 30)} for _ in range(6)]

    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        if calls.append(0) or len(calls) == 3:
            (tiny_disk / "of_another").write_bytes(b"0" * 36_000)
        return model(batch["x"]).square().mean(), {}

    calls: list[int] = []
    config = TrainConfig(checkpoint_steps=1)
    with pytest.raises(
        ArtifactError, match=r"stopped after step 3: the checkpoint of step 2 is intact: .* no space left"
    ):
        fit(model, data, loss_fn, config, checkpoint_dir=tiny_disk / "run", progress=False)
    assert not [name for name in os.listdir(tiny_disk / "run") if "tmp" in name or "00003" in name]
    (tiny_disk / "of_another").unlink()
    assert fit(model, data, loss_fn, config, checkpoint_dir=tiny_disk / "run", resume=True, progress=False).steps == 6
    assert len(calls) == 3 + 4  # steps 1 to 3, then 3 to 6


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_come_back(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    options = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}
    first = nn.Linear(3, 2)
    old = kind(first.parameters(), **options)
    run(first, old)
    tensors, plain = state.optimizer_tensors(old)
    checkpoint.save_checkpoint(tmp_path, tensors, plain, step=1)
    second = nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    new = kind(second.parameters(), **options)
    state.restore_optimizer(new, *checkpoint.load_checkpoint(tmp_path))
    run(first, old)
    run(second, new)
    assert torch.equal(first.weight, second.weight)
