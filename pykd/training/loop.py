"""The one training loop: every verb that trains calls :func:`fit` with its own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from pykd.data.bundle import DataBundle
from pykd.errors import TrainingError
from pykd.training.config import TrainConfig
from pykd.training.events import EventLog
from pykd.training.guard import Guard
from pykd.training.history import History
from pykd.training.interrupt import deferred_interrupt
from pykd.training.progress import Progress
from pykd.training.pruner import Pruner, attached
from pykd.training.rng import preserved_rng
from pykd.training.run import LossFunction, Run
from pykd.training.source import Loader
from pykd.training.watch import Validate, Watch


def fit(
    model: nn.Module,
    data: DataBundle | Loader,
    loss_fn: LossFunction,
    config: TrainConfig | None = None,
    *,
    modules: dict[str, nn.Module] | None = None,
    validate: Validate | None = None,
    guard: Guard | None = None,
    prune: Pruner | None = None,
    settings: dict[str, Any] | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    log_file: str | Path | None = None,
    find_unused_parameters: bool = False,
    progress: bool | None = None,
    label: str = "train",
) -> History:
    """Train ``model`` in place by AdamW with warm-up, cosine decay and clipping; resumable to the bit on a CPU.

    loss_fn(model, batch) returns the scalar mean loss and what to note beside it. data is a bundle, or a loader of
    batches (dicts of tensors). modules: what the loss function uses and should be trained too without being part of the
    model (learned projections), by name; they are moved to the model's device, clipped together with the model, kept in
    the checkpoints, and left trained. In the processes of ``accelerate launch`` or torchrun the run is one on all of
    them; find_unused_parameters: DDP is not to wait for gradients of parameters that a loss does not reach.

    validate(model) returns metrics by name every ``config.validate_steps`` steps; the first, or the guard's, decides
    which model is the best. With ``guard`` a run that loses too much goes back to its best state with a lower learning
    rate, in the end stops early, and always leaves the best model; every decision is in ``history.validations``.

    prune: sparsity that rises during the run (:class:`pykd.pruning.Gradual`); the model is sparse afterwards. The best
    model is then the best of those with the final sparsity, and a guard compares no others: while sparsity rises it
    keeps the newest model, to go back to if a loss is not finite. prune does not go with FSDP2.

    With ``checkpoint_dir`` a checkpoint is written every ``config.checkpoint_steps`` steps, for every new best model,
    at Ctrl-C (after the step, then KeyboardInterrupt) and at the end; ``resume=True`` continues from the newest with
    the same data order, optimizer and random state. It is refused when config, data or ``settings`` (JSON-able values
    that the loss depends on) were others. log_file: every step and validation as a JSON line, for ``pykd monitor``.
    progress: True, False, or None for a bar only on a terminal (stderr); unless it is False the log gets a line every
    minute. Python's, NumPy's and torch's global generators are left as they were.

    Raises TrainingError at a loss or gradient that is not finite and that no guard takes back (the weights are those of
    the last good step; under FSDP2 and DeepSpeed, which train a copy, those of before, and the last good ones are in
    the checkpoints), ArtifactError when ``checkpoint_dir`` holds another run or the disk refuses a checkpoint.

    >>> from torch import nn, randn, randint
    >>> batches = [{"x": randn(8, 4), "labels": randint(3, (8,))} for _ in range(5)]
    >>> loss = lambda model, batch: (nn.functional.cross_entropy(model(batch["x"]), batch["labels"]), {})
    >>> fit(nn.Linear(4, 3), batches, loss, TrainConfig(epochs=2), progress=False).steps
    10
    """
    config = config or TrainConfig()
    watched: dict[str, Any] = {"guard": guard.to_dict()} if guard is not None else {}
    if prune is not None:
        watched["prune"] = prune.to_dict()
    with preserved_rng(), attached(prune, model):
        run = Run(model, data, config, (settings or {}) | watched, checkpoint_dir, modules, prune,
                  find_unused_parameters=find_unused_parameters)  # fmt: skip
        log = EventLog(log_file if run.engine.rank == 0 else None, label)
        watch = Watch(run, validate, guard, log)
        if not resume:
            run.store.refuse_other()
        else:
            run.resume()
        history = run.history
        log.write("begin", step=history.steps, total_steps=history.total_steps, resumed=resume)
        shown = progress if run.engine.rank == 0 else False
        with deferred_interrupt() as interrupted, training(run), Progress(history, label, show=shown) as bar:
            watch.check()
            while history.steps < history.total_steps and not watch.stopped:
                _advance(run, watch, loss_fn, log, bar, interrupted)
        watch.finish()
        run.finish()
    log.write("end", step=history.steps, kept_step=history.kept_step, outcome=history.outcome)
    return history


def _advance(
    run: Run, watch: Watch, loss_fn: LossFunction, log: EventLog, bar: Progress, interrupted: Callable[[], bool]
) -> None:
    """Steps until the end of the run, or until some were taken back and the batches begin again."""
    for parts in run.source.stream(run.history.steps, run.history.total_steps):
        try:
            run.step(loss_fn, parts)
        except TrainingError as error:
            watch.failed(error)
            return bar.step()
        log.write("step", **run.history.records[-1])
        back = watch.check()
        bar.step()
        if run.engine.total([float(interrupted())])[0]:
            raise KeyboardInterrupt(run.stopped(bar.label))
        if back:
            return None
        run.checkpoint_if_due()
    return None


@contextmanager
def training(run: Run) -> Iterator[None]:
    """Everything that is trained in training mode, and afterwards in the mode it was in."""
    modes = [(module, module.training) for module in (run.model, *run.modules.values())]
    recomputing = switch_recomputing(run.owned) if run.config.gradient_checkpointing else nullcontext()
    for module in (run.owned, run.called, *run.modules.values()):
        module.train()
    try:
        with recomputing:
            yield
    finally:
        for module, mode in modes:
            module.train(mode)


@contextmanager
def switch_recomputing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing as Hugging Face models offer it; ValueError for a model that does not."""
    way = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers renamed it
    on = getattr(model, f"{way}_checkpointing_enable", None)
    if on is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} does not offer it, as Hugging Face models do; leave it out"
        )
    on(**{f"{way}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(model, f"{way}_checkpointing_disable")()
