"""What a recipe may say, key by key. A key that is not here is an error that names the nearest one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pykd.errors import nearest
from pykd.pruning import METHODS
from pykd.quantization import check_embeddings, check_method, check_qat
from pykd.training import TrainConfig


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are refused, values do not change after they were read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Digits(Section):
    """The 1,797 handwritten digits that ship inside scikit-learn, 8x8 pixels, scaled to ``image_size``."""

    kind: Literal["digits"]
    image_size: int = Field(64, ge=8, description="pixels a side")
    channels: Literal[1, 3] = 3
    test_size: int = Field(600, ge=1, lt=1797, description="images held out, the same share of every class")
    seed: int = Field(0, ge=0, description="decides which images are held out")


class Text(Section):
    """Labelled texts: a local CSV, JSON-lines or parquet file, or the name of a `datasets` data set."""

    kind: Literal["text"]
    path: str = Field(description="file ending in .csv, .jsonl or .parquet, or a name for datasets.load_dataset")
    test_path: str | None = Field(None, description="file with the texts held out; None splits `path`")
    split_column: str | None = Field(None, description="column that says `train` or `test`")
    subset: str | None = Field(None, description="configuration of a `datasets` data set")
    text_column: str = "text"
    label_column: str = "label"
    tokenizer: str | None = Field(None, description="Hugging Face name or folder; None takes the teacher's")
    max_length: int = Field(64, ge=2, description="tokens a text is cut at")
    test_size: int = Field(3000, ge=1, description="texts held out when the data brings no test split")
    seed: int = Field(0, ge=0, description="decides which texts are held out")


Data = Annotated[Digits | Text, Field(discriminator="kind")]


class Train(Section):
    """Settings of one training: the fields of :class:`pykd.training.TrainConfig` but the seed, which the recipe has."""

    epochs: float = 1.0
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    clip_norm: float | None = 1.0
    autocast: str | None = None
    max_steps: int | None = None
    checkpoint_steps: int | None = None
    accumulate: int = 1
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    validate_steps: int | None = None
    keep_checkpoints: int = 1

    @model_validator(mode="after")
    def _in_range(self) -> Train:
        self.train_config(0)
        return self

    def train_config(self, seed: int) -> TrainConfig:
        """The same numbers as the training loop takes them; ValueError for one that is out of range."""
        return TrainConfig(**{name: getattr(self, name) for name in Train.model_fields}, seed=seed)


class Distill(Train):
    """Train with the teacher's logits (Hinton et al. 2015): alpha * T^2 * KL + (1 - alpha) * cross-entropy."""

    temperature: float = Field(4.0, gt=0)
    alpha: float = Field(0.5, ge=0, le=1)


class Recover(Distill):
    """Fine-tune the pruned model with the teacher; half an epoch unless told otherwise."""

    epochs: float = 0.5
    lr: float = 3e-4


class Prune(Section):
    """Remove weights (magnitude) or whole channels, heads or neurons."""

    method: str = "magnitude"
    sparsity: float = Field(0.5, ge=0, lt=1, description="share of weights, or of units per group, removed")
    include: list[str] | None = Field(None, description="name patterns of the layers to touch")
    exclude: list[str] | None = Field(None, description="name patterns of the layers to leave")

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(nearest("method", method, METHODS))
        return method


class Quantize(Section):
    """Store weights in 4 or 8 bits."""

    scheme: str = "w4a16"
    method: str = Field("rtn", description="how 4-bit codes are chosen: rtn, hqq, gptq or awq")
    group_size: int | None = Field(
        64, description="weights that share one scale, none: all of an output; not in 8 bits"
    )
    symmetric: bool = Field(True, description="false stores zero points; schemes w4a16 and w4a8 only")
    samples: int = Field(256, ge=1, description="training examples that gptq and awq look at")
    batch_size: int = Field(16, ge=1, description="of them at once")
    embeddings: str | None = Field(None, description="scheme of the embeddings: w8a16, w4a16, nf4 or fp4; none: as is")
    include: list[str] | None = None
    exclude: list[str] | None = None

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, scheme: str) -> str:
        check_method(scheme, "rtn")
        return scheme

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
        check_method(self.scheme, self.method, symmetric=self.symmetric)
        return self


class Qat(Recover):
    """Train with the teacher while weights are rounded (quantization-aware training), then pack them."""

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


class Stage(Section):
    """One step of the compression: exactly one of these keys."""

    distill: Distill | None = None
    prune: Prune | None = None
    recover: Recover | None = None
    quantize: Quantize | None = None
    qat: Qat | None = None

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
        """distill, prune, recover, quantize or qat."""
        return next(iter(self.model_fields_set))

    @property
    def settings(self) -> Distill | Prune | Recover | Quantize | Qat:
        """What stands under the key."""
        found: Distill | Prune | Recover | Quantize | Qat = getattr(self, self.kind)
        return found


class Model(Section):
    """A model from an official library: by name, or from scratch by model type and configuration."""

    source: Literal["torchvision", "huggingface"] | None = None
    name: str | None = Field(None, description="torchvision architecture, Hugging Face name, or a local folder")
    weights: str | None = Field(None, description="torchvision: file of a state dict; None starts from scratch")
    revision: str | None = Field(None, description="Hugging Face: commit, tag or branch")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="values of the model's own configuration; without a name it builds a Hugging Face model from "
        "scratch and must hold its model_type (vit, bert, distilbert ...)",
    )


class Teacher(Model):
    """The model to be compressed. With ``train`` it is trained first, once, and kept for later runs."""

    train: Train | None = None

    @model_validator(mode="after")
    def _named(self) -> Teacher:
        if self.source is None:
            raise ValueError("source is missing: torchvision or huggingface")
        if self.name is None and (self.source == "torchvision" or "model_type" not in self.config):
            raise ValueError("name is missing (only source: huggingface can do without, with config.model_type)")
        if self.train is None and self.name is None:
            raise ValueError("a teacher from scratch must learn first: add a `train` section")
        return self


class Student(Model):
    """The small model: cut from the teacher by importance (``width``, ``depth``), or another architecture."""

    width: float | None = Field(None, gt=0, le=1, description="share of the channels, neurons and heads that is kept")
    depth: int | None = Field(None, ge=1, description="layers that are kept")

    @model_validator(mode="after")
    def _one_origin(self) -> Student:
        derived = self.width is not None or self.depth is not None
        other = self.name is not None or "model_type" in self.config
        if derived == other or (derived and self.config):
            raise ValueError(
                "say where the student comes from, in one way: width and/or depth (cut from the teacher), name "
                "(another architecture, or weights), or config with its model_type (from scratch)"
            )
        return self

    @property
    def derived(self) -> bool:
        """Whether the student is cut from the teacher."""
        return self.width is not None or self.depth is not None


class Evaluate(Section):
    """How every stage is measured."""

    batch_size: int = Field(default=64, ge=1)
    latency_rounds: int = Field(default=50, ge=1, description="timed calls at batch 1")
    speed_rounds: int = Field(default=20, ge=1, description="alternating rounds against the teacher, for the ratio")


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
    short: dict[str, Any] = Field(default_factory=dict, description="dotted keys that --short sets")
    then: str | None = Field(None, description="recipe file to run next, relative to this one")

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        packed = None
        for index, stage in enumerate(self.stages):
            if stage.kind == "distill" and self.student is None:
                raise ValueError(f"stages[{index}].distill needs a student: add one, or use recover to fine-tune")
            if packed is not None and stage.kind != "quantize":
                earlier = self.stages[packed].kind
                raise ValueError(
                    f"stages[{index}].{stage.kind} comes after stages[{packed}].{earlier}, whose packed weights no "
                    f"longer change: move {earlier} to the end"
                )
            if stage.kind in ("quantize", "qat"):
                packed = index
        return self
