"""Every loss in a real training: it falls, alone and with others, follows the map of layers, and leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pykd
from pykd.data import DataBundle
from pykd.data.bundle import stack
from pykd.distillation import distill
from pykd.distillation.generation import written
from pykd.distillation.hidden import hidden_loss
from pykd.distillation.methods import METHODS, resolve
from pykd.distillation.sequence import teacher_writes
from pykd.distillation.teacher import first_batch
from pykd.distillation.terms import Terms
from pykd.errors import DataError
from pykd.models.adapter import logits
from pykd.models.huggingface import load_huggingface
from pykd.models.layers import match_layers
from pykd.models.students import derive
from pykd.models.views import observe, stages_of

BODY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
      "pad_token_id": 0, "eos_token_id": 5}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("sequence-classification", {**BODY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "t5": ("seq2seq-lm", {**T5, "dropout_rate": 0.0}),
    "llama": ("causal-lm", {**BODY, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 5}),
}
TAUGHT: dict[str, nn.Module] = {}
FAST: dict[str, Any] = {"batch_size": 10, "lr": 3e-3, "temperature": 2.0, "progress": False}


def pair(family: str, bundles: dict[str, DataBundle], **options: Any) -> tuple[nn.Module, nn.Module, DataBundle]:
    """A teacher that learned a little (once for all tests), a student cut from it, and their data."""
    task, config = FAMILIES[family]
    data = bundles[task]
    if family not in TAUGHT:
        torch.manual_seed(0)
        labels = {"num_labels": len(data.class_names)} if data.class_names else {}
        full = {"model_type": family, "vocab_size": len(data.tokenizer), **config}
        TAUGHT[family] = load_huggingface(None, task, config=full, **labels)
        pykd.finetune(TAUGHT[family], data, epochs=4, lr=3e-3, batch_size=10, progress=False)
    teacher = copy.deepcopy(TAUGHT[family])
    return teacher, derive(teacher, **{"depth": 2, **options}), data


def fallen(model: nn.Module, name: str = "loss") -> float:
    values = [record[name] for record in model.pykd_report[-1]["curve"]]
    return sum(values[-4:]) / sum(values[:4])


@pytest.mark.parametrize("method", ["hidden", "attention", "relation", "contrastive"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_loss_falls(family: str, method: str, bundles: dict[str, DataBundle]) -> None:
    teacher, student, data = pair(family, bundles, hidden_size=16, depth=1)
    distill(student, teacher, data, method=method, epochs=6, **FAST)
    assert fallen(student) < 0.97
    entry = student.pykd_report[-1]
    assert entry["method"] == method and not entry["teacher_cached"]
    assert teacher.config._attn_implementation == student.config._attn_implementation == "sdpa"


def test_losses_are_summed_with_their_weights(bundles: dict[str, DataBundle], tmp_path: Path) -> None:
    teacher, student, data = pair("bert", bundles, hidden_size=16)
    names = [name for name, _ in student.named_parameters()]
    distill(student, teacher, data, method={"logits": 1.0, "hidden": 0.5, "attention": 2.0}, epochs=4, **FAST)
    entry = student.pykd_report[-1]
    assert entry["method"] == "logits + hidden + attention"
    for record in entry["curve"]:
        want = record["logits"] + 0.5 * record["hidden"] + 2 * record["attention"]
        assert record["loss"] == pytest.approx(want, rel=1e-5)
    for name in ("logits", "hidden", "attention"):
        assert fallen(student, name) < 1
    assert [name for name, _ in student.named_parameters()] == names  # projections are dropped
    pykd.save_pretrained(student, tmp_path / "student")
    again = pykd.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(again, data.example(4)), logits(student.eval(), data.example(4)))


@pytest.mark.parametrize("pruned", [False, True])
def test_hidden_is_the_error_of_the_layers_on_the_map(bundles: dict[str, DataBundle], pruned: bool) -> None:
    teacher, _, data = pair("bert", bundles)
    student, followed = derive(teacher, layers=[1, 2]), [1, 2]
    if pruned:  # layers, then heads and neurons of those that are left
        student, followed = pykd.prune(derive(teacher, layers=[0, 1, 3]), "layers", 0.3), [0, 3]
        pykd.prune(pykd.prune(student, "heads", 0.5), "neurons", 0.5)
    assert match_layers(student, teacher) == [followed]
    batch = data.example(6)
    terms = Terms(resolve("hidden"), student.eval(), [teacher.eval()], [1.0], temperature=1.0, alpha=1.0, classes=2)
    with terms.ready(batch, seed=0), torch.no_grad():
        got, _ = terms(student, batch)
        mine, its = (
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
            for m in (student, teacher)
        )
    assert not terms.modules  # equal widths need no projection
    mask = batch["attention_mask"].bool()
    pairs = [(0, 0), *((s, t + 1) for s, t in enumerate(followed, 1))]  # the embeddings, then the teacher's layers
    want = torch.stack(
        [nn.functional.mse_loss(mine.hidden_states[s][mask], its.hidden_states[t][mask]) for s, t in pairs]
    ).mean()
    torch.testing.assert_close(got, want)


def test_layers_without_a_map_follow_evenly(bundles: dict[str, DataBundle]) -> None:
    teacher, student, _ = pair("bert", bundles)
    other = load_huggingface(None, "masked-lm", config={"model_type": "bert", "vocab_size": 9, **BODY,
                                                        "num_hidden_layers": 2})  # fmt: skip
    assert match_layers(other, teacher) == [[1, 3]] and match_layers(student, teacher) == [[0, 3]]
    assistant = derive(teacher, layers=[0, 1, 3])
    assert match_layers(derive(teacher, layers=[2]), assistant) == [[1]]  # the nearest that the assistant still has
    assert match_layers(derive(assistant, layers=[0, 2]), teacher) == [[0, 3]]
    t5 = load_huggingface(None, "seq2seq-lm", config={"model_type": "t5", "vocab_size": 9, **T5})
    with pytest.raises(ValueError, match="has 2 stacks of layers, BertForSequenceClassification 1"):
        match_layers(t5, teacher)


def test_gradients_reach_the_student_and_the_projections_only(bundles: dict[str, DataBundle]) -> None:
    teacher, student, data = pair("t5", bundles, hidden_size=16, depth=1)
    methods = resolve({"hidden": 1.0, "attention": 1.0, "relation": 1.0, "contrastive": 1.0})
    terms = Terms(methods, student, [teacher.eval()], [1.0], temperature=1.0, alpha=1.0, classes=10**6)
    batch = first_batch(data, student)
    teacher.zero_grad()
    with terms.ready(batch, seed=0):
        terms(student, batch)[0].backward()
    assert sorted(terms.modules) == ["0-0-0", "0-0-1", "0-0-2", "0-0-3", "3-0-0"]
    for module in terms.modules.values():
        assert all(p.grad is not None and p.grad.ne(0).any() for p in module.parameters())
    reached = {name for name, p in student.named_parameters() if p.grad is not None and bool(p.grad.ne(0).any())}
    missed = {name for name, _ in student.named_parameters()} - reached
    assert missed == set() and all(p.grad is None for p in teacher.parameters())


def test_a_resumed_run_has_its_projections_again(bundles: dict[str, DataBundle], tmp_path: Path) -> None:
    teacher, student, data = pair("bert", bundles, hidden_size=16)
    options: dict[str, Any] = {**FAST, "method": {"hidden": 1.0, "contrastive": 0.5}, "epochs": 2}
    runs = [copy.deepcopy(student) for _ in range(3)]
    distill(runs[0], teacher, data, **options)
    calls = 0

    def stopping(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("power cut")
        return hidden_loss(*arguments)

    stopping.__name__ = "hidden"
    broken = dataclasses.replace(METHODS["hidden"], loss=stopping)
    with pytest.raises(RuntimeError, match="power cut"):
        distill(runs[1], teacher, data, checkpoint_dir=tmp_path, checkpoint_steps=2,
                **{**options, "method": {broken: 1.0, "contrastive": 0.5}})  # fmt: skip
    distill(runs[2], teacher, data, checkpoint_dir=tmp_path, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters(), runs[2].parameters(), strict=True))


# Several teachers, and teachers in fewer bits.


def test_several_teachers_are_averaged(bundles: dict[str, DataBundle]) -> None:
    teacher, student, data = pair("bert", bundles)
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.classifier.weight.mul_(-1)
    batch, weights = data.example(8), [0.25, 0.75]
    wanted = [logits(t.eval(), batch).detach() for t in (teacher, other)]
    terms = Terms(resolve("logits"), student.eval(), [teacher, other], weights, temperature=2.0, alpha=0.5, classes=2)
    with terms.ready(batch, seed=0):
        got, noted = terms(student, batch)
    parts = [pykd.kd_loss(logits(student, batch), t, batch["labels"], temperature=2.0, alpha=0.5) for t in wanted]
    torch.testing.assert_close(got, 0.25 * parts[0] + 0.75 * parts[1])
    assert noted == {}
    distill(student, [teacher, other], data, teacher_weights=[1, 3], method={"logits": 1.0, "hidden": 1.0}, epochs=2,
            **FAST)  # fmt: skip
    entry = student.pykd_report[-1]
    assert entry["teacher"] == "BertForSequenceClassification + BertForSequenceClassification"
    assert entry["parameters"]["teacher_weights"] == weights and fallen(student) < 1
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="teacher_weights must be 2 positive numbers, one for each teacher, got"):
            distill(student, [teacher, other], data, teacher_weights=weights)
    with pytest.raises(ValueError, match="distill needs a teacher, or several in a list, got an empty one"):
        distill(student, [], data)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16"])
def test_a_teacher_in_fewer_bits(scheme: str, bundles: dict[str, DataBundle]) -> None:
    teacher, student, data = pair("bert", bundles)
    before = copy.deepcopy(teacher.state_dict())
    runs = [copy.deepcopy(student) for _ in range(2)]
    distill(runs[0], teacher, data, epochs=4, **FAST)
    distill(runs[1], teacher, data, teacher_scheme=scheme, epochs=4, **FAST)
    entry = runs[1].pykd_report[-1]
    assert entry["parameters"]["teacher_scheme"] == scheme and entry["teacher"] == type(teacher).__name__
    assert entry["last_loss"] == pytest.approx(runs[0].pykd_report[-1]["last_loss"], rel=0.2)
    curves = [[record["loss"] for record in run.pykd_report[-1]["curve"]] for run in runs]
    assert curves[0] != curves[1]
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    with pytest.raises(ValueError, match="unknown teacher_scheme 'w8'"):
        distill(student, teacher, data, teacher_scheme="w8")


# Sequences.


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_teacher_writes(family: str, bundles: dict[str, DataBundle], tmp_path: Path) -> None:
    teacher, student, data = pair(family, bundles, depth=1)
    path = tmp_path / "sequences.json"
    new = teacher_writes(teacher, data, beams=2, path=path, progress=False)
    content = path.read_bytes()
    again = teacher_writes(teacher, data, beams=2, path=path, progress=False)
    assert path.read_bytes() == content and new.fingerprint == again.fingerprint != data.fingerprint
    batch = new.collate([new.train[i] for i in range(4)])
    source = data.collate([data.train[i] for i in range(4)])
    said = batch["labels"][0]
    if family == "t5":
        assert torch.equal(batch["input_ids"], source["input_ids"])
        first = data.collate([data.train[i] for i in range(32)])  # the batch in which the teacher wrote
        length = first["labels"].shape[1]
        want = teacher.eval().generate(
            input_ids=first["input_ids"], attention_mask=first["attention_mask"], num_beams=2, max_new_tokens=length
        )[0, 1:]
        count = int((said != -100).sum())
        assert said[:count].tolist() == want[:count].tolist() and (said[count:] == -100).all()
    else:
        given = int((said != -100).long().argmax())
        assert given > 0 and torch.equal(batch["input_ids"][0, :given], source["input_ids"][0, :given])
        assert torch.equal(said[given:][said[given:] != -100], batch["input_ids"][0, given:][said[given:] != -100])
    held = new.collate([new.test[0]])
    assert all(torch.equal(held[name], value) for name, value in data.collate([data.test[0]]).items())
    distill(student, teacher, data, method="sequence", epochs=5, checkpoint_dir=tmp_path / "run", **FAST)
    assert fallen(student) < 0.9 and (tmp_path / "run" / "teacher_sequences.json").exists()
    assert student.pykd_report[-1]["method"] == "sequence"


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_student_writes(family: str, bundles: dict[str, DataBundle]) -> None:
    teacher, student, data = pair(family, bundles, depth=1)
    batch = data.example(5)
    own = written(student, batch, do_sample=True)
    assert own["labels"].shape[0] == 5 and bool((own["labels"] != -100).any(1).all())
    if family == "llama":
        same = own["labels"] == own["input_ids"]
        assert bool((same | (own["labels"] == -100)).all()) and bool((own["labels"][:, 0] == -100).all())
    ends = (own["labels"] == student.config.eos_token_id).sum(1)
    assert ends.max() <= 1  # nothing counts after the end
    method = {"on_policy": {"weight": 1.0, "share": 1.0, "beta": 0.1}}
    distill(student, teacher, data, method=method, epochs=6, **FAST)
    assert fallen(student) < 0.9
    mixed = derive(teacher, depth=1)
    distill(mixed, teacher, data, method={"logits": 1.0, "on_policy": 0.5}, max_steps=4, **FAST)
    assert {"logits", "on_policy"} <= mixed.pykd_report[-1]["curve"][0].keys()


def test_who_cannot_write(bundles: dict[str, DataBundle]) -> None:
    teacher, student, data = pair("bert", bundles)
    with pytest.raises(DataError, match="task seq2seq-lm or causal-lm, not for classification"):
        distill(student, teacher, data, method="sequence", **FAST)
    with pytest.raises(DataError, match="task seq2seq-lm or causal-lm, not for list"):
        distill(student, teacher, [data.example(2)], method="sequence", **FAST)
    with pytest.raises(DataError, match="BertForSequenceClassification does not generate"):
        distill(student, teacher, data, method={"on_policy": {"share": 1.0}}, **FAST)
    next(student.parameters()).device_mesh = object()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="a student that writes needs whole weights in every process: run under DDP"):
        distill(student, teacher, data, method={"on_policy": {"share": 0.0}}, **FAST)


# Convolutional networks, and pairs that do not fit.


def images(size: int = 32) -> DataBundle:
    generator = torch.Generator().manual_seed(0)
    items = [
        {"pixel_values": torch.randn(3, size, size, generator=generator) + i % 2, "labels": i % 2} for i in range(24)
    ]
    return DataBundle(items, items, stack, ["dark", "light"], "images", fingerprint="images")


def test_feature_maps_at_each_resolution() -> None:
    from pykd.models.torchvision import load_torchvision

    torch.manual_seed(0)
    teacher, student = load_torchvision("resnet18", num_classes=2), load_torchvision("mobilenet_v2", num_classes=2)
    data = images(64)
    batch = first_batch(data, student)
    assert stages_of(teacher, batch) == ["relu", "layer1", "layer2", "layer3", "layer4"]
    view = observe(teacher.eval(), batch, ["hidden"], stages_of(teacher, batch))
    assert [feature.shape[2] for feature in view.hidden[0]] == [32, 16, 8, 4, 2]
    torch.testing.assert_close(view.logits, teacher(batch["pixel_values"]))
    distill(student, teacher, data, method={"logits": 1.0, "hidden": 0.1, "relation": 0.1}, epochs=4, batch_size=8,
            lr=3e-3, progress=False)  # fmt: skip
    assert fallen(student, "hidden") < 1 and fallen(student, "loss") < 1


def test_models_that_show_nothing_to_compare(bundles: dict[str, DataBundle]) -> None:
    from pykd.models.torchvision import load_torchvision

    data = images(32)
    vit = load_huggingface(None, "image-classification", num_labels=2,
                           config={"model_type": "vit", **BODY, "image_size": 32, "patch_size": 8})  # fmt: skip
    finer = load_huggingface(None, "image-classification", num_labels=2,
                             config={"model_type": "vit", **BODY, "image_size": 32, "patch_size": 4})  # fmt: skip
    cnn = load_torchvision("resnet18", num_classes=2)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    options: dict[str, Any] = {"max_steps": 1, "batch_size": 4, "progress": False}
    with pytest.raises(ValueError, match="are a transformer and a convolutional network: use 'relation'"):
        distill(vit, cnn, data, method="hidden", **options)
    with pytest.raises(ValueError, match="see different numbers of positions"):
        distill(vit, finer, data, method="hidden", **options)
    with pytest.raises(ValueError, match="convolutional networks without attention maps: use 'hidden'"):
        distill(copy.deepcopy(cnn), cnn, data, method="attention", **options)
    with pytest.raises(ValueError, match="Sequential shows neither layers of a transformer nor feature maps"):
        distill(flat, cnn, data, method="hidden", **options)
    odd = nn.Sequential(nn.Conv2d(3, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="share no resolution of feature maps"):
        distill(odd, cnn, data, method="hidden", **options)
    distill(vit, cnn, data, method={"relation": 1.0, "contrastive": 1.0}, **options)
    assert vit.pykd_report[-1]["steps"] == 1


def test_vocabularies_must_be_shared(bundles: dict[str, DataBundle]) -> None:
    teacher, _, data = pair("bert", bundles)
    other = load_huggingface(None, "sequence-classification", num_labels=2,
                             config={"model_type": "bert", "vocab_size": 500, **BODY})  # fmt: skip
    with pytest.raises(
        ValueError, match=r"the student reads 500 tokens, the teacher \d+: they must share a vocabulary"
    ):
        distill(other, teacher, data, **FAST)
    both = {"student_tokenizer": data.tokenizer, "teacher_tokenizer": data.tokenizer}
    distill(other, teacher, data, max_steps=1, **both, **FAST)
    assert other.pykd_report[-1]["steps"] == 1


def test_labels_must_be_as_many_as_scores(bundles: dict[str, DataBundle]) -> None:
    teacher, student, data = pair("bert", bundles)
    words = bundles["token-classification"].example(3)
    with pytest.raises(
        DataError, match=r"labels \(3, \d+\) do not go with logits \(3, 2\): the model scores every row"
    ):
        distill(student, teacher, [words], **FAST)
    with pytest.raises(DataError, match=r"do not go with logits \(3, 2\)"):
        pykd.finetune(student, [words], progress=False)
    body = {"model_type": "bert", "vocab_size": len(data.tokenizer), **BODY}
    tagger = load_huggingface(None, "token-classification", num_labels=2, config=body)
    with pytest.raises(DataError, match=r"\(4,\) do not go with logits \(4, \d+, 2\): the model scores every position"):
        pykd.finetune(tagger, [data.example(4)], progress=False)
