"""One run between two steps: what a step needs, what it leaves, and what of that a checkpoint must hold."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykd.data.bundle import DataBundle
from pykd.errors import ArtifactError, TrainingError
from pykd.models.adapter import move
from pykd.training.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from pykd.training.config import AUTOCAST, TrainConfig, learning_rate
from pykd.training.history import History
from pykd.training.optimizer import adamw
from pykd.training.rng import get_rng
from pykd.training.source import Batch, Loader, RngState, Source, batch_to_float

logger = logging.getLogger(__name__)

LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Any]]]


class Run:
    """Model, optimizer, data and history of one run."""

    def __init__(
        self,
        model: nn.Module,
        data: DataBundle | Loader,
        config: TrainConfig,
        settings: dict[str, Any],
        checkpoint_dir: str | Path | None,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.modules = {name: module.to(self.device) for name, module in (modules or {}).items()}
        self.trained = nn.ModuleList([model, *self.modules.values()])
        self.directory = Path(checkpoint_dir) if checkpoint_dir is not None else None
        self.source = Source(data, batch_size=config.batch_size, seed=config.seed)
        self.optimizer = adamw(self.trained, lr=config.lr, weight_decay=config.weight_decay)
        self.history = History(total_steps=config.total_steps(self.source.steps_per_epoch))
        self.identity = {
            "config": config.to_dict() | {"checkpoint_steps": None},
            "settings": settings,
            "data": self.source.fingerprint(),
            "total_steps": self.history.total_steps,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        if self.modules:
            sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in self.modules.items()}
            self.identity["modules"] = sizes

    def step(self, loss_fn: LossFunction, batch: Batch) -> None:
        """Forward, backward, update; the weights change only when loss and gradient are finite."""
        began = time.perf_counter()
        number = self.history.steps
        rate = learning_rate(
            number, self.history.total_steps, peak=self.config.lr, warmup_ratio=self.config.warmup_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss, noted = loss_fn(self.model, move(batch, self.device))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.clip_norm or float("inf"))
        values = {"loss": float(loss.detach()), "grad_norm": float(norm)}  # the step's only wait for the device
        self._require_finite(values, number)
        self.optimizer.step()
        record = {"step": float(number + 1), "epoch": (number + 1) / self.source.steps_per_epoch, "lr": rate}
        self.history.records.append(record | values | batch_to_float(noted))
        self.history.seconds += time.perf_counter() - began

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint at the end of the run and every ``checkpoint_steps``, by default every epoch."""
        every = self.config.checkpoint_steps or self.source.steps_per_epoch
        if self.history.steps % every == 0 or self.history.steps == self.history.total_steps:
            self.save()

    def save(self) -> None:
        """Write everything the next step depends on."""
        if self.directory is None:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for prefix, module in self.modules.items():
            tensors |= {f"modules.{prefix}/{name}": tensor for name, tensor in module.state_dict().items()}
        slots, optimizer = optimizer_tensors(self.optimizer)
        states, rng = get_rng()
        tensors |= {f"optimizer.{name}": tensor for name, tensor in slots.items()}
        tensors |= {f"rng.{name}": tensor for name, tensor in states.items()}
        plain = {
            "identity": self.identity,
            "optimizer": optimizer,
            "rng": rng,
            "history": {"records": self.history.records, "seconds": self.history.seconds},
        }
        save_checkpoint(self.directory, tensors, plain, step=self.history.steps)

    def refuse_other(self) -> None:
        """Never overwrite another run's checkpoint."""
        if self.directory is not None and has_checkpoint(self.directory):
            raise ArtifactError(
                f"checkpoint_dir {self.directory} already holds a run: pass resume=True to continue it, "
                "or choose another directory"
            )

    def resume(self) -> RngState | None:
        """Load weights, optimizer and history; the random state of that moment, or None when there is no checkpoint."""
        if self.directory is None:
            raise ValueError("resume=True needs checkpoint_dir, the directory that the interrupted run wrote to")
        if not has_checkpoint(self.directory):
            logger.info("no checkpoint in %s: starting from the first step", self.directory)
            return None
        tensors, plain = load_checkpoint(self.directory)
        for name in self.identity | plain["identity"]:
            mine, theirs = self.identity.get(name), plain["identity"].get(name)
            if theirs != mine:
                raise ArtifactError(
                    f"checkpoint {self.directory} belongs to another run: {name} was {theirs}, is now {mine}; "
                    "resume with the same settings and data, or choose another directory"
                )
        self.model.load_state_dict(_part(tensors, "model."))
        for name, module in self.modules.items():
            module.load_state_dict(_part(tensors, f"modules.{name}/"))
        restore_optimizer(self.optimizer, _part(tensors, "optimizer."), plain["optimizer"])
        self.history.records, self.history.seconds = plain["history"]["records"], plain["history"]["seconds"]
        logger.info("resumed at step %d of %d", self.history.steps, self.history.total_steps)
        return _part(tensors, "rng."), plain["rng"]

    def stopped(self, label: str) -> str:
        """Save after Ctrl-C; the sentence for the user."""
        self.save()
        done = f"{label} stopped after step {self.history.steps} of {self.history.total_steps}"
        return done + (f"; checkpoint in {self.directory}, continue with resume=True" if self.directory else "")

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=AUTOCAST[self.config.autocast])

    def _require_finite(self, values: dict[str, float], number: int) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                continue
            what = "gradient" if name == "grad_norm" else name
            raise TrainingError(
                f"the {what} is {value} at step {number + 1} of {self.history.total_steps}: try a lower lr "
                f"(now {self.config.lr:g}), a smaller clip_norm, no autocast, or look for NaN in the inputs"
            )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
