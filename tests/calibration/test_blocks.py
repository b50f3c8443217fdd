"""Running block by block measures bit for bit what running the whole model measures, in fewer passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd.calibration import Inputs, blocks, calibrate
from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision
from pykd.nn.selection import CONVOLUTION, LINEAR, select_layers, transposed

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("sequence-classification", SMALL),
    "modernbert": ("sequence-classification", {**SMALL, "num_hidden_layers": 4, "pad_token_id": 0}),
    "albert": ("sequence-classification", {**SMALL, "embedding_size": 16}),
    "gpt2": ("causal-lm", {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 16,
                           "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("causal-lm", {**SMALL, "num_key_value_heads": 2}),
    "t5": ("seq2seq-lm", {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
                       "decoder_start_token_id": 0}),
}  # fmt: skip
IMAGES = ("resnet18", "squeezenet1_1", "vit")
Batch = dict[str, Tensor]


def text_model(family: str) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    task, config = TEXT[family]
    model = load_huggingface(None, task, num_labels=3, config={"model_type": family, **config})
    ids, mask = torch.randint(3, 60, (10, 9)), (torch.arange(9) < torch.randint(3, 10, (10, 1))).long()
    batches = [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(4), mask.split(4), strict=True)]
    return model, [{**batch, "labels": batch["input_ids"]} for batch in batches] if task == "seq2seq-lm" else batches


def image_model(family: str) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    batches = [{"pixel_values": torch.randn(2, 3, 32, 32)} for _ in range(2)]
    if family == "vit":
        config = {**SMALL, "image_size": 32, "patch_size": 8}
        config["model_type"] = family
        return load_huggingface(None, "image-classification", num_labels=3, config=config), batches
    return load_torchvision(family, num_classes=3), batches


def seen(model: nn.Module, batches: list[Batch], names: list[str] | None = None) -> list[tuple[str, Tensor, int]]:
    """What calibration shows of every layer, in its order, each layer being rounded when it was shown."""
    found = []

    def visit(name: str, inputs: Inputs) -> None:
        found.append((name, inputs.hessian.clone(), inputs.rows))
        weight: Any = model.get_submodule(name).weight
        weight.copy_((weight * 16).round() / 16)

    chosen: Any = select_layers(model, (*LINEAR, *CONVOLUTION, *transposed())).chosen
    narrow = [name for name, layer in chosen.items() if layer.weight[0].numel() <= 1200]
    missing = calibrate(model, names or narrow, batches, visit)
    assert not missing
    return found


def same(make: Callable[[], tuple[nn.Module, list[Batch]]], monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """With blocks and without any."""
    got = seen(*make(), list(names) or None)
    monkeypatch.setattr(blocks, "CONTAINERS", ())
    want = seen(*make(), list(names) or None)
    assert [(name, rows) for name, _, rows in got] == [(name, rows) for name, _, rows in want]
    for (name, ours, _), (_, theirs, _) in zip(got, want, strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("family", [*TEXT, *IMAGES])
def test_every_family_is_measured_as_by_running_the_whole_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same(lambda: text_model(family) if family in TEXT else image_model(family), monkeypatch)


@pytest.mark.parametrize("depth", [3, 6])
def test_a_block_runs_once_for_each_of_its_inputs_however_deep_it_lies(depth: int) -> None:
    task, config = TEXT["bert"]
    model = load_huggingface(
        None, task, num_labels=3, config={"model_type": "bert", **config, "num_hidden_layers": depth}
    )
    batches, calls = text_model("bert")[1], Counter[str]()
    layers: Any = model.bert.encoder.layer
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.update([str(number)]))
    seen(model, batches)
    inputs = 4  # of query, key and value; and of three more layers
    each = 1 + len(batches) * (1 + inputs + 1 + 1)  # alone; survey, inputs, outputs, and on the way to the pooler
    first, *others, last = (calls[str(number)] for number in range(depth))
    assert first == each + len(batches)  # the way to the first block
    assert set(others) == {each} and last == each - len(batches)


class Residual(nn.Module):
    """A block whose first operation changes its input."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.act, self.linear = nn.ReLU(inplace=True), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return x + self.linear(x)


class Told(nn.Module):
    """A block that is given an object and writes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, log: Any) -> Tensor:
        log.append(x)
        return self.linear(x) + len(log)


class Chain(nn.Module):
    """Blocks in a list, called as ``how`` says."""

    def __init__(self, make: Callable[[], nn.Module], how: Callable[[Chain, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.how, self.scale = nn.ModuleList(make() for _ in range(3)), how, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


class Log:
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.kept)

    def append(self, x: Tensor) -> None:
        self.kept.append(x)


def in_turn(chain: Chain, x: Tensor) -> Tensor:
    for block in chain.blocks:
        x = block(x)
    return x


def backwards_twice(chain: Chain, x: Tensor) -> Tensor:
    for block in [*reversed(chain.blocks), chain.blocks[1]]:
        x = block(x)
    return x


def told(chain: Chain, x: Tensor) -> Tensor:
    log = Log()
    for block in chain.blocks:
        x = block(x, log=log)
    return x


def skipping(chain: Chain, x: Tensor) -> Tensor:
    """The first block's output is given to the third as well."""
    first = chain.blocks[0](x)
    return chain.blocks[2](chain.blocks[1](first) * 0.5) + chain.blocks[2].linear(first)


class Scaled(nn.Module):
    """A block that computes otherwise while its model runs."""

    inside = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * (2.0 if Scaled.inside else 1.0))


def inside(chain: Chain, x: Tensor) -> Tensor:
    for block in chain.blocks:
        Scaled.inside = True
        x = block(x)
        Scaled.inside = False
    return x


CUT = {
    "changes its input": (Residual, in_turn),
    "called twice": (Residual, backwards_twice),
    "given an object": (Told, told),
    "a layer inside and outside": (Residual, skipping),
    "state around it": (Scaled, inside),
}


@pytest.mark.parametrize("kind", CUT)
def test_blocks_that_cannot_run_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, how = CUT[kind]

    def chain() -> tuple[nn.Module, list[Batch]]:
        torch.manual_seed(0)
        model, batches = Chain(make, how), [{"pixel_values": torch.randn(5, 6)} for _ in range(2)]
        return model, batches

    names = [name for name, module in chain()[0].named_modules() if isinstance(module, nn.Linear)]
    same(chain, monkeypatch, *names)
