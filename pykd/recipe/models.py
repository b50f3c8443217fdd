"""The models that a recipe may name: the teacher, further teachers, and students."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pykd.errors import nearest
from pykd.models.layer_choice import BY_DATA, BY_POSITION
from pykd.models.sizes import size_of
from pykd.recipe.router import Router
from pykd.recipe.section import Section
from pykd.recipe.train import Train


class Model(Section):
    """A model from an official library: by name, or from scratch by model type and configuration."""

    source: Literal["torchvision", "huggingface"] | None = None
    name: str | None = Field(None, description="torchvision architecture, Hugging Face name, or a local folder")
    weights: str | None = Field(None, description="torchvision: file of a state dict; None starts from scratch")
    revision: str | None = Field(None, description="Hugging Face: commit, tag or branch")
    preset: str | None = Field(None, description="layers x width, as 6x512; published sizes bring heads and neurons")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="values of the model's own configuration; without a name it builds a Hugging Face model from "
        "scratch and must hold its model_type (vit, bert, distilbert ...); what the tokenizer knows may be left out",
    )

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, preset: str | None) -> str | None:
        if preset is not None:
            size_of(preset)
        return preset


#: Library -> keys of a model that only the other one reads.
UNREAD = {"huggingface": ("weights",), "torchvision": ("revision", "preset")}


def check_read(spec: Model, source: str, *, key: str) -> None:
    """Raise ValueError for a value that the model's library would pass over."""
    for name in UNREAD[spec.source or source]:
        if getattr(spec, name) is not None:
            raise ValueError(f"{key}.{name} is not read by {spec.source or source}: leave it out")


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


class FurtherTeacher(Model):
    """A teacher beside the recipe's own, already trained."""

    name: str
    weight: float = Field(1.0, gt=0, description="of what it says; weights of all teachers are scaled to add up to 1")


class Student(Model):
    """The small model: cut from the teacher by importance, or another architecture."""

    width: float | None = Field(None, gt=0, le=1, description="share of the channels, neurons and heads that is kept")
    depth: int | None = Field(None, ge=1, description="layers that are kept")
    layers: str | list[int] = Field(
        "spaced", description="which: spaced, first, last, by data: influence or divergence; or their numbers"
    )
    hidden_size: int | None = Field(None, ge=1, description="channels of the residual stream")
    heads: int | None = Field(None, ge=1, description="attention heads")
    intermediate_size: int | None = Field(None, ge=1, description="neurons of a feed-forward block")
    router: Router | None = Field(None, description="a fast and a deep branch of the teacher's layers; {} for defaults")

    @field_validator("layers")
    @classmethod
    def _known_choice(cls, layers: str | list[int]) -> str | list[int]:
        if isinstance(layers, str) and layers not in (*BY_POSITION, *BY_DATA):
            raise ValueError(nearest("choice of layers", layers, [*BY_POSITION, *BY_DATA]))
        return layers

    @model_validator(mode="after")
    def _one_origin(self) -> Student:
        other = self.name is not None or "model_type" in self.config
        if self.router is not None and self.model_fields_set != {"router"}:
            raise ValueError("a student with a router is made of the teacher's layers: leave the other keys out")
        if self.derived == other or (self.derived and self.config):
            raise ValueError(
                "say where the student comes from, in one way: preset, width, depth, layers, hidden_size ... (cut from "
                "the teacher), router (branches of its layers), name (another architecture, or weights), or config "
                "with its model_type (from scratch)"
            )
        return self

    @property
    def derived(self) -> bool:
        """Whether the student is cut from the teacher."""
        cut = (self.width, self.depth, self.hidden_size, self.heads, self.intermediate_size)
        preset = self.preset is not None and "model_type" not in self.config
        named = preset or isinstance(self.layers, list) or self.router is not None
        return named or any(value is not None for value in cut)
