"""DistillationTrainer on a tiny real BERT: loss, accumulation, saving and resuming, callbacks, what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import pykd
from pykd.data import DataBundle
from pykd.data.bundle import stack
from pykd.distillation import TeacherCache
from pykd.errors import ArtifactError

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
    names = ("temperature", "alpha", "callbacks", "eval_dataset", "method", "teacher", "teacher_weights",
             "teacher_scheme", "optimizers", "compute_loss_func", "train_dataset")  # fmt: skip
    extra = {"teacher": bert(24, 0), "train_dataset": rows()}
    extra |= {name: options.pop(name) for name in names if name in options}
    trainer = pykd.DistillationTrainer(
        student or bert(16, 1), TrainingArguments(str(folder), **settings | options), **extra
    )
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
    its = trainer.terms.teachers[0]
    same(its.state_dict(), teacher.state_dict())
    assert not its.training and all(p.grad is None for p in its.parameters())


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


LAYERS = {"logits": 1.0, "hidden": 0.5, "attention": 0.5, "relation": 0.1, "contrastive": 0.1}


def test_losses_by_layers_are_those_of_distill(tmp_path: Path) -> None:
    data = DataBundle(rows(), rows()[:4], stack, ["a", "b", "c"], "rows", fingerprint="rows")
    teachers, shares = [bert(24, 0), bert(32, 5)], [2.0, 1.0]
    student = bert(16, 1)
    made = pykd.distill(copy.deepcopy(student), teachers, data, method=LAYERS, teacher_weights=shares, max_steps=1,
                        batch_size=24, seed=3, progress=False)  # fmt: skip
    trainer, _ = train(tmp_path, student=student, teacher=teachers, method=LAYERS, teacher_weights=shares, seed=3,
                       per_device_train_batch_size=24, max_steps=2)  # fmt: skip
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(made.pykd_report[-1]["first_loss"], rel=1e-5) and losses[1] < losses[0]
    assert student.config._attn_implementation != "eager"  # only while it is looked at


def test_projections_are_trained_kept_and_left_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": LAYERS, "save_strategy": "steps", "save_steps": 2}
    whole, weights = train(tmp_path / "a", **options)
    first = train(tmp_path / "c", **options | {"max_steps": 2})[0].terms.modules
    assert sorted(whole.terms.modules) == sorted(first) and len(first) == 3
    for name, module in first.items():
        assert not torch.equal(module.weight, whole.terms.modules[name].weight)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert (checkpoint / "projections.safetensors").exists()
    again, resumed = train(tmp_path / "b", resume=str(checkpoint), **options)
    same(resumed, weights, rtol=0, atol=0)
    for name, module in again.terms.modules.items():
        assert torch.equal(module.weight, whole.terms.modules[name].weight)
    whole.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "projections.safetensors").exists()
    assert type(whole.model).from_pretrained(tmp_path / "saved").state_dict().keys() == weights.keys()
    with pytest.raises(
        ArtifactError, match=r"checkpoint-2 holds projections \{'1-0-0/weight': \(24, 16\).*has none: r"
    ):
        train(tmp_path / "d", resume=str(checkpoint))


def test_projections_are_clipped_with_the_model(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, method={"hidden": 1e6}, max_steps=1, max_grad_norm=1.0)
    parameters = [*trainer.model.parameters(), *trainer._projected]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    trainer._clip_grad_norm(trainer.model)
    norm = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-3)


def test_a_quantized_teacher(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, teacher=bert(32, 0), teacher_scheme="w8a8", max_steps=1)
    assert any(type(module).__name__ == "Linear8bit" for module in trainer.terms.teachers[0].modules())


def test_what_a_trainer_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sequence", "on_policy"):
        with pytest.raises(
            ValueError, match=f"method '{name}' trains on texts that a model writes, not on given batches: use pykd.dis"
        ):
            train(tmp_path, method=name)
    with pytest.raises(ValueError, match=r"a cached teacher knows rows by their number, .*: use pykd\.distill"):
        train(tmp_path, teacher=TeacherCache.__new__(TeacherCache))
    with pytest.raises(ValueError, match="would replace the distillation's loss: pass a function as method= instead"):
        train(tmp_path, compute_loss_func=lambda *_: None)
    with pytest.raises(ValueError, match="would replace the distillation's loss"):
        train(tmp_path, label_smoothing_factor=0.1)
    trainer, _ = train(tmp_path, max_steps=1)
    trainer.train_dataset, trainer._prepared = None, False
    with pytest.raises(ValueError, match="hidden, attention, relation and contrastive need train_dataset"):
        trainer.create_optimizer()
    student = bert(16, 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match=r"one more group of the optimizer, .*: pass optimizers=\(optimizer, None\)"):
        train(tmp_path, student=student, method="hidden", optimizers=(optimizer, schedule))
    trainer, _ = train(tmp_path, student=student, method="hidden", optimizers=(optimizer, None), max_steps=1)
    assert [len(group["params"]) for group in optimizer.param_groups][1:] == [2]
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(
        ValueError, match="learned projections lie outside the model that FSDP or DeepSpeed takes apart"
    ):
        trainer._prepare(trainer._example())


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
