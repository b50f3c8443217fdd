"""Any 16 numbers as the code of 4-bit weights: natively computed, saved by name, chosen by every method."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from pykd import from_pretrained, save_pretrained
from pykd.models.torchvision import load_torchvision
from pykd.nn import Conv2d4bit, Embedding4bit, Linear4bit, QATLinear, codebook_code
from pykd.nn.codecs.four_bit import quantize_4bit
from pykd.ops.int4_r16 import CODEBOOKS, code_number, table_of
from pykd.ops.linear_4bit_reference import linear_4bit_reference
from pykd.quantization import METHODS, quantize

LOPSIDED = (-1.5, -0.9, -0.6, -0.4, -0.3, -0.2, -0.1, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.75)
#: As means of clusters are: no 0.0.
CLUSTERS = (-1.4, -1.0, -0.8, -0.6, -0.45, -0.3, -0.2, -0.06, 0.05, 0.15, 0.25, 0.4, 0.55, 0.7, 0.85, 1.1)


def test_a_known_table_under_its_numbers_is_the_same_code() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(67, 45), torch.randn(9, 67)
    known = Linear4bit.from_linear(linear, scheme="nf4", group_size=16)
    named = Linear4bit.from_linear(linear, scheme=codebook_code(CODEBOOKS["nf4"]), group_size=16)
    assert torch.equal(named.dequantize(), known.dequantize()) and torch.equal(named(x), known(x))
    assert all(torch.equal(tensor, known.state_dict()[name]) for name, tensor in named.state_dict().items())


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("zeros", [0.0, 0.7])
def test_a_table_of_ones_own_computes_what_it_stores(rows: int, zeros: float) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(67, 45), torch.randn(rows, 67)
    with torch.no_grad():
        linear.weight[torch.rand(45, 67) < zeros] = 0
    scheme = codebook_code(LOPSIDED)
    layer = Linear4bit.from_linear(linear, scheme=scheme, group_size=16)
    assert ("bitmask" in layer.state_dict()) == bool(zeros)
    assert bool((layer.weight[linear.weight == 0] == 0).all())
    # either end of every group is reached: little is cut off at the short side of the table
    assert (layer.weight - linear.weight).abs().max() <= 0.4 * linear.weight.abs().max()
    tensors = quantize_4bit(linear.weight, code=scheme, group_size=16)
    want = linear_4bit_reference(x.double(), *tensors, linear.bias, scheme, 16).float()
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), Linear4bit.from_spec(layer.spec())):
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), layer(x)) and again.spec() == layer.spec()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_table_without_zero(rows: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(67, 45), torch.randn(rows, 67)  # the last group is filled up from 3 columns
    with torch.no_grad():
        linear.weight[3] = 0  # a whole row of zeros has the scale 0
    scheme = codebook_code(CLUSTERS)
    layer = Linear4bit.from_linear(linear, scheme=scheme, group_size=16)
    assert layer.nnz is None and "bitmask" not in layer.state_dict() and not bool(layer.weight[3].any())
    tensors = quantize_4bit(linear.weight, code=scheme, group_size=16)
    levels = layer.weight[0, :16] / tensors.scales[0, 0].float()
    assert bool((levels[:, None] - torch.tensor(CLUSTERS)).abs().amin(1).max() < 1e-3)
    want = linear_4bit_reference(x.double(), *tensors, linear.bias, scheme, 16).float()
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    again = Linear4bit.from_spec(layer.spec())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    trained = QATLinear.from_linear(linear, scheme=scheme, group_size=16)
    assert torch.equal(trained.rounded(), layer.dequantize())
    assert torch.equal(trained.convert().dequantize(), layer.dequantize())


def test_the_filling_of_a_group_does_not_choose_its_scale() -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(8, 19), codebook_code(CLUSTERS)
    whole = quantize_4bit(weight, code=scheme, group_size=16).scales
    assert torch.equal(whole[:, 1:], quantize_4bit(weight[:, 16:], code=scheme, group_size=3).scales)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_do_not_go_into_a_table_without_them(method: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 4)), torch.randn(64, 64)
    with torch.no_grad():
        model[0].weight[torch.rand(48, 64) < 0.5] = 0
    with pytest.raises(ValueError, match=r"zeros, which a codebook without 0\.0 cannot keep: put 0\.0 into the table"):
        quantize(model, codebook_code(CLUSTERS), method=method, group_size=16, data=[x])


def test_pruned_weights_under_a_table_without_zero_are_damaged() -> None:
    layer = Linear4bit.from_linear(nn.Linear(64, 48), scheme=codebook_code(LOPSIDED), group_size=16)
    layer.code = codebook_code(CLUSTERS)
    with pytest.raises(ValueError, match=r"has no 0\.0 for pruned weights: the tensors are damaged"):
        layer._zero_codes(None)


@pytest.mark.parametrize("table", [LOPSIDED, CLUSTERS])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_chooses_its_codes(method: str, table: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 4)), torch.randn(64, 64) * torch.linspace(0.1, 3, 64)
    dense = model[0](x)
    plain = quantize(copy.deepcopy(model), codebook_code(table), group_size=16)[0](x)
    quantize(model, codebook_code(table), method=method, group_size=16, data=[x])
    assert (model[0](x) - dense).norm() <= (1.3 if method == "hqq" else 1.0) * (plain - dense).norm()


def test_models_reload_in_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = load_torchvision("squeezenet1_1", num_classes=3).eval(), torch.randn(1, 3, 48, 48)
    quantize(model, codebook_code(LOPSIDED), group_size=None, include=["features.3", "features.4"])
    assert model.features[3].squeeze.group_size == 64 and isinstance(model.features[3].expand3x3, Conv2d4bit)
    with torch.inference_mode():
        want = model(images)
        save_pretrained(model, tmp_path / "model")
        assert torch.equal(from_pretrained(tmp_path / "model").eval()(images), want)
    table = quantize(
        nn.Sequential(nn.Embedding(99, 64), nn.Linear(64, 64), nn.Linear(64, 2)), embeddings=codebook_code(LOPSIDED)
    )[0]
    assert isinstance(table, Embedding4bit) and table.code == codebook_code(LOPSIDED)


def test_what_is_no_table() -> None:
    for table in (
        [0.0] * 15,
        [1.0] * 16,
        [k / 16 for k in range(16)],
        [float("nan"), *LOPSIDED[1:]],
        [-1.0] * 15 + [0],
    ):
        with pytest.raises(ValueError, match="a codebook has 16 finite numbers, some below and some above 0"):
            codebook_code(table)
    with pytest.raises(ValueError, match=r"'codebook:' is followed by 16 numbers with commas between them, got 'codeb"):
        table_of("codebook:1,2,three")
    with pytest.raises(ValueError, match="a codebook has 16 finite numbers"):
        Linear4bit(4, 4, "codebook:1,2,3")
    with pytest.raises(ValueError, match="a codebook has 16 finite numbers"):
        quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 4)), "codebook:1,2,3")
    with pytest.raises(ValueError, match="a codebook has 16 finite numbers"):
        quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(4, 4)), embeddings="codebook:1,2,3")
    with pytest.raises(ValueError, match="unknown 4-bit code 'codebok': did you mean 'codebook:'"):
        code_number("codebok")
    with pytest.raises(ValueError, match="symmetric=False goes with schemes 'w4a16' and 'w4a8' only"):
        Linear4bit(4, 4, codebook_code(LOPSIDED), symmetric=False)
