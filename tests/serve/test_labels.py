"""The compact answer, decoded."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykd.serve import decode_labels, encode_labels


@given(st.integers(1, 70_000).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=70))))
def test_labels_come_back_in_the_fewest_bits(drawn: tuple[int, list[int]]) -> None:
    classes, labels = drawn
    content = encode_labels(labels, classes)
    assert decode_labels(content) == labels
    assert len(content) == 12 + math.ceil(len(labels) * max(1, math.ceil(math.log2(classes))) / 8)


def test_the_layout() -> None:
    assert encode_labels([1, 2, 3, 0, 3], 4) == b"PL" + bytes([1, 2, 4, 0, 0, 0, 5, 0, 0, 0, 0b00_11_10_01, 0b11])


def test_labels_out_of_range_are_refused() -> None:
    for label in (-1, 4):
        with pytest.raises(ValueError, match=f"label {label} is out of range: there are 4 classes"):
            encode_labels([0, label], 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "got 0 bytes that do not begin"), (b"{" * 20, "got 20 bytes that do not begin"),
     (b"PL\2" + bytes(9), "version 2 of application/vnd.pykd.labels is unknown"),
     (encode_labels([1] * 9, 2)[:-1], "9 labels of 1 bits take 2 bytes, got 1"),
     (b"PL\1\0" + bytes([2, 0, 0, 0, 255, 255, 255, 255]), "labels of 2 classes do not take 0 bits"),
     (b"PL\1\2" + bytes([3, 0, 0, 0, 1, 0, 0, 0, 3]), "label 3 is out of range, there are 3 classes")],
)  # fmt: skip
def test_other_content_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_labels(content)
