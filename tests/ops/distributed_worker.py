"""One of two processes that train on halves of a batch by DDP: `distributed_worker.py LOSS RANK RENDEZVOUS RESULT`."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pykd


class Model(nn.Module):
    """A body and a head with the same weights in every process, and a loss by name."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head, self.loss = nn.Linear(6, 8), nn.Linear(8, 5), loss

    def forward(self, x: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
        hidden = self.body(x)
        if self.loss == "kd_loss":
            return pykd.kd_loss(self.head(hidden), teacher, labels, **options)
        head = {"student_bias": self.head.bias, "chunk_bytes": 100}
        return pykd.linear_kd_loss(hidden, self.head.weight, teacher, torch.eye(5), labels, **head, **options)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, teacher logits and labels of 8 positions; those of the second half are mostly ignored."""
    generator = torch.Generator().manual_seed(3)
    x, teacher = torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)
    return x, teacher, torch.tensor([0, 1, 2, 3, -100, -100, 4, -100])


def main(loss: str, rank: int, rendezvous: str, result: str) -> None:
    """Save the gradients that DDP has averaged over both processes."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    counted = int((batch()[2] != -100).sum())
    model = nn.parallel.DistributedDataParallel(Model(loss))
    half = (part[4 * rank : 4 * rank + 4] for part in batch())
    model(*half, num_items=counted / 2).backward()  # DDP divides by the two processes
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], result)
    dist.barrier()
    os._exit(0)  # taking the process group down can wait forever for its own threads, which want Python's lock


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
