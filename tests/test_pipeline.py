"""A whole run on a tiny recipe: what it writes, what it refuses, and that interruptions leave no trace."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pykd
from pykd.errors import ArtifactError, DataError, ModelLoadError, RecipeError
from pykd.evaluation import measure
from pykd.io.load import from_pretrained
from pykd.io.save import save_pretrained
from pykd.models.huggingface import load_huggingface
from pykd.pipeline import Run, evaluate_saved, run, runner
from pykd.pipeline.directory import RunDirectory
from pykd.pipeline.reload import Reload, check_reload
from pykd.recipe import load_recipe, recipe_yaml

TESTS = pathlib.Path(__file__).parent

VIT = {
    "model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 128,
}  # fmt: skip
TRAIN = {"max_steps": 4, "batch_size": 16, "checkpoint_steps": 1}
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"kind": "digits", "image_size": 8, "test_size": 50},
    "teacher": {"source": "huggingface", "config": VIT, "train": TRAIN},
    "student": {"depth": 1},
    "stages": [
        {"distill": TRAIN},
        {"prune": {"sparsity": 0.5}},
        {"recover": TRAIN},
        {"quantize": {"scheme": "w4a16", "method": "gptq", "samples": 20, "group_size": 32}},
    ],
    "evaluate": {"latency_rounds": 3, "speed_rounds": 2},
}
STAGES = ["0-teacher", "1-distill", "2-prune", "3-recover", "4-quantize"]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """One thread, which tiny models are fastest with, and no second of waiting for a throughput."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure_throughput", functools.partial(measure.measure_throughput, seconds=0.01))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One complete run, with the reload in a real new process."""
    folder = tmp_path_factory.mktemp("complete")
    (folder / "tiny.yaml").write_text(recipe_yaml(load_recipe(TINY)), encoding="utf-8")
    return run(folder / "tiny.yaml", output_dir=folder / "out", progress=False)


@pytest.fixture
def copied(finished: Run, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the finished run, with its teacher beside it, to be damaged."""
    shutil.copytree(finished.directory, tmp_path / "out")
    shutil.copytree(finished.directory.parent / "teachers", tmp_path / "teachers")
    return tmp_path / "out"


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reload without a new process, for runs that are about something else."""

    def reload(model: pathlib.Path, recipe: pathlib.Path, predictions: Any, *, batch_size: int) -> Reload:
        found = evaluate_saved(model, recipe=recipe, batch_size=batch_size, latency_rounds=1).predictions
        return Reload("pykd evaluate", len(found), sum(a != b for a, b in zip(found, predictions, strict=True)))

    monkeypatch.setattr(runner, "check_reload", reload)


def weights(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return from_pretrained(folder).state_dict()


def reopen(path: pathlib.Path, stages: list[str]) -> None:
    """Make a finished run look as if it had been stopped after all but these stages."""
    state = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**state, "finished": False}))
    for stage in stages:
        (path / "stages" / f"{stage}.json").unlink()


def test_a_run_measures_every_stage_and_reloads_in_a_new_process(finished: Run) -> None:
    assert [entry.stage for entry in finished.measured] == STAGES
    assert [report.name for report in finished.reports] == ["teacher", "distill", "prune", "recover", "quantize"]
    assert finished.reload.identical and finished.reload.compared == 50
    assert not finished.measured[0].cached
    sizes = [report.size_bytes for report in finished.reports]
    assert sizes[0] > sizes[1] > sizes[2] >= sizes[4]
    assert finished.reports[2].nonzero_parameters < finished.reports[1].nonzero_parameters
    for report in finished.reports[1:]:
        assert "teacher" in report.speedup_over
    assert finished.then is None
    (recovery,) = finished.recoveries
    qualities = [report.accuracy for report in finished.reports[1:4]]
    assert recovery[1:] == tuple(qualities) and f"{recovery.sentence()}." in finished.summary()
    assert recovery.sentence() in (finished.directory / "report.md").read_text()


def test_guarded_stages_tell_what_they_decided(tmp_path: pathlib.Path, same_process: None) -> None:
    recipe = copy.deepcopy(TINY)
    recipe["stages"] = [
        {"distill": {**TRAIN, "guard": {"drop": 0.5}, "validate_steps": 2}},
        {"prune": {"sparsity": 0.9, "guard": {"drop": 0.0, "retention": 0.0}}},
        {"quantize": {"scheme": "w8a8", "guard": {"drop": 1.0, "retention": 0.0}}},
    ]
    done = run(recipe, output_dir=tmp_path / "out", progress=False)
    distilled, pruned, quantized = (entry.details for entry in done.measured[1:])
    assert [entry["step"] for entry in distilled["validations"]] == [0, 2, 4]
    assert distilled["validations"][-1]["retention"] is not None and "model of step" in distilled["outcome"]
    assert pruned["guard"]["decisions"] and pruned["outcome"].startswith(("kept", "undone"))
    accuracies = [report.accuracy for report in done.reports]
    assert accuracies[2] >= accuracies[1]
    assert quantized["guard"]["outcome"] == "kept"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Validation and guard" in page and distilled["outcome"].partition(",")[0] in page
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"Guard, distill: {distilled['outcome']}" in text and f"Guard, prune: {pruned['outcome']}" in text
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert {event["run"] for event in events} == {"teacher", "1-distill"}
    with pytest.raises(RecipeError, match=r"stages\[0\].prune.guard: guard: drop is a share"):
        load_recipe(recipe | {"stages": [{"prune": {"guard": {"drop": 2}}}]})


def test_the_quantize_stage_reads_the_training_data(finished: Run) -> None:
    record = from_pretrained(finished.directory / "model").pykd_report[-1]
    assert record["method"] == "gptq" and record["parameters"]["samples"] == 20 and len(record["changed"]) >= 6


def test_a_run_leaves_reports_models_and_a_log(finished: Run) -> None:
    folder = finished.directory
    report = json.loads((folder / "report.json").read_text())
    assert [entry["name"] for entry in report["reports"]] == [entry.name for entry in finished.reports]
    assert "identical" in (folder / "report.md").read_text()
    assert "<html" in (folder / "report.html").read_text()
    log = (folder / "run.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) pykd", line) for line in log)
    assert any("teacher: trained in this run" in line for line in log)
    assert not (folder / "checkpoints" / "1-distill").exists()
    manifest = json.loads((folder / "model" / "pykd_manifest.json").read_text())
    assert manifest["provenance"]["teacher"]["sha256"] == finished.measured[0].sha256
    assert [entry["name"] for entry in manifest["provenance"]["metrics"]] == [entry.name for entry in finished.reports]
    for stage in STAGES[1:]:
        assert weights(folder / "stages" / stage)
    summary = finished.summary()
    assert "of the teacher's bytes" in summary and "all 50 predictions are identical" in summary


def test_a_second_run_uses_the_cached_teacher_and_gives_the_same_numbers(
    finished: Run, tmp_path: pathlib.Path, same_process: None
) -> None:
    shutil.copytree(finished.directory.parent / "teachers", tmp_path / "teachers")
    again = pykd.run(TINY, output_dir=tmp_path / "again", progress=False)
    assert again.measured[0].cached
    assert "teacher cached from an earlier run" in again.summary()
    assert "cached, not trained again" in (again.directory / "run.log").read_text()
    assert [r.predictions for r in again.reports] == [r.predictions for r in finished.reports]
    assert [entry.sha256 for entry in again.measured] == [entry.sha256 for entry in finished.measured]
    # The same folder again: a finished run of the same recipe is made again if that is said.
    thrice = pykd.run(TINY, output_dir=tmp_path / "again", overwrite=True, progress=False)
    assert [entry.sha256 for entry in thrice.measured] == [entry.sha256 for entry in finished.measured]


def test_resuming_a_finished_run_does_nothing(copied: pathlib.Path, finished: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.safetensors")}
    again = run(TINY, output_dir=copied, resume=True, progress=False)
    assert again.reports == finished.reports and again.reload == finished.reload
    assert before == {path: path.stat().st_mtime_ns for path in copied.rglob("*.safetensors")}


def test_interrupted_anywhere_and_resumed_the_weights_are_the_same(finished: Run, tmp_path: pathlib.Path) -> None:
    # Real processes, real signals: Ctrl-C and SIGKILL in trainings, between stages, in a measurement, before the
    # reload; and a disk that takes no more than 20 kB a file.
    points = [
        "train:teachers:SIGINT",
        "train:teachers:SIGKILL",
        "measure=teacher:SIGINT",
        "train:1-distill:SIGKILL",
        "train:1-distill:SIGINT",
        "stage=prune:SIGINT",
        "measure=prune:SIGKILL",
        "disk=20000:none",
        "train:3-recover:SIGINT",
        "stage=quantize:SIGKILL",
        "measure=quantize:SIGINT",
        "reload:SIGINT",
        "end:none",
    ]
    recipe = finished.directory.parent / "tiny.yaml"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "pipeline_driver.py"), str(recipe), str(tmp_path / "out"), *points]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=one_thread)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"point"')]
    assert [result["point"] for result in results] == points
    for result in results:
        last = (result["stderr"].strip().splitlines() or [""])[-1]
        assert "Traceback" not in result["stderr"], result["stderr"]
        if result["point"].endswith("SIGINT"):
            assert result["code"] == 130, result
            assert last == "pykd: interrupted; what is finished is kept, continue with --resume"
        elif result["point"].endswith("SIGKILL"):
            assert result["code"] == -9, result
        elif result["point"].startswith("disk"):
            assert result["code"] == 2, result
            assert re.match(r"pykd: \S+ could not be written: File too large; .*Make room", last), last
    assert results[-1]["code"] == 0, results[-1]["stderr"]
    assert not list((tmp_path / "out").rglob("*.tmp"))
    log = (tmp_path / "out" / "run.log").read_text()
    assert "2-prune: finished before, skipped" in log and "resumed at step" in log
    ours, theirs = weights(tmp_path / "out" / "model"), weights(finished.directory / "model")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_folder_with_another_run_is_refused(copied: pathlib.Path) -> None:
    with pytest.raises(RecipeError, match=r"out holds another run \('tiny', recipe \w+; .* --output, .* --overwrite"):
        run({**TINY, "seed": 1}, output_dir=copied)
    with pytest.raises(RecipeError, match=r"out holds another run"):
        run({**TINY, "seed": 1}, output_dir=copied, resume=True)


def test_a_run_is_not_started_over_by_accident(copied: pathlib.Path) -> None:
    with pytest.raises(RecipeError, match=r"holds a finished run of this recipe: read it again with --resume, or star"):
        run({**TINY, "ablate": ["stages"]}, output_dir=copied)
    assert (copied / "model").exists() and (copied / "report.json").exists()
    reopen(copied, STAGES[2:])
    with pytest.raises(RecipeError, match=r"holds an unfinished run of this recipe: continue it with --resume"):
        run(TINY, output_dir=copied)
    assert (copied / "stages" / "1-distill.json").exists()


def test_overwrite_replaces_another_run(copied: pathlib.Path, same_process: None) -> None:
    (copied / "run.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"run\.json cannot be read \(.*\): replace that run with --overwrite"):
        run(TINY, output_dir=copied)
    shorter = {**TINY, "stages": [{"prune": {"sparsity": 0.3}}]}
    done = run(shorter, output_dir=copied, overwrite=True, progress=False)
    assert [entry.stage for entry in done.measured] == ["0-teacher", "1-prune"]
    assert sorted(path.name for path in (copied / "stages").iterdir()) == ["0-teacher.json", "1-prune", "1-prune.json"]


def test_resume_needs_a_run_and_excludes_overwrite(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecipeError, match=r"--resume: there is no run in .*none; leave --resume out"):
        run(TINY, output_dir=tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(RecipeError, match=r"--resume continues a run and --overwrite starts it over"):
        run(TINY, output_dir=tmp_path / "none", resume=True, overwrite=True)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RecipeError, match=r"is not empty and holds no run of pykd: choose a new folder with --output"):
        run(TINY, output_dir=tmp_path, overwrite=True)
    with pytest.raises(RecipeError, match=r"thesis\.tex is a file: choose a new folder"):
        run(TINY, output_dir=tmp_path / "thesis.tex")
    with pytest.raises(ArtifactError, match=r"cannot make the folder .*: Not a directory; choose another --output"):
        run(TINY, output_dir=tmp_path / "thesis.tex" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_of_a_newer_format_is_refused(copied: pathlib.Path) -> None:
    state = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**state, "format_version": 99}))
    with pytest.raises(ArtifactError, match=r"run\.json has format_version 99, this pykd reads 1"):
        run(TINY, output_dir=copied, resume=True)


def test_two_processes_do_not_share_a_folder(copied: pathlib.Path) -> None:
    descriptor = os.open(copied, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(ArtifactError, match=r"out is in use by another process"):
            run(TINY, output_dir=copied, resume=True)
    finally:
        os.close(descriptor)


def test_resume_refuses_other_data(copied: pathlib.Path) -> None:
    state = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**state, "data": "0123"}))
    with pytest.raises(
        RecipeError, match=r"the data is not what the run in .* began with \(fingerprint 0123, now \w+\)"
    ):
        run(TINY, output_dir=copied, resume=True)


def test_resume_names_a_truncated_model_file_and_the_way_out(copied: pathlib.Path, same_process: None) -> None:
    reopen(copied, STAGES[3:])
    file = copied / "stages" / "2-prune" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    sentence = r"model\.safetensors is truncated or altered: .* Or delete \S+2-prune and \S+2-prune\.json and run again"
    with pytest.raises(ArtifactError, match=sentence):
        run(TINY, output_dir=copied, resume=True, progress=False)
    shutil.rmtree(copied / "stages" / "2-prune")
    (copied / "stages" / "2-prune.json").unlink()
    assert run(TINY, output_dir=copied, resume=True, progress=False).reload.identical


def test_resume_names_a_broken_stage_record(copied: pathlib.Path) -> None:
    reopen(copied, STAGES[3:])
    (copied / "stages" / "2-prune.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"2-prune\.json cannot be read \(.*\): delete it, and --resume runs"):
        run(TINY, output_dir=copied, resume=True, progress=False)


def test_a_teacher_of_other_classes_is_refused(tmp_path: pathlib.Path) -> None:
    save_pretrained(load_huggingface(None, "image-classification", num_labels=5, config=VIT), tmp_path / "five")
    recipe = {**TINY, "teacher": {"source": "huggingface", "name": str(tmp_path / "five")}}
    with pytest.raises(
        RecipeError, match=r"teacher: .*five tells 5 classes apart, but the data has 10: give it a `train`"
    ):
        run(recipe, output_dir=tmp_path / "out")


def test_what_a_verb_refuses_is_told_with_the_stage(tmp_path: pathlib.Path, finished: Run) -> None:
    shutil.copytree(finished.directory.parent / "teachers", tmp_path / "teachers")
    recipe = {**copy.deepcopy(TINY), "stages": [{"prune": {"include": ["nothing*"]}}]}
    with pytest.raises(RecipeError, match=r"stages\[0\]\.prune: .*nothing\*"):
        run(recipe, output_dir=tmp_path / "patterns", progress=False)
    with pytest.raises(RecipeError, match=r"student: depth must be between 1 and the teacher's 2 layers"):
        run({**TINY, "student": {"depth": 3}}, output_dir=tmp_path / "depth", progress=False)


def test_torchvision_needs_a_name_and_texts_a_tokenizer(tmp_path: pathlib.Path, finished: Run) -> None:
    shutil.copytree(finished.directory.parent / "teachers", tmp_path / "teachers")
    student = {"source": "torchvision", "config": {"model_type": "vit"}}
    with pytest.raises(RecipeError, match=r"student\.name is missing: torchvision builds models by name"):
        run({**TINY, "student": student}, output_dir=tmp_path / "vision", progress=False)
    with pytest.raises(RecipeError, match=r"data\.tokenizer is missing: a teacher from scratch has none"):
        run({**TINY, "data": {"kind": "text", "path": "none.csv"}}, output_dir=tmp_path / "text", progress=False)


def test_wrong_sources_pass_through(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelLoadError, match=r"torchvision has no such model: unknown model 'resnet81'"):
        run({**TINY, "teacher": {"source": "torchvision", "name": "resnet81", "train": {}}}, output_dir=tmp_path / "a")
    with pytest.raises(DataError, match="test_size"):
        run(TINY | {"data": {"kind": "digits", "test_size": 1796}}, output_dir=tmp_path / "b")


def test_one_recipe_leads_to_the_next(tmp_path: pathlib.Path, finished: Run, same_process: None) -> None:
    shutil.copytree(finished.directory.parent / "teachers", tmp_path / "teachers")
    second = {**TINY, "name": "second", "stages": [{"quantize": {"scheme": "nf4", "group_size": 32}}], "student": None}
    first = {**TINY, "stages": [{"prune": {"sparsity": 0.3}}], "student": None, "then": "second.yaml"}
    (tmp_path / "second.yaml").write_text(json.dumps(second))  # JSON is YAML
    (tmp_path / "first.yaml").write_text(json.dumps(first))
    done = run(tmp_path / "first.yaml", output_dir=tmp_path / "out", progress=False)
    assert done.then is not None and done.then.directory == tmp_path / "out" / "second"
    assert done.then.measured[0].cached and done.then.final.size_bytes < done.then.teacher.size_bytes
    (tmp_path / "second.yaml").write_text(json.dumps({**second, "then": "first.yaml"}))
    with pytest.raises(RecipeError, match=r"leads back to the recipe 'tiny'; a chain must end"):
        run(tmp_path / "first.yaml", output_dir=tmp_path / "loop")


def test_a_convolutional_teacher_and_mobilenet_by_one_line(tmp_path: pathlib.Path, same_process: None) -> None:
    few = {"max_steps": 2, "batch_size": 8}
    recipe = {
        **TINY,
        "data": {"kind": "digits", "image_size": 32, "test_size": 20},
        "teacher": {"source": "torchvision", "name": "resnet18", "train": few},
        "student": {"width": 0.5},
        "stages": [
            {"distill": few},
            {"prune": {"method": "channels", "sparsity": 0.3}},
            {"recover": few},
            {"quantize": {"scheme": "w4a16", "group_size": 64}},
        ],
    }
    for name, student in (("narrow", {"width": 0.5}), ("mobile", {"name": "mobilenet_v2"})):
        done = run({**recipe, "student": student}, output_dir=tmp_path / name, progress=False)
        assert done.measured[0].cached == (name == "mobile")
        assert done.reload.identical
        assert done.teacher.size_bytes > 6 * done.final.size_bytes
        sizes = [report.parameters for report in done.reports]
        assert sizes[0] > sizes[1] > sizes[2] == sizes[3]


def test_text_from_a_csv_file_with_a_local_model(tmp_path: pathlib.Path, same_process: None) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "book", "very", "not"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    bert = {
        "model_type": "bert", "vocab_size": len(words), "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 128,
    }  # fmt: skip
    teacher = load_huggingface(None, "sequence-classification", num_labels=2, config=bert)
    save_pretrained(teacher, tmp_path / "bert", tokenizer=BertTokenizerFast(str(tmp_path / "vocab.txt")))
    rows = [
        f"very {word} {thing},{label}" for word, label in (("good", "yes"), ("bad", "no")) for thing in ("film", "book")
    ]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,liked", *rows * 10]))
    overrides = [
        f"data.path={tmp_path}/reviews.csv", "data.text_column=review", "data.label_column=liked", "data.test_size=8",
        "data.split_column=null", f"teacher.name={tmp_path}/bert", "student.depth=1", "evaluate.latency_rounds=2",
        "evaluate.speed_rounds=2",
    ]  # fmt: skip
    recipe = TESTS.parent / "recipes" / "text_classification.yaml"
    done = run(recipe, output_dir=tmp_path / "out", overrides=overrides, short=True, progress=False)
    assert done.reload.identical and done.final.class_names == ("no", "yes")
    assert (done.directory / "model" / "tokenizer.json").exists()
    del overrides[2]
    with pytest.raises(DataError, match=r"unknown column 'label'"):
        run(recipe, output_dir=tmp_path / "wrong", overrides=overrides, short=True, progress=False)


@contextlib.contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, code: int, predictions: list[int] | None) -> Iterator[None]:
    """A new process that answers like this."""

    def process(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if predictions is not None:
            file = pathlib.Path(command[command.index("--predictions") + 1])
            file.write_text(json.dumps({"predictions": predictions}))
        return subprocess.CompletedProcess(command, code, "", "pykd: the disk caught fire\n")

    with monkeypatch.context() as patch:
        patch.setattr("pykd.pipeline.reload.subprocess.run", process)
        yield


def test_a_reload_that_differs_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    files = (tmp_path / "model", tmp_path / "recipe.yaml")
    with answering(monkeypatch, 0, [1, 2, 4]):
        found = check_reload(*files, [1, 2, 3], batch_size=1)
    assert not found.identical
    assert re.search(r"1 of 3 predictions differ .* compare again with `pykd evaluate \S+model", found.sentence())
    with (
        answering(monkeypatch, 0, [1]),
        pytest.raises(ArtifactError, match="predicted 1 examples, but the run measured 3"),
    ):
        check_reload(*files, [1, 2, 3], batch_size=1)
    with (
        answering(monkeypatch, 2, None),
        pytest.raises(ArtifactError, match="in a new process: pykd: the disk caught fire"),
    ):
        check_reload(*files, [1, 2, 3], batch_size=1)


def test_the_log_survives_a_full_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    with RunDirectory.open(tmp_path / "out", load_recipe(TINY), resume=False, overwrite=False) as directory:
        package = logging.getLogger("pykd")
        handler = next(h for h in package.handlers if isinstance(h, logging.FileHandler))
        full = open("/dev/full", "w")  # noqa: SIM115 - closing it fails as well
        handler.stream = full
        package.info("written to a full disk")
        handler.stream = None  # type: ignore[assignment]
        with pytest.raises(OSError, match="No space left"):
            full.close()
        assert handler not in package.handlers
    assert directory.state["finished"] is False
