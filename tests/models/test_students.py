"""Students cut out of their teacher: which layers and units they keep, and that the teacher is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pykd.models.layer_choice import spaced_layers
from pykd.models.layers import layer_stacks
from pykd.models.students import derive


def bert(layers: int = 5) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 50, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **shape)).eval()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 4)
    )


TOKENS = torch.arange(3, 11).view(2, 4)


@pytest.mark.parametrize(
    ("layers", "depth", "want"), [(12, 6, [0, 2, 4, 7, 9, 11]), (6, 6, [0, 1, 2, 3, 4, 5]), (6, 2, [0, 5]), (3, 1, [0])]
)
def test_layers_are_spaced_evenly(layers: int, depth: int, want: list[int]) -> None:
    assert spaced_layers(layers, depth) == want


def test_fewer_layers_are_the_teachers_own() -> None:
    teacher = bert()
    student = derive(teacher, depth=3)
    assert student.pykd_layer_map == {"bert.encoder.layer": [0, 2, 4]}
    assert student.config.num_hidden_layers == 3 and teacher.config.num_hidden_layers == 5
    assert len(teacher.bert.encoder.layer) == 5
    for mine, its in enumerate([0, 2, 4]):
        got, want = student.bert.encoder.layer[mine].state_dict(), teacher.bert.encoder.layer[its].state_dict()
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert [layer.attention.self.layer_idx for layer in student.bert.encoder.layer] == [0, 1, 2]
    again = type(student)(student.config).eval()
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(input_ids=TOKENS).logits, student(input_ids=TOKENS).logits)


def test_both_stacks_of_an_encoder_decoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2, vocab_size=50, decoder_start_token_id=0)
    student = derive(T5ForConditionalGeneration(config).eval(), depth=2, width=0.5)
    assert student.pykd_layer_map == {"encoder.block": [0, 3], "decoder.block": [0, 3]}
    assert (student.config.num_layers, student.config.num_decoder_layers, student.config.d_ff) == (2, 2, 12)
    again = type(student)(student.config).eval()
    again.load_state_dict(student.state_dict())
    batch = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    assert torch.equal(again(**batch).logits, student(**batch).logits)


def test_layer_types_of_decoders_follow() -> None:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(num_hidden_layers=3, layer_types=kinds, vocab_size=50, pad_token_id=0, **shape)
    student = derive(Qwen2ForSequenceClassification(config), depth=2)
    assert student.config.layer_types == ["full_attention", "full_attention"]


def test_narrower_transformer_keeps_the_strongest_units() -> None:
    teacher = bert(layers=2)
    feed_forward = teacher.bert.encoder.layer[0]
    feed_forward.intermediate.dense.weight.data[12:] *= 10
    student = derive(teacher, width=0.5)
    kept = student.bert.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(kept, feed_forward.intermediate.dense.weight[12:])
    assert student.bert.encoder.layer[1].attention.self.query.weight.shape == (16, 32)
    assert student.config.intermediate_size == 12
    assert student(input_ids=TOKENS).logits.shape == (2, 3)


def test_narrower_convolutional_network() -> None:
    teacher = network()
    teacher.pykd_report = [{"stage": "finetune"}]
    student = derive(teacher, width=0.5, example=torch.zeros(1, 3, 6, 6))
    assert student[0].out_channels == 4 and student[3].out_channels == 3 and student[5].weight.shape == (4, 12)
    assert teacher[0].out_channels == 8
    (entry,) = student.pykd_report  # the teacher's own history is not the student's
    assert entry["stage"] == "derive" and entry["parameters"] == {"width": 0.5}


def test_full_width_is_an_equal_copy() -> None:
    teacher = network()
    student = derive(teacher)
    assert student[0].weight is not teacher[0].weight and torch.equal(student[0].weight, teacher[0].weight)


def test_another_number_of_classes() -> None:
    student = derive(bert(2), num_classes=7)
    assert student(input_ids=TOKENS).logits.shape == (2, 7) and student.config.num_labels == student.num_labels == 7
    model = network()
    model.pykd_origin = {"source": "torchvision", "name": "x", "kwargs": {"num_classes": 4}}
    student = derive(model, num_classes=2)
    assert student(torch.zeros(1, 3, 6, 6)).shape == (1, 2)
    assert student.pykd_origin["kwargs"] == {"num_classes": 2} and model.pykd_origin["kwargs"] == {"num_classes": 4}
    assert student[5].bias.eq(0).all() and student[5].weight.std() > 0


def test_a_transformer_without_config() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(self.fc1(x).relu())

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

    teacher = Stack()
    assert list(layer_stacks(teacher)) == ["layers"]
    student = derive(teacher, depth=2, width=0.5)
    assert len(student.layers) == 2 and student.layers[1].fc1.out_features == 3


def test_what_cannot_be_derived() -> None:
    with pytest.raises(ValueError, match="width is the share of units kept, above 0 and at most 1, got 0"):
        derive(network(), width=0)
    with pytest.raises(ValueError, match=r"depth=2 needs a transformer; Sequential has no stack"):
        derive(network(), depth=2)
    with pytest.raises(ValueError, match=r"depth must be between 1 and the teacher's 2 layers in .*, got 3"):
        derive(bert(2), depth=3)
    with pytest.raises(ValueError, match="neither attention, feed-forward blocks nor convolutions"):
        derive(nn.Linear(3, 3), width=0.5)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        derive(network(), num_classes=1)
    with pytest.raises(ValueError, match="has no linear classifier to replace"):
        derive(nn.Conv2d(3, 3, 1), num_classes=2)
