"""What the service refuses to start with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pykd.serve import Settings

TOKEN = "abcdefgh-ABCDEFGH"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_token(host: str) -> None:
    assert Settings(host=host).loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_anything_else_demands_one(host: str) -> None:
    with pytest.raises(ValueError, match=f"host '{host}' can be reached from other machines: set a token"):
        Settings(host=host)
    assert not Settings(host=host, token=TOKEN).loopback


@pytest.mark.parametrize("token", ["", "short", "with blanks in between", "umlauts-äöüäöüäöü"])
def test_a_token_is_long_and_visible(token: str) -> None:
    with pytest.raises(ValueError, match="the token must be at least 16 visible ASCII characters"):
        Settings(token=token)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_inputs", 0), ("max_tokens", 1), ("batch_window_ms", -1), ("max_queue", 63), ("threads", 0), ("parallel", 0),
     ("timeout_s", 0), ("drain_s", float("nan"))],
)  # fmt: skip
def test_limits_limit_something(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least"):
        Settings(**{field: value})


def test_roots_are_folders(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert Settings(roots=(tmp_path / "link",)).roots == (tmp_path.resolve(),)
    with pytest.raises(ValueError, match="is not a folder: name one that exists"):
        Settings(roots=(tmp_path / "none",))
