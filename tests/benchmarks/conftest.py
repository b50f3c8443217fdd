"""The tokenizer of the data tests."""

from __future__ import annotations

from ..data.conftest import tokenizer

__all__ = ["tokenizer"]
