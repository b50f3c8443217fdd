"""The verb `compare`: reports side by side, as ratios to a baseline, and in words where a stage brought nothing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pykd.evaluation.behaviour import Behaviour, behaviour
from pykd.evaluation.report import HEADLINES, Report
from pykd.evaluation.tables import markdown_table, table

#: Below these a change in size or speed is called no gain: a hundredth of the file, and what repeats do not tell apart.
SIZE_GAIN = 1.01
SPEED_GAIN = 1.03


@dataclass(frozen=True)
class Ratios:
    """One model beside another. smaller, faster, throughput, fewer_parameters: times; above 1 is better.

    paired: ``faster`` comes from alternating rounds; otherwise from the P50 of separate measurements, which is rougher.
    accuracy_change, f1_change: differences, -1..1. agreement: share of equal predictions, None for unequal test sets.
    """

    smaller: float
    faster: float
    paired: bool
    throughput: float
    fewer_parameters: float
    accuracy_change: float
    f1_change: float
    more_errors: int
    agreement: float | None


@dataclass(frozen=True)
class Comparison:
    """Reports in the order of their stages, their ``ratios`` to the one at index ``baseline``, and remarks in words.

    behaviours: each report's answers against the baseline's, example by example; None for the baseline itself and for
    one measured on other examples. front: indices of the reports that no other beats in quality, size and speed.
    """

    reports: tuple[Report, ...]
    baseline: int
    ratios: tuple[Ratios, ...]
    remarks: tuple[str, ...]
    behaviours: tuple[Behaviour | None, ...]
    front: tuple[int, ...]

    def text(self, *, width: int | None = None) -> str:
        """The table in aligned columns, then the remarks: what the command line prints.

        width: characters of a line; a wider table continues below itself, with the names repeated. None: no limit.
        """
        return "\n\n".join([table(self.cells(), width=width), *(["\n".join(self.remarks)] if self.remarks else [])])

    def behaviour_text(self, *, width: int | None = None) -> str:
        """The answers beside the baseline's in aligned columns, as :meth:`text`; empty for one model."""
        cells = self.behaviour_cells()
        return table(cells, width=width) if cells else ""

    def markdown(self) -> str:
        """The table and the remarks in Markdown."""
        tables = [markdown_table(cells) for cells in (self.cells(), self.behaviour_cells()) if cells]
        return "\n\n".join([*tables, "\n".join(f"- {remark}" for remark in self.remarks)]).strip() + "\n"

    def cells(self) -> list[list[str]]:
        """The table as strings: a row of headings, then one row a model."""
        columns = columns_for(self.reports[0])
        rows = [
            [show(report, ratio) for _, show in columns]
            for report, ratio in zip(self.reports, self.ratios, strict=True)
        ]
        return [[heading for heading, _ in columns], *rows]

    def behaviour_cells(self) -> list[list[str]]:
        """The answers beside the baseline's as strings: headings, then one row a model; empty for one model."""
        rows = [
            [found.name, *_behaviour_row(found, beside)]
            for found, beside in zip(self.reports, self.behaviours, strict=True)
            if beside is not None
        ]
        return [BEHAVIOUR_HEADINGS, *rows] if rows else []

    def to_dict(self) -> dict[str, Any]:
        """Baseline, ratios and remarks as plain values."""
        ratios = {report.name: asdict(ratio) for report, ratio in zip(self.reports, self.ratios, strict=True)}
        return {
            "baseline": self.reports[self.baseline].name,
            "ratios": ratios,
            "remarks": list(self.remarks),
            "behaviours": {
                report.name: asdict(found)
                for report, found in zip(self.reports, self.behaviours, strict=True)
                if found is not None
            },
            "front": [self.reports[index].name for index in self.front],
        }


def compare(reports: Sequence[Report], baseline: int = 0, *, chained: bool = True) -> Comparison:
    """Compare models, in the order in which one was made from the other, with one of them, usually the teacher.

    chained: every model after the first is also compared with the one before it: where that step made it neither
    smaller (by 1 %) nor faster (by 3 %), or only one of both, a remark says so. Speed ratios come from
    ``Report.speedup_over`` where the pair was timed in alternating rounds, else from the P50 latencies.

    Raises ValueError for no reports, for repeated names and for a baseline that is not there.
    """
    names = [report.name for report in reports]
    if not reports or len(set(names)) != len(names):
        raise ValueError(f"compare needs reports with distinct names, got {', '.join(names) or 'none'}")
    if not -len(reports) <= baseline < len(reports):
        raise ValueError(f"baseline {baseline} is out of range: there are {len(reports)} reports, counted from 0")
    first = reports[baseline]
    remarks = [remark(now, before) for before, now in itertools.pairwise(reports)] if chained else []
    return Comparison(
        reports=tuple(reports),
        baseline=baseline % len(reports),
        ratios=tuple(ratios(report, first) for report in reports),
        remarks=tuple(sentence for sentence in remarks if sentence),
        behaviours=tuple(
            None if report is first or report.labels != first.labels else behaviour(report, first) for report in reports
        ),
        front=pareto_front([(report.quality(), -report.size_bytes, -report.latency_p50_ms) for report in reports]),
    )


def pareto_front(points: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Indices of the points that no other is at least as high as in every coordinate and higher in one.

    >>> pareto_front([(1, 1), (2, 0), (0, 0), (2, 0)])
    (0, 1, 3)
    """

    def beaten(point: Sequence[float]) -> bool:
        return any(
            all(a >= b for a, b in zip(other, point, strict=True)) and tuple(other) != tuple(point) for other in points
        )

    return tuple(index for index, point in enumerate(points) if not beaten(point))


def ratios(now: Report, before: Report) -> Ratios:
    """One report relative to another."""
    faster, paired = _speed(now, before)
    return Ratios(
        smaller=before.size_bytes / now.size_bytes,
        faster=faster,
        paired=paired,
        throughput=now.throughput_per_s / before.throughput_per_s,
        fewer_parameters=before.nonzero_parameters / max(1, now.nonzero_parameters),
        accuracy_change=now.accuracy - before.accuracy,
        f1_change=now.f1 - before.f1,
        more_errors=now.errors - before.errors,
        agreement=now.agreement(before) if now.labels == before.labels else None,
    )


def remark(now: Report, before: Report) -> str | None:
    """What the step from ``before`` to ``now`` did not gain in size or speed, as a sentence; None if it gained both."""
    step = ratios(now, before)
    smaller, faster = step.smaller >= SIZE_GAIN, step.faster >= SPEED_GAIN
    size = f"{megabytes(before)} -> {megabytes(now)} MB"
    speed = f"{step.faster:.2f}x the speed"
    quality = f"accuracy {100 * step.accuracy_change:+.2f} points" if now.task == "classification" else now.headline()
    if smaller and faster:
        return None
    if smaller:
        return (
            f"no gain in speed here: {now.name} is smaller than {before.name} ({size}), but runs at {speed}; {quality}."
        )
    if faster:
        return (
            f"no gain in size here: {now.name} runs at {speed} of {before.name}, but its file is not smaller ({size})."
        )
    return f"no gain here: {now.name} is neither smaller ({size}) nor faster ({speed}) than {before.name}; {quality}."


def megabytes(report: Report) -> str:
    """Bytes on disk in MB (10^6 bytes) as tables show them."""
    return f"{report.size_bytes / 1e6:,.2f}"


def _speed(now: Report, before: Report) -> tuple[float, bool]:
    if now.name == before.name:
        return 1.0, True
    if before.name in now.speedup_over:
        return now.speedup_over[before.name], True
    return before.latency_p50_ms / now.latency_p50_ms, False


def _count(number: int) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 1e6 else f"{number:,}"


#: Heading -> how a cell is written.
COLUMNS: tuple[tuple[str, Callable[[Report, Ratios], str]], ...] = (
    ("model", lambda report, _: report.name),
    ("accuracy", lambda report, _: f"{100 * report.accuracy:.2f} %"),
    ("precision", lambda report, _: f"{report.precision:.4f}"),
    ("recall", lambda report, _: f"{report.recall:.4f}"),
    ("F1", lambda report, _: f"{report.f1:.4f}"),
    ("errors", lambda report, _: f"{report.errors:,}"),
    ("params", lambda report, _: _count(report.parameters)),
    ("non-zero", lambda report, _: _count(report.nonzero_parameters)),
    ("MB", lambda report, _: megabytes(report)),
    ("smaller", lambda _, ratio: f"{ratio.smaller:.2f}x"),
    ("P50 ms", lambda report, _: f"{report.latency_p50_ms:.2f}"),
    ("P95 ms", lambda report, _: f"{report.latency_p95_ms:.2f}"),
    ("P99 ms", lambda report, _: f"{report.latency_p99_ms:.2f}"),
    ("faster", lambda _, ratio: f"{ratio.faster:.2f}x"),
    ("items/s", lambda report, _: f"{report.throughput_per_s:,.0f}"),
    ("agreement", lambda _, ratio: "-" if ratio.agreement is None else f"{100 * ratio.agreement:.1f} %"),
)


#: What is said of a model's answers beside the baseline's.
BEHAVIOUR_HEADINGS = [
    "model",
    "95 % interval",
    "flips",
    "lost / won",
    "difference",
    "p",
    "calibration error",
    "worst class",
]


def _behaviour_row(report: Report, beside: Behaviour) -> list[str]:
    first = HEADLINES[report.task][0][0] if report.task in HEADLINES else "accuracy"
    ends = report.intervals.get(first)
    test = beside.test
    drop = f"{beside.worst_class} -{100 * beside.worst_class_drop:.1f} points" if beside.worst_class else "none"
    return [
        "-" if ends is None else f"{first} {ends[0]:.4g} to {ends[1]:.4g}",
        f"{100 * beside.flip_rate:.1f} %",
        f"{beside.lost} / {beside.won}",
        f"{test.difference:+.4g} ({test.low:+.4g} to {test.high:+.4g})",
        f"{test.p_value:.2g}" + ("" if test.significant else ": may be chance"),
        f"{beside.calibration_error:.3f}, was {beside.baseline_calibration_error:.3f}",
        drop if report.per_class else "-",
    ]


def columns_for(report: Report) -> Sequence[tuple[str, Callable[[Report, Ratios], str]]]:
    """The columns of a table of such reports: other tasks than classification show their own metrics and the score."""
    if report.task == "classification":
        return COLUMNS
    named = [(name, functools.partial(_metric, name)) for name in report.metrics]
    score = ("score", lambda found, _: f"{found.score:.4f}")
    return (COLUMNS[0], *named, score, *COLUMNS[6:])


def _metric(name: str, report: Report, ratio: Ratios) -> str:
    return f"{report.metrics[name]:.4f}" if name in report.metrics else "-"
