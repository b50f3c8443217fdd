"""Every op test that takes the fixture `isa` runs once at each instruction-set level that this CPU can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykd.ops.dispatch import native

LEVELS = native.isa_levels() if native is not None else ["reference"]


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if native is None:
        yield "reference"
        return
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
