"""Embeddings with 4-, 8- and 16-bit rows: stored and kept so; a lookup unpacks the rows that it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pykd.nn.codecs.four_bit import quantize_4bit
from pykd.nn.compressed import CompressedModule
from pykd.nn.linear_4bit import Weight4bit
from pykd.nn.linear_8bit import Weight8bit
from pykd.nn.linear_16bit import Weight16bit
from pykd.ops.embedding_4bit import embedding_4bit
from pykd.ops.embedding_8bit import embedding_8bit


class CompressedEmbedding(CompressedModule):
    """What compressed embeddings share: frozen rows [num_embeddings, embedding_dim] in the layout of files.

    Where a layer that is tied to the embedding multiplies with its weight (`pykd.nn.TiedLinear`), the weight has the
    layout of linear layers instead, one copy for both, and lookups read their rows from that.
    """

    padding_idx: int | None
    rows: int
    columns: int
    multiplies: bool
    _matrix: Callable[[], Tensor]
    _multiply: Callable[..., Tensor]
    _spec: Callable[[], dict[str, Any]]
    _has_layout: Callable[[], bool]
    _register: Callable[..., None]

    @property
    def num_embeddings(self) -> int:
        return self.rows

    @property
    def embedding_dim(self) -> int:
        return self.columns

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias: what an output projection that shares the weight computes."""
        return self._multiply(x, bias)

    def use_in_products(self) -> None:
        """Change to the layout of linear layers: something multiplies with the weight, too."""
        if not self.multiplies:
            self._unpack()
            self.multiplies = True
            if self.finalized:
                self.finalize()

    def spec(self) -> dict[str, Any]:
        sizes = {"num_embeddings": self.rows, "embedding_dim": self.columns, "padding_idx": self.padding_idx}
        return {"type": type(self).__name__, **sizes, **self._spec()}

    def dequantize(self) -> Tensor:
        return self._matrix()

    def to_dense(self) -> nn.Embedding:
        return self.to_embedding()

    def to_embedding(self) -> nn.Embedding:
        """The ordinary embedding with the dequantized rows."""
        weight = self.dequantize()
        options: dict[str, Any] = {"padding_idx": self.padding_idx, "device": "meta", "dtype": self.dtype}
        dense = nn.Embedding(self.rows, self.columns, **options)
        dense.weight = nn.Parameter(weight)
        return dense

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        options = {name: value for name, value in self._spec().items() if name != "dtype" and value is not None}
        return f"{self.rows}, {self.columns}{padding}, {', '.join(f'{k}={v}' for k, v in options.items())}"


def check_embedding(embedding: nn.Embedding) -> None:
    """Raise ValueError for an embedding that changes its rows while it looks them up."""
    if embedding.max_norm is not None:
        raise ValueError(
            f"an embedding with max_norm={embedding.max_norm} rescales its rows in each lookup, which packed rows "
            "cannot: rescale the weight once and set max_norm to None"
        )


class Embedding4bit(CompressedEmbedding, Weight4bit):
    """`nn.Embedding` with 4-bit rows, frozen: a lookup gives exactly the rows of `dequantize()`.

    >>> layer = Embedding4bit.from_embedding(nn.Embedding(100, 64), scheme="nf4", group_size=32)
    >>> layer(torch.tensor([[3, 99]])).shape
    torch.Size([1, 2, 64])
    """

    multiplies = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: str = "w4a16",
        group_size: int | None = 32,
        symmetric: bool = True,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme, group_size, symmetric)
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, *, scheme: str = "w4a16", group_size: int | None = 32, symmetric: bool = True
    ) -> Self:
        """Quantize an embedding by plain rounding; options as in `Linear4bit.from_linear`. `embedding` stays as it is.

        Raises ValueError for an embedding with max_norm.
        """
        check_embedding(embedding)
        sizes = embedding.num_embeddings, embedding.embedding_dim
        layer = cls(*sizes, scheme, group_size, symmetric, embedding.padding_idx)
        weight = embedding.weight.detach()
        layer._take(quantize_4bit(weight, code=layer.code, group_size=layer.group_size), weight.dtype)
        layer.train(embedding.training)
        layer.finalize()
        return layer

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        names = ("num_embeddings", "embedding_dim", "scheme", "group_size", "symmetric", "padding_idx")
        layer = cls(*(spec[name] for name in names))
        layer._register_empty(spec, device)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        options: dict[str, Any] = {"code": self.code, "embedding_dim": self.columns, "group_size": self.group_size}
        packed = self._buffers.get("packed")
        if packed is not None:
            return embedding_4bit(ids, packed, num_embeddings=self.rows, **options).to(self.dtype)
        qweight, scales, zeros = self._tensors()
        return embedding_4bit(ids, qweight, scales, zeros=zeros, **options).to(self.dtype)


class Embedding8bit(CompressedEmbedding, Weight8bit):
    """`nn.Embedding` with int8 rows and a scale per row, frozen: a lookup gives exactly the rows of `dequantize()`.

    >>> Embedding8bit.from_embedding(nn.Embedding(100, 64))(torch.tensor([3])).shape
    torch.Size([1, 64])
    """

    multiplies = False

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__(num_embeddings, embedding_dim, "w8a16")
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Self:
        """Quantize an embedding by rounding each row to its largest magnitude / 127. `embedding` stays as it is.

        Raises ValueError for an embedding with max_norm.
        """
        check_embedding(embedding)
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        layer._quantize(embedding.weight.detach())
        layer.train(embedding.training)
        layer.finalize()
        return layer

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        layer = cls(spec["num_embeddings"], spec["embedding_dim"], spec["padding_idx"])
        layer._register_empty(spec, device)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        packed = self._buffers.get("packed")
        if packed is not None:
            found = embedding_8bit(ids, packed, embedding_dim=self.columns, num_embeddings=self.rows)
        else:
            found = embedding_8bit(ids, *self._tensors(), embedding_dim=self.columns)
        return found.to(self.dtype)


class Embedding16bit(CompressedEmbedding, Weight16bit):
    """`nn.Embedding` with rows in bfloat16 or float16, frozen: a lookup gives exactly the rows of `dequantize()`.

    >>> Embedding16bit.from_embedding(nn.Embedding(100, 64), scheme="bf16")(torch.tensor([3])).shape
    torch.Size([1, 64])
    """

    multiplies = False

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: str = "bf16", padding_idx: int | None = None):
        super().__init__(num_embeddings, embedding_dim, scheme)
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, *, scheme: str = "bf16") -> Self:
        """Round the rows to 16 bits. `embedding` stays as it is.

        Raises ValueError for an embedding with max_norm, and for values beyond float16.
        """
        check_embedding(embedding)
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, scheme, embedding.padding_idx)
        layer._quantize(embedding.weight.detach())
        layer.train(embedding.training)
        layer.finalize()
        return layer

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        layer = cls(spec["num_embeddings"], spec["embedding_dim"], spec["scheme"], spec["padding_idx"])
        layer._register_empty(spec, device)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        rows = self._buffers.get("dense")
        return F.embedding(ids, self._values() if rows is None else rows).to(self.dtype)
