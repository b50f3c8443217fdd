"""Distillation: the student follows the teacher, the teacher is left alone, and pairs that do not fit are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd import kd_loss, kl_div_loss
from pykd.data.bundle import DataBundle, stack
from pykd.distillation import distill, logits_loss
from pykd.distillation.teacher import Teacher
from pykd.errors import ArtifactError, DataError
from pykd.training import Guard, TrainConfig

CLASSES = 3


class Counting(nn.Module):
    """A teacher that counts its forward passes and has dropout, which eval mode must silence."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert not self.training and not torch.is_grad_enabled()
        scores: Tensor = self.body(x)
        return scores


def bundle(size: int = 40, *, noisy: bool = False) -> DataBundle:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(size, 6, generator=generator)

    class Items:
        def __len__(self) -> int:
            return size

        def __getitem__(self, index: int, /) -> dict[str, Any]:
            x = xs[index] + (torch.randn(6) * 0.1 if noisy else 0)
            return {"pixel_values": x, "labels": index % CLASSES}

    return DataBundle(Items(), Items(), stack, ["a", "b", "c"], "noise", fingerprint=f"noise-{size}")


def student() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, CLASSES))


def test_the_student_follows_the_teacher() -> None:
    teacher, model = Counting(), student()
    before = copy.deepcopy(teacher.state_dict())
    x = torch.stack([item["pixel_values"] for item in (bundle().train[i] for i in range(40))])
    with torch.no_grad():
        want = teacher.eval()(x)
    teacher.train()
    untrained = kl_div_loss(model.eval()(x), want).item()
    assert distill(model, teacher, bundle(), epochs=60, lr=0.02, temperature=1.0, alpha=1.0, progress=False) is model
    model.eval()
    assert kl_div_loss(model(x), want).item() < 0.1 * untrained
    assert teacher.training and all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    (entry,) = model.pykd_report
    assert entry["stage"] == "distill" and entry["method"] == "logits" and entry["steps"] == 120
    assert entry["teacher"] == "Counting" and entry["teacher_cached"] and entry["last_loss"] < entry["first_loss"]
    json.dumps(entry, allow_nan=False)


def test_the_loss_is_the_fused_one() -> None:
    scores, wanted, labels = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, -100, 1])
    got = logits_loss(scores, wanted, labels, temperature=3.0, alpha=0.3)
    torch.testing.assert_close(got, kd_loss(scores, wanted, labels, temperature=3.0, alpha=0.3))
    keep = labels != -100
    by_hand = 0.3 * 9 * nn.functional.kl_div(
        (scores[keep] / 3).log_softmax(1), (wanted[keep] / 3).softmax(1), reduction="batchmean"
    ) + 0.7 * nn.functional.cross_entropy(scores[keep], labels[keep])
    torch.testing.assert_close(got, by_hand)


def test_a_function_is_a_method() -> None:
    def mine(scores: Tensor, wanted: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return (scores - wanted).square().mean()

    model = distill(student(), Counting(), bundle(), method=mine, max_steps=2, progress=False)
    assert model.pykd_report[0]["method"] == "mine"


# The teacher's logits in memory.


def test_cached_logits_are_the_teachers() -> None:
    teacher, data = Counting(), bundle()
    source = Teacher([teacher], data)
    assert source.remember(TrainConfig(epochs=3, batch_size=16), cache_bytes=10**6, progress=False)
    assert teacher.calls == 3  # one pass, batches of 16
    assert source.data.fingerprint == "noise-40"
    batch = source.data.collate([source.data.train[i] for i in (5, 0, 39)])
    with torch.no_grad(), source.frozen():
        want = teacher(batch["pixel_values"])
    found = source.known(batch)
    assert found is not None
    torch.testing.assert_close(found, want)
    assert sorted(batch) == ["labels", "pixel_values"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"epochs": 1}, "one epoch gains nothing"),
        ({"cache_bytes": 40 * CLASSES * 4 - 1}, "one byte too little"),
        ({"data": bundle(noisy=True)}, "augmented rows differ each time"),
        ({"data": [{"pixel_values": torch.ones(2, 6), "labels": torch.tensor([0, 1])}]}, "a loader has no rows"),
    ],
)
def test_nothing_is_cached_when_it_cannot_be(options: dict[str, Any], why: str) -> None:
    settings = {"data": bundle(), "epochs": 2, "cache_bytes": 40 * CLASSES * 4} | options
    data = settings.pop("data")
    model = distill(student(), Counting(), data, batch_size=8, progress=False, **settings)
    assert not model.pykd_report[0]["teacher_cached"], why
    assert model.pykd_report[0]["steps"] > 0


def test_cached_and_computed_logits_train_alike() -> None:
    runs = [distill(student(), Counting(), bundle(), epochs=3, cache_bytes=size, progress=False) for size in (0, 10**6)]
    for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_with_identical_weights(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 16, "checkpoint_steps": 2, "progress": False}
    want = distill(student(), Counting(), bundle(), **options)
    calls = 0

    def stopping(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("power cut")
        return logits_loss(*args, **kwargs)

    with pytest.raises(RuntimeError, match="power cut"):
        distill(student(), Counting(), bundle(), method=stopping, checkpoint_dir=tmp_path, **options)
    with pytest.raises(ArtifactError, match=r"settings was .*'temperature': 4\.0.*, is now .*'temperature': 2\.0"):
        distill(student(), Counting(), bundle(), temperature=2.0, checkpoint_dir=tmp_path, resume=True, **options)
    got = distill(student(), Counting(), bundle(), checkpoint_dir=tmp_path, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters(), strict=True))


# Real architectures.


def tiny_llama(vocab_size: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape))


class Tokenizer:
    def __init__(self, tokens: str) -> None:
        self.vocabulary = {token: index for index, token in enumerate(tokens)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def test_causal_language_models_with_padded_vocabularies() -> None:
    tokens = Tokenizer("abcdefghij")
    ids = torch.randint(0, 10, (4, 8))
    batches = [{"input_ids": ids, "labels": ids.masked_fill(ids == 3, -100)}]
    torch.manual_seed(0)
    teacher, model = tiny_llama(16), tiny_llama(12)
    with torch.no_grad():
        want = kd_loss(
            model(input_ids=ids).logits[:, :-1, :10],
            teacher(input_ids=ids).logits[:, :-1, :10],
            batches[0]["labels"][:, 1:],
        ).item()
    distill(model, teacher, batches, student_tokenizer=tokens, teacher_tokenizer=tokens, progress=False)
    entry = model.pykd_report[0]
    assert entry["classes"] == 10 and entry["first_loss"] == pytest.approx(want, rel=1e-5)


def test_a_convolutional_student_of_a_convolutional_teacher() -> None:
    from pykd.models.students import derive
    from pykd.models.torchvision import load_torchvision

    torch.manual_seed(0)
    teacher = load_torchvision("resnet18", num_classes=3)
    model = derive(teacher, width=0.25, example=torch.zeros(1, 3, 32, 32))
    items = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(8)]
    data = DataBundle(items, items, stack, ["a", "b", "c"], "noise")
    distill(model, teacher, data, max_steps=3, batch_size=4, progress=False)
    assert model.layer4[1].conv2.weight.shape[0] == 128 and model.pykd_report[1]["steps"] == 3


# Pairs that do not fit.


def test_pairs_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="the student has 4 classes, the teacher 3: give both the same"):
        distill(nn.Linear(6, 4), Counting(), bundle())
    teacher = Counting()
    with pytest.raises(ValueError, match="student and teacher are the same object"):
        distill(teacher, teacher, bundle())
    pair = {"student_tokenizer": Tokenizer("abc"), "teacher_tokenizer": Tokenizer("acb")}
    with pytest.raises(ValueError, match=r"different tokenizers: 2 tokens differ, the first is 'b' with id 1 .* and 2"):
        distill(student(), Counting(), bundle(), **pair)
    same = {"student_tokenizer": Tokenizer("abcde"), "teacher_tokenizer": Tokenizer("abcde")}
    with pytest.raises(ValueError, match="the student has 4 classes, the teacher 3"):  # narrower than the vocabulary
        distill(nn.Linear(6, 4), Counting(), bundle(), **same)
    with pytest.raises(ValueError, match="unknown method 'logit': did you mean 'logits'"):
        distill(student(), Counting(), bundle(), method="logit")
    with pytest.raises(DataError, match="label 2 is out of range: the model has 2 classes"):
        distill(nn.Linear(6, 2), nn.Linear(6, 2), bundle(), progress=False)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_that_are_not_finite(role: str) -> None:
    pair = {"student": student(), "teacher": Counting()}
    with torch.no_grad():
        next(pair[role].parameters())[0, 0] = float("inf")
    with pytest.raises(ValueError, match=rf"the {role}'s '.*0\.weight' holds NaN or infinite values"):
        distill(pair["student"], pair["teacher"], bundle())


def test_a_guard_knows_the_teachers_quality() -> None:
    items = [{"pixel_values": torch.eye(4)[i % 3], "labels": i % 3} for i in range(12)]
    data = DataBundle(items, items, stack, ["a", "b", "c"], "corners")
    teacher, student = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
    with torch.no_grad():
        teacher.weight.copy_(9 * torch.eye(3, 4))
    distill(student, teacher, data, epochs=30, batch_size=4, lr=0.1, guard=Guard(), progress=False)
    entry = student.pykd_report[-1]
    assert entry["validations"][-1]["retention"] == 1.0
    assert "accuracy 1, 100.0 % of the teacher's" in entry["outcome"]
