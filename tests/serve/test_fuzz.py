"""Requests drawn from the service's own description: none breaks it, and every answer is as described."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pykd.serve import Settings
from pykd.serve.app import create_app

#: The service answers to the names of its own machine only.
HOME = {"Host": "localhost"}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


LIMITS = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module", params=["text", "image"])
def api(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("root")
    app = create_app(
        Settings(models=(str(folders[request.param]),), roots=(root,), library=root, max_body_bytes=4000, max_inputs=3)
    )
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=HOME)


@pytest.mark.parametrize("kind", list(GenerationMode))
def test_every_answer_is_as_described(api: Any, kind: GenerationMode) -> None:
    tried = set()
    for found in api.get_all_operations():
        operation = found.ok()
        if kind is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing that could be wrong
        tried.add(operation.path)

        @LIMITS
        @given(case=operation.as_strategy(generation_mode=kind))
        def fuzz(case: Any) -> None:
            case.call_and_validate(headers=HOME, checks=CHECKS)

        fuzz()
    assert tried >= ({"/predict", "/test_model"} if kind is GenerationMode.NEGATIVE else {"/models", "/healthz"})
