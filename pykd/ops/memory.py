"""Large fresh outputs on the CPU, in huge pages.

torch's CPU allocator maps every large tensor anew, so the first write to each 4 KB page is a page fault; for a kernel
that only streams through memory these faults cost about three times the work itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykd.ops.dispatch import native

#: Below this a buffer holds too few whole 2 MB pages, and malloc recycles its memory anyway.
HUGE_BYTES = 4 << 20


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty(shape)`, with huge pages advised for large CPU tensors (Linux transparent huge pages).

    Contiguous; contents undefined. Any other device, a small tensor or a missing native module: plain `torch.empty`.

    >>> empty((2, 3), dtype=torch.float32, device=torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if native is not None and device.type == "cpu" and tensor.nbytes >= HUGE_BYTES:
        native.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
