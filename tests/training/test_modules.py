"""Modules that are trained with the model without being part of it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pykd.data.bundle import DataBundle, stack
from pykd.errors import ArtifactError
from pykd.training import TrainConfig, fit

CONFIG = TrainConfig(epochs=2, batch_size=8, lr=1e-2, clip_norm=0.5, checkpoint_steps=2)


def bundle() -> DataBundle:
    generator = torch.Generator().manual_seed(1)
    items = [{"x": torch.randn(6, generator=generator), "labels": i % 3} for i in range(32)]
    return DataBundle(items, items[:4], stack, ["a", "b", "c"], "noise", fingerprint="noise-32")


def parts() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(6, 4), nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 8))


def train(
    directory: Path | None, *, stop_at: int = -1, resume: bool = False, name: str = "projection"
) -> tuple[nn.Module, nn.Module]:
    model, projection = parts()
    done = 0

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        nonlocal done
        if done == stop_at:
            signal.raise_signal(signal.SIGINT)
        done += 1
        assert projection.training
        return (projection(model(batch["x"])) - 5.0).square().mean(), {}

    fit(
        model, bundle(), loss_fn, CONFIG, modules={name: projection}, checkpoint_dir=directory, resume=resume,
        progress=False,
    )  # fmt: skip
    return model, projection


def test_they_learn_with_the_model_and_are_clipped_with_it() -> None:
    fresh_model, fresh_projection = parts()
    fresh_projection.eval()
    model, projection = train(None)
    assert not torch.equal(model.weight, fresh_model.weight)
    assert not torch.equal(projection[1].weight, fresh_projection[1].weight)
    gradients = [p.grad.flatten() for p in (*model.parameters(), *projection.parameters()) if p.grad is not None]
    assert len(gradients) == 4 and torch.cat(gradients).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert set(model.state_dict()) == {"weight", "bias"}


def test_their_mode_is_left_as_it_was() -> None:
    model, projection = parts()
    projection.eval()
    loss = lambda model, batch: (projection(model(batch["x"])).square().mean(), {})  # noqa: E731
    fit(model, bundle(), loss, CONFIG, modules={"projection": projection}, progress=False)
    assert model.training and not projection.training and not projection[0].training


def test_an_interrupted_run_ends_with_identical_weights(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4 of 8"):
        train(tmp_path, stop_at=3)
    for got, want in zip(train(tmp_path, resume=True), train(None), strict=True):
        for name, tensor in want.state_dict().items():
            assert torch.equal(got.state_dict()[name], tensor), name


def test_a_run_with_other_modules_is_not_continued(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ArtifactError, match=r"belongs to another run: modules was \{'projection': 40\}, is now"):
        train(tmp_path, resume=True, name="other")
    model, _ = parts()
    loss = lambda model, batch: (model(batch["x"]).square().mean(), {})  # noqa: E731
    with pytest.raises(ArtifactError, match=r"modules was .*, is now None"):
        fit(model, bundle(), loss, CONFIG, checkpoint_dir=tmp_path, resume=True, progress=False)
