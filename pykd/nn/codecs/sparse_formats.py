"""How files say which weights of a sparse matrix are kept: `bitmask`, `csr16`, blocks ("4x1") and N:M ("2:4").

Every format stores `values` [nnz], the kept weights in row-major order, and differs in the index beside it:

- ``bitmask``: `bitmask` uint8 [out, ceil(in / 8)], see `pykd.ops.bitmask`. Fits every mask; 1 bit a weight.
- ``csr16``: `indices` int16 [nnz], the bits of the unsigned column modulo 65,536, and `counts` int32
  [out, ceil(in / 65536)], the kept weights of each row in each tile of 65,536 columns. Fits every mask; 2 bytes a kept
  weight, hence smaller than the bitmask above 94 % sparsity.
- ``RxC``, as "4x1": blocks of R rows and C columns are kept or pruned whole; those at the edges may be smaller.
  `blocks` uint8 [ceil(out / R), ceil(ceil(in / C) / 8)]: the bits of the kept blocks.
- ``N:M``, as "2:4": of every M neighbours in a row N are kept (of the last, if shorter, at most N: as many as it has).
  `positions` uint8: log2(M) bits for every kept weight, its place among its neighbours, least significant bit first.

"block" and "n:m" stand for the smallest of `BLOCKS` and of `PATTERNS` that fits, "auto" for the smallest of all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.errors import nearest
from pykd.ops.bitmask import bitmask_offsets, pack_bits, unpack_bits

#: The formats that "auto" looks at, the preferred one of equally small ones first.
PATTERNS = ("1:2", "1:4", "2:4", "1:8", "2:8", "4:8", "1:16")
BLOCKS = ("4x1", "8x1", "16x1", "1x4", "4x4", "8x8", "16x16", "32x32", "64x64")
FORMATS = (*PATTERNS, "bitmask", "csr16", *BLOCKS)
FAMILIES = {"auto": FORMATS, "block": BLOCKS, "n:m": PATTERNS}

_TILE = 1 << 16  # columns that 16 bits tell apart


class _Block(NamedTuple):
    rows: int
    columns: int


class _Pattern(NamedTuple):
    kept: int
    of: int

    @property
    def bits(self) -> int:
        return self.of.bit_length() - 1


def choose_format(mask: Tensor, format: str = "auto") -> str:
    """The name of one format for a mask, bool [out, in]: `format` itself, or the smallest of its family that fits.

    Raises ValueError for an unknown format, and for one that the mask does not fit.

    >>> choose_format(torch.eye(8).bool()), choose_format(torch.ones(8, 8).tril().bool())
    ('1:8', 'bitmask')
    """
    _parse(format)
    family = FAMILIES.get(format, (format,))
    # Most masks show in their first rows what they do not fit.
    fitting = [name for name in family if _fits(mask[:64], name) and _fits(mask, name)]
    if not fitting:
        raise ValueError(
            f"the mask [{mask.shape[0]}, {mask.shape[1]}] does not fit format {format!r} ({_needs(format)}): "
            f"prune it that way, or take format='auto'"
        )
    rows, columns, kept = *mask.shape, int(mask.sum())
    return min(fitting, key=lambda name: index_bytes(name, rows, columns, kept))


def filled_mask(weight: Tensor, format: str) -> Tensor:
    """The weights that are not zero, bool [out, in], and the zeros that a block or N:M format keeps beside them.

    A weight matrix that has more than N of M non-zeros stays as it is, for `choose_format` to refuse.

    >>> filled_mask(torch.tensor([[0.0, 0.0, 0.0, 5.0]]), "2:4")
    tensor([[ True, False, False,  True]])
    """
    mask, kind = weight != 0, _parse(format)
    if isinstance(kind, _Block):
        rows, columns = mask.shape
        return _spread(_blocks(mask, kind), kind)[:rows, :columns]
    if isinstance(kind, _Pattern):
        inside = _inside(mask, kind.of)
        groups = F.pad(mask, (0, -mask.shape[1] % kind.of)).view(inside.shape)
        if bool((groups.sum(-1) <= kind.kept).all()):
            order = (2 * groups.int() + inside.int()).sort(dim=-1, descending=True, stable=True).indices
            first = torch.zeros_like(groups).scatter_(-1, order[..., : kind.kept], True) & inside
            mask = first.flatten(1)[:, : mask.shape[1]]
    return mask


def index_shapes(format: str, rows: int, columns: int, nnz: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, element type) of the index tensors of a matrix with `nnz` kept weights.

    >>> index_shapes("csr16", 3, 70000, 5)
    {'indices': ((5,), torch.int16), 'counts': ((3, 2), torch.int32)}
    """
    kind = _parse(format)
    if isinstance(kind, _Block):
        height, width = -(-rows // kind.rows), -(-columns // kind.columns)
        return {"blocks": ((height, -(-width // 8)), torch.uint8)}
    if isinstance(kind, _Pattern):
        return {"positions": ((-(-nnz * kind.bits // 8),), torch.uint8)}
    if format == "csr16":
        return {"indices": ((nnz,), torch.int16), "counts": ((rows, -(-columns // _TILE)), torch.int32)}
    return {"bitmask": ((rows, -(-columns // 8)), torch.uint8)}


def index_bytes(format: str, rows: int, columns: int, nnz: int) -> int:
    """Bytes of the index tensors, which every format has beside the `nnz` values.

    >>> index_bytes("bitmask", 64, 64, 100), index_bytes("csr16", 64, 64, 100)
    (512, 456)
    """
    shapes = index_shapes(format, rows, columns, nnz).values()
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)


def encode(mask: Tensor, format: str) -> dict[str, Tensor]:
    """The index tensors of a mask, bool [out, in], in one of FORMATS that it fits (`choose_format`)."""
    kind = _parse(format)
    if isinstance(kind, _Block):
        return {"blocks": pack_bits(_blocks(mask, kind))}
    if isinstance(kind, _Pattern):
        place = mask.nonzero()[:, 1] % kind.of
        bits = (place.unsqueeze(1) >> torch.arange(kind.bits, device=mask.device)) & 1
        return {"positions": pack_bits(bits.bool().view(1, bits.numel())).flatten()}
    if format == "csr16":
        rows, columns = mask.shape
        tiles, width = -(-columns // _TILE), min(columns, _TILE)
        cells = F.pad(mask, (0, tiles * width - columns)).view(rows, tiles, width)
        low = mask.nonzero()[:, 1] & (_TILE - 1)
        signed = low - ((low >> 15) << 16)
        return {"indices": signed.to(torch.int16), "counts": cells.sum(-1, dtype=torch.int32)}
    return {"bitmask": pack_bits(mask)}


def decode(tensors: Mapping[str, Tensor], format: str, rows: int, columns: int, nnz: int) -> Tensor:
    """The bitmask (`pykd.ops.bitmask`) of index tensors that `encode` made.

    Raises ValueError where the tensors contradict each other, the shape, or the number of values.
    """
    for name, (shape, _) in index_shapes(format, rows, columns, nnz).items():
        if tuple(tensors[name].shape) != shape:
            _refuse(format, f"{name} has shape {tuple(tensors[name].shape)}, not {shape}")
    kind = _parse(format)
    if isinstance(kind, _Block):
        mask = _decode_blocks(tensors["blocks"], kind, format, rows, columns)
    elif isinstance(kind, _Pattern):
        mask = _decode_pattern(tensors["positions"], kind, format, rows, columns, nnz)
    elif format == "csr16":
        mask = _decode_csr16(tensors["indices"], tensors["counts"], rows, columns, nnz)
    else:
        return tensors["bitmask"]
    if int(mask.sum()) != nnz:
        _refuse(format, f"it keeps {int(mask.sum())} weights and there are {nnz} values")
    return pack_bits(mask)


def _decode_blocks(blocks: Tensor, kind: _Block, format: str, rows: int, columns: int) -> Tensor:
    width = -(-columns // kind.columns)
    try:
        bitmask_offsets(blocks, width)
    except ValueError:
        _refuse(format, f"a block past the last of {width} in a row is kept")
    return _spread(unpack_bits(blocks, width), kind)[:rows, :columns]


def _decode_pattern(positions: Tensor, kind: _Pattern, format: str, rows: int, columns: int, nnz: int) -> Tensor:
    groups, left = divmod(columns, kind.of)
    last = min(left, kind.kept)
    if nnz != rows * (groups * kind.kept + last):
        _refuse(format, f"{nnz} values are not those of [{rows}, {columns}]")
    bits = unpack_bits(positions.unsqueeze(0), nnz * kind.bits).view(nnz, kind.bits)
    place = (bits.long() << torch.arange(kind.bits, device=positions.device)).sum(1)
    place = place.view(rows, groups * kind.kept + last)
    start = torch.arange(groups, device=positions.device).repeat_interleave(kind.kept) * kind.of
    column = place + F.pad(start, (0, last), value=groups * kind.of)
    if column.numel() and (bool((column >= columns).any()) or bool((column.diff(dim=1) <= 0).any())):
        _refuse(format, "places among neighbours do not ascend, or lie past the last column")
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=positions.device)
    return mask.scatter_(1, column, True)


def _decode_csr16(indices: Tensor, counts: Tensor, rows: int, columns: int, nnz: int) -> Tensor:
    tiles = counts.shape[1]
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=counts.device)
    if bool((counts < 0).any()) or int(counts.long().sum()) != nnz:
        _refuse("csr16", f"the counts of its rows do not add up to {nnz} values")
    if nnz:
        cell = torch.arange(rows * tiles, device=counts.device).repeat_interleave(counts.flatten().long())
        column = (indices.long() & (_TILE - 1)) + cell % tiles * _TILE
        at = cell // tiles * columns + column
        if bool((column >= columns).any()) or bool((at.diff() <= 0).any()):
            _refuse("csr16", "columns do not ascend within a row, or lie past the last one")
        mask.view(-1)[at] = True
    return mask


def _refuse(format: str, what: str) -> NoReturn:
    raise ValueError(f"corrupt {format} index: {what}; load the weight again")


def _parse(format: str) -> _Block | _Pattern | None:
    """What a block or N:M format keeps; None for the others. Raises ValueError for names that are no format."""
    if format in ("bitmask", "csr16", *FAMILIES):
        return None
    block = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", format) if isinstance(format, str) else None
    if block is not None:
        return _Block(int(block[1]), int(block[2]))
    pattern = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", format) if isinstance(format, str) else None
    if pattern is None:
        raise ValueError(nearest("sparse format", format, (*FORMATS, *FAMILIES)))
    kept, of = int(pattern[1]), int(pattern[2])
    if kept >= of or of & (of - 1) or of > 256:
        raise ValueError(f"format 'N:M' keeps N of M with N < M, M a power of two up to 256; got {format!r}")
    return _Pattern(kept, of)


def _needs(format: str) -> str:
    kind = _parse(format)
    if isinstance(kind, _Block):
        return f"blocks of {kind.rows} x {kind.columns} are kept or pruned whole"
    if isinstance(kind, _Pattern):
        return f"{kind.kept} of every {kind.of} neighbours are kept"
    return f"one of {', '.join(FAMILIES[format])}"


def _fits(mask: Tensor, format: str) -> bool:
    kind = _parse(format)
    if isinstance(kind, _Block):
        rows, columns = mask.shape
        return torch.equal(_spread(_blocks(mask, kind), kind)[:rows, :columns], mask)
    if isinstance(kind, _Pattern):
        inside = _inside(mask, kind.of)
        groups = F.pad(mask, (0, -mask.shape[1] % kind.of)).view(inside.shape)
        return torch.equal(groups.sum(-1), inside.sum(-1).clamp(max=kind.kept))
    return True


def _inside(mask: Tensor, of: int) -> Tensor:
    """bool [out, groups, of]: False where the last group is filled up."""
    rows, columns = mask.shape
    return F.pad(torch.ones_like(mask), (0, -columns % of)).view(rows, -(-columns // of), of)


def _blocks(mask: Tensor, kind: _Block) -> Tensor:
    """bool [block rows, block columns]: whether any of a block's weights is kept."""
    rows, columns = mask.shape
    padded = F.pad(mask, (0, -columns % kind.columns, 0, -rows % kind.rows))
    split = padded.view(-(-rows // kind.rows), kind.rows, -(-columns // kind.columns), kind.columns)
    return split.transpose(1, 2).flatten(2).any(-1)


def _spread(blocks: Tensor, kind: _Block) -> Tensor:
    return blocks.repeat_interleave(kind.rows, 0).repeat_interleave(kind.columns, 1)
