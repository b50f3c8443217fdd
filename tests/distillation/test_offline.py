"""Students of a cached teacher: they learn what they would learn from the teacher itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd import kd_loss_topk, kl_div_loss
from pykd.data import DataBundle
from pykd.distillation import TeacherCache, cache_teacher, distill, logits_loss

from .cached import Mortal, bundle
from .test_cache import Speaker, log_softmax, sentences

SETTINGS: dict[str, Any] = {"temperature": 1.0, "alpha": 0.7, "epochs": 3, "progress": False}


def student() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 12))


def differences(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


def test_every_class_kept_trains_as_the_teacher_does(tmp_path: Path) -> None:
    teacher = Mortal()
    cache_teacher(teacher, bundle(), tmp_path, k=12, progress=False)
    want = distill(student(), teacher, bundle(), **SETTINGS)
    got = distill(student(), TeacherCache(tmp_path), bundle(), **SETTINGS)
    assert differences(got, want) < 1e-3 < differences(student(), want)
    (entry,) = got.pykd_report
    assert entry["teacher"] == "Mortal" and entry["teacher_cached"] and entry["classes"] == 12
    json.dumps(entry, allow_nan=False)


@pytest.mark.parametrize("kept", [{"k": 4}, {"samples": 1000}], ids=str)
def test_a_student_follows_what_was_kept(tmp_path: Path, kept: dict[str, Any]) -> None:
    teacher, model = Mortal(), student()
    cache = cache_teacher(teacher, bundle(), tmp_path, progress=False, **kept)
    want = log_softmax(teacher, bundle())
    untrained = kl_div_loss(log_softmax(model, bundle()), want).item()
    model = distill(model, cache, bundle(), lr=0.02, **SETTINGS | {"epochs": 40, "alpha": 1.0})
    assert kl_div_loss(log_softmax(model, bundle()), want).item() < 0.4 * untrained


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_models(tmp_path: Path, side: str) -> None:
    data, vocabulary = sentences(side), 60
    data = dataclasses.replace(data, class_names=["only"])
    cache = cache_teacher(Speaker(vocabulary), data, tmp_path, k=vocabulary, batch_size=3, progress=False)
    batch = data.collate([data.train[i] for i in range(7)])
    ids, log_probs = cache.batch(range(7), batch["attention_mask"].bool())
    scores = torch.randn(7, 7, vocabulary)
    want = logits_loss(scores, Speaker(vocabulary)(batch["input_ids"]), batch["labels"], temperature=1.0)
    got = kd_loss_topk(scores, ids, log_probs, batch["labels"], missing=cache.missing, alpha=0.5)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    options = SETTINGS | {"batch_size": 7, "max_steps": 1}
    runs = [distill(Reader(vocabulary), teacher, data, **options) for teacher in (cache, Speaker(vocabulary))]
    first = [run.pykd_report[0]["first_loss"] for run in runs]
    assert first[0] == pytest.approx(first[1], rel=1e-3)


class Reader(Speaker):
    """A student that starts from other weights than its teacher."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        with torch.no_grad():
            self.head.weight.neg_()


def mine(scores: Tensor, wanted: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return (scores - wanted).square().mean()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": bundle(81)}, ValueError, r"was cached for data 'noise-80' of 80 examples, not for 'noise-81' of 81"),
        ({"data": [{}]}, TypeError, "a cached teacher needs a DataBundle, whose examples have an index, got list"),
        ({"student": nn.Linear(6, 11)}, ValueError, "the student has 11 classes, the cached teacher 12"),
        ({"temperature": 2.0}, ValueError, r"cached at temperature 1.0, and its tail cannot be tempered to 2.0: pass"),
        ({"method": {"logits": 0.5}}, ValueError, "method 'logits' with a weight or options would change nothing with"),
        ({"method": {"logits": {"alpha": 0.9}}}, ValueError, "method 'logits' with a weight or options would change"),
        (
            {"teacher_scheme": "w8a8", "teacher_weights": [2.0]},
            ValueError,
            "teacher_weights and teacher_scheme would change nothing with a cached teacher: leave it out",
        ),
        ({"method": mine}, ValueError, r"a cached teacher has no logits for method .*: use method='logits'"),
    ],
)
def test_errors(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    cache = cache_teacher(Mortal(), bundle(), tmp_path, k=4, progress=False)
    arguments = {"student": student(), "teacher": cache, "data": bundle()} | SETTINGS | changes
    with pytest.raises(error, match=message):
        distill(**arguments)


@pytest.mark.parametrize(
    ("family", "task", "counted"),
    [("bert", "token-classification", "attention_mask"), ("llama", "causal-lm", "attention_mask"),
     ("t5", "seq2seq-lm", "labels"), ("bert", "masked-lm", "labels")],
)  # fmt: skip
def test_token_families_from_the_cache(
    family: str, task: str, counted: str, bundles: dict[str, DataBundle], tmp_path: Path
) -> None:
    from pykd.models.huggingface import load_huggingface
    from pykd.models.students import derive

    body = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    own = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    data = bundles[task]
    config = {"model_type": family, "vocab_size": len(data.tokenizer), **(own if family == "t5" else body)}
    labels = {"num_labels": len(data.class_names)} if data.class_names else {}
    teacher = load_huggingface(None, task, config=config, **labels)
    whole = cache_teacher(teacher, data, tmp_path / "cache", k=1000, batch_size=7, progress=False)
    assert whole.manifest["counted"] == counted and whole.per_position
    batch = data.collate([data.train[0]])
    kept = batch["labels"] != -100 if counted == "labels" else batch["attention_mask"] == 1
    assert len(whole[0][0]) == int(kept.sum())
    options: dict[str, Any] = {"temperature": 1.0, "max_steps": 4, "batch_size": 8, "progress": False}
    runs = [derive(teacher.eval(), depth=1) for _ in range(2)]
    distill(runs[0], teacher, data, **options)
    distill(runs[1], whole, data, **options)
    losses = [[record["loss"] for record in run.pykd_report[-1]["curve"]] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
