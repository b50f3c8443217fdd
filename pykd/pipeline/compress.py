"""`compress_to`: the best model within a size, a latency or a loss of quality, searched and measured."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pykd.data import DataBundle
from pykd.evaluation import Report, StageRecord, compare, write_report
from pykd.pipeline.candidates import Candidate, Pruning, space
from pykd.pipeline.search import Search
from pykd.pipeline.target import Point, Target
from pykd.training.record import add_record

logger = logging.getLogger("pykd.pipeline")

#: Timings of untrained candidates are short: one that is so much too slow is still measured properly.
LATENCY_SLACK = 0.1


@dataclass(frozen=True)
class Measurement:
    """One candidate, measured: its report, and how far it is beyond each limit (0 or less is met)."""

    candidate: Candidate
    report: Report
    excess: dict[str, float]

    @property
    def met(self) -> bool:
        """Whether it is within every limit."""
        return all(value <= 0 for value in self.excess.values())


@dataclass(frozen=True)
class Compressed:
    """What `compress_to` found.

    model: the best one within the target, or the closest to it; met: whether it is within. sentence: what it reaches,
    or which limit no candidate met and how close the best came. base: the model as it was. measured: every candidate
    that was evaluated; front: those of them that no other beats in quality, size and speed at once. skipped: candidates
    that were not evaluated, and why.
    """

    model: nn.Module
    met: bool
    sentence: str
    best: Measurement
    base: Report
    measured: tuple[Measurement, ...]
    front: tuple[Measurement, ...]
    skipped: dict[str, str]


def compress_to(
    model: nn.Module,
    target: Target | Mapping[str, float],
    data: DataBundle,
    *,
    teacher: nn.Module | None = None,
    depths: Sequence[int | None] | None = None,
    prunings: Sequence[Pruning] | None = None,
    schemes: Sequence[str | None] = (None, "w8a8", "w4a16"),
    embeddings: str | None = "w8a16",
    method: str = "rtn",
    group_size: int | None = 64,
    epochs: float = 0.5,
    max_candidates: int = 12,
    max_seconds: float | None = None,
    latency_rounds: int = 50,
    seed: int = 0,
    output_dir: str | Path | None = None,
    loss: Mapping[str, Any] | None = None,
    **training: Any,
) -> Compressed:
    """The best compressed copy of ``model`` within ``target``, found by measuring depth x pruning x bits.

    Every candidate is built without training first, for the bytes and the time of a call, which training does not
    change. Those within the limits on these are made in earnest, the least changed first: layers taken out (`derive`),
    pruned, trained to follow the teacher for ``epochs``, once for all schemes, quantized, saved and evaluated on the
    held-out split. Among those within every limit the one of the highest quality is returned, or, where quality is the
    only limit, the smallest. ``model`` is not changed.

    Args:
        target: any of size_mb, ratio, latency_ms, max_metric_drop; see `Target`.
        teacher: what training follows; the model itself by default.
        depths, prunings, schemes: what is combined. depths: numbers of layers, None for all; prunings: (method,
            sparsity), None for none; schemes: None for none. By default what fits the kind of model.
        embeddings, method, group_size: as for `quantize`, in candidates with a scheme; the method chooses 4-bit codes.
        epochs, training: of `distill`, such as lr, batch_size, temperature; 0 epochs trains nothing. loss: its options
            whose names are taken here, {"method": ...}.
        max_candidates, max_seconds: how many are evaluated, and for how long new ones are begun.
        latency_rounds: timed calls of each. seed: of everything random.
        output_dir: keeps every result; a search that was interrupted goes on in the same folder. Holds report.html with
            the measured Pareto front, and the candidates' models.

    Raises ValueError for a target or options out of range, DataError as `evaluate` does, ArtifactError for a folder
    that holds another search. A target that nothing meets is no error: see `Compressed.sentence`.

    >>> found = compress_to(model, {"ratio": 6, "max_metric_drop": 0.01}, data, epochs=0.5)  # doctest: +SKIP
    >>> found.met, found.sentence  # doctest: +SKIP
    """
    from tqdm import tqdm

    goal = Target.of(target)
    if isinstance(max_candidates, bool) or not isinstance(max_candidates, int) or max_candidates < 1:
        raise ValueError(f"max_candidates is how many are evaluated, at least 1, got {max_candidates!r}")
    if not epochs >= 0:
        raise ValueError(f"epochs of training a candidate is a number from 0 on, got {epochs!r}")
    candidates = space(model, depths, prunings, schemes)
    quantization = {"embeddings": embeddings, "method": method, "group_size": group_size}
    began = time.perf_counter()
    with _folder(output_dir) as folder:
        options = {"epochs": epochs, **training, **(loss or {})}
        search = Search(model, teacher or model, data, folder, quantization, options, seed)
        search.bind()
        base = search.measure(Candidate(), rounds=latency_rounds)
        skipped: dict[str, str] = {}
        logger.info("compress_to: %s; %d candidates to look at before any is trained", _told(base), len(candidates))
        shown = tqdm(candidates, desc="survey", unit="candidate", disable=None)
        surveyed = {c: found for c in shown if (found := _surveyed(search, c, skipped)) is not None}
        if not surveyed:
            raise ValueError(f"no candidate can be made of this model: {next(iter(skipped.values()))}")
        measured: list[Measurement] = []
        for candidate in _ordered(surveyed, goal, _point(base), skipped):
            if len(measured) >= max_candidates:
                skipped[candidate.name] = f"max_candidates={max_candidates} were evaluated"
            elif measured and max_seconds is not None and time.perf_counter() - began > max_seconds:
                skipped[candidate.name] = f"max_seconds={max_seconds:g} had passed"
            else:
                logger.info(
                    "compress_to: making %d of at most %d: %s", len(measured) + 1, max_candidates, candidate.name
                )
                report = search.measure(candidate, rounds=latency_rounds)
                logger.info("compress_to: %s", _told(report))
                measured.append(Measurement(candidate, report, goal.excess(_point(report), _point(base))))
        return _conclude(search, goal, base, measured, skipped, output_dir is not None)


def _told(report: Report) -> str:
    """A measured model in a line of the log."""
    size, time_ms = f"{report.size_bytes / 1e6:.2f} MB", f"P95 {report.latency_p95_ms:.2f} ms"
    return f"{report.name}: {report.headline()}, {size}, {time_ms}"


def _point(report: Report) -> Point:
    return Point(report.quality(), report.size_bytes, report.latency_p95_ms)


def _surveyed(search: Search, candidate: Candidate, skipped: dict[str, str]) -> Point | None:
    try:
        return search.survey(candidate)
    except ValueError as error:
        skipped[candidate.name] = f"cannot be made: {error}"
        return None


def _ordered(
    surveyed: Mapping[Candidate, Point], goal: Target, base: Point, skipped: dict[str, str]
) -> Iterator[Candidate]:
    """Candidates within the limits on size and time, what needs no training first, then the least changed first; where
    quality is the only limit, the smallest first. The closest one where none is within."""
    beyond = {candidate: goal.excess(point, base) for candidate, point in surveyed.items()}
    slack = {"latency_ms": LATENCY_SLACK}
    within = [c for c, found in beyond.items() if all(value <= slack.get(k, 0.0) for k, value in found.items())]
    if not within:
        within = [min(beyond, key=lambda c: max(beyond[c].values()))]
    for candidate in surveyed:
        if candidate not in within:
            names = [name for name, value in beyond[candidate].items() if value > slack.get(name, 0.0)]
            skipped[candidate.name] = f"beyond the target before training: {', '.join(names)}"
    if set(goal.limits()) == {"max_metric_drop"}:
        return iter(sorted(within, key=lambda c: (c.trained, surveyed[c].size_bytes)))
    largest: dict[Candidate, int] = {}
    for candidate in within:
        size = surveyed[candidate].size_bytes
        largest[candidate.structure] = max(size, largest.get(candidate.structure, 0))
    return iter(sorted(within, key=lambda c: (c.trained, -largest[c.structure], c.key, -surveyed[c].size_bytes)))


def _conclude(
    search: Search, goal: Target, base: Report, measured: list[Measurement], skipped: dict[str, str], keep: bool
) -> Compressed:
    within = [one for one in measured if one.met]
    if within and set(goal.limits()) == {"max_metric_drop"}:
        best = min(within, key=lambda one: (one.report.size_bytes, -one.report.quality()))
    elif within:
        best = max(within, key=lambda one: (one.report.quality(), -one.report.size_bytes))
    else:
        best = min(measured, key=lambda one: max(one.excess.values()))
    sentence = _sentence(goal, best, base, len(measured))
    logger.log(logging.INFO if within else logging.WARNING, "compress_to: %s", sentence)
    others = [one.report for one in measured if one is not best]
    comparison = compare([base, *others, best.report])
    fronts = {comparison.reports[index].name for index in comparison.front}
    model = search.load(best.candidate)
    add_record(
        model,
        stage="compress_to",
        method="search",
        parameters={"target": goal.limits(), **search.settings},
        outcome=sentence,
        candidates=[_facts(report, report.name in fronts) for report in comparison.reports],
        skipped=skipped,
    )
    if keep:
        stages = {one.report.name: StageRecord(details=search.record(one.candidate)) for one in measured}
        title = "compress_to " + ", ".join(f"{name} {value:g}" for name, value in goal.limits().items())
        write_report(search.folder, comparison, search.data, title=title, stages=stages, remarks=[f"{sentence}."])
    return Compressed(
        model=model,
        met=bool(within),
        sentence=sentence,
        best=best,
        base=base,
        measured=tuple(measured),
        front=tuple(one for one in measured if one.report.name in fronts),
        skipped=skipped,
    )


def _facts(report: Report, front: bool) -> dict[str, Any]:
    """What the record of the model says of a candidate."""
    return {
        "name": report.name,
        "quality": report.quality(),
        "size_bytes": report.size_bytes,
        "latency_p50_ms": report.latency_p50_ms,
        "latency_p95_ms": report.latency_p95_ms,
        "front": front,
    }


def _sentence(goal: Target, best: Measurement, base: Report, count: int) -> str:
    limits = goal.limits()
    reached = goal.reached(_point(best.report), _point(base))
    told = {name: f"{name} {limits[name]:g} (reached: {reached[name]:.4g})" for name in limits}
    met = " and ".join(told[name] for name in limits if best.excess[name] <= 0)
    if best.met:
        return f"{best.report.name} meets {met}, the best of {count} measured candidates"
    missed = " and ".join(told[name] for name in limits if best.excess[name] > 0)
    but = f", but meets {met}" if met else ""
    closest = f"{best.report.name} comes closest, misses {missed}{but}"
    return f"none of {count} measured candidates meets the target: {closest}"


@contextlib.contextmanager
def _folder(output_dir: str | Path | None) -> Iterator[Path]:
    if output_dir is not None:
        yield Path(output_dir)
        return
    with tempfile.TemporaryDirectory(prefix="pykd-compress-") as folder:
        yield Path(folder)
