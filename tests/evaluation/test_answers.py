"""Metrics of texts, tags and tokens: against numbers worked out by hand, and in whole reports of tiny real models."""

from __future__ import annotations

import copy
import dataclasses
import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pykd.data import DataBundle, load_language, load_pairs, load_tokens
from pykd.errors import DataError
from pykd.evaluation import Report, compare, evaluate, write_report
from pykd.evaluation.metrics_text import entity_quality, perplexity, text_quality
from pykd.evaluation.score import quality_score
from pykd.evaluation.validation import validator
from pykd.evaluation.worst import worst_examples
from pykd.models.huggingface import load_huggingface

BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "token-classification": BERT,
    "masked-lm": BERT,
    "causal-lm": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "seq2seq-lm": {"model_type": "t5", "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2},
}


@pytest.fixture(scope="module")
def tokenizer(word_tokenizer: Callable[..., Any]) -> Any:
    return word_tokenizer(["a b c d e f g h"])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, DataBundle]:
    path: Path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    texts = [" ".join("abcdefgh"[(i * k) % 8] for k in range(1, 6)) for i in range(16)]
    rows = [
        {
            "text": t,
            "tokens": t.split(),
            "tags": ["B-X" if w < "c" else "O" for w in t.split()],
            "source": t,
            "target": t,
        }
        for t in texts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common: dict[str, Any] = {"tokenizer": tokenizer, "test_size": 6, "max_length": 8}
    return {
        "token-classification": load_tokens(path, **common),
        "seq2seq-lm": load_pairs(path, **common, max_target_length=6),
        "causal-lm": load_language(path, **common),
        "masked-lm": load_language(path, task="masked-lm", **common),
    }


def model_for(task: str, data: DataBundle) -> torch.nn.Module:
    torch.manual_seed(0)
    tokens = data.tokenizer
    config = TINY[task] | {"vocab_size": len(tokens), "pad_token_id": tokens.pad_token_id}
    config |= {"eos_token_id": tokens.eos_token_id, "bos_token_id": tokens.eos_token_id}
    if task == "seq2seq-lm":
        config["decoder_start_token_id"] = tokens.pad_token_id
    labels = len(data.class_names) or None
    return load_huggingface(None, task, num_labels=labels, config=config).eval()


def test_texts_by_hand() -> None:
    same = text_quality(["the cat sat on the mat"] * 2, ["the cat sat on the mat"] * 2)
    assert same["bleu"] == pytest.approx(100) and same["chrf"] == pytest.approx(100) and same["ter"] == 0
    assert same["rouge1"] == same["rouge2"] == same["rougeL"] == 1
    found = text_quality(["a b c d"], ["a c b d"])
    assert found["rouge1"] == 1 and found["rougeL"] == 0.75  # three of four in order
    assert found["rouge2"] == 0 and found["ter"] == pytest.approx(25)  # one shift of four words
    with pytest.raises(DataError, match="needs one prediction a reference, got 1 and 2"):
        text_quality(["a", "b"], ["a"])
    with pytest.raises(DataError, match="bertscore_model /nowhere is not a folder"):
        text_quality(["a"], ["a"], bertscore_model="/nowhere")


def test_entities_are_right_as_a_whole_or_not() -> None:
    labels = [["B-P", "I-P", "O", "B-Q"], ["O", "B-P"]]
    found = entity_quality(labels, [["B-P", "O", "O", "B-Q"], ["O", "B-P"]])
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["precision"] == found["recall"] == found["f1"] == pytest.approx(2 / 3)


def test_perplexity_and_what_is_too_large_for_it() -> None:
    assert perplexity(3 * math.log(5), 3) == pytest.approx(5)
    assert perplexity(1e6, 1) == math.inf


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(DataError, match=r"needs rouge-score: install it with `pip install 'pykd\[text\]'`"):
        text_quality(["a"], ["a"])


def test_the_score_lies_between_0_and_1_and_tells_its_formula() -> None:
    score, formula = quality_score({"f1": 0.5, "perplexity": 4.0, "ter": 300.0}, {"f1": 2, "perplexity": 1, "ter": 1})
    assert score == pytest.approx(0.5 * 0.5 + 0.25 / 4)
    assert formula == "0.5 F1 + 0.25 1 / perplexity + 0.25 (1 - TER / 100), each between 0 and 1"
    with pytest.raises(ValueError, match="unknown metric 'f2': Known: f1"):
        quality_score({"f1": 1.0}, {"f2": 1})
    with pytest.raises(ValueError, match="weights of a score must be at least 0, and one above it"):
        quality_score({"f1": 1.0}, {"f1": 0})


@pytest.mark.parametrize("task", list(TINY))
def test_a_report_of_every_task(task: str, bundles: dict[str, DataBundle], tmp_path: Path) -> None:
    data = bundles[task]
    model = model_for(task, data)
    report = evaluate(model, data, name="tiny", batch_size=4, latency_rounds=1)
    assert report.task == task and 0 <= report.score <= 1 and report.score_formula
    assert len(report.labels) == len(report.predictions) == len(report.confidences)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
    other = evaluate(model, data, name="again", batch_size=3, latency_rounds=1)
    assert other.predictions == report.predictions and other.agreement(report) == 1
    table = compare([report, other]).text()
    assert "score" in table and next(iter(report.metrics)) in table
    page = html.unescape(write_report(tmp_path, compare([report, other]), data, title=task).read_text())
    assert "Quality score" in page and "Confusion" not in page and f"score: {report.example_score}" in page
    _check_the_worst(report, data)
    assert f"Quality score = {report.score_formula}: tiny" in (tmp_path / "report.md").read_text()
    if task == "seq2seq-lm":
        assert len(report.texts) == 6 and report.metrics.keys() >= {"bleu", "chrf", "ter", "rougeL", "perplexity"}
    if task in ("causal-lm", "masked-lm"):
        assert report.metrics["perplexity"] == pytest.approx(len(data.tokenizer), rel=0.5)  # knows nothing yet


def _check_the_worst(report: Report, data: DataBundle) -> None:
    """Wrong answers of the report, the lowest score first, each with what was wanted and said in the wrong places."""
    worst = worst_examples(report, report, data, limit=4)
    scores = [each.score for each in worst]
    assert len(worst) == 4 and scores == sorted(scores) and scores[0] == min(report.example_scores)
    assert all(each.text == data.test[each.index]["text"] and each.prediction == each.baseline for each in worst)
    assert all(each.prediction != each.label for each in worst)
    if report.task == "seq2seq-lm":
        assert all(each.label == data.test[each.index]["target"] for each in worst)
        assert [each.prediction for each in worst] == [report.texts[each.index] for each in worst]
    if report.task == "token-classification":
        for each in worst:
            item, named = data.test[each.index], [pair.rpartition(" ")[::2] for pair in each.label.split(", ")]
            assert set(named) <= set(zip(item["words"], (report.class_names[n] for n in item["labels"]), strict=True))
            assert [word for word, _ in named] == [pair.rpartition(" ")[0] for pair in each.prediction.split(", ")]
    with pytest.raises(ValueError, match=r"tiny was measured on 6 examples .* of .* has 5 with"):
        worst_examples(report, report, dataclasses.replace(data, test=[data.test[i] for i in range(5)]))
    assert worst_examples(dataclasses.replace(report, example_scores=()), report, data) == []


@pytest.mark.parametrize("task", list(TINY))
def test_a_validator_of_every_task_shows_the_worst(task: str, bundles: dict[str, DataBundle]) -> None:
    found = validator(bundles[task], batch_size=4)(model_for(task, bundles[task]))
    first = {"token-classification": "f1", "seq2seq-lm": "score"}.get(task, "perplexity")
    assert next(iter(found)) == first and 0 <= found["score"] <= 1
    assert 1 <= len(found["examples"]) <= 5 and found["examples"][0]["text"]
    assert {example["index"] for example in found["examples"]} <= set(found["wrong"]) <= set(range(6))


def test_bertscore_of_a_model_that_the_user_names(tmp_path: Path, tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {key: value for key, value in BERT.items() if key != "model_type"}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    framed = copy.deepcopy(tokenizer)
    pair = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    framed.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
    framed.save_pretrained(tmp_path)
    same = text_quality(["a b c d", "e f"], ["a b c d", "e f"], bertscore_model=tmp_path)
    other = text_quality(["a b c d", "e f"], ["h g h", "d"], bertscore_model=tmp_path)
    assert same["bertscore"] == pytest.approx(1, abs=1e-5) and other["bertscore"] < 0.99


def test_scores_that_are_not_finite(bundles: dict[str, DataBundle]) -> None:
    model = model_for("causal-lm", bundles["causal-lm"])
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(DataError, match="scores are not finite for test examples 0 to 5"):
        evaluate(model, bundles["causal-lm"])


def test_tags_of_other_data(bundles: dict[str, DataBundle]) -> None:
    data = bundles["token-classification"]
    model = load_huggingface(
        None, "token-classification", num_labels=9, config=BERT | {"vocab_size": len(data.tokenizer)}
    )
    with pytest.raises(DataError, match=r"class \d is out of range: .* names 2 classes"):
        evaluate(model, data)
