"""One way to call, move and describe a model, whichever library it is from."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pykd.errors import DataError, ModelLoadError

#: Classes that call the model in their attribute `module`; by name, so that no library is loaded to compare with.
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
#: Classes of Hugging Face models that are pykd's own -> their module.
FAMILIES = {"RouterForSequenceClassification": "pykd.models.router"}


def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Class scores of a batch, `(rows, classes)` (or `(rows, positions, classes)`), whatever the model returns them in.

    Hugging Face models get every tensor of the batch that their `forward` accepts by name, except `labels`. Models that
    take one tensor, as torchvision's do, get `pixel_values`, or the only tensor beside `labels`. Raises DataError if
    the batch holds nothing that the model takes.

    >>> logits(nn.Linear(4, 3), {"pixel_values": torch.zeros(2, 4), "labels": torch.zeros(2)}).shape
    torch.Size([2, 3])
    """
    return logits_of(model, call(model, batch))


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """The logits in what `call` returned; errors as for `logits`."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        raise DataError(
            f"{type(unwrap(model)).__name__} returns {type(output).__name__}, which has no logits; "
            "use a model with a head, such as AutoModelForSequenceClassification."
        )
    result: Tensor = found
    return result


def auxiliary_losses(output: Any) -> dict[str, Tensor]:
    """Losses of a model's own in what `call` returned, weighted scalars by name, to be added to the task's.

    Those of pykd's own families (`pykd.models.router`), in training; {} for all others.

    >>> auxiliary_losses(torch.zeros(2, 3))
    {}
    """
    return dict(getattr(output, "auxiliary", None) or {})


def call(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Any:
    """Whatever the model returns for a batch; inputs and errors as for `logits`. options: arguments beside the inputs.

    An encoder-decoder that generates gets its decoder's inputs from the labels, shifted right by the model's own rule,
    unless the batch brings them.

    >>> call(nn.Linear(4, 3), {"pixel_values": torch.zeros(2, 4)}).shape
    torch.Size([2, 3])
    """
    named = inputs_of(model, batch)
    if named:
        return model(**named, **options)
    accepted = _accepted(type(unwrap(model)).forward)
    tensors = {k: v for k, v in batch.items() if k != "labels" and isinstance(v, Tensor)}
    if "pixel_values" not in tensors and len(tensors) != 1:
        raise DataError(
            f"{type(unwrap(model)).__name__} takes {', '.join(accepted) or 'nothing by name'}, but the batch holds "
            f"{', '.join(batch) or 'nothing'}; name the input as the model does, or pixel_values."
        )
    return model(tensors["pixel_values"] if "pixel_values" in tensors else next(iter(tensors.values())), **options)


def inputs_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch that the model's `forward` takes by name, with a decoder's inputs as for `call`.

    >>> inputs_of(nn.Linear(4, 3), {"input": torch.zeros(2, 4), "labels": torch.zeros(2)}).keys()
    dict_keys(['input'])
    """
    accepted = _accepted(type(unwrap(model)).forward)
    named = {k: v for k, v in batch.items() if k in accepted and k != "labels" and isinstance(v, Tensor)}
    return _with_decoder_inputs(unwrap(model), named, batch) if named else {}


def _with_decoder_inputs(model: nn.Module, named: dict[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None or "decoder_input_ids" in named or "decoder_inputs_embeds" in named:
        return named
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise DataError(
            f"{type(model).__name__} decodes: give the batch labels (rows, positions), which its decoder reads shifted "
            "right, or decoder_input_ids"
        )
    return {**named, "decoder_input_ids": shift(labels)}


def move(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on `device`; everything else as it is.

    >>> move({"labels": torch.zeros(2), "id": "a"}, "meta")["labels"].device.type
    'meta'
    """
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def num_classes(model: nn.Module) -> int:
    """How many classes `logits` has: those of the output embeddings, of the configuration, or of the last layer.

    Raises ModelLoadError if the model does not tell.

    >>> num_classes(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)))
    3
    """
    model = unwrap(model)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "num_labels"):
        head: Any = model.get_output_embeddings() if isinstance(model, _EmbeddingAccess) else None
        return int(head.out_features if hasattr(head, "out_features") else config.num_labels)
    source: dict[str, Any] = getattr(model, "pykd_origin", {})
    recorded = source.get("kwargs", {}).get("num_classes")
    if recorded is not None:
        return int(recorded)
    for module in reversed(list(model.modules())):
        width = getattr(module, "out_features", getattr(module, "out_channels", None))
        if isinstance(width, int):
            return width
    raise ModelLoadError(
        f"{type(model).__name__} does not tell how many classes it has: it has no config.num_labels, no pykd_origin, "
        "and no linear or convolution layer."
    )


def origin(model: nn.Module) -> dict[str, Any]:
    """Where the model's architecture comes from, as JSON: what a saved model is rebuilt from.

    `{"source": "torchvision", "name", "kwargs"}` or `{"source": "huggingface", "class", "model_type", "name"}`.
    Raises ModelLoadError for a model of unknown origin.
    """
    model = unwrap(model)
    recorded = getattr(model, "pykd_origin", None)
    if recorded is not None:
        return dict(recorded)
    config: Any = getattr(model, "config", None)
    known = type(model).__module__.startswith("transformers.") or type(model).__name__ in FAMILIES
    if not hasattr(config, "model_type") or not known:
        raise ModelLoadError(
            f"{type(model).__name__} is neither a model of transformers nor carries pykd_origin; build it with "
            "load_torchvision or load_huggingface, or say how torchvision built it: model.pykd_origin = "
            "{'source': 'torchvision', 'name': 'resnet18', 'kwargs': {'num_classes': 10}}."
        )
    return {
        "source": "huggingface",
        "class": type(model).__name__,
        "model_type": config.model_type,
        "name": getattr(config, "_name_or_path", ""),
    }


def skeleton(model: nn.Module) -> nn.Module:
    """The model's architecture as its origin builds it, before any pruning or quantization, without values."""
    from pykd.models import huggingface, torchvision

    model = unwrap(model)
    source = origin(model)
    if source["source"] == "huggingface":
        return without_values(lambda: huggingface.skeleton(model))
    return without_values(lambda: torchvision.build(source))


def without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the meta device, where it takes neither memory nor time.

    Some architectures compute with tensors while they are built, which meta tensors do not allow; those are built on
    the CPU, without touching the random state.
    """
    try:
        with torch.device("meta"):
            return make()
    except RuntimeError:  # also what operations without a meta form raise
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return make()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DistributedDataParallel, FSDP and DeepSpeed."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module) or (
        any(base.__name__ in WRAPPERS for base in type(model).__mro__)
        and isinstance(inner := getattr(model, "module", None), nn.Module)
    ):
        model = inner
    return model


@runtime_checkable
class _EmbeddingAccess(Protocol):
    def get_output_embeddings(self) -> nn.Module | None: ...


@functools.cache
def _accepted(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(forward).parameters
    return tuple(name for name, p in parameters.items() if name != "self" and p.kind is not p.VAR_KEYWORD)
