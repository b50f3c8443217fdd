"""One run between two steps: what a step needs, what it leaves, and what of that a checkpoint must hold."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pykd.data.bundle import DataBundle
from pykd.errors import ArtifactError, TrainingError
from pykd.models.adapter import move
from pykd.training.checkpoint import has_checkpoint
from pykd.training.config import TrainConfig, learning_rate
from pykd.training.engine import engine_for
from pykd.training.history import History
from pykd.training.labels import counted
from pykd.training.optimizer import adamw, parameter_groups
from pykd.training.pruner import Pruner
from pykd.training.source import Batch, Loader, Part, Source, batch_to_float
from pykd.training.state import part
from pykd.training.store import State, Store

logger = logging.getLogger(__name__)

LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Any]]]

#: Settings that decide how a run is kept, not what it computes.
NOT_IDENTITY = {"checkpoint_steps": None, "keep_checkpoints": None}


class Run:
    """Model, optimizer, data and history of one run.

    ``owned`` holds the parameters that are trained: the model's own, but for FSDP2; ``called`` is the model as the loss
    function gets it.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DataBundle | Loader,
        config: TrainConfig,
        settings: dict[str, Any],
        checkpoint_dir: str | Path | None,
        modules: Mapping[str, nn.Module] | None = None,
        prune: Pruner | None = None,
        *,
        find_unused_parameters: bool = False,
    ) -> None:
        self.model, self.config, self.prune = model, config, prune
        device = next(model.parameters()).device
        self.engine = engine_for(config, device, find_unused_parameters=find_unused_parameters)
        self.source = Source(
            data,
            batch_size=config.batch_size,
            seed=config.seed,
            accumulate=config.accumulate,
            rank=self.engine.rank,
            processes=self.engine.processes,
            group_by_length=config.group_by_length,
        )
        self.owned = self.engine.own(model)
        if prune is not None and self.owned is not model:
            raise ValueError("prune needs whole weights in every process: run under DDP, not FSDP2 or DeepSpeed")
        if modules and not self.engine.takes_modules:
            raise ValueError(
                "learned projections lie outside the model that DeepSpeed takes apart: run under DDP or FSDP2, use "
                "a student of the teacher's width, or losses without projections"
            )
        self.modules = {name: module.to(self.engine.device) for name, module in (modules or {}).items()}
        optimizer = adamw(self.owned, lr=config.lr, weight_decay=config.weight_decay)
        self.called, self.optimizer = self.engine.prepare(self.owned, optimizer)
        mine = list(self.owned.parameters())
        for group in parameter_groups(self.modules.values(), weight_decay=config.weight_decay, apart_from=mine):
            self.optimizer.add_param_group(group)
        self.beside = [p for module in self.modules.values() for p in module.parameters()]
        self.lr_scale, self.unlabelled = 1.0, False
        self.store = Store(checkpoint_dir, keep=config.keep_checkpoints)
        self.history = History(total_steps=config.total_steps(self.source.steps_per_epoch))
        self.identity = {
            "config": config.to_dict() | NOT_IDENTITY,
            "settings": settings,
            "data": self.source.fingerprint(),
            "total_steps": self.history.total_steps,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        if self.engine.processes > 1:
            self.identity["processes"] = self.engine.processes
        if self.modules:
            sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in self.modules.items()}
            self.identity["modules"] = sizes

    def step(self, loss_fn: LossFunction, parts: list[Part]) -> None:
        """Forward, backward, update; the weights change only when loss and gradient are finite."""
        began = time.perf_counter()
        number = self.history.steps
        config, engine = self.config, self.engine
        pruned = self.prune.step(self.owned, number, self.history.total_steps) if self.prune is not None else {}
        rate = learning_rate(number, self.history.total_steps, peak=config.lr, warmup_ratio=config.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.lr_scale
        self.optimizer.zero_grad(set_to_none=True)
        noted = self._gradients(loss_fn, parts)
        engine.average(self.beside)
        trained = [*self.owned.parameters(), *self.beside]
        clipped = engine.clip(trained, self.optimizer, config.clip_norm or math.inf)
        norm, found = float(clipped), batch_to_float(noted)  # the step's only wait for the device
        found = dict(zip(found, engine.total(list(found.values())), strict=True))
        if engine.scales:
            found["skipped"] = float(not math.isfinite(norm))
            norm = norm if math.isfinite(norm) else 0.0
        self._require_finite({"loss": found["loss"], "grad_norm": norm}, number)
        if found["loss"] == 0.0:
            self._warn_of_labels(parts, number)
        engine.update(self.optimizer)
        record = {"step": float(number + 1), "epoch": (number + 1) / self.source.steps_per_epoch}
        self.history.records.append(record | {"lr": rate * self.lr_scale, "grad_norm": norm} | found | pruned)
        self.history.seconds += time.perf_counter() - began

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint at the end of the run and every ``checkpoint_steps``, by default every epoch."""
        every = self.config.checkpoint_steps or self.source.steps_per_epoch
        due = self.history.steps % every == 0 or self.history.steps == self.history.total_steps
        if due and self.store.saved_step != self.history.steps:
            self.save()

    def save(self, *, best: bool = False) -> None:
        """Keep everything the next step depends on, when there is a place for it."""
        if self.store.directory is None and not best:
            return
        state = self.state()
        problem = None
        if self.engine.rank == 0 or self.store.directory is None:
            try:
                self.store.save(state, step=self.history.steps, best=best)
            except ArtifactError as error:
                problem = str(error)
        problem = self.engine.agree(problem)
        if problem is not None:
            raise ArtifactError(problem)
        self.store.saved_step = self.history.steps if self.store.directory is not None else None

    def state(self) -> State:
        """Weights, optimizer and history: whole tensors, and JSON-able values."""
        tensors = {f"model.{name}": tensor for name, tensor in self.engine.weights(self.owned).items()}
        for prefix, module in self.modules.items():
            tensors |= {f"modules.{prefix}/{name}": tensor for name, tensor in module.state_dict().items()}
        slots, optimizer = self.engine.slots(self.optimizer)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in slots.items()}
        history = self.history
        plain = {
            "identity": self.identity,
            "optimizer": optimizer,
            "scaler": self.engine.scale(),
            "lr_scale": self.lr_scale,
            "records": history.records,
            "validations": history.validations,
            "wrong": history.wrong,
            "seconds": history.seconds,
        }
        return tensors, plain

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one and it belongs to this run."""
        folder = self.store.directory
        if folder is None:
            raise ValueError("resume=True needs checkpoint_dir, the directory that the interrupted run wrote to")
        if not has_checkpoint(folder):
            logger.info("no checkpoint in %s: starting from the first step", folder)
            return
        tensors, plain = self.store.load()
        for name in self.identity | plain["identity"]:
            mine, theirs = self.identity.get(name), plain["identity"].get(name)
            if theirs != mine:
                raise ArtifactError(
                    f"checkpoint {folder} belongs to another run: {name} was {theirs}, is now {mine}; "
                    "resume with the same settings and data, or choose another directory"
                )
        self.restore((tensors, plain))
        self.history.validations, self.lr_scale = plain["validations"], plain["lr_scale"]
        self.history.wrong = plain.get("wrong")
        self.store.saved_step = self.history.steps
        logger.info("resumed at step %d of %d", self.history.steps, self.history.total_steps)

    def restore(self, state: State) -> None:
        """Weights, optimizer and the records of the steps as they were; not the validations, nor what they decided."""
        tensors, plain = state
        self.restore_weights(state)
        self.engine.restore_slots(self.optimizer, (part(tensors, "optimizer."), plain["optimizer"]))
        self.engine.restore_scale(plain["scaler"])
        self.history.records, self.history.seconds = plain["records"], max(self.history.seconds, plain["seconds"])

    def restore_weights(self, state: State) -> None:
        """Weights alone."""
        self.engine.restore_weights(self.owned, part(state[0], "model."))
        for name, module in self.modules.items():
            module.load_state_dict(part(state[0], f"modules.{name}/"))

    def stopped(self, label: str) -> str:
        """Save after Ctrl-C; the sentence for the user."""
        if self.store.saved_step != self.history.steps:
            self.save()
        done, folder = f"{label} stopped after step {self.history.steps} of {self.history.total_steps}", self.store
        return done + (f"; checkpoint in {folder.directory}, continue with resume=True" if folder.directory else "")

    def finish(self) -> None:
        """Hand the weights to the caller's model where a copy was trained."""
        if self.owned is not self.model:
            self.model.load_state_dict(self.engine.weights(self.owned))

    def _gradients(self, loss_fn: LossFunction, parts: list[Part]) -> dict[str, Any]:
        """Backward of the step's mean loss: each part weighs what it counts, over all parts of all processes."""
        engine = self.engine
        weights = [1.0]
        if len(parts) * engine.processes > 1:
            counts = [float(counted(self.model, batch)) if counts else 0.0 for batch, counts in parts]
            whole = max(1.0, engine.total([sum(counts)])[0])
            weights = [count / whole for count in counts]
        sums: dict[str, Any] = {}
        for index, ((batch, _), weight) in enumerate(zip(parts, weights, strict=True)):
            if weight == 0.0 and any(weights) and engine.processes == 1:
                continue
            with engine.partial(self.called, last=index == len(parts) - 1):
                with engine.autocast():
                    loss, noted = loss_fn(self.called, move(batch, engine.device))
                engine.backward(loss if weights == [1.0] else loss * (weight * engine.processes))
            for name, value in {"loss": loss, **noted}.items():
                value = value.detach() if isinstance(value, Tensor) else value
                sums[name] = value if weights == [1.0] else sums.get(name, 0.0) + weight * value
        return sums

    def _warn_of_labels(self, parts: list[Part], number: int) -> None:
        """Once a run: nothing is learned from batches without labels, which a loss of 0 does not tell."""
        if not self.unlabelled and not any(counted(self.model, batch) for batch, _ in parts):
            self.unlabelled = True
            logger.warning("step %d: no label of its batches counts (all are -100): nothing is learned", number + 1)

    def _require_finite(self, values: dict[str, float], number: int) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                continue
            what = "gradient" if name == "grad_norm" else name
            raise TrainingError(
                f"the {what} is {value} at step {number + 1} of {self.history.total_steps}: try a lower lr "
                f"(now {self.config.lr:g}), a smaller clip_norm, no autocast, or look for NaN in the inputs"
            )
