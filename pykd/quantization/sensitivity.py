"""Mixed precision: what each layer costs the model's output in each scheme, measured, and a choice within a budget."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pykd.calibration import Batch, Data, Inputs, calibrate, calibration_batches
from pykd.evaluation.latency import device_of, evaluating
from pykd.models.adapter import logits, move, unwrap
from pykd.nn import CompressedModule
from pykd.nn.linear_8bit import STATIC
from pykd.nn.selection import CONVOLUTION, LINEAR, replace_layer, select_layers, transposed
from pykd.quantization.methods import check_group_size, check_method
from pykd.quantization.packing import Options, Packer, as_dense, packer, stored_bytes
from pykd.training.record import require_finite_weights

#: Layer -> scheme -> number.
Table = Mapping[str, Mapping[str, float]]


class Assignment(dict[str, str]):
    """{layer: scheme}, for `quantize(model, scheme=assignment)`, and what it was chosen by.

    Attributes:
        sensitivities: layer -> scheme -> KL divergence of the model's output, in nats, with only that layer quantized.
        size_bytes: of the layers, as stored. budget_bytes: what they may take.
        divergence: KL divergence of the output with all layers quantized so, on the same examples.
        uniform: scheme -> the same with this scheme in every layer, for those within the budget.
    """

    def __init__(
        self,
        schemes: Mapping[str, str],
        *,
        sensitivities: Table,
        size_bytes: int,
        budget_bytes: int,
        divergence: float,
        uniform: Mapping[str, float],
    ) -> None:
        super().__init__(schemes)
        self.sensitivities, self.uniform = sensitivities, uniform
        self.size_bytes, self.budget_bytes, self.divergence = size_bytes, budget_bytes, divergence

    def record(self) -> dict[str, Any]:
        """What the record of `quantize` keeps of it."""
        return {
            "sensitivities": {layer: dict(costs) for layer, costs in self.sensitivities.items()},
            "size_bytes": self.size_bytes,
            "budget_bytes": self.budget_bytes,
            "divergence": self.divergence,
            "uniform": dict(self.uniform),
        }


@torch.no_grad()
def assign_bits(
    model: nn.Module,
    data: Data,
    *,
    candidates: Sequence[str] = ("w4a16", "w8a16"),
    bits: float | None = None,
    size_bytes: int | None = None,
    samples: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    group_size: int | None = 64,
    symmetric: bool = True,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Assignment:
    """A scheme for each layer, chosen by measured sensitivity so that all of them fit in a budget of bytes.

    For every layer and candidate, the layer alone is quantized (by plain rounding) and the KL divergence of the model's
    output from the unquantized model's is measured, over all positions but padding. Every layer starts in its smallest
    form; then, as long as something fits, the change with the largest fall of that divergence per byte is made, along
    each layer's convex hull (the greedy solution of the multiple-choice knapsack). That adds up single effects; so the
    choice, and every candidate used in all layers that fits the budget, are measured whole, and the best of them is
    returned. The model is left as it was.

    Args:
        data: examples as for `quantize`; samples: how many; batch_size, seed: of a DataBundle. Labels only say
            where an encoder-decoder's positions are padding.
        candidates: names of schemes. "w8a8_static" is measured under ranges that these examples show each layer of the
            unquantized model ("minmax"); layers that they never reach are then left out.
        bits: the budget as bits per weight of the layers, scales and zero points counted; or size_bytes, their bytes.
        group_size, symmetric, include, exclude: as for `quantize`.

    Raises ValueError for no budget or two, one that even the smallest candidates exceed, an unknown scheme or one of
    which the output cannot be measured, and as `quantize` does.

    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 3))
    >>> found = assign_bits(model, [torch.randn(16, 64)], bits=6.5)
    >>> sorted(found), found.size_bytes <= found.budget_bytes
    (['0', '2'], True)
    """
    _check(candidates, bits, size_bytes, group_size)
    require_finite_weights(model, "model")
    drawn = calibration_batches(data, samples=samples, batch_size=batch_size, seed=seed)
    batches = [move(batch, device_of(model)) for batch in drawn]
    names = list(select_layers(model, (*LINEAR, *transposed(), *CONVOLUTION), include=include, exclude=exclude).chosen)
    inputs: dict[str, Inputs] = {}
    if STATIC in candidates:
        calibrate(model, names, batches, inputs.__setitem__, hessian=False, sample=True)
        names = [name for name in names if name in inputs]
    packers = {scheme: packer(scheme, Options("rtn", group_size, symmetric, "minmax", False)) for scheme in candidates}
    with evaluating(model):
        probe = _Probe(model, batches, packers, inputs)
        sizes = {name: probe.sizes(name) for name in names}
        weights = sum(as_dense(model.get_submodule(name)).weight.numel() for name in names)
        budget = int(bits * weights / 8) if bits is not None else int(size_bytes or 0)
        costs = {name: {scheme: probe.divergence({name: scheme}) for scheme in candidates} for name in names}
        choices = {"": choose(costs, sizes, budget)}
        choices |= {scheme: dict.fromkeys(names, scheme) for scheme in candidates}
        fitting = {key: chosen for key, chosen in choices.items() if _total(sizes, chosen) <= budget}
        measured = {key: probe.divergence(chosen) for key, chosen in fitting.items()}
    best = min(measured, key=lambda key: (measured[key], _total(sizes, fitting[key])))
    return Assignment(
        fitting[best],
        sensitivities=costs,
        size_bytes=_total(sizes, fitting[best]),
        budget_bytes=budget,
        divergence=measured[best],
        uniform={key: value for key, value in measured.items() if key},
    )


def choose(costs: Table, sizes: Mapping[str, Mapping[str, int]], budget: int) -> dict[str, str]:
    """Scheme of each layer with a small sum of costs and a sum of sizes of at most the budget.

    Raises ValueError when the smallest sizes exceed it.

    >>> choose({"a": {"x": 9.0, "y": 1.0}, "b": {"x": 2.0, "y": 1.0}}, {k: {"x": 1, "y": 2} for k in "ab"}, 3)
    {'a': 'y', 'b': 'x'}
    """
    hulls = {name: _hull(costs[name], sizes[name]) for name in costs}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - _total(sizes, chosen)
    if left < 0:
        raise ValueError(
            f"the layers take {budget - left} bytes in the smallest candidates, more than the budget of {budget}: "
            "raise it, or add a candidate of fewer bits"
        )
    queue: list[tuple[float, str, int]] = []

    def offer(name: str, step: int) -> None:
        hull = hulls[name]
        if step < len(hull):
            gain = costs[name][hull[step - 1]] - costs[name][hull[step]]
            heapq.heappush(queue, (-gain / (sizes[name][hull[step]] - sizes[name][hull[step - 1]]), name, step))

    for name in hulls:
        offer(name, 1)
    while queue:
        _, name, step = heapq.heappop(queue)
        extra = sizes[name][hulls[name][step]] - sizes[name][chosen[name]]
        if extra <= left:
            left -= extra
            chosen[name] = hulls[name][step]
        offer(name, step + 1)
    return chosen


def _hull(costs: Mapping[str, float], sizes: Mapping[str, int]) -> list[str]:
    """Schemes of growing size and falling cost, each step saving less per byte than the one before."""
    hull: list[str] = []
    for scheme in sorted(costs, key=lambda s: (sizes[s], costs[s])):
        if hull and costs[scheme] >= costs[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(costs, sizes, hull[-2], hull[-1]) <= _slope(costs, sizes, hull[-1], scheme):
            hull.pop()
        hull.append(scheme)
    return hull


def _slope(costs: Mapping[str, float], sizes: Mapping[str, int], one: str, other: str) -> float:
    return (costs[one] - costs[other]) / max(1, sizes[other] - sizes[one])


def _total(sizes: Mapping[str, Mapping[str, int]], chosen: Mapping[str, str]) -> int:
    return sum(sizes[name][scheme] for name, scheme in chosen.items())


class _Probe:
    """Packs layers for a measurement and puts the dense ones back."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        packers: Mapping[str, Packer],
        inputs: Mapping[str, Inputs],
    ) -> None:
        self.model, self.batches, self.packers, self.inputs = model, batches, packers, inputs
        self.exact = self._outputs()

    def packed(self, name: str, scheme: str) -> CompressedModule:
        return self.packers[scheme].pack(as_dense(self.model.get_submodule(name)), self.inputs.get(name))

    def sizes(self, name: str) -> dict[str, int]:
        return {scheme: stored_bytes(self.packed(name, scheme)) for scheme in self.packers}

    def divergence(self, schemes: Mapping[str, str]) -> float:
        """Mean KL(model, model with these layers quantized) over the rows of the output (`real_rows`), in nats."""
        replaced: list[tuple[nn.Module, nn.Module]] = []
        try:
            for name, scheme in schemes.items():
                layer, packed = self.model.get_submodule(name), self.packed(name, scheme)
                replace_layer(self.model, layer, packed)
                replaced.append((packed, layer))
            found = self._outputs()
        finally:
            for put, layer in reversed(replaced):
                replace_layer(self.model, put, layer)
        total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(self.exact, found, strict=True))
        return max(0.0, total / sum(len(p) for p in self.exact))

    def _outputs(self) -> list[Tensor]:
        found = (real_rows(self.model, logits(self.model, dict(batch)), batch) for batch in self.batches)
        return [rows.double().log_softmax(-1) for rows in found]


def real_rows(model: nn.Module, output: Tensor, batch: Batch) -> Tensor:
    """The rows of a model's output [..., classes] without those of padded positions.

    Which these are says the batch's mask of positions; of an encoder-decoder the labels say it, where they are -100.

    >>> real_rows(nn.Identity(), torch.zeros(1, 3, 2), {"attention_mask": torch.tensor([[1, 1, 0]])}).shape
    torch.Size([2, 2])
    """
    mask = batch.get("attention_mask")
    if hasattr(unwrap(model), "prepare_decoder_input_ids_from_labels"):
        labels = batch.get("labels")
        mask = batch.get("decoder_attention_mask", None if labels is None else labels != -100)
    per_position = output.dim() == 3 and mask is not None and mask.shape == output.shape[:-1]
    return output[mask.bool()] if per_position and mask is not None else output.flatten(0, -2)


def check_candidates(candidates: Sequence[str]) -> None:
    """Raise ValueError unless these are names of schemes.

    >>> check_candidates(["w4a16", "bf16"])
    """
    if not candidates:
        raise ValueError("candidates names no scheme: give two or more, such as ('w4a16', 'w8a16')")
    for scheme in candidates:
        check_method(scheme, "rtn")
        if not isinstance(scheme, str):
            raise ValueError(f"candidates are names of schemes, such as 'w4a16', got {scheme!r}")


def _check(candidates: Sequence[str], bits: float | None, size_bytes: int | None, group_size: int | None) -> None:
    if (bits is None) == (size_bytes is None) or not (bits or size_bytes or 0) > 0:
        raise ValueError(
            f"the budget is bits per weight or size_bytes, one of them and above 0, got {bits} and {size_bytes}"
        )
    check_group_size(group_size)
    check_candidates(candidates)
