"""Accumulation that equals the whole batch, float16, recomputed activations, and batches of similar lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import pykd
from pykd.data.bundle import DataBundle, stack
from pykd.errors import DataError
from pykd.training import TrainConfig, fit
from pykd.training.order import epoch_order, row_lengths, share
from pykd.training.source import Source


def bundle(rows: int = 22) -> DataBundle:
    """Positions with labels, most of which are ignored in some rows."""
    generator = torch.Generator().manual_seed(1)
    items = []
    for row in range(rows):
        labels = torch.randint(5, (7,), generator=generator)
        labels[1 + row % 6 :] = -100
        items.append({"x": torch.randn(7, 6, generator=generator), "labels": labels})
    return DataBundle(items, items[:4], stack, list("abcde"), "positions")


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    teacher = batch["x"][..., :5] * 3
    return pykd.kd_loss(model(batch["x"]), teacher, batch["labels"]), {"rows": len(batch["labels"])}


def curve(loss: Any = loss_fn, data: Any = None, **config: Any) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    history = fit(model, data or bundle(), loss, TrainConfig(lr=1e-2, epochs=4, **config), progress=False)
    return [record["loss"] for record in history.records], model


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_accumulated_batches_are_the_whole_batch(batch_size: int, accumulate: int) -> None:
    whole, model = curve(batch_size=8)
    parts, other = curve(batch_size=batch_size, accumulate=accumulate)
    assert len(parts) == len(whole) == 12  # three steps an epoch, of 8, 8 and 6 rows
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=1e-5, atol=0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_batches_of_a_loader_are_accumulated_too() -> None:
    batches = [bundle().collate([bundle().train[i] for i in rows]) for rows in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))]
    pairs = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in ((batches[0], batches[1]), batches[2:4])]
    whole, _ = curve(data=[*pairs, batches[4]])
    parts, _ = curve(data=batches, accumulate=2)
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=1e-5, atol=0)


def test_batches_are_dealt_to_processes_in_turn_and_every_row_once() -> None:
    data = bundle(13)
    rows = {tuple(item["x"].flatten().tolist()) for item in data.train}  # type: ignore[attr-defined]
    seen: list[tuple[float, ...]] = []
    for rank in range(2):
        source = Source(data, batch_size=2, seed=0, accumulate=2, rank=rank, processes=2)
        assert source.steps_per_epoch == 2
        for parts in source.stream(0, 2):
            assert len(parts) == 2
            seen += [tuple(x.flatten().tolist()) for batch, counts in parts if counts for x in batch["x"]]
    assert len(seen) == 13 and set(seen) == rows


def test_a_loader_is_dealt_unless_its_sampler_does() -> None:
    data = list(range(10))

    def read(rank: int, sampler: bool) -> list[int]:
        own = DistributedSampler(data, 2, rank, shuffle=False) if sampler else None  # type: ignore[arg-type]
        loader = DataLoader(data, batch_size=2, sampler=own)  # type: ignore[arg-type]
        source = Source(loader, batch_size=1, seed=0, rank=rank, processes=2)
        assert source.steps_per_epoch == 3
        return [value for ((batch, counts),) in source.stream(0, 3) if counts for value in batch.tolist()]

    assert read(0, False) == [0, 1, 4, 5, 8, 9] and read(1, False) == [2, 3, 6, 7]
    assert read(0, True) == [0, 2, 4, 6, 8] and read(1, True) == [1, 3, 5, 7, 9]


def test_a_loader_that_ends_early_is_said() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter([{"x": torch.zeros(2, 6), "labels": torch.zeros(2, dtype=torch.long)}] * 3)

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return self.batches

    with pytest.raises(DataError, match=r"the loader's length is 3 batches, but epoch 2 ended before: give a loader"):
        fit(nn.Linear(6, 5), Once(), loss_fn, TrainConfig(epochs=2), progress=False)


def test_float16_scales_the_loss_and_leaves_out_steps_that_overflow() -> None:
    def steep(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        assert model(batch["x"]).dtype == torch.float16
        return loss_fn(model, batch)[0] * (1e33 if steep.calls == 0 else 1.0), {}  # type: ignore[attr-defined]

    steep.calls = 0  # type: ignore[attr-defined]
    config = TrainConfig(epochs=1, batch_size=8, autocast="float16", lr=1e-2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    before = model[0].weight.detach().clone()

    def counting(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        found = steep(model, batch)
        steep.calls += 1  # type: ignore[attr-defined]
        if steep.calls == 2:  # type: ignore[attr-defined]
            assert torch.equal(model[0].weight, before)  # type: ignore[index]
        return found

    records = fit(model, bundle(), counting, config, progress=False).records
    assert [record["skipped"] for record in records] == [1.0, 0.0, 0.0]
    assert not torch.equal(model[0].weight, before)


def test_recomputed_activations_give_the_same_weights() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    items = [{"input_ids": torch.full((5,), 3 + i % 2), "labels": i % 2} for i in range(8)]
    data = DataBundle(items, items, stack, ["a", "b"], "tokens")
    weights = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=2, **shape))
        pykd.finetune(model, data, batch_size=4, gradient_checkpointing=recompute, progress=False)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)
    with pytest.raises(ValueError, match="gradient_checkpointing: Linear does not offer it"):
        fit(nn.Linear(6, 5), bundle(), loss_fn, TrainConfig(gradient_checkpointing=True), progress=False)


def test_rows_of_similar_length_come_together_in_random_order() -> None:
    lengths = [(7 * row) % 31 for row in range(203)]
    order = epoch_order(203, seed=1, epoch=0, step_rows=4, lengths=lengths)
    assert sorted(order) == list(range(203)) and order == epoch_order(
        203, seed=1, epoch=0, step_rows=4, lengths=lengths
    )
    assert order != epoch_order(203, seed=1, epoch=1, step_rows=4, lengths=lengths)
    steps = [order[first : first + 4] for first in range(0, 200, 4)]
    spread = sum(max(lengths[row] for row in rows) - min(lengths[row] for row in rows) for rows in steps)
    assert spread < 2 * len(steps)
    firsts = [lengths[rows[0]] for rows in steps]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


def test_grouping_by_length_needs_lengths() -> None:
    items = [{"input_ids": torch.ones(1 + i % 5)} for i in range(6)]
    assert row_lengths(items) == [1, 2, 3, 4, 5, 1]
    assert row_lengths([{"words": ["a", "b"], "text": "a b"}]) == [2]
    assert row_lengths([{"source": "a", "target": "abc", "text": "a"}]) == [3]
    with pytest.raises(
        DataError, match=r"group_by_length needs examples with one of input_ids, .* but they have x, labels"
    ):
        curve(group_by_length=True)
    with pytest.raises(ValueError, match="group_by_length needs a DataBundle"):
        curve(data=[bundle().example()], group_by_length=True)


def test_a_step_is_shared_evenly() -> None:
    assert [len(share(range(7), 4, part)) for part in range(4)] == [2, 2, 2, 1]
    assert [len(share(range(2), 4, part)) for part in range(4)] == [1, 1, 0, 0]
