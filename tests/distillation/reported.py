"""A DistillationTrainer that reports to TensorBoard, MLflow and W&B, in the current folder: `reported.py`."""

from __future__ import annotations

import os

os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    """Four steps of a tiny distillation by logits, and an evaluation."""
    import torch

    import pykd
    from pykd.models.torchvision import ensure_torchvision

    ensure_torchvision()
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    student, teacher = (BertForSequenceClassification(BertConfig(hidden_size=width, **sizes)) for width in (16, 24))
    rows = [{"input_ids": torch.randint(20, (6,)), "labels": row % 2} for row in range(16)]
    args = TrainingArguments(
        "out", max_steps=4, per_device_train_batch_size=4, logging_steps=1, eval_strategy="steps", eval_steps=2,
        save_strategy="no", report_to=["tensorboard", "mlflow", "wandb"], run_name="distilled", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = pykd.DistillationTrainer(student, args, teacher=teacher, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()


if __name__ == "__main__":
    main()
