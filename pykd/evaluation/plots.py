"""Plots of a report as SVG text (matplotlib, no display, no global state)."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pykd.evaluation.report import Report
from pykd.evaluation.routing import Routing

INK, MUTED, GRID = "#1f2733", "#667085", "#e4e8ee"
BASELINE, STAGE, FINAL = "#98a2b3", "#5b8def", "#1d4ed8"
LINES = ("#1d4ed8", "#d97706", "#0f9d6c", "#b42374", "#6d4bd1")
#: What every training record has; whatever else is in it is a loss to draw.
NOT_A_LOSS = {"step", "epoch", "lr", "grad_norm", "skipped"}
#: Panels of curves in a row.
PANELS = 4
#: A confusion matrix with more classes has no room for its numbers.
NUMBERED_CLASSES = 20


def stage_bars(reports: Sequence[Report], baseline: int) -> str:
    """Four rows of bars over the stages: accuracy, size, latency at batch 1 with its tail, throughput."""
    names = [report.name for report in reports]
    figure, axes = _figure(11.0, 0.75 + 0.36 * len(names), columns=4)
    colors = _colors(len(reports), baseline)
    accuracy = [100 * report.accuracy for report in reports]
    _bars(axes[0], names, accuracy, colors, "accuracy, %", "{:.1f}", floor=max(0.0, min(accuracy) - 5))
    _bars(axes[1], None, [report.size_bytes / 1e6 for report in reports], colors, "size on disk, MB", "{:,.2f}")
    _latency_bars(axes[2], reports, colors)
    rates = [report.throughput_per_s for report in reports]
    _bars(axes[3], None, rates, colors, f"examples a second, batch {reports[0].throughput_batch}", "{:,.0f}")
    return _svg(figure)


def training_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One panel per training: every loss over the steps, faint as it was, strong smoothed."""
    figure, axes = _panels(len(curves))
    for axis, (name, records) in zip(axes, curves.items(), strict=True):
        steps = [record["step"] for record in records]
        for color, key in zip(LINES, [key for key in records[0] if key not in NOT_A_LOSS], strict=False):
            values = [record[key] for record in records]
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            axis.plot(steps, smoothed(values), color=color, linewidth=1.8, label=key)
        axis.set_title(name, loc="left", fontsize=10, color=INK, fontweight="bold")
        axis.set_xlabel("step", fontsize=8, color=MUTED)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", color=GRID)
        axis.legend(frameon=False, fontsize=8, labelcolor=MUTED)
    return _svg(figure)


def validation_curves(validations: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One panel per training: the guarded metric at every validation; a ring is a new best, a cross a rollback."""
    figure, axes = _panels(len(validations))
    for axis, (name, entries) in zip(axes, validations.items(), strict=True):
        known = [entry for entry in entries if entry["value"] is not None]
        axis.plot([e["step"] for e in known], [e["value"] for e in known], ".-", color=LINES[0], linewidth=1.2)
        for marker, color, actions in (("o", LINES[2], {"best"}), ("x", LINES[3], {"roll back", "stop"})):
            marked = [entry for entry in known if entry["action"] in actions]
            style = {"facecolors": "none"} if marker == "o" else {}
            places = [e["step"] for e in marked], [e["value"] for e in marked]
            axis.scatter(*places, marker=marker, edgecolors=color if style else None, color=None if style else color,
                         s=55, zorder=3, **style)  # fmt: skip
        axis.set_title(f"{name}: {entries[0]['metric']}", loc="left", fontsize=10, color=INK, fontweight="bold")
        axis.set_xlabel("step", fontsize=8, color=MUTED)
        axis.grid(axis="y", color=GRID)
    return _svg(figure)


def pareto(points: Sequence[Mapping[str, Any]], front: Sequence[int], quality: str) -> str:
    """Quality against size and against latency, one dot a model; those of the front are filled and joined.

    points: of each model "name", "quality", "megabytes", "ms"; front: indices; quality: what the vertical axis is.
    """
    figure, axes = _figure(11.0, 3.4, columns=2)
    for axis, key, title in zip(axes, ("megabytes", "ms"), ("MB on disk", "ms a call, batch 1"), strict=True):
        joined = sorted((points[index] for index in front), key=lambda point: point[key])
        axis.plot([p[key] for p in joined], [p["quality"] for p in joined], color=GRID, linewidth=1.2, zorder=1)
        for index, point in enumerate(points):
            face = FINAL if index in front else "#ffffff"
            axis.scatter([point[key]], [point["quality"]], s=42, facecolors=face, edgecolors=FINAL, zorder=2)
            place = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8, "color": INK}
            axis.annotate(point["name"], (point[key], point["quality"]), **place)
        axis.set_xscale("log")
        axis.margins(x=0.2, y=0.15)
        axis.set_title(f"{quality} against {title}", loc="left", fontsize=9, color=INK)
        axis.grid(color=GRID)
    return _svg(figure)


def confusion_heatmap(report: Report) -> str:
    """Rows are labels, columns predictions; the color is the share of the label's examples, mistakes stand out."""
    from matplotlib.colors import LinearSegmentedColormap

    classes = len(report.class_names)
    numbered = classes <= NUMBERED_CLASSES
    side = 1.6 + classes * (0.34 if numbered else 0.13)
    figure, (axis,) = _figure(side + 0.6, side, columns=1)
    shares = [[count / max(1, sum(row)) for count in row] for row in report.confusion]
    right = LinearSegmentedColormap.from_list("right", ["#ffffff", "#bcd2fb", FINAL])
    wrong = LinearSegmentedColormap.from_list("wrong", ["#ffffff", "#fbb6a4", "#c2310d"])
    colors = [
        [right(share) if row == column else wrong(min(1.0, 3 * share)) for column, share in enumerate(line)]
        for row, line in enumerate(shares)
    ]
    axis.imshow(colors, aspect="equal")
    axis.set_xticks(
        range(classes), report.class_names, fontsize=8 if numbered else 6, rotation=90 if classes > 10 else 0
    )
    axis.set_yticks(range(classes), report.class_names, fontsize=8 if numbered else 6)
    axis.set_xlabel("predicted", fontsize=9, color=MUTED)
    axis.set_ylabel("label", fontsize=9, color=MUTED)
    for row, line in enumerate(report.confusion if numbered else ()):
        for column, count in enumerate(line):
            if count:
                strong = shares[row][column] > (0.6 if row == column else 0.2)
                color = "#ffffff" if strong else INK
                axis.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    return _svg(figure)


def score_histogram(routing: Routing) -> str:
    """How many rows have which score of difficulty, by the branch that they took, and the threshold between."""
    figure, (axis,) = _figure(7.0, 2.7, columns=1)
    widths = [high - low for low, high in itertools.pairwise(routing.edges)]
    style = {"align": "edge", "linewidth": 0.4, "edgecolor": "#ffffff"}
    axis.bar(routing.edges[:-1], routing.fast_counts, widths, color=STAGE, label="fast branch", **style)
    axis.bar(
        routing.edges[:-1], routing.deep_counts, widths, bottom=routing.fast_counts, color=LINES[1],
        label="deep branch", **style,
    )  # fmt: skip
    axis.axvline(routing.threshold, color=INK, linewidth=1)
    axis.set_xlabel("score; the line is the threshold", fontsize=8, color=MUTED)
    axis.set_ylabel("rows", fontsize=8, color=MUTED)
    axis.legend(frameon=False, fontsize=8, labelcolor=MUTED)
    return _svg(figure)


def smoothed(values: Sequence[float], share: float = 0.1) -> list[float]:
    """Centered moving average over a ``share`` of the points.

    >>> smoothed([0.0, 3.0, 0.0, 3.0, 0.0], share=0.6)
    [1.5, 1.0, 2.0, 1.0, 1.5]
    """
    half = int(share * len(values)) // 2
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _colors(count: int, baseline: int) -> list[str]:
    return [BASELINE if i == baseline else FINAL if i == count - 1 else STAGE for i in range(count)]


def _bars(
    axis: Any,
    names: Sequence[str] | None,
    values: Sequence[float],
    colors: Sequence[str],
    title: str,
    form: str,
    *,
    floor: float = 0.0,
) -> None:
    rows = range(len(values))
    axis.barh(rows, [value - floor for value in values], left=floor, color=colors, height=0.62)
    for row, value in zip(rows, values, strict=True):
        axis.annotate(
            form.format(value),
            (value, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axis.set_xlim(floor, floor + 1.28 * max(max(values) - floor, 1e-9))
    axis.set_yticks(rows, names if names is not None else [""] * len(values), fontsize=9)
    axis.invert_yaxis()
    axis.set_title(title + (f" (from {floor:.0f})" if floor else ""), loc="left", fontsize=9, color=INK)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)


def _latency_bars(axis: Any, reports: Sequence[Report], colors: Sequence[str]) -> None:
    p50 = [report.latency_p50_ms for report in reports]
    p99 = [report.latency_p99_ms for report in reports]
    _bars(axis, None, p50, colors, "ms a call, batch 1: P50, line to P99", "{:.2f}")
    limit = min(max(p99), 2.5 * max(p50))
    axis.hlines(range(len(reports)), p50, [min(value, limit) for value in p99], color=INK, linewidth=0.9, zorder=3)
    for row, label in enumerate(axis.texts):
        label.xy = (min(p99[row], limit), row)
    axis.set_xlim(0, 1.28 * limit)


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure of so many small panels, PANELS of them beside each other at most."""
    rows = -(-count // PANELS)
    figure, axes = _figure(11.0, 2.7 * rows, columns=min(count, PANELS), rows=rows)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def _figure(width: float, height: float, *, columns: int, rows: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GRID)
        axis.tick_params(length=0, labelsize=8, labelcolor=MUTED)
        axis.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names of classes and models may hold dollar signs
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pykd", "svg.fonttype": "path", "text.parse_math": False}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
