"""report.html: what the template shows, computed here; every string is escaped by the template engine."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pykd.evaluation import plots
from pykd.evaluation.comparison import SPEED_GAIN, Comparison, Ratios
from pykd.evaluation.examples import flips, worst_confusions, wrong_examples
from pykd.evaluation.footprint import theoretical_bytes
from pykd.evaluation.report import Report
from pykd.evaluation.worst import worst_examples

if TYPE_CHECKING:
    from pykd.evaluation.report_files import Story

TEMPLATES = Path(__file__).parent / "templates"
#: Parts of a stage's record that have a place of their own on the page.
SHOWN_APART = {"curve", "curves", "stage", "method", "validations", "outcome", "candidates", "units"}
#: From here on the per-class table is longer than the confusion matrix is high.
MANY_CLASSES = 15


@dataclass(frozen=True)
class Card:
    """One headline number: what it is, the number, what stands behind it, and whether it is good, plain or bad."""

    title: str
    value: str
    note: str
    tone: str


def render(story: Story) -> str:
    """The whole page as one string: style, plots and pictures inside, nothing fetched, no script."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template("report.html.j2").render(**context(story)) + "\n"


def context(story: Story) -> dict[str, Any]:
    """Everything the template uses."""
    comparison = story.comparison
    final, baseline = comparison.reports[-1], comparison.reports[comparison.baseline]
    same_test = final is not baseline and final.labels == baseline.labels
    curves = _curves(story)
    validated = {n: r.details["validations"] for n, r in story.stages.items() if r.details.get("validations")}
    head, *rows = comparison.cells()
    return {
        "story": story,
        "style": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "final": final,
        "baseline": baseline,
        "cards": cards(final, baseline, comparison.ratios[-1]),
        "head": head,
        "rows": rows,
        "remarks": [*comparison.remarks, *story.remarks],
        "bars": plots.stage_bars(comparison.reports, comparison.baseline),
        "curves": plots.training_curves(curves) if curves else "",
        "confusion": plots.confusion_heatmap(final) if final.confusion else "",
        "confusions": worst_confusions(final),
        "per_class": list(zip(final.per_class, baseline.per_class, strict=True)) if same_test else [],
        "flips": flips(final, baseline) if same_test else None,
        "examples": wrong_examples(final, baseline, story.data) if final.confusion else [],
        "worst": worst_examples(final, baseline, story.data) if final.task != "classification" else [],
        "searches": {n: _search(r.details) for n, r in story.stages.items() if r.details.get("candidates")},
        "watched": {n: r.details for n, r in story.stages.items() if r.details.get("validations")},
        "validated": plots.validation_curves(validated) if validated else "",
        "stages": [
            (name, record.seconds, list(flatten({k: v for k, v in record.details.items() if k not in SHOWN_APART})))
            for name, record in story.stages.items()
        ],
        "methods": {name: _method(record.details) for name, record in story.stages.items()},
        "tables": story.tables,
        "behaviours": comparison.behaviour_cells(),
        "agreement": found.agreement_by_confidence if (found := comparison.behaviours[-1]) is not None else (),
        "pareto": pareto(comparison),
        "footprint": [(report.name, list(flatten(footprint(report)))) for report in comparison.reports],
        "speeds": speeds(comparison.reports),
        "routing": final.routing,
        "scores": plots.score_histogram(final.routing) if final.routing is not None else "",
        "many_classes": len(final.class_names) > MANY_CLASSES,
        "settings": list(flatten(story.settings)),
        "data": list(flatten({k: v for k, v in story.data.describe().items() if k != "class_names"})),
        "machine": list(flatten(story.environment)),
    }


def _curves(story: Story) -> dict[str, Any]:
    """Every training's curve by its name: of a stage, or of one of the trainings that a stage was made of."""
    found = {name: record.details.get("curve") for name, record in story.stages.items()}
    for record in story.stages.values():
        found |= record.details.get("curves", {})
    return {name: records for name, records in found.items() if records and len(records) > 1}


def cards(final: Report, baseline: Report, ratio: Ratios) -> list[Card]:
    """The result in five numbers, relative to the baseline."""
    tests = len(final.labels)
    more = ratio.more_errors
    kept = "the same number of errors" if more == 0 else f"{abs(more)} {'more' if more > 0 else 'fewer'} errors"
    sizes = f"{final.size_bytes / 1e6:,.2f} MB, was {baseline.size_bytes / 1e6:,.2f}"
    speed = f"{final.latency_p50_ms:.2f} ms at batch 1, was {baseline.latency_p50_ms:.2f}"
    weights = f"{_millions(final.nonzero_parameters)} not zero, was {_millions(baseline.nonzero_parameters)}"
    return [
        Card("Smaller on disk", f"{ratio.smaller:.1f}×", sizes, _tone(ratio.smaller, 1.01)),
        Card("Faster", f"{ratio.faster:.2f}×", speed, _tone(ratio.faster, SPEED_GAIN)),
        Card("Accuracy", f"{100 * final.accuracy:.1f} %", f"{kept} on {tests:,}", _tone(1.0 - more / tests, 1.0)),
        Card("Fewer weights", f"{ratio.fewer_parameters:.1f}×", weights, _tone(ratio.fewer_parameters, 1.01)),
        Card(
            "Agreement",
            "–" if ratio.agreement is None else f"{100 * ratio.agreement:.1f} %",
            f"same answer as {baseline.name}",
            "plain",
        ),
    ]


def pareto(comparison: Comparison) -> str:
    """Quality against size and latency of every model."""
    points = [
        {"name": r.name, "quality": r.quality(), "megabytes": r.size_bytes / 1e6, "ms": r.latency_p50_ms}
        for r in comparison.reports
    ]
    kind = "accuracy" if comparison.reports[0].task == "classification" else "quality score"
    return plots.pareto(points, comparison.front, kind)


def _search(details: Mapping[str, Any]) -> dict[str, Any]:
    """What a search says of itself, and its candidates as a plot."""
    found = details["candidates"]
    points = [
        {"name": c["name"], "quality": c["quality"], "megabytes": c["size_bytes"] / 1e6, "ms": c["latency_p50_ms"]}
        for c in found
    ]
    front = [index for index, candidate in enumerate(found) if candidate["front"]]
    return {"outcome": details["outcome"], "plot": plots.pareto(points, front, "quality")}


def footprint(report: Report) -> dict[str, Any]:
    """What a model costs, as facts: bytes beside those its weights would take at each width, memory, operations."""
    widths = {f"its weights in {name}": _megabytes(size) for name, size in theoretical_bytes(report.parameters).items()}
    parts = {name: f"{count:,} parameters" for name, count in report.components.items()}
    memory = report.peak_memory_bytes
    return {
        "on disk": _megabytes(report.size_bytes),
        **widths,
        "peak memory at batch 1": _megabytes(memory) if memory is not None else None,
        "operations at batch 1": f"{report.flops / 1e9:,.3f} GFLOP",
        **parts,
    }


def speeds(reports: Sequence[Report]) -> list[list[str]]:
    """Further timed calls as a table: a row a batch size and length, a column a model; empty when there are none."""
    first = reports[0].speeds
    if not first or any(len(report.speeds) != len(first) for report in reports):
        return []
    rows = [["rows x tokens" if first[0].length else "rows", *(report.name for report in reports)]]
    for number, speed in enumerate(first):
        timed = [report.speeds[number] for report in reports]
        shown = [f"{t.p50_ms:.2f} / {t.p95_ms:.2f} / {t.p99_ms:.2f} ms, {t.per_s:,.0f}/s" for t in timed]
        rows.append([f"{speed.batch_size} x {speed.length}" if speed.length else str(speed.batch_size), *shown])
    return rows


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted key, value) pairs, lists of plain values on one line.

    >>> list(flatten({"a": {"b": 1}, "c": [{"d": None}, {"d": True}], "e": [1, 2]}))
    [('a.b', '1'), ('c[0].d', '-'), ('c[1].d', 'yes'), ('e', '1, 2')]
    """
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Mapping) for v in value):
            yield from flatten({f"{name}[{index}]": entry for index, entry in enumerate(value)})
        else:
            yield name, plain(value)


def plain(value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(entry) for entry in value) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def data_uri(content: str | bytes) -> str:
    """An SVG text or PNG bytes as the source of an image."""
    kind, raw = ("svg+xml", content.encode()) if isinstance(content, str) else ("png", content)
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode('ascii')}"


def _tone(value: float, gain: float) -> str:
    return "good" if value >= gain else "bad" if value < 1 else "plain"


def _method(details: Mapping[str, Any]) -> str:
    return ", ".join(str(details[key]) for key in ("stage", "method") if key in details)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 1e6 else f"{count:,}"
