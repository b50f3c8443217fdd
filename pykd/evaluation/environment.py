"""On what machine, with which versions: the facts without which a measured time means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

#: Packages whose version can change a result.
PACKAGES = (
    "pykd", "torch", "torchvision", "transformers", "tokenizers", "datasets", "accelerate", "deepspeed", "triton",
    "torch-pruning", "numpy", "scipy", "scikit-learn", "safetensors", "pillow", "seqeval", "sacrebleu", "rouge-score",
    "torchmetrics", "captum", "optuna", "onnxruntime",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, processor, instruction set in force, threads, memory and GPU, as plain values.

    >>> environment()["threads"] >= 1
    True
    """
    import torch

    from pykd.ops.dispatch import build_info

    info = build_info()
    return {
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "isa": info["isa"] or "none: the native module is missing",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := version(name)) is not None},
    }


def version(package: str) -> str | None:
    """Version of an installed package, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as Linux gives it, else what Python's platform module knows."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
