"""`DistillationTrainer`: Hugging Face's Trainer with a teacher in the loss. Importing this imports transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from pykd.distillation.checks import common_classes
from pykd.models.adapter import logits_of, unwrap
from pykd.ops.kd_loss import kd_loss
from pykd.training.labels import IGNORED, predicts_next


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """transformers.Trainer whose loss is :func:`pykd.kd_loss` with a teacher (Hinton et al. 2015).

    teacher: frozen, in eval mode, moved to the Trainer's device. temperature > 0; alpha, 0..1: weight of the teacher's
    term, 1 - alpha that of the labels. student_tokenizer, teacher_tokenizer: must be equal where both are given; the
    logits may then differ in width by padding. Everything else is the Trainer's: TrainingArguments, callbacks, every
    ``report_to`` logger, resuming, accelerate's backends. Under gradient accumulation the loss is divided by the labels
    of the whole step (``num_items_in_batch``), so that parts of unequal size add up to the whole.

    Raises ValueError for models that do not fit together, or values out of range.

    Example::

        args = TrainingArguments("out", num_train_epochs=3, per_device_train_batch_size=32)
        trainer = DistillationTrainer(student, args, teacher=teacher, train_dataset=rows, temperature=4.0, alpha=0.7)
        trainer.train()
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *more: Any,
        teacher: nn.Module,
        temperature: float = 4.0,
        alpha: float = 0.5,
        student_tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        **options: Any,
    ) -> None:
        if temperature <= 0 or not 0 <= alpha <= 1:
            raise ValueError(f"temperature must be above 0 and alpha in 0..1, got {temperature!r} and {alpha!r}")
        super().__init__(model, args, *more, **options)
        self.classes = common_classes(
            unwrap(self.model), teacher, student_tokenizer=student_tokenizer, teacher_tokenizer=teacher_tokenizer
        )
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.temperature, self.alpha = temperature, alpha
        self.model_accepts_loss_kwargs = True  # compute_loss divides by num_items_in_batch, so the Trainer must not

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; with ``num_items_in_batch``, its share of the step's."""
        labels = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        inner: Any = unwrap(model)
        if hasattr(inner, "prepare_decoder_input_ids_from_labels") and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = inner.prepare_decoder_input_ids_from_labels(labels)
        output = model(**given)
        with torch.no_grad():
            wanted = logits_of(self.teacher, self.teacher(**given))[..., : self.classes]
        scores = logits_of(model, output)[..., : self.classes]
        shift = predicts_next(model)
        items = None
        if num_items_in_batch is not None:
            items = float(num_items_in_batch) / (self.accelerator.num_processes if self._averages else 1)
        loss: Tensor = kd_loss(
            scores, wanted, labels, temperature=self.temperature, alpha=self.alpha, shift=shift, num_items=items
        )
        return (loss, output) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Labels of a step that count, in all processes; those that a causal model does not predict do not."""
        shift = predicts_next(self.model)
        count = 0
        for batch in batch_samples:
            labels = batch["labels"][..., 1:] if shift else batch["labels"]
            count += int((labels != IGNORED).sum())
        counted = torch.tensor(count, device=device)
        if self._averages:
            counted = self.accelerator.gather(counted).sum()
        return counted

    @property
    def _averages(self) -> bool:
        """Whether gradients are averaged over processes, so that each must scale its loss up by their number."""
        return bool(self.args.average_tokens_across_devices) and self.accelerator.num_processes > 1
