"""A finished run as files: report.json with everything, report.html to look at, report.md to paste."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pykd.data.bundle import DataBundle
from pykd.evaluation.comparison import Comparison
from pykd.evaluation.environment import environment
from pykd.evaluation.page import render
from pykd.evaluation.report import Report
from pykd.evaluation.tables import markdown_table
from pykd.io.files import atomic_write

FORMAT_VERSION = 1


@dataclass(frozen=True)
class StageRecord:
    """How one model of a comparison was made: seconds it took, and what the verb left in ``model.pykd_report``.

    A list of dicts under ``details["curve"]`` (with ``step`` and losses) becomes a training curve.
    """

    seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Story:
    """Everything the three files tell."""

    title: str
    description: str
    created: str
    comparison: Comparison
    data: DataBundle
    stages: Mapping[str, StageRecord]
    settings: Mapping[str, Any]
    remarks: Sequence[str]
    tables: Mapping[str, Sequence[Sequence[str]]]
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "description": self.description,
            "created": self.created,
            "environment": dict(self.environment),
            "data": self.data.describe(),
            "settings": dict(self.settings),
            "comparison": self.comparison.to_dict(),
            "remarks": list(self.remarks),
            "tables": {title: [list(row) for row in rows] for title, rows in self.tables.items()},
            "stages": {name: asdict(record) for name, record in self.stages.items()},
            "reports": [report.to_dict() for report in self.comparison.reports],
        }


def write_report(
    directory: str | os.PathLike[str],
    comparison: Comparison,
    data: DataBundle,
    *,
    title: str,
    description: str = "",
    stages: Mapping[str, StageRecord] | None = None,
    settings: Mapping[str, Any] | None = None,
    remarks: Sequence[str] = (),
    tables: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> Path:
    """Write report.json, report.html (one file that opens offline) and report.md into ``directory``; the HTML's path.

    data: the bundle that the models were measured on, for pictures of their errors. stages: by report name, how each
    model was made. settings: hyperparameters, nested as they may be (a recipe). remarks: sentences that belong to the
    result besides those of the comparison. tables: further ones by title, their
    first row the headings. The machine and the versions are those of the calling process.

    Raises ValueError for a stage that is not among the reports, or other data; ArtifactError when the disk refuses.
    """
    names = [report.name for report in comparison.reports]
    unknown = sorted(set(stages or {}) - set(names))
    if unknown:
        raise ValueError(f"stage {unknown[0]!r} has no report; the reports are {', '.join(names)}")
    story = Story(
        title=title,
        description=description,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        comparison=comparison,
        data=data,
        stages=stages or {},
        settings=settings or {},
        remarks=remarks,
        tables=tables or {},
        environment=environment(),
    )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.json": json.dumps(story.to_dict(), indent=1, allow_nan=False, default=str) + "\n",
        "report.md": markdown(story),
        "report.html": render(story),
    }
    for name, content in contents.items():
        atomic_write(folder / name, content.encode())
    return folder / "report.html"


def markdown(story: Story) -> str:
    """The report as Markdown: the table, the remarks, the data, the machine."""
    environment, data, reports = story.environment, story.data.describe(), story.comparison.reports
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    gpu = f"; {environment['gpu']}" if environment["gpu"] else ""
    lines = [
        f"# {story.title}",
        *([story.description] if story.description else []),
        story.comparison.markdown().rstrip(),
        *(["\n".join(f"- {remark}" for remark in story.remarks)] if story.remarks else []),
        *(f"## {title}\n\n{markdown_table(rows)}" for title, rows in story.tables.items()),
        *_scores(reports),
        *_routing(reports),
        *(
            f"Guard, {name}: {record.details['outcome']}."
            for name, record in story.stages.items()
            if record.details.get("outcome")
        ),
        *(f"{name}: {note}." for name, record in story.stages.items() for note in record.details.get("notes") or ()),
        f"Data: {data['name']}, {data['train_size']:,} to train on, {data['test_size']:,} held out, "
        f"{len(data['class_names'])} classes.",
        f"Machine: {environment['cpu']} ({environment['cpu_count']} cores, {environment['isa']}), "
        f"{environment['threads']} threads{gpu}; {environment['system']}.",
        f"Versions: Python {environment['python']}, {versions}.",
        f"Written {story.created}.",
    ]
    return "\n\n".join(lines) + "\n"


def _scores(reports: Sequence[Report]) -> list[str]:
    """The formula of the quality score, and every model's value."""
    found = ", ".join(f"{report.name} {report.score:.4f}" for report in reports)
    return [f"Quality score = {reports[-1].score_formula}: {found}."] if reports[-1].score_formula else []


def _routing(reports: Sequence[Report]) -> list[str]:
    """The split of the last model with a router, and its tables."""
    found = [report for report in reports if report.routing is not None]
    if not found:
        return []
    routing = found[-1].routing
    assert routing is not None
    tables = (routing.label_table(), routing.latency_table(), routing.parts_table(), routing.expert_table())
    return [
        f"Routing of {found[-1].name}: {routing.sentence()}.",
        *(markdown_table(table) for table in tables if table),
    ]
