"""Layers that have no weight of their own: they compute with that of a compressed embedding, which is stored once."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pykd.nn.compressed import CompressedModule, dense_linear
from pykd.nn.embedding import CompressedEmbedding


class Tied(CompressedModule):
    """A layer that reads the tensors of a compressed embedding and registers none but its bias.

    The embedding is held, not registered: it is a module of the model under its own name, which moves it, saves it and
    loads it. `state_dict()` of this layer holds the bias alone; the name of the embedding belongs to the description of
    the whole model (`pykd.io.structure`), which calls `tie` after both were built.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self._source: tuple[CompressedEmbedding, ...] = ()  # a tuple, so that nn.Module does not register it

    @property
    def source(self) -> CompressedEmbedding:
        """The embedding whose weight this layer uses. Raises ValueError before `tie`."""
        if not self._source:
            raise ValueError(f"this {type(self).__name__} is not tied to an embedding yet: call tie(embedding) first")
        return self._source[0]

    def tie(self, embedding: CompressedEmbedding) -> None:
        """Compute with the weight of this embedding. Raises ValueError where its shape is another."""
        if (embedding.rows, embedding.columns) != self._sizes():
            raise ValueError(
                f"a {type(self).__name__} with a weight {list(self._sizes())} cannot use that of an embedding with "
                f"{embedding.rows} rows of {embedding.columns}"
            )
        self._source = (embedding,)

    @abc.abstractmethod
    def _sizes(self) -> tuple[int, int]:
        """The shape of the weight."""

    @property
    def device(self) -> torch.device:
        own = next(self.parameters(), None)
        return own.device if own is not None else self._source[0].device if self._source else torch.device("meta")

    def _pack(self) -> None:
        assert self.source is not None  # refuses a layer that was never tied

    def dequantize(self) -> Tensor:
        return self.source.dequantize()


class TiedLinear(Tied):
    """An output projection, x W^T + bias, whose weight W is that of an embedding: quantized once, resident once.

    >>> from pykd.nn import Embedding8bit
    >>> head = TiedLinear(64, 100)
    >>> head.tie(Embedding8bit.from_embedding(nn.Embedding(100, 64)))
    >>> head(torch.zeros(2, 64)).shape
    torch.Size([2, 100])
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, embedding: CompressedEmbedding) -> Self:
        """The layer in the place of a linear one that shared its weight with this embedding; the bias is shared."""
        layer = cls(linear.in_features, linear.out_features, linear.weight.dtype)
        layer.bias = linear.bias
        layer.tie(embedding)
        layer.train(linear.training)
        layer.finalize()
        return layer

    def tie(self, embedding: CompressedEmbedding) -> None:
        super().tie(embedding)
        embedding.use_in_products()

    def _sizes(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def spec(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        return {"type": "TiedLinear", **sizes, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        layer = cls(spec["in_features"], spec["out_features"], getattr(torch, spec["dtype"]))
        if spec["bias"]:
            layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=layer.dtype, device=device))
        return layer

    def to_dense(self) -> nn.Linear:
        return self.to_linear()

    def to_linear(self) -> nn.Linear:
        """An ordinary linear layer with a dequantized weight of its own; shares the bias."""
        return dense_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.source.multiply(x, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class TiedEmbedding(Tied):
    """Another lookup in the rows of an embedding, as encoder and decoder of a translation model share one.

    >>> from pykd.nn import Embedding4bit
    >>> again = TiedEmbedding(100, 64)
    >>> again.tie(Embedding4bit.from_embedding(nn.Embedding(100, 64)))
    >>> again(torch.tensor([7])).shape
    torch.Size([1, 64])
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, source: CompressedEmbedding) -> Self:
        """The layer in the place of one that shared its weight with `source`."""
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        layer.dtype = embedding.weight.dtype
        layer.tie(source)
        layer.train(embedding.training)
        layer.finalize()
        return layer

    def _sizes(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def spec(self) -> dict[str, Any]:
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return {"type": "TiedEmbedding", **sizes, "padding_idx": self.padding_idx}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        return cls(spec["num_embeddings"], spec["embedding_dim"], spec["padding_idx"])

    def to_dense(self) -> nn.Embedding:
        return self.source.to_embedding()

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.source(ids)
        return found

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
