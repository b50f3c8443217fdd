"""What a router does with the rows of a test split: who goes deep, what it brings, what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pykd.data.bundle import DataBundle, batches
from pykd.evaluation.counting import count_parameters
from pykd.evaluation.footprint import theoretical_bytes
from pykd.evaluation.latency import device_of, evaluating, measure_latency
from pykd.models.adapter import call, move, unwrap

#: Bars of the score histogram.
BINS = 24
#: What is timed: every row through one branch, and each row through its own.
TIMED = ("fast", "deep", "learned")


@dataclass(frozen=True)
class LabelRouting:
    """Rows of one class: how many there are and went deep, and which share of all of them each branch has right."""

    name: str
    rows: int
    deep: int
    fast_accuracy: float
    deep_accuracy: float


@dataclass(frozen=True)
class Routing:
    """What a router did on a test split.

    deep_share: of the rows, 0..1, beside the ``target_share`` that the threshold was meant for. fast_accuracy,
    deep_accuracy: of each branch on all rows; fast_rows_accuracy, deep_rows_accuracy: of each on the rows it answers.
    labels: by class. edges, fast_counts, deep_counts: histogram of the scores by the branch that the row took.
    experts: tokens that each expert of each deep layer computed for the rows that went deep. branch_ms: median
    milliseconds of a call at 1 row and at ``timed_rows``, from alternating rounds, with every row in the fast branch,
    in the deep one, and each in its own ("learned"). parts: parameters of each part of the model.
    """

    threshold: float
    target_share: float
    deep_share: float
    fast_accuracy: float
    deep_accuracy: float
    fast_rows_accuracy: float
    deep_rows_accuracy: float
    labels: tuple[LabelRouting, ...]
    edges: tuple[float, ...]
    fast_counts: tuple[int, ...]
    deep_counts: tuple[int, ...]
    experts: tuple[tuple[int, ...], ...]
    branch_ms: dict[str, tuple[float, float]]
    timed_rows: int
    parts: dict[str, int]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Routing:
        """What ``dataclasses.asdict`` made of one, also after a trip through JSON."""
        read: dict[str, Any] = {
            name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in values.items()
        }
        read["labels"] = tuple(LabelRouting(**entry) for entry in values["labels"])
        read["experts"] = tuple(tuple(layer) for layer in values["experts"])
        read["branch_ms"] = {name: tuple(times) for name, times in values["branch_ms"].items()}
        return cls(**read)

    def sentence(self) -> str:
        """The split in words."""
        return (
            f"{100 * (1 - self.deep_share):.1f} % of the rows take the fast branch and {100 * self.deep_share:.1f} % "
            f"the deep one (meant: {100 * self.target_share:.0f} % deep); all rows in the fast branch would give an "
            f"accuracy of {100 * self.fast_accuracy:.2f} %, all in the deep one {100 * self.deep_accuracy:.2f} %"
        )

    def label_table(self) -> list[list[str]]:
        """Rows of a table: what happened to each class."""
        head = ["class", "rows", "deep", "share deep", "fast branch right", "deep branch right"]
        rows = [
            [each.name, f"{each.rows:,}", f"{each.deep:,}", _percent(each.deep / max(1, each.rows)),
             _percent(each.fast_accuracy), _percent(each.deep_accuracy)]
            for each in self.labels
        ]  # fmt: skip
        return [head, *rows]

    def latency_table(self) -> list[list[str]]:
        """Rows of a table: what a call takes in each branch, and as a share of the deep one."""
        deep = self.branch_ms["deep"]
        names = {"fast": "all rows fast", "deep": "all rows deep", "learned": "each row its branch"}
        rows = [
            [names[name], *(f"{ms:.2f} ms ({ms / whole:.2f}x)" for ms, whole in zip(times, deep, strict=True))]
            for name, times in self.branch_ms.items()
        ]
        return [["routing", "1 row", f"{self.timed_rows} rows"], *rows]

    def parts_table(self) -> list[list[str]]:
        """Rows of a table: parameters of each part, and what they would take at each width."""
        rows = []
        for name, count in {**self.parts, "together": sum(self.parts.values())}.items():
            sizes = theoretical_bytes(count)
            rows.append([name, f"{count:,}", *(f"{sizes[width] / 1e6:,.3f}" for width in ("fp32", "int8", "int4"))])
        return [["part", "parameters", "fp32, MB", "int8, MB", "int4, MB"], *rows]

    def expert_table(self) -> list[list[str]]:
        """Rows of a table: the share of the tokens of each deep layer that went to each expert; empty without any."""
        if not self.experts:
            return []
        head = ["deep layer", *(f"expert {number}" for number in range(1, len(self.experts[0]) + 1))]
        rows = [
            [str(n), *(_percent(count / max(1, sum(layer))) for count in layer)]
            for n, layer in enumerate(self.experts, 1)
        ]
        return [head, *rows]


def measure_routing(
    model: nn.Module, data: DataBundle, *, batch_size: int = 64, rounds: int = 10, examples: int = 32
) -> Routing | None:
    """Route the test split of ``data``; None for a model without a router (:mod:`pykd.models.router`).

    Both branches answer every row, so that each can be judged on all of them. rounds: timed calls of each branch,
    alternating, at 1 row (going round ``examples`` rows) and at ``batch_size``.
    """
    inner: Any = unwrap(model)
    if getattr(inner, "router", None) is None or not hasattr(inner, "parts"):
        return None
    found = _route(model, data, batch_size)
    labels, deep, scores = found["labels"], found["deep"], found["scores"]
    right = found["branches"].argmax(-1) == labels[:, None]
    low, high = float(scores.min()), float(scores.max())
    edges = torch.linspace(low, max(high, low + 1e-6), BINS + 1, dtype=torch.float64)
    counts = [torch.histogram(scores[rows].double(), edges).hist.int().tolist() for rows in (~deep, deep)]
    singles = [data.collate([data.test[index]]) for index in range(min(examples, len(data.test)))]
    full = data.collate([data.test[index] for index in range(min(batch_size, len(data.test)))])
    timed = [_times(model, each, rounds) for each in (singles, [full])]
    return Routing(
        threshold=inner.config.threshold,
        target_share=inner.config.deep_share,
        deep_share=_mean(deep),
        fast_accuracy=_mean(right[:, 0]),
        deep_accuracy=_mean(right[:, 1]),
        fast_rows_accuracy=_mean(right[~deep, 0]),
        deep_rows_accuracy=_mean(right[deep, 1]),
        labels=tuple(
            LabelRouting(str(name), int(own.sum()), int(deep[own].sum()), *map(_mean, right[own].T))
            for number, name in enumerate(data.class_names)
            if bool((own := labels == number).any())
        ),
        edges=tuple(edges.tolist()),
        fast_counts=tuple(counts[0]),
        deep_counts=tuple(counts[1]),
        experts=tuple(map(tuple, found["experts"].tolist())),
        branch_ms={name: (timed[0][name], timed[1][name]) for name in TIMED},
        timed_rows=len(full["labels"]),
        parts={name: sum(count_parameters(m)[0] for m in modules) for name, modules in inner.parts().items()},
    )


def _route(model: nn.Module, data: DataBundle, batch_size: int) -> dict[str, Tensor]:
    """Labels, scores, routes and both branches' logits of every row; tokens by expert of the rows that go deep."""
    from pykd.models.router_layers import tokens_by_expert

    kept: dict[str, list[Tensor]] = {name: [] for name in ("labels", "scores", "deep", "branches")}
    experts: list[Tensor] = []
    device = device_of(model)
    with evaluating(model):
        for batch in batches(data.test, data.collate, batch_size):
            batch = move(batch, device)
            out = call(model, batch, output_branches=True)
            rows = {"labels": batch["labels"], "scores": out.scores, "deep": out.deep, "branches": out.branch_logits}
            for name, value in rows.items():
                kept[name].append(value.cpu())
            if out.expert_choices is not None:  # both branches computed all rows; those of the deep ones count
                seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                deep = out.deep.repeat_interleave(seen.sum(1))
                used = [tokens_by_expert(own[deep], out.expert_tokens.shape[1]) for own in out.expert_choices]
                experts.append(torch.stack(used).cpu())
    whole = torch.stack(experts).sum(0) if experts else torch.zeros(0, 0)
    return {name: torch.cat(values) for name, values in kept.items()} | {"experts": whole}


def _times(model: nn.Module, ready: Sequence[Mapping[str, Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of a call for each routing, in alternating rounds."""
    from pykd.models.router import routed

    times: dict[str, list[float]] = {name: [] for name in TIMED}
    for turn in range(-1, rounds):
        for name in TIMED:
            with routed(model, name):
                took = measure_latency(model, [ready[turn % len(ready)]], rounds=1, warmup=0).p50_ms
            times[name] += [took] if turn >= 0 else []
    return {name: statistics.median(values) for name, values in times.items()}


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean()) if flags.numel() else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
