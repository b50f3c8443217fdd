"""The text classifier that the tables of methods are about: MiniLM, really pretrained, fine-tuned on labelled texts.

    python benchmarks/data/debian.py --output runs/debian.parquet --test-size 10000
    python benchmarks/teacher.py --data runs/debian.parquet --output runs/teacher
    python benchmarks/bench_quantization_methods.py --model runs/teacher --data runs/debian.parquet --texts 10000

Trains on the rows of the split `train` and prints the accuracy on the others. A run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from pykd import finetune, save_pretrained
from pykd.data import load_text
from pykd.models.huggingface import load_huggingface
from pykd.training.checkpoint import has_checkpoint
from pykd.training.held_out import held_out

sys.path.append(str(pathlib.Path(__file__).parent / "data"))

from minilm import minilm_path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a pretrained encoder on a table of labelled texts.")
    parser.add_argument("--data", required=True, help="table with the columns text, label and split")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the model, with its tokenizer")
    parser.add_argument("--start", help="folder of the pretrained model; MiniLM by default")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=64, help="tokens a text is cut at")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    start = settings.start or str(minilm_path())
    data = load_text(settings.data, tokenizer=start, max_length=settings.max_length, split_column="split")
    model = load_huggingface(start, "sequence-classification", num_labels=len(data.class_names))
    checkpoints = settings.output.with_name(f"{settings.output.name}.checkpoints")
    finetune(
        model, data, epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr, warmup_ratio=0.1,
        seed=settings.seed, group_by_length=True, checkpoint_dir=checkpoints, checkpoint_steps=100,
        resume=has_checkpoint(checkpoints), label="teacher",
    )  # fmt: skip
    save_pretrained(model.eval(), settings.output, tokenizer=data.tokenizer, overwrite=True)
    print(", ".join(f"{name} {value:.4f}" for name, value in held_out(model, data).items()))


if __name__ == "__main__":
    main()
