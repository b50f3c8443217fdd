"""What a recipe may say, key by key. A key that is not here is an error that names the nearest one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pykd.distillation.methods import resolve
from pykd.distillation.quantized import SCHEMES as TEACHER_SCHEMES
from pykd.errors import nearest
from pykd.pruning import check_prune
from pykd.quantization import check_candidates, check_embeddings, check_method, check_observer, check_qat
from pykd.recipe.data_kinds import Data
from pykd.recipe.gradual import GradualPruning
from pykd.recipe.guarded import Guarded
from pykd.recipe.models import FurtherTeacher, Student, Teacher, check_read
from pykd.recipe.router import Calibrate
from pykd.recipe.section import PatternText, Section
from pykd.recipe.studies import Search, Study
from pykd.recipe.train import Train

#: The scheme of a recipe that chooses one for every layer.
MIXED = "mixed"
#: Stages that train many models, each in the same way -> keys of a single training that they do not take.
UNREAD = {
    "chain": ("gradual", "teachers", "teacher_weight"),
    "compress_to": ("gradual", "guard", "teachers", "teacher_weight"),
}


class Distill(Train):
    """Train with the teacher's logits (Hinton et al. 2015): alpha * T^2 * KL + (1 - alpha) * cross-entropy."""

    temperature: float = Field(4.0, gt=0)
    alpha: float = Field(0.5, ge=0, le=1)
    guard: Guarded | None = Field(
        None, description="go back to the best checkpoint when quality falls; {} for defaults"
    )
    gradual: GradualPruning | None = Field(None, description="prune meanwhile; {} for the defaults")
    method: str | dict[str, float | dict[str, Any]] = Field(
        "logits",
        description="logits, hidden, attention, relation, contrastive, sequence, on_policy; or several with their "
        "weights, as {logits: 1.0, hidden: {weight: 0.5}}",
    )
    teacher_scheme: str | None = Field(None, description="w8a8, w8a16 or w4a16: the teacher runs in fewer bits")
    teacher_weight: float = Field(1.0, gt=0, description="of the recipe's teacher, beside the further ones")
    teachers: list[FurtherTeacher] = Field(default_factory=list, description="further teachers, already trained")

    @field_validator("method")
    @classmethod
    def _known_loss(cls, method: str | dict[str, Any]) -> str | dict[str, Any]:
        resolve(method)
        return method

    @field_validator("teacher_scheme")
    @classmethod
    def _known_teacher_scheme(cls, scheme: str | None) -> str | None:
        if scheme is not None and scheme not in TEACHER_SCHEMES:
            raise ValueError(nearest("teacher_scheme", scheme, TEACHER_SCHEMES))
        return scheme


class Chain(Distill):
    """Distil through assistants (Mirzadeh et al. 2020): teacher -> first student -> next ...; the last one goes on."""

    students: dict[str, Student] = Field(min_length=1, description="by name, the largest first")
    arms: tuple[Literal["labels", "direct"], ...] = Field(
        ("labels", "direct"),
        description="what is trained beside the chain, to compare: each student on labels alone, or without assistants",
    )
    metric: str | None = Field(None, description="what the arms are compared by, as f1 or chrf; none: accuracy")


class Recover(Distill):
    """Fine-tune the pruned model with the teacher; half an epoch unless told otherwise."""

    epochs: float = 0.5
    lr: float = 3e-4


class Prune(Section):
    """Remove single weights, or whole channels, heads, neurons or layers."""

    guard: Guarded | None = Field(None, description="undo what costs too much quality; {} for the defaults")

    method: str = Field(
        "magnitude",
        description="of weights: magnitude, random, wanda, sparsegpt; of units: channels, heads, neurons, layers",
    )
    sparsity: float | None = Field(
        None, ge=0, lt=1, description="share of weights, or of units per group, removed: 0.5 unless the pattern says it"
    )
    scope: str | None = Field(None, description="the weights over which the share is met: global, layer or row")
    pattern: PatternText = Field(
        None, description="2:4: two weights kept of four neighbours; 4x1: blocks of outputs and inputs"
    )
    importance: str | None = Field(None, description="of units: l2, l1, taylor or activation")
    samples: int = Field(256, ge=1, description="training examples that wanda, sparsegpt, taylor, activation look at")
    batch_size: int = Field(16, ge=1, description="of them at once")
    include: list[str] | None = Field(None, description="name patterns of the layers to touch")
    exclude: list[str] | None = Field(None, description="name patterns of the layers to leave")
    rows: list[Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="single weights: rows of activations for which each layer measures whether sparse or dense is "
        "faster",
    )

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        check_prune(method, None)
        return method

    @model_validator(mode="after")
    def _fit(self) -> Prune:
        options = {name: getattr(self, name) for name in ("scope", "pattern", "importance", "rows")}
        check_prune(self.method, self.sparsity, **options)
        return self


class Quantize(Section):
    """Store weights in 4, 8 or 16 bits."""

    guard: Guarded | None = Field(None, description="undo what costs too much quality; {} for the defaults")

    scheme: str | dict[str, str] = Field(
        "w4a16",
        description="one for all layers, or {name pattern: scheme}; mixed: one of `candidates` for each layer, by what "
        "it is measured to cost the output, within `bits`",
    )
    bits: float | None = Field(None, gt=0, description="mixed: bits per weight, scales counted")
    candidates: list[str] = Field(["w4a16", "w8a16"], min_length=1, description="mixed: schemes to choose from")
    method: str = Field("rtn", description="how 4-bit codes are chosen: rtn, hqq, gptq or awq")
    group_size: int | None = Field(
        64, description="weights that share one scale, none: all of an output; not in 8 bits"
    )
    symmetric: bool = Field(True, description="false stores zero points; schemes w4a16 and w4a8 only")
    observer: str = Field("minmax", description="which activations w8a8_static covers: minmax, percentile or mse")
    samples: int = Field(256, ge=1, description="training examples that gptq, awq and w8a8_static look at")
    batch_size: int = Field(16, ge=1, description="of them at once")
    embeddings: str | None = Field(
        None, description="scheme of the embeddings: w8a16, w4a16, nf4, fp4 or bf16; none: as is"
    )
    include: list[str] | None = None
    exclude: list[str] | None = None

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, scheme: str | dict[str, str]) -> str | dict[str, str]:
        if scheme != MIXED:
            check_method(scheme, "rtn")
        return scheme

    @field_validator("candidates")
    @classmethod
    def _known_candidates(cls, candidates: list[str]) -> list[str]:
        check_candidates(candidates)
        return candidates

    @field_validator("observer")
    @classmethod
    def _known_observer(cls, observer: str) -> str:
        check_observer(observer)
        return observer

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        check_method("w4a16", method)
        return method

    @field_validator("embeddings")
    @classmethod
    def _known_embeddings(cls, scheme: str | None) -> str | None:
        check_embeddings(scheme)
        return scheme

    @model_validator(mode="after")
    def _fit(self) -> Quantize:
        if (self.scheme == MIXED) != (self.bits is not None):
            raise ValueError(f"scheme 'mixed' and its budget `bits` go together, got {self.scheme!r} and {self.bits}")
        if self.scheme != MIXED:
            if "candidates" in self.model_fields_set:
                raise ValueError(f"candidates are what scheme 'mixed' chooses from, got scheme {self.scheme!r}")
            check_method(self.scheme, self.method, symmetric=self.symmetric)
        return self


class Qat(Recover):
    """Train with the teacher while weights are rounded (quantization-aware training), then pack them.

    Several after one another, in fewer and fewer bits, are progressive quantization.
    """

    lr: float = 1e-4
    scheme: str = "w4a16"
    group_size: int | None = Field(64, ge=1, description="weights that share one scale, none: all of an output")
    symmetric: bool = Field(True, description="false stores zero points; scheme w4a16 only")
    search_every: int = Field(50, ge=1, description="training steps from one search for 4-bit scales to the next")
    include: list[str] | None = None
    exclude: list[str] | None = None

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, scheme: str) -> str:
        check_qat(scheme)
        return scheme

    @model_validator(mode="after")
    def _fit(self) -> Qat:
        check_qat(self.scheme, symmetric=self.symmetric)
        return self


class CompressTo(Recover):
    """Search depth x pruning x bits for the best model within a target; each candidate follows the teacher first."""

    size_mb: float | None = Field(None, description="10^6 bytes of the saved weights")
    ratio: float | None = Field(None, description="times smaller than the model before this stage")
    latency_ms: float | None = Field(None, description="P95 of a call at batch 1 on this machine")
    max_metric_drop: float | None = Field(None, description="how much lower the accuracy or quality score may be")
    depths: list[int | None] | None = Field(None, description="layers kept, null for all; none: thirds and half")
    prunings: list[tuple[str, float] | None] | None = Field(None, description="[method, sparsity], null for none")
    schemes: list[str | None] = Field([None, "w8a8", "w4a16"], description="as in quantize, null for none")
    embeddings: str | None = "w8a16"
    quantization: str = Field("rtn", description="how 4-bit codes are chosen: rtn, hqq, gptq or awq")
    group_size: int | None = Field(64, ge=1)
    max_candidates: int = Field(12, ge=1, description="how many are trained and evaluated")
    max_seconds: float | None = Field(None, ge=0, description="for how long new ones are begun")

    def target(self) -> dict[str, float]:
        """The limits that are set."""
        names = ("size_mb", "ratio", "latency_ms", "max_metric_drop")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _in_reach(self) -> CompressTo:
        if not self.target():
            raise ValueError("a target is one or more of size_mb, ratio, latency_ms, max_metric_drop, got none")
        for scheme in self.schemes:
            if scheme is not None:
                check_method(scheme, "rtn")
        check_method("w4a16", self.quantization)
        check_embeddings(self.embeddings)
        return self


class Stage(Section):
    """One step of the compression: exactly one of these keys."""

    distill: Distill | None = None
    chain: Chain | None = None
    prune: Prune | None = None
    recover: Recover | None = None
    quantize: Quantize | None = None
    calibrate: Calibrate | None = None
    qat: Qat | None = None
    compress_to: CompressTo | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, content: Any) -> Any:
        """`- recover:` is `- recover: {}`: all defaults."""
        bare = isinstance(content, dict)
        return {key: {} if value is None else value for key, value in content.items()} if bare else content

    @model_validator(mode="after")
    def _one(self) -> Stage:
        if len(self.model_fields_set) != 1:
            named = ", ".join(sorted(self.model_fields_set)) or "none"
            raise ValueError(f"a stage is one of {', '.join(Stage.model_fields)}, but this one names {named}")
        return self

    @property
    def kind(self) -> str:
        """distill, chain, prune, recover, quantize, calibrate, qat or compress_to."""
        return next(iter(self.model_fields_set))

    @property
    def settings(self) -> Distill | Chain | Prune | Recover | Quantize | Qat | CompressTo | Calibrate:
        """What stands under the key."""
        found: Distill | Chain | Prune | Recover | Quantize | Qat | CompressTo | Calibrate = getattr(self, self.kind)
        return found


Count = Annotated[int, Field(ge=1)]


class Evaluate(Section):
    """How every stage is measured."""

    batch_size: int = Field(default=64, ge=1)
    latency_rounds: int = Field(default=50, ge=1, description="timed calls at batch 1")
    speed_rounds: int = Field(default=20, ge=1, description="alternating rounds against the teacher, for the ratio")
    bertscore_model: str | None = Field(
        default=None, description="folder of an encoder: generated texts get BERTScore by it"
    )
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list, description="further calls to time, rows"
    )
    lengths: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list, description="and their tokens, where inputs have them"
    )


class Recipe(Section):
    """One run: data, teacher, student, stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="also the folder under runs/")
    description: str = ""
    seed: int = Field(0, ge=0)
    data: Data
    teacher: Teacher
    student: Student | None = Field(None, description="None compresses the teacher itself")
    stages: list[Stage] = Field(min_length=1)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    study: Study | None = Field(None, description="the ranking of `pykd study`; only with a single stage `chain`")
    search: Search | None = Field(None, description="values that `pykd study` looks for before it carries out the rest")
    ablate: list[str | dict[str, dict[str, Any]]] = Field(
        default_factory=list,
        description="what is left out, one at a time, each in a run of its own: stages, losses, students (of a chain), "
        "one of them as stages.prune or losses.hidden, or {name: {key: value}} with the keys that take it away",
    )
    short: dict[str, Any] = Field(default_factory=dict, description="dotted keys that --short sets")
    then: str | None = Field(None, description="recipe file to run next, relative to this one")

    @model_validator(mode="after")
    def _models_fit(self) -> Recipe:
        source = str(self.teacher.source)
        check_read(self.teacher, source, key="teacher")
        if self.student is not None and not self.student.derived:
            check_read(self.student, source, key="student")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        packed = None
        if self.study is not None and [stage.kind for stage in self.stages] != ["chain"]:
            raise ValueError("study ranks the students of a chain: it goes with a single stage, `chain`")
        if self.study is not None and self.study.explain and self.data.kind not in ("digits", "text"):
            raise ValueError(f"study.explain compares the attributions of classifiers, data.kind is {self.data.kind!r}")
        for index, stage in enumerate(self.stages):
            given = stage.settings.model_fields_set
            unread = [key for key in UNREAD.get(stage.kind, ()) if key in given and getattr(stage.settings, key)]
            if unread:
                keys = " and ".join(unread)
                raise ValueError(f"stages[{index}].{stage.kind} does not read {keys}: put it under distill or recover")
            if stage.kind == "distill" and self.student is None:
                raise ValueError(f"stages[{index}].distill needs a student: add one, or use recover to fine-tune")
            if stage.kind == "chain" and (index or self.student is not None):
                raise ValueError(f"stages[{index}].chain makes its own students: put it first and leave `student` out")
            router = self.student.router if self.student is not None else None
            if stage.kind == "calibrate" and (router is None or router.routing != "learned"):
                raise ValueError(
                    f"stages[{index}].calibrate needs a student with a router that learns: `student: {{router: {{}}}}`"
                )
            if packed is not None and stage.kind not in ("quantize", "qat", "calibrate"):
                earlier = self.stages[packed].kind
                raise ValueError(
                    f"stages[{index}].{stage.kind} comes after stages[{packed}].{earlier}, whose packed weights no "
                    f"longer change: move {earlier} to the end"
                )
            if stage.kind in ("quantize", "qat", "compress_to"):
                packed = index
        return self
