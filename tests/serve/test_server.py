"""`pykd serve` as a process: it starts, answers, and ends without losing a request."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pykd.serve import Settings
from pykd.serve.app import create_app
from pykd.serve.server import bound, serve

from .conftest import TEXTS
from .running import listening

TOKEN = "a-token-of-24-characters"


@contextlib.contextmanager
def running(*words: str, port: int, token: str = "") -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"PYKD_TOKEN": token} if token else {})}
    command = [sys.executable, "-m", "pykd", "serve", *words, "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200  # a machine that does much else
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, "the service did not come up"
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_it_answers_and_ends_gracefully(folders: dict[str, Path]) -> None:
    answers = dict[str, httpx.Response]()
    with bound("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def send(name: str) -> None:
        answers[name] = httpx.post(f"{url}/predict", json={"text": "plays music"}, headers=bearer)

    def until(path: str, sign: Callable[[httpx.Response], bool]) -> None:
        while not sign(httpx.get(url + path, headers=bearer)):
            time.sleep(0.02)

    bearer = {"Authorization": f"Bearer {TOKEN}"}
    with running(str(folders["text"]), "--batch-window-ms", "3000", port=port, token=TOKEN) as process:
        assert httpx.post(f"{url}/predict", json={"text": "a"}).status_code == 401
        under_way = threading.Thread(target=send, args=("under way",))
        under_way.start()
        until("/metrics", lambda answer: 'pykd_waiting_inputs{model="text"} 1.0' in answer.text)
        process.send_signal(signal.SIGTERM)
        until("/healthz", lambda answer: answer.status_code == 503)
        send("late")
        under_way.join()
        assert process.wait(timeout=100) == 0
        assert "requests are under way" in process.stderr.read()  # type: ignore[union-attr]
    assert answers["under way"].status_code == 200
    assert json.loads(answers["under way"].text)["predictions"][0]["label"] in ("images", "sound", "net")
    assert answers["late"].status_code == 503
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


def test_models_that_compute_in_parallel_mix_nothing_up(folders: dict[str, Path]) -> None:
    with bound("127.0.0.1", 0) as free:
        port = free.getsockname()[1]

    def score(text: str) -> dict[str, float]:
        answer = httpx.post(f"http://127.0.0.1:{port}/predict", json={"text": text, "top": 3}).json()
        return {each["label"]: each["score"] for each in answer["predictions"][0]["top"]}

    words = ("--parallel", "2", "--threads", "2", "--batch-window-ms", "0")
    with running(str(folders["text"]), *words, port=port), ThreadPoolExecutor(8) as clients:
        alone = {text: score(text) for text in TEXTS}
        for text, found in zip(TEXTS * 20, clients.map(score, TEXTS * 20), strict=True):
            assert found == pytest.approx(alone[text], abs=1e-4)
    assert len({tuple(sorted(each.items())) for each in alone.values()}) == len(TEXTS)


def test_a_head_that_does_not_end_or_has_no_end_takes_no_connection() -> None:
    app = create_app(Settings(body_timeout_s=0.5))
    with listening(app) as address, contextlib.ExitStack() as stack:
        where = ("127.0.0.1", int(address.rpartition(":")[2]))
        silent, slow, after, endless = (
            stack.enter_context(socket.create_connection(where, timeout=20)) for _ in range(4)
        )
        begun = time.monotonic()
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        after.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert after.recv(4096).startswith(b"HTTP/1.1 200 OK")
        after.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert silent.recv(9) == slow.recv(9) == b"" and after.recv(4096) == b""
        assert 0.4 < time.monotonic() - begun < 15
        with contextlib.suppress(ConnectionError):
            endless.sendall(b"GET /healthz HTTP/1.1\r\n" + b"X-Endless: 0\r\n" * 10_000)
            assert endless.recv(9) == b""
        patient = stack.enter_context(httpx.Client(base_url=address))
        assert [patient.get("/healthz").status_code for _ in range(3)] == [200] * 3


def test_an_address_that_cannot_be_listened_at() -> None:
    with bound("localhost", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"localhost, port {port} cannot be listened at .* choose another"):
            serve(Settings(host="localhost", port=port))
