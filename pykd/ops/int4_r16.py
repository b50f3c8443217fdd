"""4-bit weights as tensors: their codes, the canonical layout of files, and `int4_r16`, the layout of the CPU kernel.

Canonical: `qweight` uint8 [out_features, ceil(in_features / 2)], two codes a byte, even k in the low half; `scales`
float16 (or bfloat16, float32) [out_features, groups]; for `uint4` also `zeros` uint8 [out_features, ceil(groups / 2)],
packed alike.

`int4_r16`: one uint8 vector that the kernel reads as a single stream. A strip is 32 output rows: for `uint4` first its
zero points (a byte each, groups x 32, padded to 64), then one block per group: 32 scales, float16 where that holds all
scales of the weight exactly, else float32; then for every 8 k two lines of 64 bytes, one for rows 0-15 and one for rows
16-31, in which byte `4 * row + j` holds the code of k0 + j in its low and of k0 + 4 + j in its high half. Groups are
padded to 8 k and strips to 32 rows. The vector's size says which scales there are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.errors import nearest

#: 16-entry codes: weight = table[code] * scale. NF4: Dettmers et al. 2023, QLoRA, appendix E. FP4: E2M1 over its
#: largest magnitude, 6. Both hold an exact zero.
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * level / 6 for sign in (1, -1) for level in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
}

#: Name -> number that the native kernels know: int4 is (code - 8) * scale, uint4 is (code - zero) * scale.
CODES: dict[str, int] = {"int4": 0, "uint4": 1, **dict.fromkeys(CODEBOOKS, 2)}

#: What the name of any other table begins with; its 16 numbers follow, so that the name is all that has to be kept.
CODEBOOK = "codebook:"

STRIP = 32
PAD_CODE = 8


def codebook_code(table: Sequence[float]) -> str:
    """The name of a code of your own, weight = table[code] * scale: "codebook:" and the numbers as float32 holds them.

    Without 0.0 among them a table has no code for a weight that was pruned: such weights are refused where they are
    quantized. Raises ValueError unless the table has 16 finite numbers, some below and some above 0.

    >>> codebook_code([k / 8 - 1 for k in range(16)])[:29]
    'codebook:-1.0,-0.875,-0.75,-0'
    """
    values: list[float] = torch.tensor([float(value) for value in table], device="cpu").tolist()  # not on "meta"
    finite = len(values) == 16 and all(map(math.isfinite, values))
    if not finite or not min(values) < 0 < max(values):
        raise ValueError(
            f"a codebook has 16 finite numbers, some below and some above 0, got {len(values)}: "
            f"{', '.join(f'{value:g}' for value in values[:16])}"
        )
    return CODEBOOK + ",".join(str(value) for value in values)


@functools.cache
def table_of(code: str) -> tuple[float, ...] | None:
    """The 16 entries of a code that is a table; None for the integer codes. Raises ValueError for an unknown code.

    >>> table_of("nf4")[7], table_of("int4")
    (0.0, None)
    """
    if code.startswith(CODEBOOK):
        try:
            values = [float(word) for word in code.removeprefix(CODEBOOK).split(",")]
        except ValueError:
            raise ValueError(f"{CODEBOOK!r} is followed by 16 numbers with commas between them, got {code!r}") from None
        codebook_code(values)
        return tuple(values)
    code_number(code)
    return CODEBOOKS.get(code)


def holds_zero(code: str) -> bool:
    """Whether a weight can be exactly zero under any scale: false for tables without 0.0.

    >>> holds_zero("int4"), holds_zero(codebook_code([k / 8 - 0.95 for k in range(16)]))
    (True, False)
    """
    table = table_of(code)
    return table is None or 0.0 in table


def code_number(code: str) -> int:
    """The number of a code for the native kernels. Raises ValueError for an unknown code."""
    if code not in CODES and not code.startswith(CODEBOOK):
        raise ValueError(nearest("4-bit code", code, (*CODES, CODEBOOK)))
    return CODES.get(code, 2)


class Groups(NamedTuple):
    """How `in_features` falls into groups, and what `int4_r16` pads them to."""

    size: int
    number: int
    padded: int
    padded_last: int

    @property
    def padded_k(self) -> int:
        return (self.number - 1) * self.padded + self.padded_last


def groups_of(in_features: int, group_size: int) -> Groups:
    """Groups of `group_size` (or one, if it is larger than the row); the last may be shorter."""
    size = min(group_size, in_features)
    count = -(-in_features // size)
    last = in_features - (count - 1) * size
    return Groups(size, count, -(-size // 8) * 8, -(-last // 8) * 8)


@functools.cache
def codebook(code: str, device: torch.device) -> Tensor | None:
    """The float32 table [16] of a codebook code on a device; None for the integer codes."""
    table = table_of(code)
    return None if table is None else torch.tensor(table, device=device)


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [..., n] in 0..15 -> uint8 [..., ceil(n / 2)], even positions in the low half."""
    even = F.pad(values, (0, values.shape[-1] % 2))
    return even[..., 0::2] | (even[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_nibbles`: the first `count` codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :count]


def dequantize(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, *, code: str, in_features: int, group_size: int
) -> Tensor:
    """Canonical tensors -> the dense float32 weight [out_features, in_features]: the definition of every code."""
    size, count, _, _ = groups_of(in_features, group_size)
    codes = unpack_nibbles(qweight, in_features)
    table = codebook(code, qweight.device)
    if table is not None:
        values = table[codes.long()]
    elif zeros is not None:
        points = unpack_nibbles(zeros, count).float()
        values = codes.float() - points.repeat_interleave(size, dim=1)[:, :in_features]
    else:
        values = codes.float() - 8.0
    return values * scales.float().repeat_interleave(size, dim=1)[:, :in_features]


def packed_bytes(out_features: int, in_features: int, group_size: int, *, code: str, wide_scales: bool = False) -> int:
    """Size of the `int4_r16` vector."""
    groups = groups_of(in_features, group_size)
    return -(-out_features // STRIP) * _Strip.of(groups, code == "uint4", wide_scales).size


def pack_r16(qweight: Tensor, scales: Tensor, zeros: Tensor | None, *, in_features: int, group_size: int) -> Tensor:
    """Canonical tensors -> `int4_r16`."""
    groups = groups_of(in_features, group_size)
    rows = qweight.shape[0]
    strips = -(-rows // STRIP)
    fill = strips * STRIP - rows
    halves = scales.half()
    wide = not torch.equal(halves.to(scales.dtype), scales)
    strip = _Strip.of(groups, zeros is not None, wide)
    packed = qweight.new_zeros(strips, strip.size)
    blocks, last = _views(packed, groups, strip)
    codes = _pad_groups(unpack_nibbles(qweight, in_features), groups)
    codes = F.pad(codes, (0, 0, 0, fill), value=PAD_CODE).view(strips, STRIP, groups.padded_k // 8, 2, 4)
    lines = (codes[:, :, :, 0] | (codes[:, :, :, 1] << 4)).permute(0, 2, 1, 3)
    held = F.pad(scales.float() if wide else halves, (0, 0, 0, fill)).view(strips, STRIP, -1)
    scale_bytes, head = held.transpose(1, 2).contiguous().view(torch.uint8), strip.scales
    blocks[:, :, :head] = scale_bytes[:, :-1]
    blocks[:, :, head:] = lines[:, : -(groups.padded_last // 8)].reshape(blocks[:, :, head:].shape)
    last[:, :head] = scale_bytes[:, -1]
    last[:, head:] = lines[:, -(groups.padded_last // 8) :].flatten(1)
    if zeros is not None:
        points = F.pad(unpack_nibbles(zeros, groups.number), (0, 0, 0, fill)).view(strips, STRIP, -1)
        packed[:, : groups.number * STRIP] = points.transpose(1, 2).reshape(strips, -1)
    return packed.flatten()


def unpack_r16(
    packed: Tensor, *, out_features: int, in_features: int, group_size: int, code: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`int4_r16` -> exactly the canonical tensors that it was made from, scales in the type that it holds them in."""
    groups = groups_of(in_features, group_size)
    asymmetric = code == "uint4"
    strips = -(-out_features // STRIP)
    strip = _Strip.find(packed.numel() // strips, groups, asymmetric)
    packed, head = packed.view(strips, -1), strip.scales
    blocks, last = _views(packed, groups, strip)
    scale_bytes = torch.cat((blocks[:, :, :head], last[:, None, :head]), dim=1).contiguous()
    scales = scale_bytes.view(strip.dtype).transpose(1, 2).reshape(strips * STRIP, -1)[:out_features].contiguous()
    lines = torch.cat((blocks[:, :, head:].flatten(1), last[:, head:]), dim=1).view(strips, -1, STRIP, 4)
    codes = torch.stack((lines & 15, lines >> 4), dim=3).permute(0, 2, 1, 3, 4).reshape(strips * STRIP, -1)
    qweight = pack_nibbles(_unpad_groups(codes[:out_features], groups, in_features))
    if not asymmetric:
        return qweight, scales, None
    points = packed[:, : groups.number * STRIP].view(strips, groups.number, STRIP).transpose(1, 2)
    return qweight, scales, pack_nibbles(points.reshape(strips * STRIP, -1)[:out_features])


def rows_r16(
    packed: Tensor, rows: Tensor, *, out_features: int, in_features: int, group_size: int, code: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The canonical tensors of some output rows, int64 [n], as `unpack_r16` gives them; no other row is read."""
    groups = groups_of(in_features, group_size)
    asymmetric = code == "uint4"
    packed = packed.view(-(-out_features // STRIP), -1)
    form = _Strip.find(packed.shape[1], groups, asymmetric)
    head, size = form.scales, form.scales // STRIP
    blocks, last = _views(packed, groups, form)
    strip, row = rows // STRIP, rows % STRIP
    count = groups.number - 1
    scales = packed.new_empty(len(rows), 0, size)
    if count:
        scales = blocks[:, :, :head].view(-1, count, STRIP, size)[strip, :, row]
    scales = torch.cat((scales, last[:, :head].view(-1, 1, STRIP, size)[strip, :, row]), dim=1)
    lines = last[:, head:].view(-1, groups.padded_last // 8, STRIP, 4)[strip, :, row]
    if count:
        first = blocks[:, :, head:].view(-1, count, groups.padded // 8, STRIP, 4)[strip, :, :, row]
        lines = torch.cat((first.flatten(1, 2), lines), dim=1)
    codes = torch.stack((lines & 15, lines >> 4), dim=2).flatten(1)
    qweight = pack_nibbles(_unpad_groups(codes, groups, in_features))
    points = None
    if asymmetric:
        points = packed[:, : groups.number * STRIP].view(-1, groups.number, STRIP)[strip, :, row]
    return qweight, scales.view(form.dtype).squeeze(2), None if points is None else pack_nibbles(points)


class _Strip(NamedTuple):
    """Bytes of a strip: all, of its zero points, and of the scales of one of its blocks, which are of `dtype`."""

    size: int
    zeros: int
    scales: int
    dtype: torch.dtype

    @classmethod
    def of(cls, groups: Groups, asymmetric: bool, wide_scales: bool) -> _Strip:
        zeros = -(-groups.number * STRIP // 64) * 64 if asymmetric else 0
        scales = (4 if wide_scales else 2) * STRIP
        size = zeros + groups.number * scales + groups.padded_k * STRIP // 2
        return cls(size, zeros, scales, torch.float32 if wide_scales else torch.float16)

    @classmethod
    def find(cls, size: int, groups: Groups, asymmetric: bool) -> _Strip:
        """By its size: which scales it holds."""
        narrow = cls.of(groups, asymmetric, False)
        return narrow if size == narrow.size else cls.of(groups, asymmetric, True)


def _views(packed: Tensor, groups: Groups, strip: _Strip) -> tuple[Tensor, Tensor]:
    """All blocks but the last as [strips, groups - 1, bytes], and the last as [strips, bytes]."""
    size = strip.scales + groups.padded * STRIP // 2
    end = strip.size - strip.scales - groups.padded_last * STRIP // 2
    return packed[:, strip.zeros : end].view(packed.shape[0], groups.number - 1, size), packed[:, end:]


def _pad_groups(codes: Tensor, groups: Groups) -> Tensor:
    codes = F.pad(codes, (0, groups.size * groups.number - codes.shape[1]), value=PAD_CODE)
    codes = F.pad(codes.view(-1, groups.number, groups.size), (0, groups.padded - groups.size), value=PAD_CODE)
    return codes.flatten(1)[:, : groups.padded_k].contiguous()


def _unpad_groups(codes: Tensor, groups: Groups, in_features: int) -> Tensor:
    codes = F.pad(codes, (0, groups.padded * groups.number - codes.shape[1]))
    return codes.view(-1, groups.number, groups.padded)[:, :, : groups.size].flatten(1)[:, :in_features]
