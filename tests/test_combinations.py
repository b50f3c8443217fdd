"""Distilled x pruned x quantized over the families: every row runs, computes what it says, reloads identically.

The fast suite takes rows that cover every pair of choices; `pytest -m slow` takes them all.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pykd import distill, prune, quantize, save_pretrained
from pykd.models.adapter import logits
from pykd.models.huggingface import load_huggingface
from pykd.models.students import derive
from pykd.models.torchvision import load_torchvision
from pykd.nn import CompressedModule
from pykd.nn.fake_quantized import rounded_inputs
from pykd.nn.selection import replace_layer
from pykd.nn.sparse_linear import SparseWeight
from pykd.quantization import SCHEMES

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("sequence-classification", {**SMALL, "vocab_size": 99}),
    "gpt2": ("causal-lm", {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32,
                           "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("causal-lm", {**SMALL, "vocab_size": 99, "num_key_value_heads": 2}),
    "t5": ("seq2seq-lm", {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
                          "decoder_start_token_id": 0}),
    "vit": ("image-classification", {**SMALL, "image_size": 16, "patch_size": 4}),
}  # fmt: skip
CONVOLUTIONAL = "squeezenet1_1"
PRUNED = (None, "units", "weights", "2:4")


class Row(NamedTuple):
    """One combination; None leaves a part out."""

    family: str
    distilled: bool
    pruned: str | None
    scheme: str | None

    @property
    def name(self) -> str:
        parts = (self.family, "distilled" if self.distilled else None, self.pruned, self.scheme)
        return "-".join(part.replace(":", "of") for part in parts if part)


AXES: tuple[tuple[Any, ...], ...] = ((*FAMILIES, CONVOLUTIONAL), (False, True), PRUNED, (None, *SCHEMES))
ROWS = [Row(*values) for values in itertools.product(*AXES)]
#: Largest share of the output's norm that quantization may change on these random models, by bits of the scheme.
CHANGES = {"4": 0.75, "8": 0.12, "16": 0.03}


def covering(rows: Sequence[Row]) -> list[Row]:
    """Few rows in which every pair of values of two axes occurs: always the row with the most pairs not seen yet."""
    unseen = {pair for row in rows for pair in pairs(row)}
    chosen = []
    while unseen:
        best = max(rows, key=lambda row: len(pairs(row) & unseen))
        unseen -= pairs(best)
        chosen.append(best)
    return chosen


def pairs(row: Row) -> set[Any]:
    return set(itertools.combinations(enumerate(row), 2))


@functools.cache
def _original(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == CONVOLUTIONAL:
        return load_torchvision(family, num_classes=5).eval()
    task, config = FAMILIES[family]
    model = load_huggingface(None, task, num_labels=5, config={"model_type": family, **config}).eval()
    with torch.no_grad():  # so that layers matter
        for parameter in model.parameters():
            parameter *= 2.0 if parameter.dim() == 2 else 1.0
    return model


def batch_of(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family in ("vit", CONVOLUTIONAL):
        size = 16 if family == "vit" else 48
        return {"pixel_values": torch.randn(4, 3, size, size, generator=generator), "labels": torch.arange(4)}
    ids = torch.randint(3, 99, (4, 10), generator=generator)
    labels = torch.arange(4) if FAMILIES[family][0] == "sequence-classification" else ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def make(row: Row) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """The combination, the same before quantization, and its batch."""
    torch.manual_seed(0)
    teacher, batch = _original(row.family), batch_of(row.family)
    model = copy.deepcopy(teacher)
    if row.distilled:
        model = copy.deepcopy(teacher) if row.family == CONVOLUTIONAL else derive(teacher, depth=1)
        distill(model, teacher, [batch], max_steps=2, lr=1e-4, progress=False)
    if row.pruned == "units":
        method = "channels" if row.family == CONVOLUTIONAL else "neurons"
        prune(model, method, 0.5, example=batch["pixel_values"][:1] if row.family == CONVOLUTIONAL else None)
    elif row.pruned == "weights":
        prune(model, sparsity=0.5)
    elif row.pruned is not None:
        prune(model, pattern=row.pruned)
    model.eval()
    before = copy.deepcopy(model)
    if row.scheme is not None:
        quantize(model, row.scheme, data=[batch], group_size=32)
    return model, before, batch


def simulated(model: nn.Module) -> nn.Module:
    """Ordinary dense layers in the place of compressed ones; what rounds activations by float arithmetic in front."""
    dense = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if not isinstance(layer, CompressedModule):
            continue
        plain = layer.to_dense()
        if getattr(layer, "pointwise", True):
            rounds = functools.partial(_rounded, layer)
            plain.register_forward_pre_hook(lambda _, args, rounds=rounds: (rounds(args[0]),))
        replace_layer(dense, dense.get_submodule(name), plain)
    return dense


def _rounded(layer: Any, x: Tensor) -> Tensor:
    scheme = getattr(layer, "scheme", None)
    x = x.movedim(-3, -1) if hasattr(layer, "kernel_size") else x
    if scheme == "w8a8_static":
        codes = (x / layer.static.scale).round() + layer.static.zero
        x = (codes.clamp(-127, 127) - layer.static.zero) * layer.static.scale
    elif scheme in ("w8a8", "w4a8"):
        x = rounded_inputs(x, layer.group_size if scheme == "w4a8" else None)
    return x.movedim(-1, -3) if hasattr(layer, "kernel_size") else x


def size_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def check(row: Row, folder: Path) -> None:
    """Runs, computes what its dense simulation does, is no larger than its parts; saved with what it computes."""
    model, before, batch = make(row)
    with torch.no_grad():
        got, want, exact = (logits(each, batch) for each in (model, simulated(model), before))
    assert got.isfinite().all(), row.name
    rounds = row.scheme in ("w8a8", "w4a8", "w8a8_static")  # a rounded activation may fall to the other side
    assert (got - want).norm() <= (0.02 if rounds else 2e-4) * want.norm(), row.name
    if row.scheme is not None:
        bits = row.scheme[1] if row.scheme[0] == "w" else "4" if row.scheme in ("nf4", "fp4") else "16"
        assert (got - exact).norm() <= CHANGES[bits] * exact.norm(), row.name
        parts = [before] if row.pruned is None else [before, make(row._replace(pruned=None))[0]]
        entry: dict[str, Any] = model.pykd_report[-1]  # type: ignore[index, operator, assignment]
        larger = size_of(model) > min(map(size_of, parts))
        assert not larger or any("stay sparse" in note for note in entry["notes"]), row.name
        changed = set(entry["changed"])
        assert changed == {name for name, layer in model.named_modules() if getattr(layer, "scheme", None)}, row.name
        check_notes(before, model, entry, row.name)
    elif row.pruned is not None:
        assert size_of(model) < size_of(make(Row(row.family, row.distilled, None, None))[0]), row.name
    save_pretrained(model, folder / row.name)
    tensors = {f"in.{name}": tensor for name, tensor in batch.items()} | {"out": got.contiguous()}
    save_file(tensors, folder / f"{row.name}.safetensors")


def check_notes(before: nn.Module, model: nn.Module, entry: dict[str, Any], name: str) -> None:
    """What packing makes of a pruned layer's zeros is said of each layer, and in words of all of them."""
    pruned = [key for key in entry["changed"] if isinstance(before.get_submodule(key), SparseWeight)]
    assert pruned == [key for key, facts in entry["changed"].items() if "zeros" in facts], name
    lost = {"bytes": 0, "time": 0}
    for key in pruned:
        layer: Any = model.get_submodule(key)
        saves, held = entry["changed"][key]["zeros"], {name for name, _ in layer.named_buffers()}
        assert ("bytes" in saves) == (layer.nnz is not None), (name, key)
        assert ("time" in saves) == bool({"kept", "panels"} & held), (name, key)
        lost = {what: count + (what not in saves) for what, count in lost.items()}
    for what, count in lost.items():
        said = [
            note for note in entry["notes"] if note.startswith(f"zeros save no {what} in {count} of {len(pruned)} ")
        ]
        assert len(said) == (count > 0), (name, what, entry["notes"])


RELOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from pykd import from_pretrained
from pykd.models.adapter import logits
torch.set_num_threads(int(sys.argv[2]))
wrong = []
for name in json.loads(sys.argv[3]):
    known = load_file(f"{sys.argv[1]}/{name}.safetensors")
    batch = {key[3:]: value.clone() for key, value in known.items() if key.startswith("in.")}
    with torch.no_grad():
        found = logits(from_pretrained(f"{sys.argv[1]}/{name}").eval(), batch)
    if not torch.equal(found, known["out"]):
        wrong.append(f"{name}: {float((found - known['out']).abs().max())}")
print(json.dumps(wrong))
"""


def check_all(rows: Sequence[Row], folder: Path) -> None:
    for row in rows:
        check(row, folder)
    words = [str(folder), str(torch.get_num_threads()), json.dumps([row.name for row in rows])]
    done = subprocess.run([sys.executable, "-c", RELOAD, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == []


def test_rows_that_cover_every_pair(tmp_path: Path) -> None:
    rows = covering(ROWS)
    assert {pair for row in rows for pair in pairs(row)} == {pair for row in ROWS for pair in pairs(row)}
    assert len(rows) < len(ROWS) / 6
    looked_at = [Row("gpt2", False, "weights", None), Row("t5", False, "2:4", None)]  # by transformers, while they load
    check_all([*rows, *(row for row in looked_at if row not in rows)], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", AXES[0])
def test_every_row(family: str, tmp_path: Path) -> None:
    check_all([row for row in ROWS if row.family == family], tmp_path)
