"""A model as it is served: loaded safely from a folder, with what turns inputs into its tensors and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pykd.errors import ArtifactError
from pykd.evaluation.counting import count_parameters, saved_bytes
from pykd.models.adapter import num_classes, origin
from pykd.models.fused import fuse
from pykd.pipeline.saved import load_saved, provenance_of, tokenizer_of
from pykd.serve.batching import Batcher
from pykd.serve.images import ImageClassifier, preprocess_of
from pykd.serve.metrics import Metrics
from pykd.serve.predictors import Answer, Input, Predictor
from pykd.serve.roots import check_folder
from pykd.serve.settings import Settings
from pykd.serve.texts import Reader, TextClassifier, TextGenerator, TokenClassifier

#: How transformers ends the names of classes with a head -> what such a model is served as.
HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForConditionalGeneration": "seq2seq",
    "ForImageClassification": "image-classification",
}


@dataclass
class Served:
    """A loaded model with its name, its folder, and the batcher that its requests share."""

    name: str
    folder: Path
    model: nn.Module
    predictor: Predictor
    batcher: Batcher[Input, Answer]
    facts: dict[str, Any]


def load_models(settings: Settings, metrics: Metrics, compute: ThreadPoolExecutor) -> dict[str, Served]:
    """The models of the settings by name. Raises ArtifactError or ModelLoadError, naming the folder and the reason."""
    found: dict[str, Served] = {}
    for given in settings.models:
        name, path = named(given)
        if name in found:
            raise ValueError(f"two models are called {name!r}: name them apart, NAME=FOLDER")
        found[name] = load_served(name, path, settings, metrics, compute)
    return found


def named(given: str) -> tuple[str, Path]:
    """(name, folder) of `FOLDER` or `NAME=FOLDER`; a folder that exists is one, whatever it is called.

    >>> named("spam=runs/a/model")[0], named("runs/model")[0]
    ('spam', 'model')
    """
    name, separator, path = given.partition("=")
    if not separator or Path(given).is_dir():
        return Path(given).resolve().name, Path(given)
    if not name:
        raise ValueError(f"{given!r} names no model: write NAME=FOLDER, or FOLDER alone")
    return name, Path(path)


def load_served(name: str, folder: Path, settings: Settings, metrics: Metrics, compute: ThreadPoolExecutor) -> Served:
    """One model, tried once, so that the first request finds it warm."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: name one that pykd saved, or a local Hugging Face folder")
    check_folder(folder)
    model = fuse(load_saved(folder).eval())
    predictor = predictor_of(model, folder, settings)
    parameters, _ = count_parameters(model)
    source = origin(model)
    facts = {
        "name": name,
        "task": predictor.task,
        "takes": predictor.takes,
        "labels": list(predictor.labels),
        "parameters": parameters,
        "size_bytes": saved_bytes(folder),
        "source": source["source"],
        "architecture": type(model).__name__,
    }
    run = without_gradients(predictor.compute)

    def on_batch(inputs: int, seconds: float) -> None:
        metrics.batch_inputs.labels(name).observe(inputs)
        metrics.batch_seconds.labels(name).observe(seconds)

    batcher = Batcher(
        run, compute, max_batch=settings.max_batch, window_s=settings.batch_window_ms / 1000,
        max_queue=settings.max_queue, parallel=settings.parallel, on_batch=on_batch,
    )  # fmt: skip
    metrics.waiting.labels(name).set_function(lambda: batcher.waiting)
    if predictor.takes == "text":
        compute.submit(run, predictor.prepare(["warm"])).result()
    return Served(name, folder, model, predictor, batcher, facts)


def without_gradients(compute: Callable[[list[Input]], list[Answer]]) -> Callable[[list[Input]], list[Answer]]:
    """``compute`` as a thread runs it that knows of no `torch.no_grad` elsewhere."""

    def run(inputs: list[Input]) -> list[Answer]:
        with torch.inference_mode():
            return compute(inputs)

    return run


def predictor_of(model: nn.Module, folder: Path, settings: Settings) -> Predictor:
    """What serves a model, by the head it has. Raises ArtifactError for one that answers no request."""
    kind = type(model).__name__
    task = next((task for end, task in HEADS.items() if kind.endswith(end)), None)
    if origin(model)["source"] == "torchvision":
        task = "image-classification"
    if task is None:
        raise ArtifactError(f"{folder} holds a {kind}, which is not served; served are {', '.join(HEADS.values())}")
    made_for = provenance_of(folder).get("data", {})
    labels = () if task == "seq2seq" else labels_of(model, made_for.get("class_names", ()))
    if task != "seq2seq" and len(labels) < 2:
        raise ArtifactError(f"{folder} has one output, a regression: served are classifiers")
    if task == "image-classification":
        preprocess = preprocess_of(folder, model, made_for.get("preprocessing", {}))
        limits = {"max_pixels": settings.max_pixels, "all_pixels": settings.max_request_pixels}
        return ImageClassifier(model, labels, preprocess, **limits)
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise ArtifactError(f"{folder} holds no tokenizer: save the model with one, tokenizer=")
    reader = Reader(model, tokenizer, settings.max_tokens, str(folder))
    if task == "seq2seq":
        return TextGenerator(model, reader, max_new_tokens=settings.max_new_tokens)
    return (TokenClassifier if task == "token-classification" else TextClassifier)(model, reader, labels)


def labels_of(model: nn.Module, class_names: Sequence[str]) -> tuple[str, ...]:
    """Names of the classes: of the data it was trained on, else of its configuration, else their numbers."""
    classes = num_classes(model)
    if len(class_names) == classes:
        return tuple(map(str, class_names))
    config: Any = getattr(model, "config", None)
    names: dict[int, str] = getattr(config, "id2label", None) or {}
    return tuple(str(names.get(index, index)) for index in range(classes))
