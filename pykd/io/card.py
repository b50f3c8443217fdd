"""The model card of a saved folder: README.md with the YAML front matter that model hubs read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from torch import nn

from pykd.models.adapter import origin, unwrap
from pykd.models.huggingface import TASKS

CARD = "README.md"

#: Task of `pykd.models.huggingface.TASKS` -> the pipeline of transformers and the task of hubs.
PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "multiple-choice": "multiple-choice",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "seq2seq-lm": "text2text-generation",
    "image-classification": "image-classification",
    "audio-classification": "audio-classification",
    "feature-extraction": "feature-extraction",
}
#: Those of them that transformers has no pipeline for any more.
UNPIPED = ("text2text-generation", "multiple-choice")
#: What the table of stages shows of each, where it was measured: (key of the record, heading, format).
COLUMNS = (
    ("accuracy", "accuracy", "{:.4f}"),
    ("f1", "F1", "{:.4f}"),
    ("parameters", "parameters", "{:,}"),
    ("nonzero_parameters", "not zero", "{:,}"),
    ("size_bytes", "bytes", "{:,}"),
    ("latency_p50_ms", "latency p50, ms", "{:.2f}"),
)
#: Measurements that the front matter names.
METRICS = ("accuracy", "f1", "precision", "recall")


def model_card(
    model: nn.Module,
    *,
    provenance: dict[str, Any],
    stages: list[dict[str, Any]],
    name: str,
    compressed: bool = False,
    library: str | None = None,
    usage: Sequence[str] | None = None,
) -> str:
    """README.md of a folder: front matter, how to load it, what was measured after each stage, and how it was made.

    provenance: as the manifest holds it; `recipe`, `data` and `metrics` of `pykd.run` are shown. stages:
    `model.pykd_report`. name: the heading. compressed: whether the folder needs pykd. library, usage: the name of what
    loads it and the lines of code that do, where that is neither pykd nor the library that the model comes from.
    """
    task = pipeline_task(model)
    facts = _facts(model, provenance, stages, compressed, task)
    if library is not None:
        facts["library_name"] = library
    code = _usage(model, compressed, task) if usage is None else usage
    parts = [_front_matter(facts), f"# {name}", _summary(stages)]
    parts += ["## How to load it", "\n".join(["```python", *code, "```"])]
    measured = [entry for entry in provenance.get("metrics") or [] if isinstance(entry, dict)]
    if measured:
        parts += ["## Measured", "After each stage, on the held-out split.", _table(measured)]
    if stages:
        parts += ["## How it was made", "\n".join(f"{n}. {_stage(stage)}" for n, stage in enumerate(stages, 1))]
    data = provenance.get("data")
    if isinstance(data, dict) and data:
        shown = {key: value for key, value in data.items() if isinstance(value, (str, int, float)) and value != ""}
        parts += ["## Data", "\n".join(f"- {key}: {value}" for key, value in shown.items())]
    parts.append("Files, checksums, versions and the whole recipe stand in `pykd_manifest.json`.")
    return "\n\n".join(parts) + "\n"


def pipeline_task(model: nn.Module) -> str | None:
    """The pipeline that a model is for, by the name of its class; None where there is none.

    >>> from pykd.models.huggingface import load_huggingface
    >>> tiny = {"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
    ...         "num_attention_heads": 2, "intermediate_size": 8}
    >>> pipeline_task(load_huggingface(None, "masked-lm", config=tiny))
    'fill-mask'
    """
    model = unwrap(model)
    if origin(model)["source"] == "torchvision":
        return "image-classification"
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration") or name == "MarianMTModel":
        return PIPELINES["seq2seq-lm"]
    heads = {auto.removeprefix("AutoModel"): task for task, auto in TASKS.items() if auto != "AutoModel"}
    heads["LMHeadModel"] = "causal-lm"
    return next((PIPELINES[task] for head, task in heads.items() if name.endswith(head)), None)


def _facts(
    model: nn.Module, provenance: dict[str, Any], stages: list[dict[str, Any]], compressed: bool, task: str | None
) -> dict[str, Any]:
    told = origin(unwrap(model))
    tags = ["pykd", *(sorted({tag for stage in stages for tag in _tags(stage)}))]
    base = _hub_name((provenance.get("recipe") or {}).get("teacher", {}).get("name") or told.get("name"))
    last: dict[str, Any] = next(iter(reversed(provenance.get("metrics") or [])), {})
    libraries = {"huggingface": "transformers", "torchvision": "pykd" if compressed else "torchvision"}
    facts = {
        "library_name": libraries[told["source"]],
        "tags": tags,
        "base_model": base if told["source"] == "huggingface" else None,
        "pipeline_tag": task,
        "metrics": [metric for metric in METRICS if metric in last],
    }
    return {key: value for key, value in facts.items() if value}


def _front_matter(facts: dict[str, Any]) -> str:
    """YAML between two lines of dashes; a JSON string is a YAML string."""
    lines = []
    for key, value in facts.items():
        items = [f"- {json.dumps(item)}" for item in value] if isinstance(value, list) else []
        lines += [f"{key}:", *items] if items else [f"{key}: {json.dumps(value)}"]
    return "\n".join(["---", *lines, "---"])


def _tags(stage: dict[str, Any]) -> Iterable[str]:
    verb = str(stage.get("stage", ""))
    done = {"distill": "distilled", "prune": "pruned", "quantize": "quantized", "qat": "quantized"}
    if verb in done:
        yield done[verb]
    scheme = (stage.get("parameters") or {}).get("scheme")
    if isinstance(scheme, str) and re.fullmatch(r"[\w-]+", scheme):
        yield scheme


def _hub_name(name: object) -> str | None:
    """The name of a model on a hub; a local folder is none."""
    text = str(name or "")
    local = not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith(".") or PurePath(text).is_absolute()
    return None if local else text


def _summary(stages: list[dict[str, Any]]) -> str:
    verbs = [str(stage.get("stage")) for stage in stages if stage.get("stage")]
    done = f": {', '.join(verbs)}" if verbs else ""
    return f"Made with pykd{done}."


def _usage(model: nn.Module, compressed: bool, task: str | None) -> list[str]:
    told = origin(unwrap(model))
    if compressed:
        lines = ["import pykd", 'model = pykd.from_pretrained("FOLDER")']
        if told["source"] == "huggingface":
            lines = ["import pykd  # teaches transformers this kind of model"]
            lines += _transformers(model, task)
    elif told["source"] == "huggingface":
        lines = _transformers(model, task)
    else:
        options = "".join(f", {key}={value!r}" for key, value in told["kwargs"].items())
        lines = ["from safetensors.torch import load_file", "from torchvision.models import get_model"]
        lines += [f'model = get_model("{told["name"]}"{options}).eval()']
        lines += ['model.load_state_dict(load_file("FOLDER/model.safetensors"))']
    return lines


def _transformers(model: nn.Module, task: str | None) -> list[str]:
    if task is not None and task not in UNPIPED:
        return ["from transformers import pipeline", f'model = pipeline("{task}", model="FOLDER")']
    name = type(unwrap(model)).__name__
    return [f"from transformers import {name}", f'model = {name}.from_pretrained("FOLDER")']


def _table(measured: list[dict[str, Any]]) -> str:
    shown = [column for column in COLUMNS if any(column[0] in entry for entry in measured)]
    rows = [["stage", *(heading for _, heading, _ in shown)], ["---"] * (len(shown) + 1)]
    for entry in measured:
        cells = [form.format(entry[key]) if key in entry else "" for key, _, form in shown]
        rows.append([str(entry.get("name", "")), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _stage(stage: dict[str, Any]) -> str:
    parameters = {key: value for key, value in (stage.get("parameters") or {}).items() if value is not None}
    shown = ", ".join(f"{key}={value}" for key, value in parameters.items() if not isinstance(value, (dict, list)))
    method = f" by {stage['method']}" if stage.get("method") else ""
    notes = "".join(f"; {note}" for note in stage.get("notes") or [])
    return f"{stage.get('stage', '?')}{method}{f' ({shown})' if shown else ''}{notes}"
