"""report.json, report.html and report.md: complete, escaped, self-contained, and really drawn by a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pykd.data.bundle import DataBundle, stack
from pykd.evaluation import Report, StageRecord, compare, write_report

from .conftest import make_report

CURVE = [{"step": i, "epoch": i / 9, "lr": 1e-3, "loss": 1 / i, "kl": 0.5 / i} for i in range(1, 10)]
STAGES = {
    "teacher": StageRecord(12.3, {"stage": "finetune", "method": "cross_entropy", "steps": 9, "curve": CURVE}),
    "2-prune": StageRecord(0.1, {"stage": "prune", "method": "magnitude", "skipped": {"fc": "too small"}}),
}
VOID = {"meta", "img", "br"}


class Checker(html.parser.HTMLParser):
    """Collects what a page fetches and whether its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def bundle(**item: Any) -> DataBundle:
    items = [{**(item or {"pixel_values": torch.rand(3, 8, 8)}), "labels": i % 3} for i in range(12)]
    return DataBundle(train=items, test=items, collate=stack, class_names=("a", "b", "c"), name="made")


def page(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return checker


def write(directory: Path, reports: list[Report], **options: Any) -> Path:
    return write_report(directory, compare(reports), options.pop("data", bundle()), **{"title": "run", **options})


def test_validations_without_examples_of_errors(tmp_path: Path, reports: list[Report]) -> None:
    entry = {"step": 4, "metric": "accuracy", "value": 0.5, "action": "best", "sentence": "first", "last_change": None}
    stages = {"1-distill": StageRecord(1.0, {"stage": "distill", "validations": [entry]})}
    assert "Validation and guard" in page(write(tmp_path, reports, stages=stages)).words


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path, reports: list[Report]) -> None:
    path = write(tmp_path / "new" / "run", reports, stages=STAGES, settings={"seed": 0, "stages": [{"a": 1}]})
    assert path == tmp_path / "new" / "run" / "report.html"
    found = page(path)
    assert all(source.startswith(("data:image/", "#")) for source in found.sources)
    assert not found.tags & {"script", "link", "iframe", "object", "form"}
    assert sum(source.startswith("data:image/svg+xml") for source in found.sources) == 4
    assert sum(source.startswith("data:image/png") for source in found.sources) == 3, "one picture for each error"
    anchors = {source[1:] for source in found.sources if source.startswith("#")}
    assert anchors <= set(re.findall(r'id="(\w+)"', path.read_text(encoding="utf-8")))
    words = " ".join(" ".join(found.words).split())
    for expected in (
        "91.67 %",
        "8.0×",
        "no gain in speed here: 2-prune",
        "stages[0].a",
        "too small",
        "torch",
        "may be chance",
    ):
        assert expected in words, expected


def test_the_json_holds_everything(tmp_path: Path, reports: list[Report]) -> None:
    write(tmp_path, reports, stages=STAGES, remarks=["teacher: cached"], settings={"seed": 7}, description="what")
    content = json.loads((tmp_path / "report.json").read_text())
    assert [Report.from_dict(values) for values in content["reports"]] == reports
    assert content["format_version"] == 1 and content["settings"] == {"seed": 7}
    assert content["remarks"] == ["teacher: cached"] and content["data"]["test_size"] == 12
    assert content["environment"]["threads"] == torch.get_num_threads()
    assert content["stages"]["teacher"]["details"]["curve"] == CURVE


def test_the_markdown_reads_well(tmp_path: Path, reports: list[Report]) -> None:
    write(tmp_path, reports, remarks=["teacher: cached"], description="What it is.", tables={"Sizes": [["a"], ["1|2"]]})
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# run\n\nWhat it is.\n\n| model | accuracy |")
    assert "- teacher: cached" in text and "Data: made, 12 to train on, 12 held out, 3 classes." in text
    assert f"torch {torch.__version__}" in text and "## Sizes\n\n| a |\n| --- |\n| 1\\|2 |\n" in text


def test_nothing_from_outside_becomes_markup(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    names = (evil, "b", "c")
    reports = [make_report(class_names=names), make_report(evil, 2, class_names=names)]
    data = bundle(text=evil)
    path = write(
        tmp_path,
        reports,
        data=data,
        title=evil,
        description=evil,
        remarks=[evil],
        settings={evil: evil},
        tables={evil: [[evil], [evil]]},
        stages={evil: StageRecord(1.0, {evil: [evil], "curve": CURVE})},
    )
    found = page(path)
    assert "script" not in found.tags
    assert sum(evil in words for words in found.words) > 11


def test_texts_are_shown_in_a_table(tmp_path: Path, reports: list[Report]) -> None:
    found = page(write(tmp_path, reports, data=bundle(text="a package that\nholds data")))
    assert "a package that\nholds data" in found.words


def test_one_model_without_mistakes_has_a_page_too(tmp_path: Path) -> None:
    found = page(write(tmp_path, [make_report(wrong=0)]))
    assert "0 of 12 examples are classified wrongly." in "".join(found.words)


def test_many_classes_fit(tmp_path: Path) -> None:
    from pykd.evaluation.metrics import quality

    labels = [i % 58 for i in range(116)]
    names = tuple(f"class {i}" for i in range(58))
    scored = quality(labels, [0, *labels[1:]], names)
    report = make_report(
        labels=tuple(labels),
        predictions=(0, *labels[1:]),
        confidences=(0.5,) * 116,
        class_names=names,
        per_class=scored.per_class,
        confusion=scored.confusion,
    )
    items = [{"text": "t", "labels": i} for i in labels]
    data = DataBundle(train=items, test=items, collate=stack, class_names=names, name="many")
    assert page(write(tmp_path, [report], data=data)).words.count("class 57") == 1


def test_a_stage_without_a_report_is_refused(tmp_path: Path, reports: list[Report]) -> None:
    with pytest.raises(ValueError, match="stage 'prune' has no report; the reports are teacher, 1-distill, 2-prune"):
        write(tmp_path / "run", reports, stages={"prune": StageRecord()})
    assert not (tmp_path / "run").exists()


@pytest.mark.browser
def test_a_browser_draws_it(tmp_path: Path, reports: list[Report]) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    path = write(tmp_path, reports, stages=STAGES)
    shot = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2400", f"--screenshot={shot}"]
    subprocess.run([browser, *flags, path.as_uri()], check=True, capture_output=True, timeout=120)
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (2400, 1200)
    blue = (abs(pixels - torch.tensor([0x1D, 0x4E, 0xD8]).div(255).numpy()) < 0.02).all(-1)
    amber = (abs(pixels - torch.tensor([0xFF, 0xF7, 0xE6]).div(255).numpy()) < 0.02).all(-1)
    assert blue.sum() > 2000, "the bars of the final model are drawn"
    assert amber.sum() > 5000, "the remarks have their ground"
