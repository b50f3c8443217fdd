"""Channels removed from convolutional networks, through residuals, depthwise and grouped convolutions."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from pykd.nn import channels


class Residual(nn.Module):
    """Stem, one residual block with an inner width of its own, a depthwise convolution, a flattened classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_bn = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.outer = nn.Conv2d(12, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_bn(self.stem(x)).relu()
        x = x + self.outer(self.inner_bn(self.inner(x)).relu())
        x = nn.functional.adaptive_avg_pool2d(self.depthwise(x), 2)
        scores: Tensor = self.head(x.flatten(1))
        return scores


def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))  # running statistics that are not the initial ones
    return model.eval()


EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_every_layer_of_a_group_shrinks_together() -> None:
    model = residual()
    changed = channels.remove_channels(model, EXAMPLE, 0.5)
    assert model.stem.weight.shape == (4, 3, 3, 3) and model.stem_bn.num_features == 4
    assert model.inner.weight.shape == (6, 4, 3, 3) and model.inner_bn.running_mean.shape == (6,)
    assert model.outer.weight.shape == (4, 6, 1, 1)
    assert model.depthwise.weight.shape == (4, 1, 3, 3) and model.depthwise.groups == 4
    assert model.head.weight.shape == (5, 16)
    assert sorted(changed.values()) == [[8, 4], [12, 6]]
    assert "inner" in changed
    assert not model.training


def test_removing_channels_that_do_nothing_changes_nothing() -> None:
    model = residual()
    with torch.no_grad():
        for tensor in (model.inner.weight, model.inner.bias, model.inner_bn.weight, model.inner_bn.bias):
            tensor[[1, 4, 9]] = 0
        model.inner_bn.running_mean[[1, 4, 9]] = 0
        model.outer.weight[:, [1, 4, 9]] = 0
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    keep = [model.stem, model.outer, model.depthwise]
    assert channels.remove_channels(model, EXAMPLE, 0.25, keep_layers=keep) == {"inner": [12, 9]}
    torch.testing.assert_close(model(x), want)


def test_grouped_convolutions_keep_equal_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 2, 1)
    )
    channels.remove_channels(model, EXAMPLE, 1 / 3)
    assert model[0].out_channels == 8 and model[2].weight.shape == (16, 2, 3, 3) and model[4].in_channels == 16
    model.train()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model[2].weight.grad.shape == model[2].weight.shape


def test_frozen_layers_are_pruned_and_stay_frozen() -> None:
    model = residual()
    model.stem.requires_grad_(False)
    model.train()
    channels.remove_channels(model, EXAMPLE, 0.5)
    assert model.training and model.stem.out_channels == 4


def test_group_magnitude_is_the_mean_of_shares() -> None:
    energy = torch.tensor([[1.0, 3.0], [10.0, 10.0]])
    torch.testing.assert_close(channels.group_magnitude(energy), torch.tensor([0.75, 1.25]))
    assert torch.equal(channels.group_magnitude(torch.zeros(1, 3)), torch.zeros(3))


def test_a_model_that_cannot_be_followed_is_refused_untouched() -> None:
    model = residual()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot follow the channels of Residual .*: pass an example that the model"):
        channels.remove_channels(model, torch.zeros(1, 4, 8, 8), 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_torch_pruning_cannot_follow_is_not_blamed_on_the_example() -> None:
    from torchvision.models import shufflenet_v2_x0_5

    with pytest.raises(ValueError, match="it runs on the example, but Torch-Pruning does not know all that it does"):
        channels.remove_channels(shufflenet_v2_x0_5(num_classes=3), torch.zeros(1, 3, 32, 32), 0.5)


class Fixed(nn.Module):
    """A network whose forward insists on the width it was built with, where no graph can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.shape[1] != 8:
            raise RuntimeError("eight channels, please")
        out: Tensor = self.last(x)
        return out


def test_a_model_that_no_longer_runs_is_put_back() -> None:
    model = Fixed()
    weight = model.first.weight
    with pytest.raises(ValueError, match=r"does not fit together \(eight channels, please\): nothing was changed"):
        channels.remove_channels(model, EXAMPLE, 0.5)
    assert model.first.weight is weight and model.first.out_channels == 8 and model(EXAMPLE).shape[1] == 2


def test_transformers_and_networks_without_channels_are_refused() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    with pytest.raises(ValueError, match="is a transformer"):
        channels.remove_channels(ViTForImageClassification(config), EXAMPLE, 0.5)
    with pytest.raises(ValueError, match=r"TransformerEncoderLayer is a transformer: .* method='magnitude'"):
        channels.remove_channels(nn.TransformerEncoderLayer(8, 2), EXAMPLE, 0.5)
    with pytest.raises(ValueError, match="no group of convolution channels"):
        channels.remove_channels(nn.Sequential(nn.Conv2d(3, 2, 1)), EXAMPLE, 0.5)
    with pytest.raises(ValueError, match="pass example="):
        channels.default_example(nn.Linear(2, 2))


def test_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'pykd\[vision\]'"):
        channels.remove_channels(residual(), EXAMPLE, 0.5)


def test_a_batch_with_labels_is_an_example() -> None:
    model = residual()
    channels.remove_channels(model, {"pixel_values": EXAMPLE, "labels": torch.zeros(1)}, 0.5)
    assert model.stem.out_channels == 4
