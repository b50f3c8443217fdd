"""A router made out of a teacher: its first layers are shared, its others become the deep branch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import nearest
from pykd.models.adapter import unwrap
from pykd.models.layers import layer_map, layer_stacks, remember
from pykd.models.router_config import RouterConfig
from pykd.models.sizes import NEURONS, value_of
from pykd.nn.slicing import ATTENTION, feed_forward_blocks, linears_at, neuron_scores, strongest

#: Model type of a teacher -> the dense layer and the output layer of its head, and the activation between them.
HEADS: dict[str, tuple[str, str, str]] = {
    "bert": ("base.pooler.dense", "classifier", "tanh"),
    "distilbert": ("pre_classifier", "classifier", "relu"),
    "electra": ("classifier.dense", "classifier.out_proj", "gelu"),
    "roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "camembert": ("classifier.dense", "classifier.out_proj", "tanh"),
}


@torch.no_grad()
def from_teacher(
    teacher: nn.Module,
    *,
    shared_layers: int | None = None,
    deep_layers: int | None = None,
    experts: int = 4,
    expert_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A :class:`pykd.models.router.RouterForSequenceClassification` of a classifier's own weights.

    The embeddings and the first ``shared_layers`` layers (by default half) are shared; the last ``deep_layers`` of the
    others (by default all) become the deep branch. Every expert begins as a copy of its layer's feed-forward network
    (Komatsuzaki et al. 2023), or of its ``expert_size`` strongest neurons; both heads as the teacher's. With all layers
    and whole experts the deep branch gives the teacher's logits. The gates and the router are new, drawn from ``seed``.
    options: other arguments of :class:`RouterConfig`. The teacher is not touched; the router remembers which of its
    layers it has, so that the losses "hidden" of `pykd.distill` follow them.

    Raises ValueError for a teacher of another family or task, one whose weights do not have its configuration's shapes,
    numbers of layers or neurons that it does not have, and unknown options.
    """
    from pykd.models.router import RouterForSequenceClassification

    inner: Any = unwrap(teacher)
    family = _family(inner)
    _check_options(options)
    layers = next(iter(layer_stacks(inner).values()))
    shared = max(1, len(layers) // 2) if shared_layers is None else shared_layers
    deep = len(layers) - shared if deep_layers is None else deep_layers
    if shared < 1 or deep < 1 or shared + deep > len(layers):
        raise ValueError(
            f"shared_layers and deep_layers are each at least 1 and together at most the teacher's {len(layers)}, got "
            f"{shared} and {deep}"
        )
    neurons = value_of(inner.config, NEURONS)
    if expert_size is not None and neurons is not None and not 1 <= expert_size <= neurons:
        raise ValueError(f"expert_size is some of the {neurons} neurons of the teacher's layers, got {expert_size!r}")
    encoder = copy.deepcopy(inner.config)
    encoder.num_hidden_layers = shared
    config = RouterConfig(
        encoder=encoder, deep_layers=deep, experts=experts, expert_size=expert_size, activation=HEADS[family][2],
        id2label=dict(inner.config.id2label), label2id=dict(inner.config.label2id),
        **{"experts_per_token": min(2, experts) or 1, "dropout": _dropout(inner.config)} | options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RouterForSequenceClassification(config)
    own = next(inner.parameters())
    model.to(device=own.device, dtype=own.dtype)
    try:
        _copy_weights(model, inner, layers[len(layers) - deep :], family)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"weights of the teacher have other shapes than its configuration says ({reason}); "
            "make the router of the teacher as it was before pruning and quantization"
        ) from error
    numbers = next(iter(layer_map(inner).values()))
    parts = (numbers[:shared], numbers[len(layers) - deep :])
    remember(model, dict(zip(layer_stacks(model), parts, strict=False)))
    entry = {"stage": "derive", "method": "router", "teacher": type(inner).__name__,
             "parameters": {"shared_layers": shared, "deep_layers": deep, "experts": experts} | options,
             "parameters_before": sum(p.numel() for p in inner.parameters()),
             "parameters_after": sum(p.numel() for p in model.parameters())}  # fmt: skip
    model.__dict__["pykd_report"] = [entry]
    return model.train(inner.training)


def _family(teacher: Any) -> str:
    """The model type of a teacher that a router can be made of."""
    kind = getattr(getattr(teacher, "config", None), "model_type", type(teacher).__name__)
    if kind not in HEADS:
        raise ValueError(f"a router is made of a sequence classifier, {nearest('model type', kind, HEADS)}")
    if not type(teacher).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"a router is made of a sequence classifier, whose head its branches take over, got a "
            f"{type(teacher).__name__}"
        )
    return str(kind)


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what RouterConfig would take without reading it, as every configuration of transformers does."""
    known = [name for name in inspect.signature(RouterConfig).parameters if name not in ("encoder", "options")]
    for name in options:
        if name not in known:
            raise ValueError(nearest("option", name, known))


def _copy_weights(model: Any, teacher: Any, deep: Iterable[nn.Module], family: str) -> None:
    """The shared encoder, the deep layers and both heads from the teacher's."""
    base, (dense, output, _) = teacher.base_model, HEADS[family]
    model.body.encoder.load_state_dict(_kept(model.body.encoder, base.state_dict()))
    for made, layer in zip(model.body.deep, deep, strict=False):
        _copy_layer(made, layer)
    for branch in model.classifiers:
        _copy(model.body.dense[branch], _head(teacher, base, dense))
        _copy(model.classifiers[branch], _head(teacher, base, output))


def _kept(encoder: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the teacher's tensors those that the shared encoder has."""
    wanted = encoder.state_dict()
    return {name: tensor for name, tensor in state.items() if name in wanted}


def _copy_layer(made: Any, layer: nn.Module) -> None:
    """One deep layer from a layer of the teacher, whose two norms come in the order attention, feed-forward."""
    attention = next(linears for module in layer.modules() for names in ATTENTION.values()
                     if (linears := linears_at(module, names)) is not None)  # fmt: skip
    mine = (made.attention.q_proj, made.attention.k_proj, made.attention.v_proj, made.attention.out_proj)
    for target, source in zip(mine, attention, strict=True):
        _copy(target, source)
    norms = [module for module in layer.modules() if isinstance(module, nn.LayerNorm)]
    for norm, its in zip((made.attention_norm, made.output_norm), norms, strict=True):
        norm.load_state_dict(its.state_dict())
    block = feed_forward_blocks(layer)[0]
    for target in getattr(made.feed_forward, "experts", [made.feed_forward]):
        kept = torch.tensor(strongest(neuron_scores(block), target.fc1.out_features))
        _put(target.fc1, block.inputs[0].weight[kept], block.inputs[0].bias[kept])
        _put(target.fc2, block.output.weight[:, kept], block.output.bias)


def _head(inner: nn.Module, base: nn.Module, name: str) -> nn.Module:
    return base.get_submodule(name.removeprefix("base.")) if name.startswith("base.") else inner.get_submodule(name)


def _copy(target: nn.Module, source: Any) -> None:
    _put(target, source.weight, source.bias)


def _put(target: nn.Module, weight: Tensor, bias: Tensor) -> None:
    target.load_state_dict({"weight": weight, "bias": bias})


def _dropout(config: Any) -> float:
    found = getattr(config, "hidden_dropout_prob", getattr(config, "dropout", 0.1))
    return float(found)
