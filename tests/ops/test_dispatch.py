"""What `build_info` says of an installation."""

from __future__ import annotations

import platform

import pytest

import pykd


def test_a_processor_without_tuned_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert pykd.build_info()["tuning"].startswith("untuned on aarch64")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert "untuned" not in pykd.build_info()["tuning"]
