"""Hugging Face models, loaded or built by the official classes only."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pykd.errors import ModelLoadError, nearest

logger = logging.getLogger(__name__)

#: Task -> the class of transformers that loads a model with the head for it.
TASKS: dict[str, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "feature-extraction": "AutoModel",
}


def load_huggingface(
    name_or_path: str | None,
    task: str = "sequence-classification",
    *,
    num_labels: int | None = None,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Load a model by `AutoModelFor....from_pretrained`, or build one from a configuration by `.from_config`.

    With `name_or_path` (a hub name or a local folder), `config` overrides single values of the model's configuration,
    `options` go to `from_pretrained` (`dtype=`, `attn_implementation=` ...), and `num_labels` other than that of the
    checkpoint gives a newly initialised head. With `name_or_path=None` the model is randomly initialised from
    `config`, which must name its `model_type`. No code from the hub is executed. Raises ModelLoadError, which says
    which model, from where, why, and how to supply a local path.

    >>> tiny = {"model_type": "bert", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1,
    ...         "num_attention_heads": 2, "intermediate_size": 37}
    >>> load_huggingface(None, "sequence-classification", num_labels=3, config=tiny).config.num_labels
    3
    """
    if task not in TASKS:
        raise ModelLoadError(nearest("task", task, TASKS))
    overrides = dict(config or {})
    if num_labels is not None:
        overrides["num_labels"] = num_labels
    auto = _auto_class(TASKS[task])
    if name_or_path is None:
        return _from_scratch(auto, task, overrides)
    return _from_pretrained(auto, name_or_path, task, revision, overrides, options)


def skeleton(model: Any) -> nn.Module:
    """The model that `model.config` describes, randomly initialised, on the default device (so also on "meta")."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh: nn.Module = type(model)(config)
    return fresh


def _auto_class(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelLoadError(
            f"Hugging Face models need the package transformers ({error}): pip install 'pykd[huggingface]'."
        ) from error
    return getattr(transformers, name)


def _from_scratch(auto: Any, task: str, config: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig

    if "model_type" not in config:
        raise ModelLoadError(
            f"a model for {task} needs either a name or path, or a config with its model_type "
            f"('bert', 'vit' ...); got config keys {sorted(config)}."
        )
    try:
        model: nn.Module = auto.from_config(AutoConfig.for_model(**config))
    except Exception as error:  # whatever transformers finds wrong with the configuration
        raise ModelLoadError(
            f"no model for {task} can be built from the config of a {config['model_type']!r}: {_line(error)}"
        ) from error
    return model


def _from_pretrained(
    auto: Any, name: str, task: str, revision: str | None, overrides: dict[str, Any], options: dict[str, Any]
) -> nn.Module:
    if revision is not None:
        options = {**options, "revision": revision}
    if "num_labels" in overrides:
        options = {"ignore_mismatched_sizes": True, **options}
    try:
        with _quiet():
            model, info = auto.from_pretrained(name, output_loading_info=True, **overrides, **options)
    except Exception as error:  # hub, network, file and format errors share no base class
        raise ModelLoadError(
            f"{name!r}{f' (revision {revision})' if revision else ''} could not be loaded for {task}, neither from a "
            f"local folder of that name nor from the hub at {_hub()}: {_line(error)} Pass the path of a folder that "
            "holds config.json and model.safetensors, for instance one fetched elsewhere with `hf download`."
        ) from error
    wrong = [key for key, *_ in info["mismatched_keys"] if key.startswith(f"{model.base_model_prefix}.")]
    if wrong:
        raise ModelLoadError(
            f"{name!r} does not fit its own config with {overrides}: {len(wrong)} tensors have another shape "
            f"(first: {wrong[0]!r}); leave out what changes the shape of pretrained layers."
        )
    if info["missing_keys"]:
        lacks = sorted(info["missing_keys"])
        rest = f" and {len(lacks) - 4} more tensors" if len(lacks) > 4 else ""
        logger.info("%s lacks %s%s: newly initialised, to be trained", name, ", ".join(lacks[:4]), rest)
    loaded: nn.Module = model
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bar and table of missing keys, which a log of ours replaces."""
    from transformers.utils import logging as theirs

    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bar:
            theirs.enable_progress_bar()


def _hub() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{'' if text.endswith('.') else '.'}"
