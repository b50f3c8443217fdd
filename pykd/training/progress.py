"""How a long run shows that it lives: a bar on a terminal, and a line in the log every minute."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from typing_extensions import Self

from pykd.training.history import History

logger = logging.getLogger(__name__)

#: Seconds between two lines in the log.
LOG_SECONDS = 60.0


class Progress:
    """Shows the steps of a run as they are done: on a terminal (stderr) as a bar with rate and time left, and in the
    log, which is all there is when the output goes to a file, once every ``LOG_SECONDS``.

    show: True, False (neither bar nor log), or None for a bar only on a terminal.

    >>> history = History(total_steps=1)
    >>> with Progress(history, "train", show=False) as progress:
    ...     history.records.append({"step": 1.0, "loss": 0.5})
    ...     progress.step()
    """

    def __init__(self, history: History, label: str, *, show: bool | None) -> None:
        from tqdm import tqdm

        self.history, self.label = history, label
        self.began = self.logged = time.monotonic()
        self.first = history.steps
        self.quiet = show is False
        disable = None if show is None else not show
        total, done = history.total_steps, history.steps
        self.bar = tqdm(total=total, initial=done, desc=label, unit="step", disable=disable, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def step(self) -> None:
        """The history has changed: by one more step, or by steps that were taken back."""
        if self.history.records:
            self.bar.set_postfix(loss=f"{self.history.records[-1]['loss']:.4f}", refresh=False)
        self.first = min(self.first, self.history.steps)
        self.bar.update(self.history.steps - self.bar.n)
        now = time.monotonic()
        if now - self.logged >= LOG_SECONDS and not self.quiet and self.history.records:
            self.logged = now
            logger.info("%s", self.sentence(now - self.began))

    def sentence(self, seconds: float) -> str:
        """Step, loss, rate and time left after so many seconds of this process."""
        done, total = self.history.steps, self.history.total_steps
        each = seconds / max(1, done - self.first)
        left = round(each * (total - done))
        return (
            f"{self.label}: step {done} of {total}, loss {self.history.records[-1]['loss']:.4f}, "
            f"{each:.2f} s a step, {left // 60}:{left % 60:02d} min left"
        )
