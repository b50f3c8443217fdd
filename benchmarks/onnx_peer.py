"""ONNX Runtime's own quantizers on a text classifier, for `bench_quantization_methods.py`."""

from __future__ import annotations

import copy
import functools
import logging
import pathlib
import tempfile
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykd.data import DataBundle
from pykd.io.export.onnx import FILE, write
from pykd.io.export.onnx_model import OnnxModel
from pykd.models.adapter import inputs_of
from pykd.nn.selection import select_layers

#: (file of the model in float32, file to write)
Quantize = Callable[[str, str], None]


def onnx_peer(quantize: Quantize) -> Callable[[nn.Module, DataBundle], int]:
    """The model as ONNX Runtime computes it when its own tools have quantized it; the bytes of the file's tensors.

    Its tools quantize products of matrices, MatMul, and leave Gemm, which a linear layer of rows becomes: those that
    `quantize` would take are traced with an axis more (`as_product`), so that they are the same layers.
    """

    def apply(model: nn.Module, data: DataBundle) -> int:
        import onnx

        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            traced = copy.deepcopy(model)
            for layer in select_layers(traced, (nn.Linear,)).chosen.values():
                layer.forward = functools.partial(as_product, layer)  # type: ignore[assignment]
            write(traced, folder, [inputs_of(model, data.example(2))])
            fold_constants(str(folder / FILE), str(folder / "folded.onnx"))
            quantize(str(folder / "folded.onnx"), str(folder / "quantized.onnx"))
            found = OnnxModel(folder / "quantized.onnx")
            tensors = onnx.load(folder / "quantized.onnx").graph.initializer
            size_bytes = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in tensors)

        def forward(**inputs: Any) -> types.SimpleNamespace:
            return types.SimpleNamespace(logits=found(**{key: inputs[key] for key in found.names}))

        model.forward = forward
        return size_bytes

    return apply


def as_product(layer: Any, x: Tensor) -> Tensor:
    """A linear layer without a Gemm."""
    y = F.linear(x, layer.weight) if x.dim() > 2 else F.linear(x[None], layer.weight)[0]
    return y if layer.bias is None else y + layer.bias


def fold_constants(source: str, target: str) -> None:
    """What ONNX Runtime computes of constants alone when it loads a file, such as transposed weights.

    Without the shapes of what lies between, of which it keeps old ones that its quantizers stumble over.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = target, 3
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    folded = onnx.load(target)
    del folded.graph.value_info[:]
    onnx.save(folded, target)


def dynamic_int8(source: str, target: str) -> None:
    """`quantize_dynamic`: weights in int8 with a scale per output, activations under one scale per call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    head = [f"{node.name}_MatMul" for node in onnx.load(source).graph.node if node.op_type == "Gemm"]  # its new name
    # Without VNNI its product of uint8 and int8 saturates, of which its documentation warns: then both are uint8.
    kind = QuantType.QInt8 if torch.cpu._is_vnni_supported() else QuantType.QUInt8
    options: dict[str, Any] = {"op_types_to_quantize": ["MatMul"], "nodes_to_exclude": head, "per_channel": True}
    quantize_dynamic(source, target, weight_type=kind, **options)


def int4(source: str, target: str, *, group_size: int, accuracy_level: int) -> None:
    """`MatMulNBitsQuantizer`: rounded to nearest with zero points. accuracy_level 4 rounds activations to int8."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    logging.getLogger(tool.__name__).setLevel(logging.WARNING)  # it tells of every node
    options = {"block_size": group_size, "is_symmetric": False, "accuracy_level": accuracy_level}
    quantizer = tool.MatMulNBitsQuantizer(onnx.load(source), **options)
    quantizer.process()
    quantizer.model.save_model_to_file(target)


#: Peers with groups of weights -> their accuracy level in `int4`.
GROUPED = {"ONNX Runtime int4": 1, "ONNX Runtime int4, int8 activations": 4}
