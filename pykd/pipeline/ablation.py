"""What every component of a recipe is worth: the run again without it, and both results beside each other."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pykd.evaluation import interleaved_latency
from pykd.evaluation.intervals import PairedTest, paired_test
from pykd.io.files import atomic_write
from pykd.pipeline.arms import StudyPipeline
from pykd.pipeline.directory import ABLATIONS, WORKERS
from pykd.pipeline.parts import part_of, results
from pykd.pipeline.ranking import sentence
from pykd.pipeline.result import Finding, Measured, Run
from pykd.pipeline.runner import Pipeline
from pykd.pipeline.workers import carry_out
from pykd.recipe.ablations import Variant, variants

logger = logging.getLogger("pykd.pipeline")


@dataclass(frozen=True)
class Worth:
    """One model with and without a component. quality: accuracy or quality score; test: of the examples' scores, with
    minus without. size_bytes of both; faster: of the model with it beside the one without, by alternating rounds, None
    where they were not timed."""

    component: str
    model: str
    quality: float
    quality_without: float
    size_bytes: int
    size_bytes_without: int
    test: PairedTest
    faster: float | None

    def sentence(self) -> str:
        """The same in words."""
        smaller = 1 - self.size_bytes / self.size_bytes_without
        size = f"the file {abs(100 * smaller):.1f} % {'smaller' if smaller >= 0 else 'larger'}"
        speed = "" if self.faster is None else f", {self.faster:.2f}x as fast"
        return f"{self.model} with {self.component} beside without: {sentence(self.test)}; {size}{speed}"


def ablated(run: Run, pipeline: Pipeline, *, workers: int = 1) -> Run:
    """The run with what was found without each component that its recipe names under ``ablate``; reports rewritten."""
    recipe, folder = pipeline.recipe, pipeline.directory.path
    if not recipe.ablate:
        return run
    found = variants(recipe)
    parts = [
        part_of(pipeline, each.name, each.recipe, folder / ABLATIONS / each.name, shared=each.shared) for each in found
    ]
    carry_out(parts, folder / WORKERS, workers=workers)
    return pipeline.together.shared(lambda: _told(run, pipeline, found))


def _told(run: Run, pipeline: Pipeline, found: Sequence[Variant]) -> Run:
    """Run with the worth of every component in its findings and its reports."""
    worth = [each for variant in found for each in _known(run, pipeline, variant)]
    rows = [["without", "model", "quality", "with it", "with - without", "MB", "with it", "faster with it"]]
    for each in worth:
        speed = "-" if each.faster is None else f"{each.faster:.2f}x"
        quality = [f"{each.quality_without:.4f}", f"{each.quality:.4f}", sentence(each.test)]
        size = [f"{each.size_bytes_without / 1e6:,.2f}", f"{each.size_bytes / 1e6:,.2f}"]
        rows.append([each.component, each.model, *quality, *size, speed])
    told = Finding("What each component is worth", rows, tuple(each.sentence() for each in worth))
    run = replace(run, findings=(*run.findings, told))
    run.write(pipeline.data)
    return run


def _known(run: Run, pipeline: Pipeline, variant: Variant) -> list[Worth]:
    """What was found of one component, compared once and kept."""
    file = pipeline.directory.path / ABLATIONS / f"{variant.name}.json"
    if not file.exists():
        worth = _compared(run, pipeline, variant)
        atomic_write(file, json.dumps([asdict(each) for each in worth], indent=1) + "\n")
        for each in worth:
            logger.info("%s", each.sentence())
    read = json.loads(file.read_text(encoding="utf-8"))
    return [Worth(**{**each, "test": PairedTest(**each["test"])}) for each in read]


def _compared(run: Run, pipeline: Pipeline, variant: Variant) -> list[Worth]:
    """The final model beside the one without the component; in a study every student of the chain, one timed."""
    folder = pipeline.directory.path / ABLATIONS / variant.name
    without = results(variant.recipe, folder)[1:]
    pairs = [(run.measured[-1], without[-1])]
    if isinstance(pipeline, StudyPipeline):
        whole = {entry.report.name: entry for entry in run.measured}
        pairs = [(whole[entry.report.name], entry) for entry in without if entry.report.name in whole]
    timed = pairs[-1:]
    return [
        _worth(variant.name, one, other, _faster(pipeline, folder, one, other) if pair in timed else None)
        for pair in pairs
        for one, other in [pair]
    ]


def _worth(name: str, one: Measured, other: Measured, faster: float | None) -> Worth:
    return Worth(
        component=name,
        model=one.report.name,
        quality=one.report.quality(),
        quality_without=other.report.quality(),
        size_bytes=one.report.size_bytes,
        size_bytes_without=other.report.size_bytes,
        test=paired_test(one.report.scores(), other.report.scores()),
        faster=faster,
    )


def _faster(pipeline: Pipeline, folder: Path, one: Measured, other: Measured) -> float:
    """How many times as fast as ``other`` of the ablation in ``folder``, in alternating rounds."""
    models = {"without": pipeline.load(folder / "stages" / other.stage), "with": pipeline.load(
        pipeline.directory.model(one.stage))}  # fmt: skip
    timed = interleaved_latency(models, pipeline.data.example(), rounds=pipeline.recipe.evaluate.speed_rounds)
    return timed.speedup("with", baseline="without")
