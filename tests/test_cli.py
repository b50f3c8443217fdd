"""The command line: every command really does something, and says in one sentence what it cannot do."""

from __future__ import annotations

import errno
import json
import logging
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pykd
from pykd import cli
from pykd.io.load import from_pretrained
from pykd.io.save import save_pretrained
from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision
from pykd.nn import codebook_code
from pykd.pipeline.reload import Reload

from .pipeline.conftest import library

__all__ = ["library"]

VIT = {
    "model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 128,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"kind": "digits", "image_size": 8, "test_size": 30},
    "teacher": {"source": "huggingface", "config": VIT, "train": {"max_steps": 1}},
    "stages": [{"quantize": {"group_size": 32}}],
    "evaluate": {"latency_rounds": 2, "speed_rounds": 1},
    "short": {"data.test_size": 20},
}


@pytest.fixture(autouse=True)
def console() -> Iterator[None]:
    """Leave the package's logger as it was: the command line sends it to the stderr of its time."""
    package = logging.getLogger("pykd")
    before = (list(package.handlers), package.level, package.propagate)
    yield
    package.handlers, level, package.propagate = before
    package.setLevel(level)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An untrained model that says which data it was made for."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "vit"
    model = load_huggingface(None, "image-classification", num_labels=10, config=VIT)
    return save_pretrained(model, folder, provenance={"recipe": RECIPE})


@pytest.fixture
def recipe(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(RECIPE))
    return file


def failure(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    assert cli.main([str(word) for word in words]) == code
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("pykd: ") and "Traceback" not in "".join(err)
    return err[-1]


def success(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_compare_puts_models_beside_the_first(
    saved: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    success(capsys, "quantize", saved, small, "--group-size", 32)
    report = tmp_path / "report"
    fast = ("--latency-rounds", 2, "--speed-rounds", 2)
    out = success(capsys, "compare", saved, small, *fast, "--explain", 2, "--rows", 2, "--output", report)
    assert "small: integrated gradients of 2 examples: cosine 0.9" in out and "lost / won" in out
    found = json.loads((report / "report.json").read_text())
    assert found["comparison"]["baseline"] == "vit" and list(found["comparison"]["behaviours"]) == ["small"]
    assert [speed["batch_size"] for speed in found["reports"][1]["speeds"]] == [2]
    assert "vit" in found["reports"][1]["speedup_over"] and "cosine" in found["remarks"][-1]
    again = success(capsys, "compare", small, tmp_path / ".." / tmp_path.name / "small", *fast)
    assert again.count(str(small)) >= 1, "folders of the same name are told apart by their paths"
    assert "needs at least two saved models, got 1" in failure(capsys, "compare", saved)


def test_help_lists_the_commands_and_python_m_pykd_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "pykd", "--help"], capture_output=True, text=True, check=True)
    for command in ("run", "evaluate", "compare", "safety", "prune", "quantize", "compress", "verify", "info"):
        assert f"  {command} " in done.stdout


def test_info_shows_what_will_run(capsys: pytest.CaptureFixture[str]) -> None:
    out = success(capsys, "info")
    assert pykd.__version__ in out and "linear_4bit" in out and "isa" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument"),
        (["run", "none.yaml"], "cannot read the recipe none.yaml: No such file or directory"),
        (["run", "none.yaml", "--outptu", "x"], "No such option"),
        (["evaluate", "none", "--threads", "0"], "--threads"),
        (["verify", "none"], "none is not a folder"),
        (["prune", "none", "out"], "none is not a folder"),
        (["quantize", "none", "out"], "none is not a folder"),
        (["evaluate", "none"], "none is not a folder"),
    ],
)
def test_wrong_words_end_with_one_sentence(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in failure(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_typo_in_a_recipe(capsys: pytest.CaptureFixture[str], recipe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ["run", recipe, "--output", tmp_path / "out", "--set", "stages[0].quantize.scheme=w4a61"]
    assert "stages[0].quantize.scheme: unknown scheme 'w4a61': did you mean 'w4a16'?" in failure(capsys, *words)
    assert not (tmp_path / "out").exists()
    assert "there is no run in" in failure(capsys, "run", recipe, "--output", tmp_path / "out", "--resume")


def test_debug_shows_the_traceback(recipe: pathlib.Path) -> None:
    with pytest.raises(pykd.errors.RecipeError, match="unknown key 'seeed'"):
        cli.main(["run", str(recipe), "--set", "seeed=1", "--debug"])


def test_run_prints_the_table_and_fails_when_the_reload_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    different = 0
    monkeypatch.setattr(
        "pykd.pipeline.runner.check_reload", lambda *_, **__: Reload("pykd evaluate", compared=20, different=different)
    )
    out = success(capsys, "run", recipe, "--output", tmp_path / "out", "--short")
    assert "teacher" in out and "quantize" in out and "of the teacher's bytes" in out
    assert "on 20 held-out examples" in out and "all 20 predictions are identical" in out
    different = 3
    assert cli.main(["run", str(recipe), "--output", str(tmp_path / "out"), "--overwrite"]) == 1
    captured = capsys.readouterr()
    assert "3 of 20 predictions differ" in captured.out and "do not use the saved model" in captured.err


def test_evaluate_takes_the_data_that_the_model_was_made_for(
    capsys: pytest.CaptureFixture[str], saved: pathlib.Path, recipe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    files = ["--json", tmp_path / "report.json", "--predictions", tmp_path / "predictions.json"]
    out = success(capsys, "evaluate", saved, "--latency-rounds", 2, "--threads", torch.get_num_threads(), *files)
    assert json.loads(out) == json.loads((tmp_path / "report.json").read_text())
    assert len(json.loads((tmp_path / "predictions.json").read_text())["predictions"]) == 30
    success(capsys, "evaluate", saved, "--recipe", recipe, "--set", "data.test_size=40", "--latency-rounds", 2, *files)
    assert len(json.loads((tmp_path / "predictions.json").read_text())["predictions"]) == 40


def test_evaluate_needs_data(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, recipe: pathlib.Path) -> None:
    model = load_huggingface(None, "image-classification", num_labels=4, config=VIT)
    save_pretrained(model, tmp_path / "four")
    assert "does not say which data it was made for: name it by --recipe" in failure(
        capsys, "evaluate", tmp_path / "four"
    )
    message = failure(capsys, "evaluate", tmp_path / "four", "--recipe", recipe)
    assert "tells 4 classes apart" in message and "10" in message


def test_prune_and_quantize_write_new_folders_that_verify(
    capsys: pytest.CaptureFixture[str], saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = success(capsys, "prune", saved, tmp_path / "pruned", "--sparsity", 0.6)
    assert "smaller" in out and "of them not zero" in out
    out = success(capsys, "quantize", tmp_path / "pruned", tmp_path / "small", "--scheme", "nf4", "--group-size", 32)
    assert "smaller" in out
    facts = success(capsys, "verify", tmp_path / "small")
    for part in (
        "huggingface",
        "ViTForImageClassification",
        "match the manifest",
        "prune, quantize",
        "logits (1, 10), finite",
    ):
        assert part in facts
    assert success(capsys, "evaluate", tmp_path / "small", "--latency-rounds", 2)
    assert "already exists: choose a new folder" in failure(capsys, "prune", saved, tmp_path / "pruned")
    wrong = failure(capsys, "quantize", saved, tmp_path / "wrong", "--scheme", "w4a61")
    assert "unknown scheme 'w4a61': did you mean 'w4a16'?" in wrong and not (tmp_path / "wrong").exists()
    wrong = failure(capsys, "prune", saved, tmp_path / "wrong", "--method", "channels")
    assert "use method='heads', method='neurons' or" in wrong and not (tmp_path / "wrong").exists()


def test_quantize_by_the_data_that_the_model_was_made_for(
    capsys: pytest.CaptureFixture[str], saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ["quantize", saved, tmp_path / "small", "--method", "gptq", "--group-size", 32, "--samples", 9]
    success(capsys, *words, "--no-symmetric")
    record = pykd.from_pretrained(tmp_path / "small").pykd_report[-1]
    assert record["method"] == "gptq" and record["parameters"]["samples"] == 9 and record["changed"]
    assert record["parameters"]["symmetric"] is False
    wrong = failure(capsys, "quantize", saved, tmp_path / "wrong", "--method", "gptq", "--scheme", "w8a8")
    assert "method 'gptq' chooses 4-bit codes, and scheme 'w8a8' has none" in wrong
    load_huggingface(None, "image-classification", num_labels=10, config=VIT).save_pretrained(tmp_path / "plain")
    wrong = failure(capsys, "quantize", tmp_path / "plain", tmp_path / "wrong", "--method", "awq")
    assert "plain does not say which data it was made for: name it by --recipe FILE" in wrong
    assert not (tmp_path / "wrong").exists()


def test_compress_to_a_target_and_say_when_there_is_none(
    capsys: pytest.CaptureFixture[str], saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ["compress", saved, tmp_path / "search", "--epochs", 0, "--max-candidates", 1, "--method", "hqq"]
    words += ["--scheme", "w8a8", "--scheme", "w4a16", "--embeddings", "none", "--group-size", 32]
    out = success(capsys, *words, "--ratio", 2)
    assert "meets ratio 2" in out and (tmp_path / "search" / "report.html").exists()
    settings = json.loads((tmp_path / "search" / "search.json").read_text())["settings"]["quantize"]
    assert settings == {"embeddings": None, "group_size": 32, "method": "hqq"}
    assert "compress_to" in success(capsys, "verify", tmp_path / "search" / "model")
    assert cli.main([str(word) for word in (*words, "--size-mb", 0.0001)]) == 1
    assert "misses size_mb 0.0001" in capsys.readouterr().out
    assert "a target is one or more of size_mb" in failure(capsys, *words)


def test_embeddings_and_a_code_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    shape = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = {"model_type": "bert", "intermediate_size": 64, **shape}
    save_pretrained(load_huggingface(None, "masked-lm", config=bert), tmp_path / "bert")
    code = codebook_code([k / 8 - 1 for k in range(16)])
    words = ["quantize", tmp_path / "bert", tmp_path / "small", "--scheme", code, "--group-size", 32]
    success(capsys, *words, "--embeddings", "w8a16")
    model = pykd.from_pretrained(tmp_path / "small")
    assert model.cls.predictions.decoder.source is model.bert.embeddings.word_embeddings
    assert model.bert.encoder.layer[0].intermediate.dense.scheme == code
    wrong = failure(capsys, *words[:2], tmp_path / "wrong", "--embeddings", "w8a8")
    assert "unknown scheme for embeddings 'w8a8': did you mean 'w8a16'?" in wrong and not (tmp_path / "wrong").exists()


def test_a_plain_hugging_face_folder_goes_in(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    load_huggingface(None, "image-classification", num_labels=10, config=VIT).save_pretrained(tmp_path / "plain")
    assert "no manifest: not saved by pykd" in success(capsys, "verify", tmp_path / "plain")
    success(capsys, "quantize", tmp_path / "plain", tmp_path / "small", "--group-size", 32)
    (tmp_path / "plain" / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in failure(capsys, "verify", tmp_path / "plain")
    for content in ("[]", '{"architectures": [5]}', '{"architectures": "Bert"}'):
        (tmp_path / "plain" / "config.json").write_text(content)
        assert "config.json is no configuration of a model" in failure(capsys, "verify", tmp_path / "plain")


def test_verify_a_torchvision_model_and_find_damage(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    folder = save_pretrained(load_torchvision("squeezenet1_1", num_classes=10), tmp_path / "net")
    assert "torchvision squeezenet1_1" in success(capsys, "verify", folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "model.safetensors is altered: expected sha256" in failure(capsys, "verify", folder)


def test_verify_refuses_what_does_not_compute(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    model = load_huggingface(None, "image-classification", num_labels=10, config=VIT)
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    save_pretrained(model, tmp_path / "nan")
    assert "gives values that are not finite" in failure(capsys, "verify", tmp_path / "nan")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "no space left for out: make room, then continue"),
        (ImportError("No module named 'yaml'"), 2, "install what recipes need with `pip install 'pykd[all]'`"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted; what is finished is kept, continue with --resume"),
    ],
)
def test_whatever_happens_there_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recipe: pathlib.Path,
    error: BaseException,
    code: int,
    sentence: str,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pykd.pipeline.run_chain", broken)
    assert sentence in failure(capsys, "run", recipe, code=code)


def test_prune_takes_what_recipes_take(
    capsys: pytest.CaptureFixture[str], saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    few = ["--samples", 8]
    success(capsys, "prune", saved, tmp_path / "a", "--method", "sparsegpt", "--pattern", "2:4", *few)
    success(capsys, "prune", saved, tmp_path / "b", "--method", "neurons", "--importance", "taylor", *few)
    for folder, method in (("a", "sparsegpt"), ("b", "neurons")):
        (stage,) = from_pretrained(tmp_path / folder).pykd_report[-1:]
        assert (stage["stage"], stage["method"]) == ("prune", method) and stage["changed"]
    wrong = ["prune", saved, tmp_path / "c"]
    assert "unknown method 'sparsgpt': did you mean 'sparsegpt'" in failure(capsys, *wrong, "--method", "sparsgpt")
    assert "unknown scope 'globl': did you mean 'global'" in failure(capsys, *wrong, "--scope", "globl")
    assert "scope says over which single weights" in failure(capsys, *wrong, "--method", "heads", "--scope", "row")


def test_export(saved: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, dense, graph = tmp_path / "packed", tmp_path / "dense", tmp_path / "onnx"
    assert cli.main(["quantize", str(saved), str(packed), "--group-size", "32"]) == 0
    assert cli.main(["export", str(packed), str(dense)]) == 0
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    capsys.readouterr()
    assert cli.main(["export", str(packed), str(graph), "--format", "onnx"]) == 0
    shown = capsys.readouterr().out
    assert "30 of 30 labels equal, logits within" in shown, "the held-out digits of the recipe that made the model"
    assert "onnxruntime" in shown and "as fast as pykd, batch 1" in shown
    manifest = json.loads((graph / "pykd_manifest.json").read_text())
    assert manifest["provenance"]["recipe"]["name"] == "tiny" and manifest["stages"][-1]["format"] == "onnx"
    assert cli.main(["export", str(packed), str(graph)]) == 2
    assert "already holds a saved model; pass overwrite=True" in capsys.readouterr().err
    assert cli.main(["export", str(packed), str(tmp_path / "new"), "--format", "onix"]) == 2
    assert "unknown format 'onix': did you mean 'onnx'?" in capsys.readouterr().err


def test_export_of_packed_layers(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = pykd.quantize(load_huggingface(None, "causal-lm", config=config).eval(), scheme="w8a16")
    folder = save_pretrained(model, tmp_path / "model")
    for name in ("compressed-tensors", "gguf"):
        assert cli.main(["export", str(folder), str(tmp_path / name), "--format", name]) == 0
        assert "7 packed layers read back, within" in capsys.readouterr().out


def test_verify_a_reference_model_from_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, library: pathlib.Path
) -> None:
    said = success(capsys, "verify", "DistilBERT", "--library", library)
    assert str(library / "distilbert-base-uncased") in said and "logits (1, 8, 99), finite" in said
    said = failure(capsys, "verify", "t5-small", "--library", tmp_path)
    assert "T5-small could not be had from" in said and "hf download google-t5/t5-small" in said
    assert "did you mean 'distilbert'" in failure(capsys, "verify", "distilbrt")


def test_serve_refuses_to_start_open_to_everyone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYKD_TOKEN", raising=False)
    said = failure(capsys, "serve", "--host", "0.0.0.0")
    assert "host '0.0.0.0' can be reached from other machines: set a token (--token or PYKD_TOKEN)" in said
    assert "none is not a folder: name one that pykd saved" in failure(capsys, "serve", "--port", "0", "none")
    assert "the token must be at least 16" in failure(capsys, "serve", "--token", "short")
