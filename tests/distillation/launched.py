"""One process of distillations by logits, hidden states and attention: `launched.py RANK PROCESSES PORT RESULT`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

#: The verb, the Trainer, and the verb by hidden states alone, so that the head gets no gradient.
KINDS = ("verb", "trainer", "head")
METHOD = {"logits": 1.0, "hidden": 1.0, "attention": 1.0}


def losses(kind: str, batch_size: int, folder: Path) -> list[float]:
    """The loss of every step; a narrower student, so with projections, and dropout 0."""
    import torch

    import pykd
    from pykd.data.bundle import DataBundle, stack
    from pykd.models.huggingface import load_huggingface
    from pykd.models.students import derive

    config = {"model_type": "bert", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3,
              "num_attention_heads": 4, "intermediate_size": 48, "hidden_dropout_prob": 0.0,
              "attention_probs_dropout_prob": 0.0}  # fmt: skip
    torch.manual_seed(0)
    teacher = load_huggingface(None, num_labels=2, config=config)
    generator = torch.Generator().manual_seed(0)
    items = [{"input_ids": torch.randint(3, 40, (6,), generator=generator), "labels": i % 2} for i in range(32)]
    student = derive(teacher, depth=1, hidden_size=16)
    if kind == "trainer":
        return trained(student, teacher, items, batch_size, folder)
    data = DataBundle(items, items, stack, ["a", "b"], "ids", fingerprint="ids")
    method = METHOD if kind == "verb" else "hidden"
    pykd.distill(student, teacher, data, method=method, epochs=2, batch_size=batch_size, lr=1e-2, progress=False)
    return [record["loss"] for record in student.pykd_report[-1]["curve"]]


def trained(student: Any, teacher: Any, items: list[Any], batch_size: int, folder: Path) -> list[float]:
    """The same by Hugging Face's Trainer; each process counts two parts to a step."""
    from transformers import TrainingArguments

    import pykd

    args = TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=batch_size // 2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = pykd.DistillationTrainer(student, args, teacher=teacher, train_dataset=items, method=METHOD)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(rank: int, processes: int, port: str, result: Path) -> None:
    """The environment that `accelerate launch` gives its processes, then the run."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    found = {kind: losses(kind, 8 // processes, result.with_suffix(f".{kind}.{rank}")) for kind in KINDS}
    result.with_suffix(f".{rank}").write_text(json.dumps(found))
    os._exit(0)  # taking the process group down can wait forever for its own threads, which want Python's lock


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
