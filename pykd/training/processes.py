"""The processes that `accelerate launch` or torchrun started, as one: what one does for all, and what all agree on."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")

#: How long a process waits for the others: the first may measure or prune for hours while the rest have nothing to do.
PATIENCE = timedelta(days=7)
#: What launchers tell their processes; a process that one of these starts for itself must not take it as said to it.
TOLD = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_DYNAMO_BACKEND",
)


_alone: ContextVar[bool] = ContextVar("alone", default=False)


def launched() -> bool:
    """Whether a launcher started this process, and it is not doing something for all (:meth:`Processes.once`)."""
    if _alone.get():
        return False
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def on_cpu() -> bool:
    """Whether launched processes are to compute on the CPU: by `--cpu`, or for want of anything else."""
    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    accelerator: Any = getattr(torch, "accelerator", torch.cuda)
    return wanted or not accelerator.is_available()


def zero_configured() -> bool:
    """Whether the launcher is to run DeepSpeed (`accelerate launch --use_deepspeed`)."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes")


def environment() -> dict[str, str]:
    """This process's environment without what a launcher told it, for a process of its own."""
    return {name: value for name, value in os.environ.items() if name not in TOLD}


class Processes:
    """All processes of a run, seen from one of them: number ``rank`` of ``count``; alone where nothing was launched.

    >>> together = Processes()
    >>> together.rank, together.count, together.shared(lambda: 3)
    (0, 1, 3)
    """

    rank, count = 0, 1
    device = torch.device("cpu")

    def __init__(self) -> None:
        if launched():
            from accelerate import PartialState

            if zero_configured() and on_cpu():  # accelerate knows DeepSpeed on accelerators alone, but takes a backend
                state = PartialState(backend="gloo", timeout=PATIENCE)
            else:
                state = PartialState(cpu=on_cpu(), timeout=PATIENCE)
            self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    def agree(self, value: Value) -> Value:
        """What the first process has for ``value``."""
        if self.count == 1 or _alone.get():
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, device=self.device)
        return box[0]

    def once(self, act: Callable[[], Value]) -> Value | None:
        """``act()`` in the first process, for which the others wait: its result there, None in them; errors in all.

        What is trained inside is trained by that process alone.
        """
        done: Value | None = None
        error: Exception | None = None
        if self.rank == 0:
            before = _alone.set(True)
            try:
                done = act()
            except Exception as caught:
                error = caught
            finally:
                _alone.reset(before)
        elsewhere = self.agree(None if error is None or self.count == 1 else _portable(error))
        if error is not None:
            raise error
        if elsewhere is not None:
            raise elsewhere
        return done

    def shared(self, act: Callable[[], Value]) -> Value:
        """Like :meth:`once`, with the result in every process."""
        return self.agree(self.once(act))  # type: ignore[return-value]


def _portable(error: Exception) -> Exception:
    """The error as another process can have it."""
    try:
        again: Any = pickle.loads(pickle.dumps(error))
        return error if str(again) == str(error) else RuntimeError(str(error))
    except Exception:  # whatever its constructor asks for
        return RuntimeError(f"{type(error).__name__}: {error}")
