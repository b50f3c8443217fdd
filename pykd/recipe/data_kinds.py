"""The kinds of data that a recipe may name, each with its own keys; the kind says the task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pykd.recipe.section import Section


class Digits(Section):
    """The 1,797 handwritten digits that ship inside scikit-learn, 8x8 pixels, scaled to ``image_size``."""

    kind: Literal["digits"]
    image_size: int = Field(64, ge=8, description="pixels a side")
    channels: Literal[1, 3] = 3
    test_size: int = Field(600, ge=1, lt=1797, description="images held out, the same share of every class")
    seed: int = Field(0, ge=0, description="decides which images are held out")


class Replay(Section):
    """Older data of the same kind and columns, a share of which is trained on again."""

    path: str = Field(description="file, or a name for datasets.load_dataset")
    share: float = Field(0.1, gt=0, le=1, description="of its training rows")


class Texts(Section):
    """What all kinds of texts have: a local CSV, JSON-lines or parquet file, or the name of a `datasets` data set."""

    path: str = Field(description="file ending in .csv, .jsonl or .parquet, or a name for datasets.load_dataset")
    test_path: str | None = Field(None, description="file with the texts held out; None splits `path`")
    split_column: str | None = Field(None, description="column that says `train` or `test`")
    subset: str | None = Field(None, description="configuration of a `datasets` data set")
    tokenizer: str | None = Field(None, description="Hugging Face name or folder; None takes the teacher's")
    max_length: int = Field(64, ge=2, description="tokens a text is cut at")
    test_size: int = Field(3000, ge=1, description="texts held out when the data brings no test split")
    seed: int = Field(0, ge=0, description="decides which texts are held out")
    replay: Replay | None = Field(None, description="older data to train on again, against forgetting")


class Text(Texts):
    """Labelled texts: classes of whole texts."""

    kind: Literal["text"]
    text_column: str = "text"
    label_column: str = "label"


class Tokens(Texts):
    """Words with a label each, such as named entities: token classification."""

    kind: Literal["tokens"]
    words_column: str = "tokens"
    labels_column: str = "tags"
    class_names: list[str] | None = Field(None, description="needed where the labels are numbers")


class Pairs(Texts):
    """Source and target texts, such as translations: sequence to sequence."""

    kind: Literal["pairs"]
    source_column: str = "source"
    target_column: str = "target"
    prefix: str = Field("", description="put before every source")
    max_target_length: int = Field(64, ge=2, description="tokens a target is cut at")


class Language(Texts):
    """Plain texts for language models, causal or masked."""

    kind: Literal["language"]
    task: Literal["causal-lm", "masked-lm"] = "causal-lm"
    text_column: str = "text"
    pack: bool = Field(False, description="fill every row with texts one after the other")
    mask_share: float = Field(0.15, gt=0, le=1, description="tokens that a masked model must find")


KINDS = ("digits", "text", "tokens", "pairs", "language")
Data = Annotated[Digits | Text | Tokens | Pairs | Language, Field(discriminator="kind")]
