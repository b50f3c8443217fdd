"""The compact answer, `application/vnd.pykd.labels`: the number of each input's class, in as few bits as it needs.

Layout, whole numbers little-endian:

    offset  bytes  content
    0       2      "PL"
    2       1      version, 1
    3       1      bits of a label, ceil(log2(classes)), at least 1
    4       4      classes
    8       4      labels
    12      ...    the labels in the order of the inputs; label i takes the bits from i * bits on, counted from the
                   least significant bit of the first byte; the bits that the last byte has left are 0

The names of the classes are in `GET /models`, in the order of their numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

MEDIA_TYPE = "application/vnd.pykd.labels"
HEADER = struct.Struct("<2sBBII")
MAGIC, VERSION = b"PL", 1


def encode_labels(labels: Sequence[int], classes: int) -> bytes:
    """Class numbers 0..classes-1 in the layout above. Raises ValueError for a number out of range.

    >>> len(encode_labels([1, 0, 1, 1], 2)), encode_labels([5, 57], 58)[12:].hex()
    (13, '450e')
    """
    wrong = next((label for label in labels if not 0 <= label < classes), None)
    if wrong is not None:
        raise ValueError(f"label {wrong} is out of range: there are {classes} classes, counted from 0")
    bits = max(1, (classes - 1).bit_length())
    packed = sum(label << (position * bits) for position, label in enumerate(labels))
    header = HEADER.pack(MAGIC, VERSION, bits, classes, len(labels))
    return header + packed.to_bytes(-(-len(labels) * bits // 8), "little")


def decode_labels(content: bytes) -> list[int]:
    """The class numbers in an answer of this type. Raises ValueError for content that is not one.

    >>> decode_labels(encode_labels([5, 57, 0], 58))
    [5, 57, 0]
    """
    if len(content) < HEADER.size or content[:2] != MAGIC:
        raise ValueError(f"expected {MEDIA_TYPE}, got {len(content)} bytes that do not begin with its header")
    _, version, bits, classes, count = HEADER.unpack_from(content)
    if version != VERSION:
        raise ValueError(f"version {version} of {MEDIA_TYPE} is unknown, this is version {VERSION}: upgrade pykd")
    if bits != max(1, (classes - 1).bit_length()):
        raise ValueError(f"labels of {classes} classes do not take {bits} bits: the content is damaged")
    body = content[HEADER.size :]
    if len(body) != -(-count * bits // 8):
        raise ValueError(f"{count} labels of {bits} bits take {-(-count * bits // 8)} bytes, got {len(body)}")
    packed, mask = int.from_bytes(body, "little"), (1 << bits) - 1
    labels = [packed >> (position * bits) & mask for position in range(count)]
    wrong = next((label for label in labels if label >= classes), None)
    if wrong is not None:
        raise ValueError(f"label {wrong} is out of range, there are {classes} classes: the content is damaged")
    return labels
