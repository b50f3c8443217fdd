"""`POST /predict` says what the model says, alone and in batches, and refuses what it cannot answer."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from PIL import Image

from pykd import from_pretrained
from pykd.serve import decode_labels
from pykd.serve.batching import Batcher
from pykd.serve.labels import MEDIA_TYPE
from pykd.serve.state import Answered

from .conftest import TEXTS, ask, client_of, predict

Make = Callable[..., FastAPI]


def scores(folder: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.softmax(from_pretrained(folder)(input_ids=torch.tensor([ids])).logits[0].float(), -1)


def tokens(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return ids


def picture(size: tuple[int, int] = (16, 16), format: str = "PNG") -> str:
    noise = torch.randint(0, 256, (*size[::-1], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise.numpy()).save(buffer, format)
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_text_gets_the_label_score_model_and_latency(make_app: Make, folders: dict[str, Path]) -> None:
    answer = predict(make_app("text"), text=TEXTS[0], top=2)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    want = scores(folders["text"], tokens(folders["text"], TEXTS[0]))
    best = int(want.argmax())
    label = ("images", "sound", "net")[best]
    assert said["model"] == "text" and said["task"] == "text-classification" and 0 < said["latency_ms"] < 10_000
    assert said["predictions"][0]["label"] == label
    assert said["predictions"][0]["score"] == pytest.approx(float(want[best]), abs=1e-5)
    assert said["predictions"][0]["top"][0]["label"] == label
    assert len(said["predictions"][0]["top"]) == 2


def test_concurrent_requests_share_a_batch_and_get_the_answers_they_get_alone(make_app: Make) -> None:
    app = make_app("text", batch_window_ms=200.0)
    alone = [predict(app, text=text).json()["predictions"] for text in TEXTS]

    async def at_once() -> list[httpx.Response]:
        async with client_of(app) as client:
            return list(await asyncio.gather(*(client.post("/predict", json={"text": text}) for text in TEXTS)))

    together = [answer.json()["predictions"] for answer in asyncio.run(at_once())]
    assert [each[0]["label"] for each in together] == [each[0]["label"] for each in alone]
    for one, other in zip(together, alone, strict=True):
        assert one[0]["score"] == pytest.approx(other[0]["score"], abs=1e-4)
    metrics = ask(app, "GET", "/metrics").text
    assert (
        'pykd_batch_inputs_sum{model="text"} 6.0' in metrics and 'pykd_batch_inputs_count{model="text"} 4.0' in metrics
    )
    assert 'pykd_predictions_total{model="text"} 6.0' in metrics and 'pykd_waiting_inputs{model="text"} 0.0' in metrics


def test_long_and_empty_texts(make_app: Make) -> None:
    app = make_app("text")
    answer = predict(app, text=["network " * 200, " "])  # the model has 24 positions; blanks have no token
    assert answer.status_code == 200 and len(answer.json()["predictions"]) == 2


def test_words_are_tagged_where_they_stand(make_app: Make, folders: dict[str, Path]) -> None:
    text = "plays   music  at once"
    found = predict(make_app("tags"), text=[text, "images"]).json()["predictions"]
    with torch.no_grad():
        raw = from_pretrained(folders["tags"])(input_ids=torch.tensor([tokens(folders["tags"], text)])).logits[0]
    tags = [("B", "I", "O")[number] for number in raw.argmax(-1).tolist()[1:-1]]
    covered = [any(one["start"] <= text.index(word) < one["end"] for one in found[0]["entities"])
               for word in text.split()]  # fmt: skip
    assert covered == [tag != "O" for tag in tags]
    for one in found[0]["entities"]:
        assert one["text"] == text[one["start"] : one["end"]] and one["label"] == "PACKAGE" and 0 < one["score"] <= 1


def test_text_is_generated_as_the_model_generates_it(make_app: Make, folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    found = predict(make_app("t5", max_new_tokens=5), text=list(TEXTS)).json()["predictions"]
    model: Any = from_pretrained(folders["t5"])
    reader = AutoTokenizer.from_pretrained(folders["t5"])
    for text, said in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokens(folders["t5"], text)])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert said["text"] == reader.decode(made[0], skip_special_tokens=True)
        assert 0 < said["score"] <= 1
        if int(made[0, 1]) != reader.eos_token_id:
            with torch.no_grad():
                first = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, -1].softmax(-1).max()
            assert said["score"] <= float(first) ** 0.2 + 1e-4  # the first of five factors


def test_images_are_prepared_as_in_training(make_app: Make, folders: dict[str, Path]) -> None:
    from pykd.data import load_digits

    data = load_digits(image_size=16)
    wanted = data.test[0]["pixel_values"]
    grey = ((wanted[0] * 0.3760 + 0.3053) * 255).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey.numpy()).save(buffer, "PNG")
    app = make_app("image")
    said = predict(app, image=base64.b64encode(buffer.getvalue()).decode(), top=10).json()["predictions"][0]
    with torch.no_grad():
        want = torch.softmax(from_pretrained(folders["image"])(pixel_values=wanted[None]).logits[0], -1)
    assert {each["label"]: each["score"] for each in said["top"]} == {
        str(digit): pytest.approx(float(want[digit]), abs=2e-3) for digit in range(10)
    }


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_images_of_any_size_and_known_format(make_app: Make, format: str) -> None:
    answer = predict(make_app("torchvision-image"), image=[picture((40, 30), format), picture((7, 9), format)])
    assert answer.status_code == 200, answer.text
    assert all(each["label"] in "nesw" for each in answer.json()["predictions"])


def test_the_compact_answer_says_the_same(make_app: Make) -> None:
    app = make_app("text", "t5")
    plain = predict(app, text=list(TEXTS), model="text").json()["predictions"]
    packed = predict(app, {"Accept": MEDIA_TYPE}, text=list(TEXTS), model="text")
    assert packed.headers["content-type"] == MEDIA_TYPE and len(packed.content) == 13
    labels = ask(app, "GET", "/models").json()[0]["labels"]
    assert [labels[number] for number in decode_labels(packed.content)] == [each["label"] for each in plain]
    refused = predict(app, {"Accept": MEDIA_TYPE}, text="plays", model="t5")
    assert refused.status_code == 406 and "does not classify whole inputs" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [({"text": "plays"}, 404, "name one of the models: text, image"),
     ({"text": "plays", "model": "txt"}, 404, "unknown model 'txt': did you mean 'text'?"),
     ({"model": "text"}, 422, "text takes 'text', and nothing else"),
     ({"text": "plays", "model": "image"}, 422, "image takes 'image'"),
     ({"text": "a", "image": "b", "model": "text"}, 422, "and nothing else"),
     ({"text": [], "model": "text"}, 422, "a request holds 1 to 4 inputs, got 0"),
     ({"text": ["a"] * 5, "model": "text"}, 422, "got 5"),
     ({"text": "a" * 101, "model": "text"}, 422, "text 0 has 101 characters, allowed are 1 to 100"),
     ({"text": ["a", ""], "model": "text"}, 422, "text 1 has 0 characters"),
     ({"image": "?", "model": "image"}, 422, "image 0 is not base64"),
     ({"image": "aGVsbG8=", "model": "image"}, 422, "image 0 is no PNG, JPEG, WEBP, BMP that can be read"),
     ({"text": 5}, 422, "body.text"), ({"text": "a", "tpo": 3}, 422, "body.tpo: Extra inputs are not permitted"),
     ({"text": "a", "top": 0}, 422, "body.top")],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_a_sentence(
    make_app: Make, body: dict[str, Any], status: int, detail: str
) -> None:
    answer = predict(make_app("text", "image", max_inputs=4, max_text_chars=100), **body)
    assert answer.status_code == status and detail in answer.json()["detail"]


def test_halves_of_characters_are_refused_not_stumbled_over(make_app: Make) -> None:
    app = make_app("text")
    for body in (b'{"text": "\\ud800"}', b'{"\\ud800": 1}', b'{"text": "a", "model": "\\udfff"}', b"\xff", b"[" * 9000):
        answer = ask(app, "POST", "/predict", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 404, 422) and answer.json()["detail"]


def test_a_full_queue_is_429_and_a_slow_model_504(make_app: Make) -> None:
    app = make_app("text", max_queue=64, batch_window_ms=5000.0, timeout_s=0.3, max_batch=64)

    async def crowd() -> list[httpx.Response]:
        async with client_of(app) as client:
            requests = [client.post("/predict", json={"text": ["music"] * 40}) for _ in range(2)]
            return list(await asyncio.gather(*requests))

    answers = sorted(asyncio.run(crowd()), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [429, 504]
    assert answers[0].headers["retry-after"] == "1" and "too many inputs are waiting" in answers[0].json()["detail"]
    assert answers[1].json()["detail"] == "the prediction took longer than 0.3 s"


def test_what_is_being_made_ready_takes_its_places_in_the_queue(
    make_app: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, free = make_app("text", max_queue=64), threading.Event()
    predictor = app.state.pykd.models["text"].predictor
    prepare = predictor.prepare
    monkeypatch.setattr(predictor, "prepare", lambda inputs: (free.wait(20), prepare(inputs))[1])
    long = {"text": ["network " * 10] * 40}  # more than is read in the event loop

    async def crowd() -> tuple[httpx.Response, httpx.Response, str]:
        async with client_of(app) as client:
            first = asyncio.create_task(client.post("/predict", json=long))
            while not app.state.pykd.in_flight:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            refused, metrics = await client.post("/predict", json=long), await client.get("/metrics")
            free.set()
            return await first, refused, metrics.text

    first, refused, metrics = asyncio.run(crowd())
    assert first.status_code == 200 and refused.status_code == 429
    assert 'pykd_waiting_inputs{model="text"} 40.0' in metrics
    assert predict(app, **long).status_code == 200


def test_scores_that_are_no_numbers_are_no_answer(make_app: Make) -> None:
    app = make_app("text")
    with torch.no_grad():
        app.state.pykd.models["text"].model.classifier.bias.fill_(float("nan"))
    answer = predict(app, text="music")
    assert answer.status_code == 500 and answer.json()["detail"].startswith("text has no finite scores for input 0:")
    assert ask(app, "GET", "/monitoring").json()["models"] == {}


def test_observers_see_every_answer_and_spoil_none(make_app: Make) -> None:
    app, seen = make_app("text", "tags"), []

    def observe(answered: Answered) -> None:
        seen.append(answered)
        raise RuntimeError("the monitor is broken")

    app.state.pykd.observers.append(observe)
    said = predict(app, text=["music", "plays"], model="text").json()
    predict(app, text="music", model="tags")
    assert [(each.model_name, each.inputs) for each in seen] == [("text", ["music", "plays"]), ("tags", ["music"])]
    assert seen[0].latency_ms == said["latency_ms"] and seen[1].answers[0].probabilities is None
    assert [max(one.probabilities) for one in seen[0].answers] == [each["score"] for each in said["predictions"]]
    assert list(seen[0].ids) == [each["id"] for each in said["predictions"]] and seen[0].lengths == [3, 3]
    assert seen[0].answers[0].vector.shape == (64,)
    assert "pykd_observer_failures_total 2.0" in ask(app, "GET", "/metrics").text


def test_a_model_that_fails_says_nothing_of_its_insides(make_app: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def submit(self: Any, items: Any) -> Any:
        raise RuntimeError("secret")

    app = make_app("text")
    monkeypatch.setattr(Batcher, "submit", submit)
    answer = predict(app, text="music")
    assert answer.status_code == 500 and answer.json() == {"detail": "the service failed; its log says why"}
