"""One of two processes that train a head on halves of a batch by DDP, with kd_loss: started by test_kd_loss.py.

Usage: ddp_worker.py RANK RENDEZVOUS_FILE RESULT_FILE
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pykd


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, teacher logits and labels of 8 positions; those of the second half are mostly ignored."""
    generator = torch.Generator().manual_seed(3)
    x, teacher = torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)
    return x, teacher, torch.tensor([0, 1, 2, 3, -100, -100, 4, -100])


def head() -> nn.Linear:
    """The same weights in every process."""
    torch.manual_seed(1)
    return nn.Linear(6, 5)


def main(rank: int, rendezvous: str, result: str) -> None:
    """Gradient of this process's half after DDP has averaged it with the other's."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    x, teacher, labels = (part[4 * rank : 4 * rank + 4] for part in batch())
    counted = int((batch()[2] != -100).sum())
    model = nn.parallel.DistributedDataParallel(head())
    pykd.kd_loss(model(x), teacher, labels, num_items=counted / 2).backward()  # DDP divides by the two processes
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], result)
    dist.barrier()  # a process that leaves early takes its threads away under the other
    del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
