"""Where data comes from: the embedded digits, Hugging Face data sets, local files. All become a DataBundle."""

from __future__ import annotations

from pykd.data.bundle import DataBundle, batches
from pykd.data.digits import load_digits
from pykd.data.language import load_language
from pykd.data.pairs import load_pairs
from pykd.data.replay import with_replay
from pykd.data.text import load_text
from pykd.data.tokens import load_tokens

__all__ = [
    "DataBundle",
    "batches",
    "load_digits",
    "load_language",
    "load_pairs",
    "load_text",
    "load_tokens",
    "with_replay",
]
