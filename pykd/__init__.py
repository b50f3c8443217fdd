"""pykd: distil, prune and quantize Hugging Face and torchvision models, with kernels that make the result pay.

The names below are loaded when they are first used, so that `import pykd` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import Any

from pykd.io.import_hook import install as _install_import_hook

__version__ = "0.1.0"

#: Public name -> module that defines it.
_LAZY: dict[str, str] = {
    "DistillationTrainer": "pykd.distillation.trainer",
    "Gradual": "pykd.pruning",
    "TeacherCache": "pykd.distillation",
    "assign_bits": "pykd.quantization",
    "build_info": "pykd.ops.dispatch",
    "cache_teacher": "pykd.distillation",
    "compare": "pykd.evaluation",
    "compress_to": "pykd.pipeline.compress",
    "convert_qat": "pykd.quantization",
    "distill": "pykd.distillation",
    "distill_chain": "pykd.distillation",
    "evaluate": "pykd.evaluation",
    "export": "pykd.evaluation.exported",
    "finetune": "pykd.training.finetune",
    "from_pretrained": "pykd.io.load",
    "fuse": "pykd.models.fused",
    "kd_loss": "pykd.ops.kd_loss",
    "kd_loss_topk": "pykd.ops.kd_loss_topk",
    "kl_div_loss": "pykd.ops.kd_loss",
    "prepare_qat": "pykd.quantization",
    "prune": "pykd.pruning",
    "linear_4bit": "pykd.ops.linear_4bit",
    "linear_8bit": "pykd.ops.linear_8bit",
    "linear_kd_loss": "pykd.ops.linear_kd_loss",
    "quantize": "pykd.quantization",
    "quantize_progressively": "pykd.pipeline.progressive",
    "run": "pykd.pipeline",
    "save_pretrained": "pykd.io.save",
    "sparse_linear": "pykd.ops.sparse_linear",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pykd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


_install_import_hook()
