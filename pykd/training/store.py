"""Where the states of one run are kept: a checkpoint directory, or, for the best one alone, memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from pykd.errors import ArtifactError
from pykd.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint

State = tuple[dict[str, Tensor], dict[str, Any]]


class Store:
    """Keeps the newest states of a run and its best one. Without a directory only the best is kept, in memory."""

    def __init__(self, directory: str | Path | None, *, keep: int) -> None:
        self.directory = Path(directory) if directory is not None else None
        self.keep = keep
        self.saved_step: int | None = None  # in every process, whichever of them writes
        self._best: State | None = None

    def save(self, state: State, *, step: int, best: bool = False) -> None:
        """Keep a state. Raises ArtifactError, with the last good step in its sentence, when the disk refuses."""
        if self.directory is None:
            if best:
                self._best = copy.deepcopy(state)
            return
        try:
            save_checkpoint(self.directory, *state, step=step, keep=self.keep, best=best)
        except ArtifactError as error:
            good = f"the checkpoint of step {self.saved_step} is intact: " if self.saved_step is not None else ""
            raise ArtifactError(f"training stopped after step {step}: {good}{error}") from error

    def load(self, *, best: bool = False) -> State:
        """The newest state, or the best one."""
        if self.directory is not None:
            return load_checkpoint(self.directory, best=best)
        assert self._best is not None
        return copy.deepcopy(self._best)

    def refuse_other(self) -> None:
        """Never overwrite another run's checkpoints."""
        if self.directory is not None and has_checkpoint(self.directory):
            raise ArtifactError(
                f"checkpoint_dir {self.directory} already holds a run: pass resume=True to continue it, "
                "or choose another directory"
            )
