"""One row through a pruned 4-bit weight: a bitmask and the kept codes, where that is less to read than dense codes."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import ACTIVATIONS
from .bitmask import pack_bits
from .dispatch import DTYPE_CODES, TABLE, Route, native, num_threads, vector_level
from .int4_r16 import PAD_CODE, table_of

#: Level -> density up to which one row is faster by the kept codes. None so far: with AVX-512, spreading codes to their
#: columns takes 0.3 ns a weight whatever is kept, 2.3 to 3.2 times the dense kernel's time (Zen 5, weights from memory,
#: 3 to 50 % kept). The other levels visit the kept ones one by one, and lose at any density too (a Zen 3 at its AVX2
#: level needs three times the dense kernel's time with 1 % kept).
GAINS_UP_TO: dict[str, float] = {}

#: Columns whose codes begin at a byte: groups are multiples of it.
COLUMNS = 32

_READ_AHEAD = 16  # bytes that may be read past the last code


def fits(density: float, code: str, in_features: int, group_size: int) -> bool:
    """Whether one row through such a weight is faster by the kept codes alone (by `GAINS_UP_TO`).

    False for uint4, whose zeros differ from group to group, and for groups that are not multiples of 32.

    >>> fits(0.9, "int4", 64, 32), fits(0.01, "uint4", 64, 32)
    (False, False)
    """
    groups = group_size % COLUMNS == 0 or group_size >= in_features
    return native is not None and groups and code != "uint4" and density <= GAINS_UP_TO.get(vector_level(), -1.0)


def pack_kept(codes: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What the kernel reads of codes uint8 [out, in] that a mask keeps.

    `bits` uint8 [out, 4 * ceil(in / 32)], the bitmask; `kept` uint8, two codes a byte, low half first, those of each 32
    columns from a whole byte on; `starts` int64 [out], the byte where each row begins.

    >>> codes = torch.tensor([[7, 9, 3]], dtype=torch.uint8)
    >>> pack_kept(codes, torch.tensor([[True, False, True]]))["kept"][:2].tolist()
    [55, 0]
    """
    rows, columns = codes.shape
    fill = (0, -columns % COLUMNS)
    mask, codes = F.pad(mask, fill), F.pad(codes, fill)
    blocks = mask.view(rows, -(-columns // COLUMNS), COLUMNS)
    block_bytes = (blocks.sum(-1) + 1) // 2
    ends = block_bytes.flatten().cumsum(0)
    begins = (ends - block_bytes.flatten()).view(block_bytes.shape)
    rank = blocks.cumsum(-1) - 1
    at = (begins.unsqueeze(-1) + rank // 2)[blocks]
    shifted = codes.view(blocks.shape)[blocks].int() << (4 * (rank[blocks] % 2))
    total = int(ends[-1]) if ends.numel() else 0
    kept = torch.zeros(total + _READ_AHEAD, dtype=torch.int32).scatter_add_(0, at, shifted.int())
    starts = begins[:, 0].contiguous() if columns else torch.zeros(rows, dtype=torch.int64)
    return {"bits": pack_bits(mask), "kept": kept.to(torch.uint8), "starts": starts}


@functools.cache
def _levels(code: str) -> tuple[Tensor, int]:
    """What the 16 codes stand for before scaling, float32, and the code of zero."""
    table = table_of(code)
    if table is None:
        return torch.arange(16, dtype=torch.float32) - PAD_CODE, PAD_CODE
    return torch.tensor(table, dtype=torch.float32), table.index(0.0)


def sparse_4bit(
    x: Tensor,
    bits: Tensor,
    kept: Tensor,
    starts: Tensor,
    scales: Tensor,
    *,
    code: str,
    group_size: int,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y = activation(x W^T + bias) for one row x on the CPU: `pykd.linear_4bit` with inputs="keep", sums in float32.

    Args:
        x: [..., in_features] with one row in all; float32, bfloat16 or float16.
        bits, kept, starts: what `pack_kept` made.
        scales: float16 [out, groups].
        code, group_size: as `pykd.linear_4bit` takes them; see `fits`.
        bias: [out], floating point, or None.
        activation: "gelu", "gelu_tanh", "silu", "relu" or None.

    No gradients: for plain inference only. Raises ValueError for more rows than one, or another number of inputs.

    >>> made = pack_kept(torch.tensor([[9, 8]], dtype=torch.uint8), torch.tensor([[True, False]]))
    >>> sparse_4bit(torch.ones(1, 2), **made, scales=torch.ones(1, 1).half(), code="int4", group_size=32)
    tensor([[1.]])
    """
    in_features, out_features = x.shape[-1], starts.shape[0]
    if x.numel() != in_features or bits.shape[1] != -(-in_features // COLUMNS) * (COLUMNS // 8):
        raise ValueError(
            f"sparse_4bit takes one row of inputs for a bitmask of {bits.shape[1] * 8} columns; got x of shape "
            f"{tuple(x.shape)}: call linear_4bit for more rows"
        )
    levels, zero = _levels(code)
    row = F.pad(x.reshape(in_features).float(), (0, -in_features % COLUMNS)).contiguous()
    if bias is not None and (bias.dtype not in DTYPE_CODES or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype)
    native.sparse_4bit(
        row.data_ptr(), bits.data_ptr(), kept.data_ptr(), starts.data_ptr(), scales.data_ptr(), levels.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), in_features, out_features,
        min(group_size, max(in_features, 1)), zero, ACTIVATIONS[activation], DTYPE_CODES[x.dtype],
        0 if bias is None else DTYPE_CODES[bias.dtype], num_threads(),
    )  # fmt: skip
    return y


if native is not None:
    for _level, _most in GAINS_UP_TO.items():
        _when = f"pruned 4-bit codes, isa {_level}, one row, inference: density up to {_most:g}"
        TABLE.append(Route("sparse_4bit", "cpu", _when, "native, kept codes spread to their columns"))
    TABLE.append(Route("sparse_4bit", "cpu", "otherwise", "no gain there: linear_4bit"))
