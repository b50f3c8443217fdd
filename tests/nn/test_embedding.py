"""Embedding4bit, Embedding8bit: exactly the rows of the weight they store, in files and in memory, tied or alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pykd.nn import COMPRESSED, Embedding4bit, Embedding8bit, TiedEmbedding, TiedLinear
from pykd.nn.embedding import CompressedEmbedding

Make = Callable[[nn.Embedding], CompressedEmbedding]
MAKES: dict[str, Make] = {
    "w4a16": lambda e: Embedding4bit.from_embedding(e, group_size=16),
    "asymmetric": lambda e: Embedding4bit.from_embedding(e, group_size=16, symmetric=False),
    "nf4": lambda e: Embedding4bit.from_embedding(e, scheme="nf4", group_size=None),
    "fp4": lambda e: Embedding4bit.from_embedding(e, scheme="fp4", group_size=7),
    "w8a16": Embedding8bit.from_embedding,
}
IDS = torch.tensor([[0, 44], [7, 7]])


def embedding(zeros: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    made = nn.Embedding(45, 67, padding_idx=3, dtype=dtype)
    with torch.no_grad():
        made.weight[torch.rand(45, 67) < zeros] = 0
    return made


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", [0.0, 0.7])
def test_a_lookup_is_exact_to_the_stored_rows(make: Make, dtype: torch.dtype, zeros: float) -> None:
    dense = embedding(zeros, dtype)
    packed = make(dense)
    assert torch.equal(packed(IDS), packed.dequantize()[IDS]) and packed(IDS).dtype == dtype
    assert torch.equal(packed.to_embedding()(IDS), packed(IDS)) and packed.to_dense().padding_idx == 3
    difference = (packed.weight - dense.weight).norm() / dense.weight.norm()
    assert difference < (0.01 if packed.state_dict()["scales"].dtype == torch.float32 else 0.25)
    assert bool((packed.weight[dense.weight == 0] == 0).all()) and bool((packed.weight[3] == 0).all())
    assert (packed.num_embeddings, packed.embedding_dim, packed.padding_idx) == (45, 67, 3)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("zeros", [0.0, 0.7])
def test_spec_and_state_dict_rebuild_it(make: Make, device: str, zeros: float) -> None:
    packed = make(embedding(zeros))
    state, spec = packed.state_dict(), packed.spec()
    assert ("bitmask" in state) == bool(zeros) and ("qweight" in state) != bool(zeros)
    again = COMPRESSED[spec["type"]].from_spec(spec, device=device)
    again.load_state_dict(state, assign=True)
    assert again.spec() == spec and torch.equal(again(IDS), packed(IDS))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(packed)))
    assert torch.equal(copied(IDS), packed(IDS))
    half = copied.to(torch.bfloat16)
    assert half(IDS).dtype == torch.bfloat16 and torch.equal(half(IDS), packed(IDS).bfloat16())


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_memory_holds_the_rows_as_files_do_until_something_multiplies_with_them(make: Make) -> None:
    packed = make(embedding())
    state = packed.state_dict()
    assert {name for name, _ in packed.named_buffers()} == set(state)
    head = TiedLinear(67, 45)
    head.tie(packed)
    assert [name for name, _ in packed.named_buffers()] == ["packed"] and not list(head.buffers())
    assert torch.equal(packed(IDS), packed.dequantize()[IDS])
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())
    x = torch.randn(3, 67)
    torch.testing.assert_close(head(x), x @ packed.weight.t())


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_tied_pair_is_one_weight(make: Make) -> None:
    dense = embedding()
    linear = nn.Linear(67, 45)
    linear.weight = dense.weight
    packed = make(dense)
    model = nn.ModuleDict({"in": packed, "again": TiedEmbedding.from_embedding(dense, packed)})
    model["out"] = TiedLinear.from_linear(linear, packed)
    x = torch.randn(3, 67, requires_grad=True)
    assert list(model.state_dict()) == [*(f"in.{name}" for name in packed.state_dict()), "out.bias"]
    for form in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert form["out"].source is form["again"].source is form["in"]
        assert torch.equal(form["out"](x), model["out"](x)) and torch.equal(form["again"](IDS), packed(IDS))
    model["out"](x).sum().backward()
    torch.testing.assert_close(x.grad, packed.weight.sum(0).expand(3, 67), rtol=1e-4, atol=1e-4)
    own = model["out"].to_linear()
    assert torch.equal(own.weight, packed.weight) and own.bias is linear.bias
    assert torch.equal(model["again"].to_dense().weight, model["again"].weight)
    moved = model.to("meta")
    assert moved["out"].device.type == moved["again"].device.type == "meta"
    assert "in_features=67, out_features=45, bias=True" in repr(moved) and "TiedEmbedding(45, 67)" in repr(moved)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_compiles_as_one_graph_and_exports(make: Make) -> None:
    packed = make(embedding())
    head = TiedLinear(67, 45)
    head.tie(packed)
    model = nn.Sequential(packed, nn.LayerNorm(67), head)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), model(IDS))
    torch.testing.assert_close(torch.export.export(model, (IDS,)).module()(IDS), model(IDS))


def test_repr_names_the_scheme() -> None:
    packed = MAKES["w4a16"](embedding(0.7))
    assert "45, 67, padding_idx=3, scheme=w4a16, group_size=16, symmetric=True, nnz=" in repr(packed)
    assert repr(MAKES["w8a16"](nn.Embedding(4, 64))) == "Embedding8bit(4, 64, scheme=w8a16)"


def test_what_they_refuse() -> None:
    for cls in (Embedding4bit, Embedding8bit):
        with pytest.raises(ValueError, match=r"an embedding with max_norm=1\.0 rescales its rows in each lookup"):
            cls.from_embedding(nn.Embedding(4, 8, max_norm=1.0))
    with pytest.raises(ValueError, match="unknown 4-bit scheme 'w4a61': did you mean 'w4a16'"):
        Embedding4bit(4, 8, "w4a61")
    head = TiedLinear(8, 4)
    with pytest.raises(ValueError, match="this TiedLinear is not tied to an embedding yet: call tie"):
        head.weight  # noqa: B018
    with pytest.raises(ValueError, match=r"with a weight \[4, 8\] cannot use that of an embedding with 45 rows of 67"):
        head.tie(MAKES["w8a16"](embedding()))
    with pytest.raises(IndexError, match="an embedding with 45 rows has no row 45"):
        MAKES["nf4"](embedding())(torch.tensor([45]))
