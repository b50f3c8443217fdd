"""Teacher-assistant chains: who teaches whom, the arms beside the chain, and going on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pykd
from pykd.data import DataBundle
from pykd.data.bundle import stack
from pykd.distillation import Chain, distill_chain
from pykd.errors import ArtifactError
from pykd.models.huggingface import load_huggingface
from pykd.training.held_out import held_out

OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 0.01, "temperature": 2.0, "progress": False}


def bundle() -> DataBundle:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(96, 8, generator=generator)
    labels = (xs[:, 0] * xs[:, 1] > 0).long().tolist()
    items = [{"pixel_values": x, "labels": label} for x, label in zip(xs, labels, strict=True)]
    return DataBundle(items[:64], items[64:], stack, ["a", "b"], "products", fingerprint="products")


def network(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))


def chain(others: dict[str, Any] | None = None, **more: Any) -> Chain:
    teacher = pykd.finetune(network(64), bundle(), epochs=20, lr=0.01, progress=False)
    students = {"medium": network(16), "small": network(4), **(others or {})}
    return distill_chain(teacher, students, bundle(), **{**OPTIONS, **more})


def test_each_link_and_its_arms() -> None:
    made = chain()
    assert [(link.student, link.arm, link.teacher) for link in made.links] == [
        ("teacher", "teacher", "-"), ("medium", "chain", "teacher"), ("medium", "labels", "-"),
        ("small", "chain", "medium"), ("small", "labels", "-"), ("small", "direct", "teacher"),
    ]  # fmt: skip
    assert made.student is made.students[1] and len(made.students) == 2
    assert made.metrics("small", "chain") == pytest.approx(held_out(made.student, bundle()))
    teacher = pykd.finetune(network(64), bundle(), epochs=20, lr=0.01, progress=False)
    direct = pykd.distill(network(4), teacher, bundle(), **OPTIONS)
    assert made.metrics("small", "direct") == pytest.approx(held_out(direct, bundle()))
    alone = {name: value for name, value in OPTIONS.items() if name != "temperature"}
    labelled = pykd.finetune(network(4), bundle(), **alone)
    assert made.metrics("small", "labels") == pytest.approx(held_out(labelled, bundle()))
    gain = made.gains()["small"]
    assert set(gain) == {"labels", "direct"} and "direct" not in made.gains()["medium"]
    assert (
        gain["direct"]["accuracy"]
        == made.metrics("small", "chain")["accuracy"] - held_out(direct, bundle())["accuracy"]
    )
    entry = made.student.pykd_report[-1]
    assert entry["stage"] == "distill_chain" and entry["method"] == "teacher -> medium -> small"
    assert entry["links"] == made.to_dict()["links"] and entry["gains"] == made.gains()
    json.dumps(entry, allow_nan=False)
    reached = made.metrics("small", "chain")["accuracy"]
    assert made.metric == "accuracy" and made.sentences()[1] == entry["sentences"][1] == (
        f"small: accuracy {reached:.4f} by distillation in the chain, "
        f"{made.metrics('small', 'labels')['accuracy']:.4f} on labels alone (gain {gain['labels']['accuracy']:+.4f}), "
        f"{made.metrics('small', 'direct')['accuracy']:.4f} directly from the first teacher "
        f"(gain {gain['direct']['accuracy']:+.4f})"
    )
    lines = made.table().splitlines()
    assert len(lines) == 7 and lines[0].split() == [
        "student",
        "arm",
        "teacher",
        "parameters",
        "loss",
        "accuracy",
        "seconds",
    ]
    with pytest.raises(KeyError, match="no 'direct' arm of student 'medium' was trained"):
        made.metrics("medium", "direct")


def test_the_metric_of_the_gain() -> None:
    teacher, students = network(64), {"small": network(4)}
    few = {**OPTIONS, "epochs": 1}
    by_loss = distill_chain(teacher, students, bundle(), metric="loss", **few)
    gained = by_loss.metrics("small", "labels")["loss"] - by_loss.metrics("small", "chain")["loss"]
    assert by_loss.sentences()[0].endswith(f"(gain {gained:+.4f})")  # a loss improves by falling
    by_f1 = distill_chain(teacher, students, bundle(), metric="f1", **few)
    assert by_f1.metric == "f1" and {"f1", "precision", "accuracy"} <= set(by_f1.metrics("small", "labels"))
    with pytest.raises(ValueError, match="unknown metric 'f2': Known: accuracy, f1, precision, recall"):
        distill_chain(teacher, students, bundle(), metric="f2", **few)


def test_students_derived_in_one_call(bundles: dict[str, DataBundle]) -> None:
    data = bundles["sequence-classification"]
    body = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    config = {"model_type": "bert", "vocab_size": len(data.tokenizer), **body}
    teacher = load_huggingface(None, num_labels=2, config=config)
    specs = [{"layers": [0, 1, 3]}, {"hidden_size": 16, "layers": [1, 3]}]
    made = distill_chain(teacher, specs, data, arms=[], method={"logits": 1.0, "hidden": 1.0}, max_steps=2,
                         batch_size=8, progress=False)  # fmt: skip
    assert [link.student for link in made.links] == ["teacher", "s1", "s2"]
    assert [entry["stage"] for entry in made.student.pykd_report] == ["derive", "distill", "distill_chain"]
    assert made.student.config.hidden_size == 16


def test_an_interrupted_chain_goes_on(tmp_path: Path) -> None:
    whole = chain()
    calls = 0

    def failing(model: nn.Module) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("power cut")
        return held_out(model, bundle())

    with pytest.raises(RuntimeError, match="power cut"):
        chain(score=failing, output_dir=tmp_path)
    finished = json.loads((tmp_path / "chain.json").read_text())["finished"]
    assert list(finished) == ["teacher-teacher", "medium-chain", "medium-labels", "small-chain"]
    with pytest.raises(ArtifactError, match="already holds a chain: continue it with resume=True"):
        chain(output_dir=tmp_path)
    with pytest.raises(ArtifactError, match="already holds another chain"):
        chain(output_dir=tmp_path, resume=True, seed=1)
    for other in (network(8), lambda teacher: network(8)):  # students are known by what they begin as
        with pytest.raises(ArtifactError, match="already holds another chain"):
            chain({"small": other}, output_dir=tmp_path, resume=True)
    again = chain({"medium": lambda teacher: network(16)}, output_dir=tmp_path, resume=True, progress=None)
    assert [link.metrics for link in again.links] == [link.metrics for link in whole.links]
    for a, b in zip(whole.students, again.students, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_chains_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="distill_chain needs at least one student"):
        distill_chain(network(4), [], bundle())
    with pytest.raises(ValueError, match="unknown arm 'label': did you mean 'labels'"):
        distill_chain(network(4), [network(2)], bundle(), arms=["label"])
    with pytest.raises(ValueError, match="resume=True needs output_dir"):
        distill_chain(network(4), [network(2)], bundle(), resume=True)


def test_held_out_counts_what_is_labelled(bundles: dict[str, DataBundle]) -> None:
    data = bundles["causal-lm"]
    body = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = load_huggingface(
        None, "causal-lm", config={"model_type": "llama", "vocab_size": len(data.tokenizer), **body}
    )
    batch = data.collate([data.test[i] for i in range(len(data.test))])
    with torch.no_grad():
        scores = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    found = held_out(model, data, batch_size=3)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(scores[keep], labels[keep]).item(), rel=1e-4)
    assert found["accuracy"] == pytest.approx((scores.argmax(-1) == labels)[keep].float().mean().item())


def test_a_chain_is_known_again_in_another_process() -> None:
    """Functions among its options count by name: where they lie in memory is another place each time."""
    from pykd.distillation import Method
    from pykd.distillation.chain import _written

    def mine(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        return student.sum()

    said = _written({"method": {mine: 1.0, Method(mine, options={"share": 0.5}): {"weight": 2.0}}})
    assert " at 0x" not in said and said.count("<locals>.mine") == 2 and "'share': 0.5" in said
    assert said != _written({"method": {mine: 1.0, Method(mine, options={"share": 0.4}): {"weight": 2.0}}})
