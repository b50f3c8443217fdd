"""Where data comes from: the embedded digits, Hugging Face data sets, local files. All become a DataBundle."""

from __future__ import annotations

from pykd.data.bundle import DataBundle, batches
from pykd.data.digits import load_digits
from pykd.data.text import load_text

__all__ = ["DataBundle", "batches", "load_digits", "load_text"]
