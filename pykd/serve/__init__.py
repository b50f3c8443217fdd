"""The HTTP service: predictions, checks of models, metrics (extra `pykd[serve]`)."""

from __future__ import annotations

from pykd.serve.labels import decode_labels, encode_labels
from pykd.serve.settings import Settings

__all__ = ["Settings", "decode_labels", "encode_labels"]
