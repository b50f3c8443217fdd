"""w8a8_static: observers, what they make of activations, and models that round by what calibration saw."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pykd import from_pretrained, save_pretrained
from pykd.calibration.inputs import Accumulator, Sample
from pykd.errors import DataError
from pykd.nn import Conv2d8bit, Linear8bit
from pykd.nn.linear_8bit import StaticInput
from pykd.quantization import OBSERVERS, quantize
from pykd.quantization.observers import minmax, mse, percentile, static_rounding


def sample(values: Tensor) -> Sample:
    return Sample(values, float(values.min()), float(values.max()))


def rounded(values: Tensor, static: StaticInput) -> Tensor:
    codes = ((values / static.scale).round() + static.zero).clamp(-127, 127)
    return (codes - static.zero) * static.scale


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
@settings(max_examples=100, deadline=None)
def test_every_range_rounds_to_half_a_step_and_keeps_zero(one: float, other: float) -> None:
    low, high = min(one, other, 0.0), max(one, other, 0.0)
    static = static_rounding(low, high)
    assert -127 <= static.zero <= 127 and static.scale > 0
    values = torch.linspace(low, high, 33)
    assert (rounded(values, static) - values).abs().max() <= 1.01 * static.scale + 1e-30
    assert float(rounded(torch.zeros(1), static)) == 0.0


def test_observers_cut_off_more_and_more() -> None:
    values = torch.randn(20_000)
    values[7] = 400.0
    whole, most, best = (observer(sample(values)) for observer in (minmax, percentile, mse))
    assert whole[1] == 400.0 and 3.0 < most[1] < 5.0
    values[7] = 40.0  # an outlier that is dear to cut off and dear to keep
    errors = {
        name: float((rounded(values, static_rounding(*observer(sample(values)))) - values).square().mean())
        for name, observer in OBSERVERS.items()
    }
    assert errors["mse"] <= min(errors.values()) and best[1] > 100
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share of the activations that are kept lies above 0 and up to 1, got"):
            percentile(sample(values), share=share)
    assert percentile(Sample(torch.zeros(1), 0.0, 0.0)) == (0.0, 0.0) and mse(Sample(torch.zeros(1), 0.0, 0.0))[1] == 0


def test_one_sided_activations_get_all_codes() -> None:
    """Behind a ReLU and a GELU: half the error that a symmetric range would make, or less."""
    for values in (torch.randn(10_000).relu(), nn.functional.gelu(torch.randn(10_000))):
        even = StaticInput(float(values.abs().max() / 127), 0)
        found = static_rounding(*minmax(sample(values)))
        assert found.zero < -100
        assert (rounded(values, found) - values).norm() < 0.55 * (rounded(values, even) - values).norm()


def test_a_sample_keeps_extremes_and_falls_on_every_column() -> None:
    accumulator = Accumulator(nn.Linear(64, 1), hessian=False, sample=True)
    x = torch.arange(64.0).repeat(32, 128, 1)
    x[3, 5, 7] = -50
    mask = torch.ones(32, 128)
    mask[0] = 0
    x[0] = 1e9
    accumulator.add(x, mask)
    found = accumulator.finish()
    assert found.sample is not None and (found.sample.low, found.sample.high) == (-50.0, 63.0)
    assert found.hessian.shape == (0, 0, 0) and len(found.sample.values) < 20_000
    assert set(range(64)) <= set(found.sample.values.int().tolist())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.GELU(), nn.Flatten(), nn.Linear(1600, 32)
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(32, 4)).eval()


IMAGES = torch.randn(24, 3, 7, 7, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_network_rounds_by_what_it_saw(observer: str) -> None:
    model = network()
    with torch.no_grad():
        want = model(IMAGES)
        quantize(model, "w8a8_static", data=[IMAGES], observer=observer)
        got = model(IMAGES)
        dynamic = quantize(network(), "w8a8")(IMAGES)
    assert isinstance(model[0], Conv2d8bit) and model[0].scheme == "w8a16" and model[0].static is None  # not 1x1
    for layer in (model[2], model[5]):
        assert isinstance(layer, (Conv2d8bit, Linear8bit)) and layer.static is not None and layer.static.zero < 0
    assert (got - want).norm() < 0.03 * want.norm() and (got - want).norm() < 2 * (dynamic - want).norm()
    assert model.pykd_report[0]["parameters"]["observer"] == observer


def test_the_output_is_a_dense_simulation() -> None:
    model = nn.Sequential(nn.GELU(), nn.Linear(96, 40), nn.Linear(40, 2))
    quantize(model, "w8a8_static", data=[torch.randn(64, 96)])
    layer = model[1]
    assert isinstance(layer, Linear8bit) and layer.static is not None
    x = 2 * torch.randn(50, 96)
    x[3, 4] = 100.0  # beyond the range: cut off
    torch.testing.assert_close(layer(x), layer.to_linear()(rounded(x, layer.static)), rtol=1e-5, atol=1e-5)
    x[7, 0] = torch.nan
    assert layer(x)[7].isnan().all() and layer(x)[:7].isfinite().all()


def test_saved_and_deployed_identically(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **shape)).eval()
    ids = torch.randint(3, 50, (8, 12))
    quantize(model, "w8a8_static", data=[{"input_ids": ids}], embeddings="bf16")
    with torch.no_grad():
        want = model(input_ids=ids).logits
        save_pretrained(model, tmp_path / "model")
        again = from_pretrained(tmp_path / "model")
        assert torch.equal(again(input_ids=ids).logits, want)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        assert torch.equal(theirs(input_ids=ids).logits, want)
        assert torch.equal(copy.deepcopy(again)(input_ids=ids).logits, want)


def test_what_it_refuses() -> None:
    with pytest.raises(DataError, match="scheme 'w8a8_static' looks at the inputs of each layer: pass data="):
        quantize(network(), "w8a8_static")
    with pytest.raises(ValueError, match="observer chooses the ranges of scheme 'w8a8_static', got scheme 'w8a8'"):
        quantize(network(), "w8a8", observer="mse")
    with pytest.raises(ValueError, match="unknown observer 'msee': did you mean 'mse'"):
        quantize(network(), "w8a8_static", data=[IMAGES], observer="msee")
    broken = IMAGES.clone()
    broken[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="calibration gives layer '0' NaN or infinite inputs"):
        quantize(network(), "w8a8_static", data=[broken])
    for scheme, static in (("w8a8", StaticInput(0.1, 0)), ("w8a8_static", None)):
        with pytest.raises(ValueError, match="a scale of the activations goes with scheme 'w8a8_static' and only it"):
            Linear8bit.from_linear(nn.Linear(8, 8), scheme=scheme, static=static)
