"""ONNX Runtime computes what pykd computes, layer by layer and model by model, from packed weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import pykd
from pykd import nn as packed
from pykd.errors import ArtifactError
from pykd.evaluation.exported import FORMATS, Format, checked_inputs
from pykd.io.export.onnx import BOUND, BOUND_ROUNDED, compare, write
from pykd.io.export.onnx_layers import to_onnx_layers
from pykd.io.export.onnx_matrices import block_of
from pykd.io.export.onnx_model import OnnxModel
from pykd.models.adapter import logits
from pykd.models.huggingface import load_huggingface
from pykd.nn.linear_8bit import StaticInput
from pykd.ops.int4_r16 import codebook_code

STATIC = StaticInput(0.03, -5)
TABLE = codebook_code([k / 8 - 1 for k in range(16)])
#: Linear layers of 40 inputs in every form, and how close ONNX Runtime must come, as a share of the largest output.
LINEAR: dict[str, tuple[Callable[[nn.Linear], nn.Module], float]] = {
    "int4": (lambda x: packed.Linear4bit.from_linear(x, group_size=32), 1e-6),
    "int4, one group, gelu": (lambda x: packed.Linear4bit.from_linear(x, group_size=None, activation="gelu"), 1e-6),
    "int4, groups of 48 of 40": (lambda x: packed.Linear4bit.from_linear(x, group_size=48), 1e-6),
    "int4, groups no block divides": (lambda x: packed.Linear4bit.from_linear(x, group_size=7), 1e-6),
    "uint4": (lambda x: packed.Linear4bit.from_linear(x, group_size=16, symmetric=False), 1e-6),
    "uint4, no block": (lambda x: packed.Linear4bit.from_linear(x, group_size=5, symmetric=False), 1e-6),
    "w4a8": (lambda x: packed.Linear4bit.from_linear(x, scheme="w4a8", group_size=32), 1e-6),
    "nf4": (lambda x: packed.Linear4bit.from_linear(x, scheme="nf4", group_size=16), 1e-6),
    "fp4": (lambda x: packed.Linear4bit.from_linear(x, scheme="fp4", group_size=32), 1e-6),
    "codebook": (lambda x: packed.Linear4bit.from_linear(x, scheme=TABLE, group_size=32), 1e-6),
    "w8a8": (lambda x: packed.Linear8bit.from_linear(x, scheme="w8a8"), 1e-6),
    "w8a16": (lambda x: packed.Linear8bit.from_linear(x, scheme="w8a16"), 1e-6),
    "w8a16, groups": (
        lambda x: packed.Linear8bit.from_linear(x, scheme="w8a16", group_size=16, activation="relu"),
        1e-6,
    ),
    "w8a8_static": (lambda x: packed.Linear8bit.from_linear(x, scheme="w8a8_static", static=STATIC), 1e-6),
    "bf16": (lambda x: packed.Linear16bit.from_linear(x, scheme="bf16"), 1e-6),
    "sparse": (lambda x: packed.SparseLinear.from_linear(x, mask=x.weight > 0), 1e-6),
}
EMBEDDING: dict[str, Callable[[nn.Embedding], nn.Module]] = {
    "w4a16": lambda x: packed.Embedding4bit.from_embedding(x, group_size=16),
    "uint4": lambda x: packed.Embedding4bit.from_embedding(x, group_size=12, symmetric=False),
    "nf4": lambda x: packed.Embedding4bit.from_embedding(x, scheme="nf4", group_size=32),
    "w8a16": packed.Embedding8bit.from_embedding,
}
CONV: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "4-bit": lambda x: packed.Conv2d4bit.from_conv2d(x, group_size=16),
    "8-bit": lambda x: packed.Conv2d8bit.from_conv2d(x, scheme="w8a8"),
}


class Everything(nn.Module):
    """Embeddings, linear layers behind them, output projections tied to them, and convolutions, each seen alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(make(nn.Embedding(20, 40)) for make in EMBEDDING.values())
        self.heads = nn.ModuleList(
            packed.TiedLinear.from_linear(nn.Linear(40, 20, bias=number == 0), embedding)  # type: ignore[arg-type]
            for number, embedding in enumerate(self.embeddings)
        )
        self.linears = nn.ModuleList(make(nn.Linear(40, 6)) for make, _ in LINEAR.values())
        self.wide = nn.ModuleList(make(nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2)) for make in CONV.values())
        self.points = nn.ModuleList(make(nn.Conv2d(4, 8, 1, stride=2)) for make in CONV.values())

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        rows = [embedding(input_ids) for embedding in self.embeddings]
        x = torch.stack(rows).sum(0)
        convolved = [layer(pixel_values).flatten(2).mean(2) for layer in [*self.wide, *self.points]]
        images = torch.cat(convolved, -1)[:, None].expand(-1, x.shape[1], -1)
        return torch.cat([*rows, images, *(layer(x) for layer in [*self.heads, *self.linears])], -1)


def test_every_layer_computes_the_same(tmp_path: Path) -> None:
    model = Everything().eval()
    shapes = ((2, 5), (1, 3), (4, 9))
    checked = [
        {"input_ids": torch.randint(0, 20, (rows, length)), "pixel_values": torch.randn(rows, 4, 6, 6)}
        for rows, length in shapes
    ]
    record = write(model, tmp_path, checked)
    assert record["check"]["labels"] == 10 + 3 + 36 and record["check"]["different_labels"] == 0
    assert "1 pruned layers hold their zeros: ONNX has no sparse product" in record["notes"]
    found = OnnxModel(tmp_path / "model.onnx")
    sizes = [40] * 4 + [8] * 4 + [20] * 4 + [6] * len(LINEAR)
    names = [*EMBEDDING, *(f"{kind} {conv}" for kind in ("3x3", "1x1") for conv in CONV)]
    names += [*(f"tied to {name}" for name in EMBEDDING), *LINEAR]
    for batch in checked:
        with torch.no_grad():
            pairs = zip(names, model(**batch).split(sizes, -1), found(**batch).split(sizes, -1), strict=True)
        for name, want, got in pairs:
            bound = LINEAR[name][1] if name in LINEAR else 1e-6
            assert (want - got).abs().max() <= bound * want.abs().max(), name
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MatMulInteger"] == 2  # w8a8 and the 1x1 convolution
    assert kinds["QuantizeLinear"] == 1 and kinds["DequantizeLinear"] == 2  # w8a8_static: activations, and the weight
    assert kinds["MatMulNBits"] == 6  # what MatMulNBits has blocks for, and the projection tied to such an embedding


@pytest.mark.parametrize("axes", [2, 3])
def test_static_codes_are_multiplied_as_codes(axes: int, tmp_path: Path) -> None:
    """ONNX Runtime fuses what lies between QuantizeLinear and DequantizeLinear, below the rounded range too."""
    import onnxruntime

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = packed.Linear8bit.from_linear(nn.Linear(48, 7), scheme="w8a8_static", static=STATIC)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.layer(pixel_values.flatten(axes - 1)).flatten(1)  # type: ignore[no-any-return]

    record = write(Flat().eval(), tmp_path, [{"pixel_values": 5 * torch.randn(4, 1 if axes == 2 else 5, 4, 12)}])
    assert record["check"]["largest_difference"] < 1e-6
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert "MatMulIntegerToFloat" in {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}


def tiny_bert(**options: Any) -> nn.Module:
    config = {"model_type": "bert", "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 40, **options}
    return load_huggingface(None, "sequence-classification", num_labels=3, config=config).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, dict[str, Any]]:
    model = tiny_bert()
    pykd.quantize(model, scheme="w4a16", group_size=32, embeddings="w8a16")
    path = tmp_path_factory.mktemp("onnx") / "model"
    return model, path, pykd.export(model, path, format="onnx", provenance={"teacher": "x"}, latency_rounds=3)


def test_a_transformer_of_any_batch_and_length(exported: tuple[nn.Module, Path, dict[str, Any]]) -> None:
    model, path, record = exported
    assert {file.name for file in path.iterdir()} == {"README.md", "model.onnx", "pykd_manifest.json"}
    assert record["check"]["largest_difference"] < 1e-5 and record["check"]["bound"] == BOUND
    assert record["size_bytes"] == (path / "model.onnx").stat().st_size
    assert record["latency_ms"].keys() == {"pykd", "onnxruntime"} and record["faster_than_pykd"] > 0
    manifest = json.loads((path / "pykd_manifest.json").read_text())
    assert manifest["stages"] == [*model.pykd_report, record] and manifest["provenance"] == {"teacher": "x"}
    card = (path / "README.md").read_text()
    assert 'library_name: "onnx"' in card and 'InferenceSession("FOLDER/model.onnx")' in card
    found = OnnxModel(path / "model.onnx")
    ids = torch.randint(0, 99, (7, 31))
    mask = torch.ones_like(ids)
    mask[3, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(7)}
    with torch.no_grad():
        want, got = logits(model, batch), logits(found, batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    nodes = Counter(node.op_type for node in onnx.load(path / "model.onnx").graph.node)
    assert nodes["MatMulNBits"] == 7, "six in the layer, one in the pooler"


def test_the_weights_are_packed_in_the_file(exported: tuple[nn.Module, Path, dict[str, Any]]) -> None:
    graph = onnx.load(exported[1] / "model.onnx").graph
    largest = {tuple(value.dims): value.data_type for value in graph.initializer}
    assert largest[99, 64] == onnx.TensorProto.INT8, "the embedding"
    assert largest[128, 2, 16] == onnx.TensorProto.UINT8, "128 x 64 weights in two blocks of 32 nibbles"
    assert not any(kind == onnx.TensorProto.FLOAT for dims, kind in largest.items() if dims == (128, 64))


def test_the_file_says_nothing_of_the_machine_it_was_made_on(exported: tuple[nn.Module, Path, dict[str, Any]]) -> None:
    content = (exported[1] / "model.onnx").read_bytes()
    assert b".py" not in content and b"stack_trace" not in content
    weights = sum(len(value.raw_data) for value in onnx.load_from_string(content).graph.initializer)
    assert len(content) < weights + 40_000


def test_inputs_come_from_data_where_there_is_some(models: Callable[[str], nn.Module]) -> None:
    from pykd.data import load_digits

    data = load_digits(image_size=32, test_size=40)
    found = checked_inputs(models("resnet18"), data)
    assert [len(batch["pixel_values"]) for batch in found] == [16, 16, 8] and found[0].keys() == {"pixel_values"}
    given = [{"input_ids": torch.ones(1, 4).long(), "labels": torch.zeros(1)}]
    assert checked_inputs(models("bert"), given)[0].keys() == {"input_ids"}


# Refusals.


def test_a_file_that_computes_something_else_is_refused(models: Callable[[str], nn.Module]) -> None:
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    batch = [{"pixel_values": torch.randn(5, 4)}]
    with pytest.raises(ArtifactError, match=r"ONNX Runtime does not compute what the model does: logits differ by"):
        compare(model, lambda given: {"logits": other(given["pixel_values"])}, batch, bound=BOUND_ROUNDED)
    found = compare(model, lambda given: {"logits": model(given["pixel_values"])}, batch, bound=BOUND)
    assert found == {"labels": 5, "different_labels": 0, "largest_difference": 0, "bound": BOUND}


def test_what_has_no_form_in_onnx_is_refused(tmp_path: Path) -> None:
    layer = packed.Linear4bit.from_linear(nn.Linear(48, 4), scheme="w4a8", group_size=24)
    with pytest.raises(ArtifactError, match=r"module '0' rounds activations in groups of 24, .*blocks of 16, 32"):
        to_onnx_layers(nn.Sequential(layer))
    trained = nn.Sequential(packed.QATLinear.from_linear(nn.Linear(8, 8)))
    with pytest.raises(ArtifactError, match=r"module '0' is being trained .* call pykd\.convert_qat first"):
        to_onnx_layers(trained)
    odd = packed.Linear8bit.from_linear(nn.Linear(8, 8))
    odd.scheme = "w8a4"
    with pytest.raises(ArtifactError, match="module '0' is a Linear8bit with scheme 'w8a4', which has no form in ONNX"):
        to_onnx_layers(nn.Sequential(odd))


class Untraceable(nn.Module):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values if float(pixel_values.sum()) > 0 else -pixel_values


def test_models_that_cannot_be_traced_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Untraceable could not be traced by torch\.onnx"):
        write(Untraceable(), tmp_path, [{"pixel_values": torch.ones(2, 3)}])
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"model\.onnx is no file that ONNX Runtime loads"):
        OnnxModel(tmp_path / "model.onnx")


def test_sessions_leave_the_cores_between_calls(exported: tuple[nn.Module, Path, dict[str, Any]]) -> None:
    options = OnnxModel(exported[1] / "model.onnx", threads=1).session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == 1


def test_inputs_that_are_not_there_are_named(exported: tuple[nn.Module, Path, dict[str, Any]]) -> None:
    found = OnnxModel(exported[1] / "model.onnx")
    with pytest.raises(ArtifactError, match="takes input_ids, attention_mask, but there is no attention_mask"):
        found(input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_unknown_formats_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="unknown format 'onxx': did you mean 'onnx'"):
        pykd.export(tiny_bert(), tmp_path / "model", format="onxx")
    monkeypatch.setitem(FORMATS, "rare", Format("onnx", ("a_package_that_is_not_there",), "", (), ""))
    with pytest.raises(ArtifactError, match=r"format 'rare' needs the package a_package.*pip install 'pykd\[export\]'"):
        pykd.export(tiny_bert(), tmp_path / "model", format="rare")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("columns", "group", "rounds", "block"),
    [
        *[(384, 64, False, 64), (384, 96, False, 32), (384, 24, False, None), (40, 48, False, 32), (12, 12, False, 16)],
        *[(384, 64, True, 64), (384, 96, True, None), (64, 64, True, 64)],
    ],
)
def test_blocks(columns: int, group: int, rounds: bool, block: int | None) -> None:
    assert block_of(columns, group, rounds=rounds) == block


# Whole families take a minute of tracing each.

FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        "causal-lm",
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"scheme": "w4a16", "group_size": 16, "embeddings": "w4a16"},
    ),
    "t5": (
        "seq2seq-lm",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        {"scheme": "w8a16", "embeddings": "w8a16"},
    ),
    "vit": (
        "image-classification",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 70,
         "image_size": 16, "patch_size": 4},
        {"scheme": "w8a8"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    task, config, options = FAMILIES[family]
    model = load_huggingface(None, task, config={"model_type": family, **config}).eval()
    pykd.quantize(model, **options)
    record = pykd.export(model, tmp_path / "model", format="onnx", latency_rounds=0)
    assert record["check"]["different_labels"] == 0 and record["check"]["largest_difference"] < 1e-3
    assert any("without cache" in note for note in record["notes"]) == (task.endswith("-lm"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), [("resnet18", "pruned_4bit"), ("mobilenet_v2", "8bit")])
def test_convolutional_networks(
    family: str, variant: str, tmp_path: Path, variants: Callable[[str, str], nn.Module], batches: Callable[[str], Any]
) -> None:
    model = variants(family, variant)
    record = pykd.export(model, tmp_path / "model", data=[batches(family)], latency_rounds=0)
    assert record["check"]["different_labels"] == 0 and record["check"]["largest_difference"] < 1e-5
