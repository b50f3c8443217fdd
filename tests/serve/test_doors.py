"""Who gets in, with how much, and what happens when the service is being stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import FastAPI

from .conftest import ask, client_of, predict

Make = Callable[..., FastAPI]
TOKEN = "a-token-of-24-characters"


def test_with_a_token_everything_but_health_demands_it(make_app: Make) -> None:
    app = make_app(host="0.0.0.0", token=TOKEN)
    assert ask(app, "GET", "/healthz").json() == {"detail": "ok"}
    for path in ("/models", "/metrics", "/openapi.json", "/none", "/predict"):
        for sent in ({}, {"Authorization": TOKEN}, {"Authorization": f"Bearer {TOKEN[:-1]}"},
                     {"Authorization": "Bearer é"}, {"Authorization": f"Basic {TOKEN}"}):  # fmt: skip
            answer = ask(app, "GET", path, headers={name: value.encode("latin-1") for name, value in sent.items()})
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["detail"] == "send the token: Authorization: Bearer TOKEN"
    allowed = ask(app, "GET", "/models", headers={"Authorization": f"Bearer {TOKEN}", "Host": "models.example.org"})
    assert allowed.status_code == 200 and TOKEN not in repr(app.state.pykd)
    paths = app.openapi()["paths"]
    assert paths["/predict"]["post"]["security"] == [{"token": []}] and paths["/healthz"]["get"]["security"] == []


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "[::1]", "LOCALHOST"])
def test_without_one_only_the_names_of_this_machine_work(make_app: Make, host: str) -> None:
    assert ask(make_app(), "GET", "/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example.org", "localhost.example.org:8000", "", "10.0.0.1"])
def test_a_page_of_someone_else_cannot_reach_in(make_app: Make, host: str) -> None:
    answer = ask(make_app(), "GET", "/models", headers={"Host": host})
    assert answer.status_code == 400 and "the names of its own machine only" in answer.json()["detail"]


@pytest.mark.parametrize(
    "sent",
    [{"Origin": "http://evil.example.org"}, {"Origin": "null"}, {"Origin": "http://localhost:3000"},
     {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}],
)  # fmt: skip
def test_a_page_of_someone_else_cannot_send_blindly(make_app: Make, sent: dict[str, str]) -> None:
    app, home = make_app(), {"Host": "localhost:8000"}
    for method, path in (("POST", "/feedback"), ("GET", "/verify_all_models"), ("GET", "/models")):
        answer = ask(app, method, path, headers={**home, **sent})
        assert answer.status_code == 403 and "a page of another site sent this" in answer.json()["detail"]
    assert ask(app, "GET", "/", headers={**home, **sent}).status_code == 200  # by a link
    bearer = {"Host": "localhost:8000", "Authorization": f"Bearer {TOKEN}"}
    assert ask(make_app(token=TOKEN), "GET", "/models", headers={**bearer, **sent}).status_code == 200


def test_its_own_page_is_no_stranger(make_app: Make) -> None:
    sent = {"Host": "localhost:8000", "Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"}
    assert ask(make_app(), "GET", "/models", headers=sent).status_code == 200


def test_large_bodies_are_refused_by_what_they_say_and_by_what_they_are(make_app: Make) -> None:
    app = make_app("text", max_body_bytes=1000)
    assert predict(app, text="music").status_code == 200

    async def drops() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    for content in (b" " * 1001, drops()):
        answer = ask(app, "POST", "/predict", content=content)
        assert answer.status_code == 413 and answer.json()["detail"] == "the body has more than 1000 bytes: send less"


def test_a_body_that_dawdles_is_not_waited_for(make_app: Make) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    answer = ask(make_app(body_timeout_s=0.1), "POST", "/predict", content=slow())
    assert answer.status_code == 408 and answer.json()["detail"] == "the body did not arrive within 0.1 s"


def test_a_body_that_breaks_off_is_refused(make_app: Make) -> None:
    messages = iter([{"type": "http.request", "body": b'{"text"', "more_body": True}, {"type": "http.disconnect"}])
    sent = []

    async def receive() -> dict[str, object]:
        return next(messages)

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [(b"host", b"localhost")]}
    asyncio.run(make_app()(scope, receive, send))
    assert sent[0]["status"] == 400 and b"the body ended early" in sent[1]["body"]  # type: ignore[operator]


def test_being_stopped_it_answers_what_is_under_way_and_refuses_the_rest(make_app: Make) -> None:
    app = make_app("text", batch_window_ms=300.0, max_batch=9)
    state = app.state.pykd

    async def scenario() -> list[httpx.Response]:
        async with client_of(app) as client:
            under_way = asyncio.create_task(client.post("/predict", json={"text": "music"}))
            await asyncio.sleep(0.1)
            state.stop()
            assert not state.stopped
            late, health = await client.post("/predict", json={"text": "music"}), await client.get("/healthz")
            return [await under_way, late, health]

    under_way, late, health = asyncio.run(scenario())
    assert under_way.status_code == 200 and state.stopped
    assert late.status_code == 503 and late.json() == {"detail": "the service is being stopped"}
    assert late.headers["retry-after"] == "5" and late.headers["connection"] == "close"
    assert health.status_code == 503


def test_it_does_not_wait_for_ever(make_app: Make) -> None:
    state = make_app(drain_s=0.001).state.pykd
    state.in_flight = 1
    state.stop()
    asyncio.run(asyncio.sleep(0.01))
    assert state.stopped


def test_metrics_count_requests_by_route_and_keep_strangers_in_one_row(make_app: Make) -> None:
    app = make_app("text")
    predict(app, text="music")
    ask(app, "GET", "/secret/1"), ask(app, "GET", "/secret/2")
    answer = ask(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'pykd_requests_total{method="POST",path="/predict",status="200"} 1.0' in answer.text
    assert 'pykd_requests_total{method="(none)",path="(none)",status="404"} 2.0' in answer.text
    assert 'pykd_request_seconds_count{path="/predict"} 1.0' in answer.text and "secret" not in answer.text
