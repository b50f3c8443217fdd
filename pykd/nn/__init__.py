"""nn: see docs/ARCHITECTURE.md."""

from __future__ import annotations

from pykd.nn.compressed import CompressedModule
from pykd.nn.conv import Conv2d4bit, Conv2d8bit, Conv2d16bit
from pykd.nn.embedding import Embedding4bit, Embedding8bit, Embedding16bit
from pykd.nn.fake_quantized import QATConv2d, QATLinear
from pykd.nn.kd_loss import KDLoss
from pykd.nn.linear_4bit import Linear4bit
from pykd.nn.linear_8bit import Linear8bit
from pykd.nn.linear_16bit import Linear16bit
from pykd.nn.sparse_conv import SparseConv2d
from pykd.nn.sparse_linear import SparseLinear
from pykd.nn.tied import TiedEmbedding, TiedLinear
from pykd.ops.int4_r16 import codebook_code

__all__ = [
    "COMPRESSED",
    "CompressedModule",
    "Conv2d4bit",
    "Conv2d8bit",
    "Conv2d16bit",
    "Embedding4bit",
    "Embedding8bit",
    "Embedding16bit",
    "KDLoss",
    "Linear4bit",
    "Linear8bit",
    "Linear16bit",
    "QATConv2d",
    "QATLinear",
    "SparseConv2d",
    "SparseLinear",
    "TiedEmbedding",
    "TiedLinear",
    "codebook_code",
]

#: `type` in the description of a saved layer -> the class that it is rebuilt with. One line per compressed layer.
COMPRESSED: dict[str, type[CompressedModule]] = {
    "Conv2d4bit": Conv2d4bit,
    "Conv2d8bit": Conv2d8bit,
    "Conv2d16bit": Conv2d16bit,
    "Embedding4bit": Embedding4bit,
    "Embedding8bit": Embedding8bit,
    "Embedding16bit": Embedding16bit,
    "Linear4bit": Linear4bit,
    "Linear8bit": Linear8bit,
    "Linear16bit": Linear16bit,
    "SparseConv2d": SparseConv2d,
    "SparseLinear": SparseLinear,
    "TiedEmbedding": TiedEmbedding,
    "TiedLinear": TiedLinear,
}
