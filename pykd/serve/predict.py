"""`POST /predict`: texts or images, answered by the model they are for."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
import secrets
import time
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from pykd.errors import nearest
from pykd.serve.doors import Problem
from pykd.serve.labels import MEDIA_TYPE, encode_labels
from pykd.serve.predictors import Answer, Input
from pykd.serve.served import Served
from pykd.serve.state import Answered, State, within

#: Texts of so few characters are read at once: handing them to a thread takes longer than that.
SHORT_CHARS = 2000


class PredictRequest(BaseModel):
    """One of `text` and `image`, one input or a list of them; how many and how large, the service's limits say."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=200, description="name from GET /models; may be left out if it has one")
    text: str | list[str] | None = Field(None, description="for models that take text")
    image: str | list[str] | None = Field(None, description="PNG, JPEG, WebP or BMP in base64, for models of images")
    top: int = Field(1, ge=1, le=1000, description="so many of the likeliest classes")


class Candidate(BaseModel):
    """A class and its probability."""

    label: str
    score: float


class Entity(BaseModel):
    """A named part of a text: characters start to end."""

    label: str
    score: float
    start: int
    end: int
    text: str


class Prediction(BaseModel):
    """Of classifiers: label, score and top; of models that tag words: entities; of those that generate: text, score."""

    id: str = Field(description="for POST /feedback, which takes the true label")
    label: str | None = None
    score: float | None = None
    top: list[Candidate] | None = None
    entities: list[Entity] | None = None
    text: str | None = None


class PredictResponse(BaseModel):
    """One prediction an input, in their order; latency from the arrival of the request."""

    model: str
    task: str
    latency_ms: float
    predictions: list[Prediction]


RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": PredictResponse,
        "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        "description": f"JSON; or, for classifiers and `Accept: {MEDIA_TYPE}`, packed class numbers",
    },
    404: {"model": Problem, "description": "No such model"},
    406: {"model": Problem, "description": "The model has no class for a whole input, so no labels to pack"},
    429: {"model": Problem, "description": "Too many inputs are waiting; Retry-After says when to try again"},
    500: {"model": Problem, "description": "The model has no finite scores for an input"},
    504: {"model": Problem, "description": "No answer within the limit of time"},
}


def router(state: State) -> APIRouter:
    """`POST /predict`."""
    routes = APIRouter(tags=["models"])

    @routes.post("/predict", summary="Classify, tag or generate", response_model=PredictResponse, responses=RESPONSES)
    async def predict(body: PredictRequest, request: Request) -> Response:
        served = _model(state, body.model)
        inputs = _inputs(state, body, served)
        packed = MEDIA_TYPE in request.headers.get("accept", "")
        if packed and served.predictor.task not in ("text-classification", "image-classification"):
            raise HTTPException(406, f"{served.name} does not classify whole inputs: accept application/json")
        ready, answers = await within(state.settings.timeout_s, _answers(state, served, inputs), "the prediction")
        _require_finite(served, answers)
        latency_ms = 1000 * (time.perf_counter() - request.scope["pykd_arrived"])
        state.metrics.predictions.labels(served.name).inc(len(answers))
        ids = prediction_ids(len(answers))
        lengths = [one.length for one in ready]
        state.observe(Answered(served.name, inputs, ids, lengths, answers, latency_ms))
        if packed:
            numbers = [one.index for one in answers if one.index is not None]
            content = encode_labels(numbers, len(served.predictor.labels))
            return Response(content, media_type=MEDIA_TYPE, headers={"X-Prediction-Id": ids[0]})
        said = PredictResponse(
            model=served.name, task=served.predictor.task, latency_ms=latency_ms,
            predictions=[
                _prediction(id, one, served.predictor.labels, body.top) for id, one in zip(ids, answers, strict=True)
            ],
        )  # fmt: skip
        return Response(said.model_dump_json(exclude_none=True), media_type="application/json")

    return routes


def _model(state: State, name: str | None) -> Served:
    models = state.models
    if name is None and len(models) == 1:
        return next(iter(models.values()))
    if name is None:
        raise HTTPException(404, f"name one of the models: {', '.join(models) or 'none is served'}")
    if name not in models:
        raise HTTPException(404, nearest("model", name, models))
    return models[name]


def _inputs(state: State, body: PredictRequest, served: Served) -> list[Any]:
    """The texts, or the bytes of the images. Raises 422 for what the model does not take or the limits forbid."""
    settings, takes = state.settings, served.predictor.takes
    given, other = (body.text, body.image) if takes == "text" else (body.image, body.text)
    if given is None or other is not None:
        raise HTTPException(422, f"{served.name} takes {takes!r}, and nothing else")
    inputs = [given] if isinstance(given, str) else given
    if not 1 <= len(inputs) <= settings.max_inputs:
        raise HTTPException(422, f"a request holds 1 to {settings.max_inputs} inputs, got {len(inputs)}")
    if takes == "image":
        return [_decoded(one, f"image {number}") for number, one in enumerate(inputs)]
    for number, text in enumerate(inputs):
        if not 1 <= len(text) <= settings.max_text_chars:
            raise HTTPException(
                422, f"text {number} has {len(text)} characters, allowed are 1 to {settings.max_text_chars}"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise HTTPException(422, f"text {number} holds half of a character, a surrogate") from None
    return list(inputs)


def _decoded(image: str, name: str) -> bytes:
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(422, f"{name} is not base64: {error}") from None


def prediction_ids(count: int) -> list[str]:
    """Ids of the predictions of one request: those after the first count on from it.

    >>> [id.rpartition("-")[2] for id in prediction_ids(2)]
    ['0', '1']
    """
    request = secrets.token_hex(8)
    return [f"{request}-{number}" for number in range(count)]


async def _answers(state: State, served: Served, inputs: list[Any]) -> tuple[list[Input], list[Answer]]:
    with served.batcher.coming(len(inputs)):
        ready = await _ready(state, served, inputs)
    return ready, await served.batcher.submit(ready)


async def _ready(state: State, served: Served, inputs: list[Any]) -> list[Input]:
    prepare = served.predictor.prepare
    try:
        if served.predictor.takes == "text" and sum(map(len, inputs)) <= SHORT_CHARS:
            return prepare(inputs)
        return await asyncio.get_running_loop().run_in_executor(state.prepare, prepare, inputs)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def _require_finite(served: Served, answers: list[Answer]) -> None:
    for number, one in enumerate(answers):
        if one.probabilities is not None and not math.isfinite(sum(one.probabilities)):
            raise HTTPException(
                500, f"{served.name} has no finite scores for input {number}: its weights are damaged or overflow"
            )


def _prediction(id: str, answer: Answer, labels: tuple[str, ...], top: int) -> Prediction:
    values = answer.probabilities
    if values is None:
        return Prediction(id=id, **answer.says)
    best = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:top]
    candidates = [Candidate(label=labels[index], score=values[index]) for index in best]
    return Prediction(id=id, label=candidates[0].label, score=candidates[0].score, top=candidates)
