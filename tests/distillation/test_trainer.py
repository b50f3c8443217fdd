"""DistillationTrainer on a tiny real BERT: loss, accumulation, saving and resuming, callbacks, what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import pykd

CONFIG = {"vocab_size": 30, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
          "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16}  # fmt: skip


def bert(hidden: int, seed: int, labels: int = 3) -> Any:
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(seed)
    return BertForTokenClassification(BertConfig(hidden_size=hidden, num_labels=labels, **CONFIG))


def rows() -> list[dict[str, torch.Tensor]]:
    """24 rows, of which unequal shares of the positions count."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for row in range(24):
        labels = torch.randint(3, (8,), generator=generator)
        labels[1 + row % 7 :] = -100
        found.append({"input_ids": torch.randint(30, (8,), generator=generator), "labels": labels})
    return found


def train(folder: Path, *, resume: str | None = None, student: Any = None, **options: Any) -> tuple[Any, Any]:
    from transformers import TrainingArguments

    settings: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 6}
    settings |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    extra = {
        name: options.pop(name) for name in ("temperature", "alpha", "callbacks", "eval_dataset") if name in options
    }
    trainer = pykd.DistillationTrainer(
        student or bert(16, 1), TrainingArguments(str(folder), **settings | options), teacher=bert(24, 0),
        train_dataset=rows(), **extra,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, trainer.model.state_dict()


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], **tolerance: float) -> None:
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **tolerance)


def test_the_loss_is_kd_loss_and_the_teacher_stays_as_it_is(tmp_path: Path) -> None:
    student, teacher = bert(16, 1), bert(24, 0).eval()
    batch = {name: torch.stack([row[name] for row in rows()[:6]]) for name in ("input_ids", "labels")}
    trainer, _ = train(tmp_path, student=copy.deepcopy(student), temperature=3.0, alpha=0.7)
    with torch.no_grad():
        scores, wanted = (model(input_ids=batch["input_ids"]).logits for model in (student.eval(), teacher))
    want = pykd.kd_loss(scores, wanted, batch["labels"], temperature=3.0, alpha=0.7)
    torch.testing.assert_close(trainer.compute_loss(student, dict(batch)), want)
    loss, output = trainer.compute_loss(student, dict(batch), return_outputs=True)
    assert output.logits.shape == (6, 8, 3) and torch.isfinite(loss)
    same(trainer.teacher.state_dict(), teacher.state_dict())
    assert not trainer.teacher.training and all(p.grad is None for p in trainer.teacher.parameters())


def test_parts_of_a_batch_are_the_whole_batch(tmp_path: Path) -> None:
    trainer, whole = train(tmp_path)
    parts = train(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    same(parts[1], whole, rtol=1e-3, atol=1e-5)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, parts[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]


def test_a_saved_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    _, whole = train(tmp_path / "a", save_strategy="steps", save_steps=2)
    assert (tmp_path / "a" / "checkpoint-2" / "model.safetensors").exists()
    _, resumed = train(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"))
    same(resumed, whole, rtol=0, atol=0)


def test_callbacks_and_evaluation_are_the_trainers(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            Count.steps += 1

    trainer, _ = train(tmp_path, callbacks=[Count()], eval_dataset=rows()[:4])
    assert Count.steps == 4
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows()[:4]).predictions.shape == (4, 8, 3)


def test_models_that_do_not_fit_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the student has 4 classes, the teacher 3"):
        train(tmp_path, student=bert(16, 1, labels=4))
    with pytest.raises(ValueError, match=r"temperature must be above 0 and alpha in 0\.\.1, got 0 and 0\.5"):
        train(tmp_path, temperature=0)
