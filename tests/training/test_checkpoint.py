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
from pykd.training import checkpoint


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
    assert file.name == "state-00000007.safetensors" and checkpoint.has_checkpoint(tmp_path / "a" / "b")
    loaded, plain = checkpoint.load_checkpoint(tmp_path / "a" / "b")
    assert plain == {"x": [1.5, None]} and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["half"].dtype == torch.bfloat16


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    big = torch.zeros(1000)
    one = checkpoint.save_checkpoint(tmp_path / "one", {"a": big}, {}, step=0).stat().st_size
    two = checkpoint.save_checkpoint(tmp_path / "two", {"a": big, "b": big}, {}, step=0).stat().st_size
    assert two < one + 100


def test_only_the_newest_stays(tmp_path: Path) -> None:
    (tmp_path / ".state-00000009.safetensors.tmp").write_text("left by a killed run")
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {"a": torch.full((2,), step)}, {}, step=step)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.json", "state-00000002.safetensors"]


def test_a_run_killed_between_the_two_renames_keeps_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_checkpoint(tmp_path, {"a": torch.tensor([1.0])}, {}, step=1)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "atomic_write", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, {"a": torch.tensor([2.0])}, {}, step=2)
    assert checkpoint.load_checkpoint(tmp_path)[0]["a"].item() == 1


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
    with pytest.raises(ArtifactError, match="has format_version 99, this pykd reads 1"):
        checkpoint.load_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(ArtifactError, match="cannot read the checkpoint"):
        checkpoint.load_checkpoint(tmp_path)


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
    tensors, plain = checkpoint.optimizer_tensors(old)
    checkpoint.save_checkpoint(tmp_path, tensors, plain, step=1)
    second = nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    new = kind(second.parameters(), **options)
    checkpoint.restore_optimizer(new, *checkpoint.load_checkpoint(tmp_path))
    run(first, old)
    run(second, new)
    assert torch.equal(first.weight, second.weight)
