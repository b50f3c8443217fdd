"""Large fresh outputs come from memory that is used again."""

from __future__ import annotations

import sys

import pytest
import torch

from pykd.ops import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are advised on Linux only")
CPU = torch.device("cpu")
LARGE = memory.LEAST_BYTES


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> memory.Pool:
    mine = memory.Pool(limit=8 * LARGE)
    monkeypatch.setattr(memory, "_POOL", mine)
    return mine


def large(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return memory.empty(shape, dtype=dtype, device=CPU)


def test_small_and_foreign_tensors_are_torch_s_own(pool: memory.Pool) -> None:
    small = large(LARGE // 4 - 1)
    foreign = memory.empty((LARGE,), dtype=torch.float32, device=torch.device("meta"))
    del small, foreign
    assert not pool.free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_freed_block_is_used_again(pool: memory.Pool, dtype: torch.dtype) -> None:
    first = large(3, 5, LARGE // 16, dtype=dtype)
    assert first.is_contiguous() and first._base is None and first.dtype == dtype and first.shape == (3, 5, LARGE // 16)
    place = first.data_ptr()
    rows = first.fill_(2.0)[1:]
    del first
    assert not pool.free and bool((rows == 2).all())  # a view keeps the block
    del rows
    assert large(3, 5, LARGE // 16, dtype=dtype).data_ptr() == place


def test_blocks_in_use_are_never_shared(pool: memory.Pool) -> None:
    tensors = [large(LARGE // 4).fill_(i) for i in range(4)]
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(tensors))


def test_the_smallest_block_that_fits_and_none_that_is_much_too_large(pool: memory.Pool) -> None:
    sizes = [2 * LARGE, LARGE]
    tensors = [large(size // 4) for size in sizes]
    places = [tensor.data_ptr() for tensor in tensors]
    del tensors
    kept = large(LARGE // 4)
    assert kept.data_ptr() == places[1] and [len(block) for block in pool.free] == [2 * LARGE]
    assert large(LARGE // 4).data_ptr() != places[0]


def test_the_limit_holds_and_the_oldest_goes_first() -> None:
    pool, none = memory.Pool(limit=4 * LARGE), memory.Pool(limit=0)
    storages = [pool.storage(LARGE * (i + 1)) for i in range(3)]
    while storages:
        storages.pop(0)
    assert [len(block) // LARGE for block in pool.free] == [3]  # 1 + 2 + 3 units, of which 4 may stay
    storage = none.storage(LARGE)
    del storage
    assert not none.free


def test_such_a_tensor_trains_copies_and_travels(pool: memory.Pool) -> None:
    tensor = large(2, LARGE // 8).fill_(1.0).requires_grad_()
    (tensor * 3).sum().backward()
    assert tensor.grad is not None and float(tensor.grad.min()) == 3.0
    assert torch.equal(tensor.detach().clone().share_memory_(), tensor.detach())
