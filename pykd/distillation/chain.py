"""Teacher-assistant chains: teacher -> s1 -> s2 ..., and what each link is worth beside the shorter ways."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pykd.data.bundle import DataBundle, digest
from pykd.distillation.cache_files import fingerprint
from pykd.distillation.distill import distill
from pykd.errors import ArtifactError, nearest
from pykd.evaluation.direction import higher_is_better
from pykd.evaluation.validation import validator
from pykd.io.files import atomic_write
from pykd.models.students import derive
from pykd.training.checkpoint import has_checkpoint
from pykd.training.finetune import finetune
from pykd.training.held_out import held_out
from pykd.training.processes import Processes
from pykd.training.record import add_record

logger = logging.getLogger(__name__)

#: How a student may be trained instead -> how a sentence says it.
ARMS = {"labels": "on labels alone", "direct": "directly from the first teacher"}
INDEX = "chain.json"
#: Options that decide how a chain is shown and kept, not what it computes.
NOT_IDENTITY = ("progress", "log_file", "checkpoint_steps", "keep_checkpoints")

#: Options of `derive`, a model to start from, or a function that makes one from the teacher.
StudentLike = Mapping[str, Any] | nn.Module | Callable[[nn.Module], nn.Module]
Score = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Link:
    """One student trained in one way: by whom, its size, its metrics on the held-out split, and the seconds it took.

    arm: "teacher" (the teacher itself), "chain", "direct" or "labels".
    """

    student: str
    arm: str
    teacher: str
    parameters: int
    metrics: dict[str, float]
    seconds: float


@dataclass
class Chain:
    """What `distill_chain` made: the students of the chain in their order, and every link and arm that was measured."""

    students: list[nn.Module] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    metric: str = "accuracy"

    @property
    def student(self) -> nn.Module:
        """The last student of the chain."""
        return self.students[-1]

    def metrics(self, student: str, arm: str) -> dict[str, float]:
        """What one student reached in one way. Raises KeyError where that was not trained."""
        for link in self.links:
            if (link.student, link.arm) == (student, arm):
                return link.metrics
        raise KeyError(f"no {arm!r} arm of student {student!r} was trained")

    def gains(self) -> dict[str, dict[str, dict[str, float]]]:
        """For each student what the chain gains over every other arm, metric by metric: chain minus arm."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for link in self.links:
            if link.arm in ARMS:
                mine = self.metrics(link.student, "chain")
                gain = {name: mine[name] - value for name, value in link.metrics.items() if name in mine}
                found.setdefault(link.student, {})[link.arm] = gain
        return found

    def sentences(self) -> list[str]:
        """What distillation gained each student by the chain's metric, above 0 where the chain is better."""
        higher, said = higher_is_better(self.metric, None), []
        for name, gains in self.gains().items():
            reached = self.metrics(name, "chain")[self.metric]
            parts = [
                f"{self.metrics(name, arm)[self.metric]:.4f} {ARMS[arm]} (gain "
                f"{gains[arm][self.metric] if higher else -gains[arm][self.metric]:+.4f})"
                for arm in gains
            ]
            said.append(f"{name}: {self.metric} {reached:.4f} by distillation in the chain, {', '.join(parts)}")
        return said

    def table(self) -> str:
        """One line a link, as text with aligned columns."""
        names = list(dict.fromkeys(name for link in self.links for name in link.metrics))
        rows = [["student", "arm", "teacher", "parameters", *names, "seconds"]]
        for link in self.links:
            values = [f"{link.metrics[name]:.4f}" if name in link.metrics else "-" for name in names]
            rows.append([link.student, link.arm, link.teacher, f"{link.parameters:,}", *values, f"{link.seconds:.1f}"])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def to_dict(self) -> dict[str, Any]:
        """Links and gains as plain values."""
        said = {"metric": self.metric, "sentences": self.sentences()}
        return {"links": [asdict(link) for link in self.links], "gains": self.gains(), **said}


def distill_chain(
    teacher: nn.Module,
    students: Mapping[str, StudentLike] | Sequence[StudentLike],
    data: DataBundle,
    *,
    arms: Sequence[str] = tuple(ARMS),
    score: Score | None = None,
    metric: str | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    **options: Any,
) -> Chain:
    """Distil the teacher into the first student, that one into the next, and so on (Mirzadeh et al. 2020).

    students: by name or in a list, largest first: options of :func:`pykd.models.students.derive`, models of any
    architecture (which are copied), or functions of the teacher that make one. All are made from the first teacher, so
    that the arms of a student start from the same weights. arms: which comparisons are trained beside the chain,
    "labels" (the student on labels alone) and "direct" (by the first teacher, without the assistants; for the first
    student that is the chain itself). score: metrics of a model, by default loss and accuracy of the held-out split
    (:func:`pykd.training.held_out.held_out`). metric: the one that the gain is told by, by default the first of
    ``score``, or accuracy; others than loss and accuracy, as "f1" or "chrf", are those of the data's task. options:
    those of :func:`distill`, the same for all.

    With ``output_dir`` every training keeps its checkpoints in a folder there, and ``chain.json`` holds what is
    finished: ``resume=True`` goes on where it was interrupted. The record on the last student's ``pykd_report`` has all
    links and the gains. Raises ValueError for no students and unknown arms, ArtifactError for another chain's folder.

    >>> from pykd.data.bundle import stack
    >>> items = [{"pixel_values": torch.randn(4), "labels": i % 2} for i in range(16)]
    >>> data = DataBundle(items, items, stack, ["a", "b"], "noise", fingerprint="noise")
    >>> chain = distill_chain(nn.Linear(4, 2), {"s1": nn.Linear(4, 2), "s2": nn.Linear(4, 2)}, data, progress=False)
    >>> [(link.student, link.arm, link.teacher) for link in chain.links][2:]
    [('s1', 'labels', '-'), ('s2', 'chain', 's1'), ('s2', 'labels', '-'), ('s2', 'direct', 'teacher')]
    """
    named = dict(students) if isinstance(students, Mapping) else {f"s{n}": s for n, s in enumerate(students, start=1)}
    if not named:
        raise ValueError("distill_chain needs at least one student")
    for arm in arms:
        if arm not in ARMS:
            raise ValueError(nearest("arm", arm, ARMS))
    score, metric = _scores(score, metric, data)
    run = _Run(teacher, data, score, seed, options, None if output_dir is None else Path(output_dir), named, resume)
    chain = Chain()
    chain.links.append(run.measure("teacher", "teacher", "-", lambda _: teacher, None)[0])
    chain.metric = metric or next(iter(chain.links[0].metrics))
    if chain.metric not in chain.links[0].metrics:
        raise ValueError(nearest("metric", chain.metric, chain.links[0].metrics))
    guide, guide_name = teacher, "teacher"
    for name, spec in named.items():
        link, model = run.measure(name, "chain", guide_name, run.by(guide), spec, needed=True)
        assert model is not None
        chain.students.append(model)
        chain.links.append(link)
        for arm in arms:
            if arm == "labels":
                chain.links.append(run.measure(name, arm, "-", run.by(None), spec)[0])
            elif guide is not teacher:
                chain.links.append(run.measure(name, arm, "teacher", run.by(teacher), spec)[0])
        guide, guide_name = model, name
        logger.info("%s: %s", name, link.metrics)
    for sentence in chain.sentences():
        logger.info("%s", sentence)
    parameters = {"students": list(named), "arms": list(arms)}
    add_record(chain.student, stage="distill_chain", method=" -> ".join(["teacher", *named]), parameters=parameters,
               **chain.to_dict())  # fmt: skip
    return chain


def link_name(student: str, arm: str) -> str:
    """What one arm of a student is called in folders and logs.

    >>> link_name("small", "direct")
    'small-direct'
    """
    return f"{student}-{arm}"


def make_link(spec: StudentLike, teacher: nn.Module, *, seed: int) -> nn.Module:
    """A student of a chain before it has learned anything, the same one for every arm."""
    if isinstance(spec, nn.Module):
        return copy.deepcopy(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return derive(teacher, **spec) if isinstance(spec, Mapping) else spec(teacher)


def train_link(student: nn.Module, guide: nn.Module | None, data: DataBundle, **options: Any) -> nn.Module:
    """One arm of a student: :func:`distill` by ``guide``, or :func:`finetune` on the labels alone where it is None.

    options: those of distill; finetune is given the ones that it knows, so that both train in the same way.
    """
    if guide is not None:
        return distill(student, guide, data, **options)
    known = inspect.signature(finetune).parameters
    return finetune(student, data, **{name: value for name, value in options.items() if name in known})


def _scores(score: Score | None, metric: str | None, data: DataBundle) -> tuple[Score, str | None]:
    """What a student is measured by, and the metric that counts where that is known before."""
    if score is not None:
        return score, metric
    if metric in (None, "loss", "accuracy"):
        return lambda model: held_out(model, data), metric or "accuracy"
    validate = validator(data)

    def task_metrics(model: nn.Module) -> dict[str, float]:
        return {name: value for name, value in validate(model).items() if isinstance(value, (int, float))}

    return task_metrics, metric


class _Run:
    """What all trainings of a chain share, and what of them is finished."""

    def __init__(
        self, teacher: nn.Module, data: DataBundle, score: Score, seed: int, options: dict[str, Any],
        folder: Path | None, students: Mapping[str, StudentLike], resume: bool,
    ) -> None:  # fmt: skip
        self.teacher, self.data, self.score, self.seed, self.options = teacher, data, score, seed, options
        self.folder, self.finished = folder, dict[str, Any]()
        self._where: dict[str, Any] = {}
        told = [f"{name}: {self._told(spec)}" for name, spec in students.items()]
        asked = {name: value for name, value in options.items() if name not in NOT_IDENTITY}
        facts = [fingerprint(teacher), data.fingerprint, seed, list(students), told, _written(asked)]
        self.identity = digest(facts)
        if folder is None and resume:
            raise ValueError("resume=True needs output_dir, the folder that the interrupted chain wrote to")
        self.together = Processes()
        self.finished = self.together.shared(lambda: self._begin(resume))

    def _begin(self, resume: bool) -> dict[str, Any]:
        """What is finished, of this very chain."""
        if self.folder is None:
            return {}
        if not (self.folder / INDEX).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
            return {}
        known: dict[str, Any] = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        if not resume or known["identity"] != self.identity:
            how = "another chain" if resume else "a chain: continue it with resume=True"
            raise ArtifactError(f"{self.folder} already holds {how}; or choose another output_dir")
        return dict(known["finished"])

    def by(self, guide: nn.Module | None) -> Callable[[nn.Module], nn.Module]:
        """A training by this teacher, or on labels alone, of the student that it is given."""

        return lambda student: train_link(student, guide, self.data, seed=self.seed, **self._where, **self.options)

    def measure(
        self, name: str, arm: str, teacher: str, train: Callable[[Any], nn.Module], spec: StudentLike | None,
        *, needed: bool = False,
    ) -> tuple[Link, nn.Module | None]:  # fmt: skip
        """Train, or take from before, and score; the model where it is ``needed`` or was trained now."""
        key = link_name(name, arm)
        known = self.finished.get(key)
        if known is not None and not needed:
            return Link(**known), None
        began = time.perf_counter()
        checkpoints = None if self.folder is None or spec is None else self.folder / key
        going_on = checkpoints is not None and has_checkpoint(checkpoints)
        self._where = {"checkpoint_dir": checkpoints, "resume": going_on, "label": key}
        model = train(None if spec is None else self._make(spec))
        if known is not None:
            return Link(**known), model
        metrics = self.together.shared(lambda: {name: float(value) for name, value in self.score(model).items()})
        size = sum(p.numel() for p in model.parameters())
        link = Link(name, arm, teacher, size, metrics, round(time.perf_counter() - began, 3))
        self.finished[key] = asdict(link)
        self.together.once(self._write)
        return link, model

    def _told(self, spec: StudentLike) -> str:
        """What a student begins as: options as they are written, models by all that is in them."""
        if isinstance(spec, Mapping):
            return str(spec)
        if self.folder is None:  # nothing is kept that could be taken for another chain's
            return ""
        return fingerprint(spec if isinstance(spec, nn.Module) else self._make(spec))

    def _make(self, spec: StudentLike) -> nn.Module:
        return make_link(spec, self.teacher, seed=self.seed)

    def _write(self) -> None:
        if self.folder is not None:
            content = {"identity": self.identity, "finished": self.finished}
            atomic_write(self.folder / INDEX, json.dumps(content, indent=1) + "\n")


def _written(value: Any) -> str:
    """An option as it is in every process: functions by their names, not by where they lie in memory.

    >>> _written({"temperature": 2.0, "method": {make_link: 1.0}})
    "{'method': {'pykd.distillation.chain.make_link': 1.0}, 'temperature': 2.0}"
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"'{_written(key)}': {_written(each)}" for key, each in value.items())) + "}"
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__ + _written({each.name: getattr(value, each.name) for each in fields(value)})
    name = getattr(value, "__qualname__", None)
    return str(value) if name is None else f"{value.__module__}.{name}"
