"""Everything that the service is told at its start, checked before a model is loaded."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from pykd.monitoring import Thresholds

#: Characters that a token must have at least: it is all that stands between the network and the models.
LEAST_TOKEN = 16
#: Names by which a client on the same machine may call a service that listens on loopback.
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")


@dataclass(frozen=True)
class Settings:
    """Models, doors and limits of the service; every number is a limit per request unless it says otherwise.

    models: folders to serve, `FOLDER` or `NAME=FOLDER`. roots: folders below which a request may name a path; models
    that are served need not lie there. library: a Hugging Face cache, or a folder of folders and weight files, in which
    the reference models are looked for; offline: never ask the network for them.

    host, port: where to listen; anything but loopback demands a token. token: of at least 16 visible ASCII characters,
    demanded as `Authorization: Bearer TOKEN` from everyone once it is set.

    max_body_bytes, max_inputs (texts or images), max_text_chars (each), max_pixels (each image), max_request_pixels
    (all images of a request), max_tokens (each text is cut there, or where the model's own limit is), max_new_tokens
    (of a generated text).

    max_batch: inputs of several requests that are computed together; batch_window_ms: how long the first of them waits
    for company. max_queue: inputs waiting for a model; more are refused. threads: that compute; None: torch's choice.
    parallel: batches computed at once, which share the threads: one text after another by all threads is soonest done,
    several at once by fewer threads each are more a second where models are small.

    state: folder of what outlives the service: its log, baselines, jobs and their runs; None keeps nothing and starts
    no job. recipes: folder whose recipes may be started as jobs; max_jobs: so many at once. thresholds: of monitoring.

    body_timeout_s: for the head of a request to arrive, and for its body; timeout_s: for an answer; check_timeout_s:
    for a check of a model; drain_s: that requests under way have to finish after the first signal to stop.

    >>> Settings(host="0.0.0.0")
    Traceback (most recent call last):
        ...
    ValueError: host '0.0.0.0' can be reached from other machines: set a token (--token or PYKD_TOKEN) or use 127.0.0.1
    """

    models: tuple[str, ...] = ()
    roots: tuple[Path, ...] = ()
    library: Path | None = None
    offline: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    max_body_bytes: int = 8 << 20
    max_inputs: int = 64
    max_text_chars: int = 20_000
    max_pixels: int = 16 << 20
    max_request_pixels: int = 64 << 20
    max_tokens: int = 512
    max_new_tokens: int = 128
    max_batch: int = 16
    batch_window_ms: float = 1.0
    max_queue: int = 256
    threads: int | None = None
    parallel: int = 1
    state: Path | None = None
    recipes: Path | None = None
    max_jobs: int = 1
    thresholds: Thresholds = field(default_factory=Thresholds)
    body_timeout_s: float = 10.0
    timeout_s: float = 30.0
    check_timeout_s: float = 300.0
    drain_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_inputs", "max_text_chars", "max_pixels", "max_new_tokens", "max_batch"):
            self._at_least(name, 1)
        self._at_least("max_request_pixels", self.max_pixels)
        self._at_least("max_tokens", 2)
        self._at_least("batch_window_ms", 0)
        self._at_least("max_queue", self.max_inputs)
        self._at_least("max_jobs", 1)
        if self.recipes is not None and not self.recipes.is_dir():
            raise ValueError(f"recipes are looked for in {self.recipes}, which is not a folder: name one that exists")
        if self.recipes is not None and self.state is None:
            raise ValueError(f"the runs of the recipes in {self.recipes} need a folder: name one by --state")
        if self.threads is not None:
            self._at_least("threads", 1)
        self._at_least("parallel", 1)
        for name in ("body_timeout_s", "timeout_s", "check_timeout_s", "drain_s"):
            self._at_least(name, 0.001)
        if self.token is None and not self.loopback:
            raise ValueError(
                f"host {self.host!r} can be reached from other machines: set a token (--token or PYKD_TOKEN) or use "
                "127.0.0.1"
            )
        if self.token is not None and (len(self.token) < LEAST_TOKEN or not _visible(self.token)):
            raise ValueError(
                f"the token must be at least {LEAST_TOKEN} visible ASCII characters, got {len(self.token)} characters: "
                "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
            )
        object.__setattr__(self, "roots", tuple(Path(root).resolve() for root in self.roots))
        for root in self.roots:
            if not root.is_dir():
                raise ValueError(f"the root {root} is not a folder: name one that exists")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def _at_least(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _visible(token: str) -> bool:
    return all(33 <= ord(character) <= 126 for character in token)
