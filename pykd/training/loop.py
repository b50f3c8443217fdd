"""The one training loop: every verb that trains calls :func:`fit` with its own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pykd.data.bundle import DataBundle
from pykd.training.config import TrainConfig
from pykd.training.history import History
from pykd.training.interrupt import deferred_interrupt
from pykd.training.progress import Progress
from pykd.training.rng import preserved_rng
from pykd.training.run import LossFunction, Run
from pykd.training.source import Loader


def fit(
    model: nn.Module,
    data: DataBundle | Loader,
    loss_fn: LossFunction,
    config: TrainConfig | None = None,
    *,
    modules: dict[str, nn.Module] | None = None,
    settings: dict[str, Any] | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    label: str = "train",
) -> History:
    """Train ``model`` in place by AdamW with warm-up, cosine decay and clipping; resumable to the bit on a CPU.

    loss_fn(model, batch) returns the scalar loss and what to note beside it. data is a bundle, or a loader of batches
    (dicts of tensors). modules: what the loss function uses and should be trained too without being part of the model
    (learned projections), by name; they are moved to the model's device, clipped together with the model, kept in the
    checkpoints, and left trained.

    With ``checkpoint_dir`` a checkpoint is written every ``config.checkpoint_steps`` steps, at Ctrl-C (after the step,
    then KeyboardInterrupt) and at the end; ``resume=True`` continues from it with the same data order, optimizer and
    random state. It is refused when config, data or ``settings`` (JSON-able values that the loss depends on) were
    others. progress: True, False, or None for a bar only on a terminal (stderr); unless it is False the log gets a line
    every minute. Python's, NumPy's and torch's global generators are left as they were.

    Raises TrainingError at a loss or gradient that is not finite (the weights are those of the last good step),
    ArtifactError when ``checkpoint_dir`` holds another run.

    >>> from torch import nn, randn, randint
    >>> batches = [{"x": randn(8, 4), "labels": randint(3, (8,))} for _ in range(5)]
    >>> loss = lambda model, batch: (nn.functional.cross_entropy(model(batch["x"]), batch["labels"]), {})
    >>> fit(nn.Linear(4, 3), batches, loss, TrainConfig(epochs=2), progress=False).steps
    10
    """
    config = config or TrainConfig()
    run = Run(model, data, config, settings or {}, checkpoint_dir, modules)
    was_training = [(module, module.training) for module in (model, *run.modules.values())]
    with preserved_rng(), deferred_interrupt() as interrupted:
        if not resume:
            run.refuse_other()
        rng = run.resume() if resume else None
        run.trained.train()
        try:
            with Progress(run.history, label, show=progress) as shown:
                for batch in run.source.stream(run.history.steps, run.history.total_steps, rng):
                    run.step(loss_fn, batch)
                    shown.step()
                    if interrupted():
                        raise KeyboardInterrupt(run.stopped(label))
                    run.checkpoint_if_due()
        finally:
            for module, training in was_training:
                module.train(training)
    return run.history
