"""What a run has measured: stage by stage, as a table, as files, and as an object."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pykd.data import DataBundle
from pykd.evaluation import Comparison, Report, StageRecord, compare, write_report
from pykd.evaluation.comparison import ratios
from pykd.evaluation.tables import table
from pykd.pipeline.recovery import Recovery, recoveries
from pykd.pipeline.reload import Reload
from pykd.pipeline.tensor_bytes import TensorBytes
from pykd.recipe import Recipe

#: What a saved model says of the stages that made it.
SUMMARY = (
    "name", "accuracy", "precision", "recall", "f1", "errors", "parameters", "nonzero_parameters", "size_bytes",
    "latency_p50_ms", "throughput_per_s", "speedup_over",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One finished stage: its measurements, the seconds it took, the checksum of its weights, the verb's own record."""

    stage: str
    report: Report
    seconds: float
    sha256: str
    cached: bool
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `stages/<name>.json`."""
        return {**vars(self), "report": self.report.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measured:
        """Read what :meth:`to_dict` wrote."""
        return cls(**{**values, "report": Report.from_dict(values["report"])})

    def summary(self) -> dict[str, Any]:
        """The numbers that a saved model carries along."""
        return {name: getattr(self.report, name) for name in SUMMARY}


@dataclass(frozen=True)
class Finding:
    """What was found beside the run itself: a table with its headings in the first row, and what it says in words."""

    title: str
    cells: list[list[str]]
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A finished run. ``teacher`` and ``final`` are the reports at its two ends; ``then`` is the run that followed.

    chained: whether each model was made from the one before it. findings: of a study, a search, ablations.
    """

    recipe: Recipe
    directory: Path
    measured: tuple[Measured, ...]
    reload: Reload
    seconds: float
    then: Run | None = field(default=None)
    chained: bool = True
    findings: tuple[Finding, ...] = ()

    @property
    def reports(self) -> tuple[Report, ...]:
        """One report for the teacher and one after each stage."""
        return tuple(entry.report for entry in self.measured)

    @property
    def teacher(self) -> Report:
        """The teacher's measurements."""
        return self.reports[0]

    @property
    def final(self) -> Report:
        """The measurements of the model under ``directory / "model"``."""
        return self.reports[-1]

    @property
    def comparison(self) -> Comparison:
        """All stages relative to the teacher, with a remark for each that brought nothing."""
        return compare(self.reports, chained=self.chained)

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """What each stage `recover` won back of what the pruning before it had cost."""
        return tuple(recoveries([(entry.stage.partition("-")[2], entry.report) for entry in self.measured]))

    def followed_by(self, other: Run) -> Run:
        """The same run that also knows what came after it."""
        return replace(self, then=other)

    def write(self, data: DataBundle) -> None:
        """report.json, report.html and report.md in the run's folder."""
        won = {each.name: {"recovered": each.share} for each in self.recoveries}
        stages = {
            entry.report.name: StageRecord(
                seconds=entry.seconds,
                details={
                    **entry.details,
                    **won.get(entry.report.name, {}),
                    "sha256": entry.sha256,
                    "cached": entry.cached,
                },
            )
            for entry in self.measured
        }
        won_back = [each.sentence() for each in self.recoveries]
        said = [self.verdict(), *self.gains(), *won_back, self.reload.sentence(), self.times()]
        write_report(
            self.directory,
            self.comparison,
            data,
            title=self.recipe.name,
            description=self.recipe.description,
            stages=stages,
            settings={"recipe": self.recipe.model_dump(mode="json"), "reload": self.reload.to_dict()},
            remarks=[f"{sentence}." for sentence in said],
            tables={found.title: found.cells for found in self.findings},
        )

    def times(self) -> str:
        """How long each part took."""
        teacher = self.measured[0]
        origin = "cached from an earlier run" if teacher.cached else f"{teacher.seconds:.0f} s"
        stages = [f"{entry.report.name} {entry.seconds:.0f} s" for entry in self.measured[1:]]
        whole = "without the ablations" if self.recipe.ablate else "in all"
        return f"time: {self.seconds:.0f} s {whole}; teacher {origin}, {', '.join(stages)}"

    def gains(self) -> list[str]:
        """What distillation gained every student of a chain over other ways to train it, pruning in bytes of what it
        touched, and other findings."""
        said = [said for entry in self.measured for said in entry.details.get("sentences", ())]
        touched = [(entry.report.name, entry.details.get("tensor_bytes")) for entry in self.measured]
        said += [TensorBytes(**found).sentence(name) for name, found in touched if found]
        return [*said, *(sentence for found in self.findings for sentence in found.sentences)]

    def verdict(self) -> str:
        """Size, speed and errors of the result against the teacher, in a sentence."""
        ratio = ratios(self.final, self.teacher)
        quality = f"makes {abs(ratio.more_errors)} {'more' if ratio.more_errors >= 0 else 'fewer'} errors"
        if self.final.task != "classification":
            quality = f"reaches {self.final.headline()} (the teacher {self.teacher.headline()})"
        return (
            f"{self.recipe.name}: the final model has 1/{ratio.smaller:.1f} of the teacher's bytes, runs "
            f"{ratio.faster:.2f}x as fast at batch 1 and {quality} on {len(self.final.labels)} held-out "
            f"{'words' if self.final.task == 'token-classification' else 'examples'}"
        )

    def summary(self, *, width: int | None = None) -> str:
        """What the command line prints at the end: the table (``width`` columns at most), the verdict, the places."""
        return "\n".join(
            [
                self.comparison.text(width=width),
                *(f"\n{found.title}\n{table(found.cells, width=width)}" for found in self.findings),
                "",
                f"{self.verdict()}.",
                *(f"{said}." for said in self.gains()),
                *(f"{each.sentence()}." for each in self.recoveries),
                f"{self.reload.sentence()}.",
                f"{self.times()}.",
                f"model: {self.directory / 'model'}   report: {self.directory / 'report.html'}",
            ]
        )


def progress_line(now: Report, before: Report) -> str:
    """What one stage changed, for the log."""
    step = ratios(now, before)
    return (
        f"{now.name}: {now.headline()}, {now.size_bytes / 1e6:.2f} MB "
        f"({step.smaller:.2f}x smaller), {step.faster:.2f}x as fast as before"
    )
