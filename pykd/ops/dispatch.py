"""Where a call goes: the native module, the CUDA library, Triton, or the reference; and how to see which.

Every op file defines its schema in `lib`, registers one implementation per device key and adds its rows to `TABLE`,
which `build_info()` prints. Nothing here is decided silently: a part that is missing is named with its reason.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import pathlib
import platform
from types import ModuleType
from typing import Any, NamedTuple

import torch

#: The op library: `torch.ops.pykd.*`.
lib = torch.library.Library("pykd", "DEF")  # type: ignore[no-untyped-call]

#: Codes of element types, the same as `DType` in csrc/ops.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Route(NamedTuple):
    """One row of the dispatch table: which implementation serves an op, where and when."""

    op: str
    device: str
    when: str
    implementation: str


#: Filled by the op files.
TABLE: list[Route] = []


def _load_native() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("pykd._C"), ""
    except ImportError as error:
        return None, str(error)


#: The pybind11 module, or None with the reason in `native_error`: then every CPU call runs the reference.
native: Any
native, native_error = _load_native()

_SMALL_SCRATCH: int = native.linear_small_scratch if native is not None else 0


def dtype_code(tensor: torch.Tensor) -> int:
    """The code that the native kernels use for the tensor's element type."""
    return DTYPE_CODES[tensor.dtype]


def vector_level() -> str:
    """The level in force, or the one that it adds a few instructions to: what thresholds are measured for."""
    return str(native.isa()).removesuffix("_bf16")


def num_threads() -> int:
    """Threads for one native call: torch's own setting, asked at every call."""
    return torch.get_num_threads()


def skips_dispatcher(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a call may go past torch's dispatcher, which costs microseconds.

    True for a plain CPU tensor that is not traced or transformed, where no gradient is wanted.
    """
    return (
        type(x) is torch.Tensor
        and x.is_cpu
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def scratch_for(elements: int) -> torch.Tensor | None:
    """Scratch memory of a native linear layer, in float32 elements; None for so little that it has it on its stack."""
    return None if elements <= _SMALL_SCRATCH else torch.empty(elements)


@functools.cache
def cuda_library() -> ctypes.CDLL | None:
    """The CUDA kernels, loaded at the first use; None when they were not built or no NVIDIA GPU can be used."""
    path = cuda_library_path()
    if path is None or not torch.cuda.is_available():
        return None
    return ctypes.CDLL(str(path))


def cuda_library_path() -> pathlib.Path | None:
    """File of the CUDA kernels if this installation has them: beside the native module."""
    for folder in importlib.import_module("pykd").__path__:
        candidate = pathlib.Path(folder) / "libpykd_cuda.so"
        if candidate.exists():
            return candidate
    if native is not None:
        candidate = pathlib.Path(native.__file__).with_name("libpykd_cuda.so")
        if candidate.exists():
            return candidate
    return None


def cuda_stream(device: torch.device) -> int:
    """Address of the current CUDA stream of a device, for the launchers."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def check_cuda(code: int, op: str) -> None:
    """Turn a launcher's cudaError_t into an exception."""
    if code != 0:
        raise RuntimeError(f"{op}: the CUDA launch failed with cudaError_t {code}; see the CUDA runtime's error codes")


@functools.cache
def triton_available() -> bool:
    """Whether Triton can be imported (it is imported only by the ops that use it)."""
    return importlib.util.find_spec("triton") is not None


def build_info() -> dict[str, Any]:
    """What this installation can run and what it will choose.

    Returns a dict: `version` of pykd; `native` (bool) and `native_error`; `isa` in force, `isa_levels` that this CPU
    can run, and in `tuning` for which processors they were made fast; `threads`; `openmp` runtimes mapped into the
    process (more than one costs speed); `cuda_library` (path or None), `cuda_available`, `triton`; `torch`; and
    `table`, the dispatch rows (op, device, when, implementation).

    >>> import pykd
    >>> sorted(pykd.build_info())[:3]
    ['cuda_available', 'cuda_library', 'isa']
    """
    from pykd import __version__

    path = cuda_library_path()
    return {
        "version": __version__,
        "torch": torch.__version__,
        "native": native is not None,
        "native_error": native_error,
        "isa": native.isa() if native is not None else None,
        "isa_levels": native.isa_levels() if native is not None else [],
        "tuning": _tuning(),
        "threads": num_threads(),
        "openmp": _openmp_runtimes(),
        "cuda_library": str(path) if path is not None else None,
        "cuda_available": torch.cuda.is_available(),
        "triton": triton_available(),
        "table": [route._asdict() for route in TABLE],
    }


def _tuning() -> str:
    """A sentence on the speed of the native kernels on this kind of processor."""
    machine = platform.machine()
    if machine in ("x86_64", "AMD64"):
        return "avx2 and avx512 are tuned for x86-64"
    return f"untuned on {machine or 'this processor'}: only the portable scalar level exists here, correct but slow"


def _openmp_runtimes() -> list[str]:
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists():
        return []
    names = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(name for name in names if any(part in name for part in ("libgomp", "libomp", "libiomp")))
