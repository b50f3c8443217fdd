"""`DistillationTrainer`: Hugging Face's Trainer with a teacher in the loss. Importing this imports transformers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import ModelOutput

from pykd.distillation.assemble import assemble
from pykd.distillation.beside import load_modules, save_modules
from pykd.distillation.methods import Methods, resolve
from pykd.distillation.teacher_cache import TeacherCache
from pykd.models.adapter import move, unwrap
from pykd.training.labels import check_batch, counted
from pykd.training.rng import preserved_rng


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """transformers.Trainer whose loss is a distillation's (Hinton et al. 2015, and every loss of :func:`pykd.distill`).

    teacher: one, or several whose terms are averaged by ``teacher_weights``; frozen, in eval mode, moved to the
    Trainer's device; ``teacher_scheme`` runs quantized copies. method: as in :func:`pykd.distill`, "logits", "hidden",
    "attention", "relation", "contrastive", a function, or several with their weights. What projections learn is trained
    by the Trainer's optimizer, kept in its checkpoints (``projections.safetensors``), and no part of the saved model.
    temperature > 0; alpha, 0..1: weight of the teacher's term, 1 - alpha that of the labels. student_tokenizer,
    teacher_tokenizer: must be equal where both are given; the logits may then differ in width by padding. Everything
    else is the Trainer's: TrainingArguments, callbacks, every ``report_to`` logger, resuming, accelerate's backends.
    Under gradient accumulation, and over processes, a batch weighs as many labels as it has of the whole step's
    (``num_items_in_batch``), so that parts of unequal size add up to the whole.

    Raises ValueError for models that do not fit together, values out of range, methods that write texts ("sequence",
    "on_policy") and cached teachers, which :func:`pykd.distill` takes, and for projections under FSDP or DeepSpeed.

    Example::

        args = TrainingArguments("out", num_train_epochs=3, per_device_train_batch_size=32)
        trainer = DistillationTrainer(student, args, teacher=teacher, train_dataset=rows, temperature=4.0, alpha=0.7,
                                      method={"logits": 1.0, "hidden": 0.5})
        trainer.train()
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *more: Any,
        teacher: nn.Module | Sequence[nn.Module],
        method: Methods = "logits",
        teacher_weights: Sequence[float] | None = None,
        teacher_scheme: str | None = None,
        temperature: float = 4.0,
        alpha: float = 0.5,
        student_tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        **options: Any,
    ) -> None:
        if temperature <= 0 or not 0 <= alpha <= 1:
            raise ValueError(f"temperature must be above 0 and alpha in 0..1, got {temperature!r} and {alpha!r}")
        methods = resolve(method)
        _refuse(methods, teacher, args, options)
        super().__init__(model, args, *more, **options)
        self.terms = assemble(
            unwrap(self.model),
            teacher,
            methods,
            teacher_weights=teacher_weights,
            teacher_scheme=teacher_scheme,
            temperature=temperature,
            alpha=alpha,
            student_tokenizer=student_tokenizer,
            teacher_tokenizer=teacher_tokenizer,
        )
        for each in self.terms.teachers:
            each.to(self.args.device).eval().requires_grad_(False)
        self._prepared, self._first_part = not self.terms.wanted, True
        self.model_accepts_loss_kwargs = True  # compute_loss weighs by num_items_in_batch, so the Trainer must not

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; with ``num_items_in_batch``, its share of the step's."""
        check_batch(inputs, classes=self.terms.classes)
        if not self._prepared:
            self._prepare(inputs)
        with self.terms.shown():
            mine = self.terms.look(model, inputs)
            loss = self.terms(model, inputs, mine=mine)[0]
        if num_items_in_batch is not None:
            processes = self.accelerator.num_processes if self._averages else 1
            loss = loss * (counted(model, inputs) * processes / max(1.0, float(num_items_in_batch)))
        return (loss, ModelOutput(logits=mine.logits)) if return_outputs else loss

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, which also trains the projections."""
        if not self._prepared:
            self._prepare(self._example())
        given = self.lr_scheduler is not None and self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*arguments, **options)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if new := [parameter for parameter in self._projected if id(parameter) not in known]:
            if given:
                raise ValueError(
                    "projections are trained as one more group of the optimizer, which a scheduler that is there "
                    "already does not know: pass optimizers=(optimizer, None), or leave both to the Trainer"
                )
            optimizer.add_param_group({"params": new, "weight_decay": self.args.weight_decay})
        return optimizer

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """The Trainer's; the projections' gradients begin at none, and end as the mean over the processes."""
        if self._first_part:
            for parameter in self._projected:
                parameter.grad = None
        loss: torch.Tensor = super().training_step(*arguments, **options)
        self._first_part = self.accelerator.sync_gradients
        if self._first_part and self.accelerator.num_processes > 1:
            for parameter in self._projected:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "mean")
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Model and projections are clipped together."""
        if not self.terms.modules:
            return super()._clip_grad_norm(model)
        trained = [*model.parameters(), *self._projected]
        return self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.terms.modules and self.args.should_save:
            save_modules(self.terms.modules, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / "optimizer.pt").exists():
            load_modules(self.terms.modules, Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _prepare(self, batch: dict[str, Any]) -> None:
        """Match layers and make projections for batches like this one."""
        example = move({name: value[:2] for name, value in batch.items()}, self.args.device)
        with self.terms.shown():
            self.terms.prepare(example, seed=self.args.seed)
        self._prepared = True
        if self.terms.modules and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "learned projections lie outside the model that FSDP or DeepSpeed takes apart: use a student of the "
                "teacher's width, method 'relation' or 'attention', or pykd.distill under FSDP2"
            )

    def _example(self) -> dict[str, Any]:
        """Two rows of the training set as a batch; no random state is used up."""
        if self.train_dataset is None:
            raise ValueError("hidden, attention, relation and contrastive need train_dataset, to see what models show")
        collate = self._get_collator_with_removed_columns(self.data_collator)
        with preserved_rng():
            batch: dict[str, Any] = collate(list(itertools.islice(iter(self.train_dataset), 2)))
        return batch

    @property
    def _projected(self) -> list[nn.Parameter]:
        return [parameter for module in self.terms.modules.values() for parameter in module.parameters()]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Labels of a step that count, in all processes; those that a causal model does not predict do not."""
        found = torch.tensor(sum(counted(self.model, batch) for batch in batch_samples), device=device)
        return self.accelerator.gather(found).sum() if self._averages else found

    @property
    def _averages(self) -> bool:
        """Whether gradients are averaged over processes, so that each must scale its loss up by their number."""
        return bool(self.args.average_tokens_across_devices) and self.accelerator.num_processes > 1


def _refuse(methods: Any, teacher: Any, args: Any, options: dict[str, Any]) -> None:
    """ValueError for what a Trainer cannot do, with what can."""
    for each in methods:
        if each.method.compares.endswith("sequences"):
            raise ValueError(
                f"method {each.name!r} trains on texts that a model writes, not on given batches: use pykd.distill"
            )
    if isinstance(teacher, TeacherCache):
        raise ValueError(
            "a cached teacher knows rows by their number, which a Trainer's batches lack: use pykd.distill"
        )
    if getattr(args, "label_smoothing_factor", 0) or options.get("compute_loss_func") is not None:
        raise ValueError(
            "label_smoothing_factor and compute_loss_func would replace the distillation's loss: pass a function as "
            "method= instead"
        )
