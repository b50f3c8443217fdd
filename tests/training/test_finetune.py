"""Supervised training of real models, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from pykd.data.bundle import DataBundle, stack
from pykd.errors import DataError
from pykd.training import Guard, finetune


def blobs(classes: int = 3, size: int = 48) -> DataBundle:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, 6, generator=generator) * 3
    items = [
        {"pixel_values": centers[i % classes] + torch.randn(6, generator=generator), "labels": i % classes}
        for i in range(size)
    ]
    return DataBundle(items, items, stack, [str(c) for c in range(classes)], "blobs")


def test_it_learns_and_reports() -> None:
    model = nn.Linear(6, 3)
    assert finetune(model, blobs(), epochs=20, lr=0.1, progress=False) is model
    batch = blobs().collate(list(blobs().test))  # type: ignore[call-overload]
    assert (model(batch["pixel_values"]).argmax(1) == batch["labels"]).float().mean() > 0.9
    (entry,) = model.pykd_report
    assert entry["stage"] == "finetune" and entry["method"] == "cross_entropy" and entry["steps"] == 40
    assert entry["last_loss"] < entry["first_loss"] and entry["parameters"]["lr"] == 0.1
    json.dumps(entry, allow_nan=False)


def test_a_hugging_face_model() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=2, **shape))
    items = [{"input_ids": torch.full((5,), 3 + i % 2), "labels": i % 2} for i in range(16)]
    finetune(model, DataBundle(items, items, stack, ["a", "b"], "tokens"), epochs=20, lr=1e-2, progress=False)
    entry = model.pykd_report[0]
    assert entry["last_loss"] < 0.5 * entry["first_loss"]


def test_positions_without_a_label_do_not_count() -> None:
    items = [{"pixel_values": torch.ones(6), "labels": -100}, {"pixel_values": torch.ones(6), "labels": 1}]
    bundle = DataBundle(items, items, stack, ["a", "b", "c"], "partly labelled")
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    want = nn.functional.cross_entropy(model(torch.ones(1, 6)), torch.tensor([1])).item()
    finetune(model, bundle, progress=False)
    assert model.pykd_report[0]["first_loss"] == pytest.approx(want)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_labels_is_passed_over_and_said(accumulate: int, caplog: pytest.LogCaptureFixture) -> None:
    batches = [{"pixel_values": torch.ones(4, 6), "labels": torch.full((4,), 1 if at < 2 else -100)} for at in range(4)]
    model = nn.Linear(6, 3)
    finetune(model, batches, accumulate=accumulate, weight_decay=0.0, progress=False)
    (entry,) = model.pykd_report
    assert entry["first_loss"] > 0 and entry["last_loss"] == 0 and bool(model.weight.isfinite().all())
    assert [record.getMessage() for record in caplog.records] == [
        f"step {1 + 2 // accumulate}: no label of its batches counts (all are -100): nothing is learned"
    ]


def test_what_it_refuses() -> None:
    with pytest.raises(DataError, match="label 2 is out of range: the model has 2 classes"):
        finetune(nn.Linear(6, 2), blobs(), progress=False)
    with pytest.raises(ValueError, match=r"label_smoothing is a share, 0\.\.1, got 2"):
        finetune(nn.Linear(6, 3), blobs(), label_smoothing=2, progress=False)
    broken = nn.Linear(6, 3)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the model's 'weight' holds NaN or infinite values"):
        finetune(broken, blobs(), progress=False)


def test_a_guard_watches_the_held_out_split() -> None:
    model = nn.Linear(6, 3)
    finetune(model, blobs(), epochs=6, lr=0.1, guard=Guard(), validate_steps=4, progress=False)
    entry = model.pykd_report[-1]
    assert [found["step"] for found in entry["validations"]] == [0, 4, 8, 12]
    assert entry["validations"][0]["metric"] == "accuracy" and "f1" in entry["validations"][0]["metrics"]
    worst = entry["validations"][0]["examples"][0]
    assert worst["label"] != worst["prediction"] and 0 < worst["confidence"] <= 1
    assert entry["outcome"].startswith("finished after 0 rollbacks with the model of step")
    json.dumps(entry, allow_nan=False)
    with pytest.raises(ValueError, match="guard needs validate, a function of the model, where the data is a loader"):
        finetune(model, [blobs().example(3)], guard=Guard(), progress=False)
