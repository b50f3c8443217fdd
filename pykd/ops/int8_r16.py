"""`int8_r16`: an int8 weight and its scales as one vector that the CPU kernel reads as a single stream.

A strip is 32 output rows: 32 float32 scales; 32 int32, each -128 times the sum of the row's codes (modulo 2^32: where
the sums of a kernel that adds 128 to activations start); then for every 4 k two lines of 64 bytes, one for rows 0-15
and one for rows 16-31, in which byte `4 * row + j` holds the code of k0 + j. Rows of zeros fill the last strip, and
zeros the last 4 k. Where nothing has to be filled, that is 1 + 8 / in_features times the codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP = 32
_HEADER = 8 * STRIP


def packed_bytes(out_features: int, in_features: int) -> int:
    """Size of the `int8_r16` vector."""
    return -(-out_features // STRIP) * _strip_bytes(in_features)


def pack_r16(qweight: Tensor, scales: Tensor) -> Tensor:
    """int8 [out_features, in_features] and float32 [out_features] -> `int8_r16`."""
    rows, columns = qweight.shape
    strips = -(-rows // STRIP)
    fill = strips * STRIP - rows
    starts = (-128 * qweight.sum(1, dtype=torch.int64)).to(torch.int32)
    packed = torch.empty(strips, _strip_bytes(columns), dtype=torch.uint8, device=qweight.device)
    packed[:, : 4 * STRIP] = F.pad(scales.float(), (0, fill)).view(strips, STRIP).view(torch.uint8)
    packed[:, 4 * STRIP : _HEADER] = F.pad(starts, (0, fill)).view(strips, STRIP).view(torch.uint8)
    codes = F.pad(qweight, (0, -columns % 4, 0, fill)).view(strips, STRIP, -1, 4)
    packed[:, _HEADER:].view(strips, -1, STRIP, 4).copy_(codes.transpose(1, 2).view(torch.uint8))
    return packed.flatten()


def unpack_r16(packed: Tensor, *, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """`int8_r16` -> exactly the codes and scales that it was made from."""
    strips = packed.view(-1, _strip_bytes(in_features))
    scales = strips[:, : 4 * STRIP].contiguous().view(torch.float32).flatten()[:out_features]
    codes = strips[:, _HEADER:].reshape(len(strips), -1, STRIP, 4).transpose(1, 2).reshape(len(strips) * STRIP, -1)
    codes = codes[:out_features, :in_features].clone(memory_format=torch.contiguous_format)
    return codes.view(torch.int8), scales.clone()


def rows_r16(packed: Tensor, rows: Tensor, *, in_features: int) -> tuple[Tensor, Tensor]:
    """The codes [n, in_features] and scales [n] of some output rows, int64 [n]; no other row is read."""
    strips = packed.view(-1, _strip_bytes(in_features))
    strip, row = rows // STRIP, rows % STRIP
    codes = strips[:, _HEADER:].view(len(strips), -1, STRIP, 4)[strip, :, row].flatten(1)[:, :in_features]
    scales = strips[:, : 4 * STRIP].view(-1, STRIP, 4)[strip, row]
    return codes.view(torch.int8), scales.view(torch.float32)[:, 0]


def _strip_bytes(in_features: int) -> int:
    return _HEADER + -(-in_features // 4) * 4 * STRIP
