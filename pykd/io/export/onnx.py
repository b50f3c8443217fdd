"""ONNX: the graph that torch.onnx traces, with compressed layers as nodes over packed weights, checked as written."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.io.export.onnx_layers import to_onnx_layers
from pykd.io.export.onnx_model import INPUTS, OnnxModel
from pykd.io.export.onnx_router import choices_of, made
from pykd.models.adapter import logits, unwrap
from pykd.nn.compressed import CompressedModule

FILE = "model.onnx"
#: Largest difference of a logit between ONNX Runtime and pykd, as a share of the largest logit. Where activations are
#: rounded, one that lies between two codes may fall to the other side by the order of a float32 sum.
BOUND, BOUND_ROUNDED = 1e-3, 3e-2
#: Names of the axes of each input that may have any size.
AXES: dict[str, dict[int, str]] = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "sequence"},
    "token_type_ids": {0: "batch", 1: "sequence"},
    "decoder_input_ids": {0: "batch", 1: "target_sequence"},
    "pixel_values": {0: "batch"},
}

Batch = Mapping[str, Tensor]
#: Outputs by name, "logits" among them, for inputs by name.
Graph = Callable[[Batch], Mapping[str, Tensor]]


class Logits(nn.Module):
    """A model as a function of tensors in a fixed order, without the keys and values of past tokens.

    It gives logits, and of a router its choices.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        config: Any = getattr(model, "config", None)
        self.options = {"use_cache": False} if getattr(config, "use_cache", None) else {}
        self.choices = choices_of(model)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, inputs, strict=True))
        model: Any = self.model
        out: Any = model(*inputs) if getattr(model, "config", None) is None else model(**named, **self.options)
        return (out if isinstance(out, Tensor) else out.logits, *(out[name] for name in self.choices))


def write(model: nn.Module, folder: Path, checked: Sequence[Batch]) -> dict[str, Any]:
    """Write `model.onnx` into `folder`, traced with the first of `checked`, and compare ONNX Runtime's logits on all.

    Returns what is to be known of it: `notes`, and `check` with the number of logits compared, the largest difference
    as a share of the largest logit, the bound, and how many labels differ. Raises ArtifactError for a layer without a
    form in ONNX, a model that torch.onnx cannot trace, and a file that does not compute what the model does.
    """
    model, example = unwrap(model), checked[0]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    forms = copy.deepcopy(model).cpu().float().eval()
    notes = to_onnx_layers(forms)
    if dtype != torch.float32:
        notes.append(f"computes in float32, where the model computes in {str(dtype).removeprefix('torch.')}")
    names = [name for name in INPUTS if name in example]
    can_generate: Any = getattr(model, "can_generate", bool)
    if can_generate():
        notes.append("without cache: each call computes all positions")
    _trace(Logits(forms, names), names, example, folder / FILE)
    found = OnnxModel(folder / FILE)
    notes.append(f"inputs {', '.join(names)}; any size along {', '.join(_free(names))}")
    if found.output_names[1:]:
        notes.append(f"outputs {', '.join(found.output_names)}")
    return {"notes": notes, "check": compare(model, found.outputs, checked, bound=bound_of(model))}


def bound_of(model: nn.Module) -> float:
    """The bound that the model's schemes allow."""
    rounding = any(
        isinstance(module, CompressedModule) and getattr(module, "scheme", None) in ("w4a8", "w8a8", "w8a8_static")
        for module in model.modules()
    )
    return BOUND_ROUNDED if rounding else BOUND


@torch.no_grad()
def compare(model: nn.Module, graph: Graph, checked: Sequence[Batch], *, bound: float) -> dict[str, Any]:
    """Differences between a model and a graph that should give the same logits; ArtifactError where they do not.

    A router is compared as if it made the choices of the graph (:mod:`pykd.io.export.onnx_router`); those that differ
    are counted.
    """
    labels = different = 0
    largest = 0.0
    routed: dict[str, int] = {}
    model = copy.deepcopy(model).cpu().float().eval()
    for batch in checked:
        given = dict(graph(batch))
        got = given.pop("logits").float()
        want = logits(model, batch).float()
        different += int((want.argmax(-1) != got.argmax(-1)).sum()) if want.shape == got.shape else 0
        if given:
            with made(model, batch, given) as choices:
                want = logits(model, batch).float()
            routed = {name: routed.get(name, 0) + count for name, count in choices.differing.items()}
            _require(choices.largest, bound, "choices of the router differ by {} of what they are the sum of")
        scale = max(float(want.abs().max()), 1e-6)
        gap = float((want - got).abs().max()) / scale if want.shape == got.shape else math.inf
        _require(gap, bound, "logits differ by {} of the largest")
        labels, largest = labels + want[..., 0].numel(), max(largest, gap)
    return {"labels": labels, "different_labels": different, "largest_difference": largest, "bound": bound} | routed


def _require(gap: float, bound: float, what: str) -> None:
    if not gap <= bound:
        raise ArtifactError(
            f"ONNX Runtime does not compute what the model does: {what.format(f'{gap:.2g}')}, where {bound:g} is "
            "allowed; nothing was exported. Report it with the model's configuration."
        )


def _trace(model: Logits, names: list[str], example: Batch, path: Path) -> None:
    inputs = tuple(_two_rows(example[name]) for name in names)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                model.eval(),
                inputs,
                dynamo=True,
                input_names=names,
                output_names=["logits", *model.choices],
                dynamic_shapes={"inputs": tuple(AXES[name] for name in names)},
                verbose=False,
            )
            assert program is not None
            _forget_the_machine(program.model)
            program.save(str(path))
        except Exception as error:  # of tracing, of decomposition, of translation: no common base
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise ArtifactError(
                f"{type(model.model).__name__} could not be traced by torch.onnx ({type(error).__name__}: {reason})"
            ) from error


def _forget_the_machine(traced: Any) -> None:
    """Drop what the exporter notes of every node: the files and lines it was traced from, as long as a small model."""
    for node in traced.graph.all_nodes():
        for noted in (node, *node.outputs):
            noted.metadata_props.clear()
    for value in (*traced.graph.inputs, *traced.graph.initializers.values()):
        value.metadata_props.clear()


def _two_rows(value: Tensor) -> Tensor:
    """Tracing takes an axis of size 1 for a constant."""
    value = value.float() if value.is_floating_point() else value
    return value if len(value) > 1 else torch.cat([value, value])


def _free(names: list[str]) -> list[str]:
    return sorted({axis for name in names for axis in AXES[name].values()})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress on stdout, and its warnings about its own dependencies."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for name in ("torch.onnx", "onnxscript", "onnx_ir"):
            log = logging.getLogger(name)
            stack.callback(functools.partial(log.setLevel, log.level))
            log.setLevel(logging.ERROR)
        yield
