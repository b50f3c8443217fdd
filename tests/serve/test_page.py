"""The page in a real browser: a real job from its start to its report, predictions, labels, and the token."""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fastapi import FastAPI

from pykd.evaluation.page import TEMPLATES
from pykd.serve import Settings
from pykd.serve.app import create_app
from pykd.serve.page import PAGE, digest, policy

from .browser import Browser
from .conftest import ask
from .running import listening
from .test_jobs_api import TINY

TOKEN = "a-token-of-many-letters"


@pytest.fixture
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


@pytest.fixture
def app(tmp_path: Path, folders: dict[str, Path]) -> Iterator[FastAPI]:
    """A service with a model, a recipe of seconds, and a token."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    models = (f"words={folders['text']}", f"pictures={folders['image']}")
    places: dict[str, Any] = {"recipes": tmp_path / "recipes", "state": tmp_path / "state"}
    made = create_app(Settings(models=models, token=TOKEN, offline=True, **places))
    yield made
    made.state.pykd.close()


def test_the_page_needs_no_token_and_fetches_nothing(app: FastAPI) -> None:
    answer = ask(app, "GET", "/")
    assert answer.status_code == 200 and answer.text == PAGE.read_text(encoding="utf-8")
    rules = answer.headers["content-security-policy"]
    assert rules.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in rules
    assert not re.search(r"https?://(?!www\.w3\.org)|<link|@import|url\(|\son\w+=|\sstyle=", answer.text)
    assert ask(app, "GET", "/models").status_code == 401


def test_the_policy_knows_the_style_of_reports() -> None:
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    template = (TEMPLATES / "report.html.j2").read_text(encoding="utf-8")
    assert template.count("<style>\n{{ style | safe }}\n</style>") == 1 == template.count("<style")
    assert digest(f"\n{style}\n") in policy("") and "style=" not in template


def click(browser: Browser, name: str) -> None:
    """Press the button of that name as soon as it is there."""
    found = f"[...document.querySelectorAll('button')].find(b => b.textContent === {name!r} && !b.disabled)"
    browser.until(f"!!{found}")
    browser.run(f"{found}.click()")


@pytest.mark.browser
def test_a_job_from_start_to_report(app: FastAPI, browser: Browser) -> None:
    with listening(app) as address:
        browser.page("Page.navigate", url=address)
        browser.until("!document.getElementById('login')?.hidden")
        browser.run(f"document.getElementById('token').value = {TOKEN!r}")
        click(browser, "Use it")
        browser.until("document.querySelectorAll('#served tr').length === 2")
        browser.until("document.getElementById('described').textContent === 'a job of seconds: distill'")

        browser.run("document.getElementById('changes').value = 'stages[0].distill.temprature = 2'")
        click(browser, "Start")
        browser.until("document.getElementById('problem').textContent.includes(\"did you mean 'temperature'\")")
        browser.run("document.getElementById('changes').value = 'stages[0].distill.temperature = 2'")
        click(browser, "Start")
        training = "[...document.querySelectorAll('.job tr')].find(r => r.textContent.startsWith('1-distill'))"
        browser.until(f"{training}?.querySelector('progress').value > 5", 120)
        assert browser.run(f"{training}.querySelector('polyline').getAttribute('points').split(' ').length") > 1
        click(browser, "Stop")
        browser.until("document.querySelector('.status').textContent === 'interrupted'", 120)
        click(browser, "Resume")
        browser.until("document.querySelector('.status').textContent === 'finished'", 180)
        assert browser.run(f"{training}.querySelector('progress').value") == 300

        click(browser, "Report of tiny")
        browser.until("!document.getElementById('shown').hidden")
        assert "tiny - pykd report" in browser.run("document.getElementById('report').srcdoc")
        browser.run("document.getElementById('report').scrollIntoView()")
        end = time.monotonic() + 30  # a frame is drawn when the machine has time for it
        while colour(browser.screenshot(), (0xFF, 0xF7, 0xE6)) <= 1000:
            assert time.monotonic() < end, "the report's remarks have no ground"
            time.sleep(0.1)
        assert [said for said in browser.said if "Content Security Policy" in said] == []

        browser.page("Page.reload")
        browser.until("document.querySelector('.status')?.textContent === 'finished'")
        assert browser.run("document.getElementById('login').hidden")


def colour(png: bytes, wanted: tuple[int, int, int]) -> int:
    """Pixels of about that colour."""
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(png))[..., :3]
    return int((abs(pixels - torch.tensor(wanted).div(255).numpy()) < 0.02).all(-1).sum())


@pytest.mark.browser
def test_predictions_labels_and_checks(app: FastAPI, browser: Browser) -> None:
    with listening(app) as address:
        browser.page("Page.navigate", url=address)
        browser.until("!document.getElementById('login')?.hidden")
        browser.run("sessionStorage.setItem('pykd-token', '" + TOKEN + "')")
        browser.page("Page.reload")
        browser.until("document.querySelectorAll('#model option').length === 2")
        browser.run("document.getElementById('text').value = 'plays music'")
        click(browser, "Predict")
        browser.until("document.querySelectorAll('#answer tr').length === 4")
        scores = browser.run(
            "[...document.querySelectorAll('#answer tr')].slice(0, 3).map(r => +r.children[1].textContent)"
        )
        assert sum(scores) == pytest.approx(1.0, abs=1e-3) and scores == sorted(scores, reverse=True)
        click(browser, "This is the true label")
        browser.until("document.getElementById('answer').textContent.includes('noted')")
        browser.until("document.getElementById('monitoring').textContent.includes('100.0 %')")

        names = browser.run("[...document.querySelectorAll('#checks button')].map(b => b.textContent)")
        assert names == ["Verify DistilBERT", "Verify T5-small", "Verify MobileNetV2", "Verify ResNet-18", "Verify all"]
        click(browser, "Verify ResNet-18")
        said = browser.until("document.getElementById('checked').textContent")
        assert said.startswith("ResNet-18")

        browser.run("document.getElementById('model').value = 'pictures'")
        browser.run("document.getElementById('model').dispatchEvent(new Event('change'))")
        assert browser.run("document.getElementById('text-field').hidden")
        png = base64.b64encode(picture()).decode()
        browser.run(
            f"const bytes = Uint8Array.from(atob('{png}'), c => c.charCodeAt(0)), files = new DataTransfer();"
            "files.items.add(new File([bytes], 'a.png')); document.getElementById('image').files = files.files; 0"
        )
        click(browser, "Predict")
        browser.until("document.querySelectorAll('#answer tr').length === 6")


def picture() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()
