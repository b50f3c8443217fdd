"""Sizes of transformers as configurations say them: published presets, and head counts that fit a width."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from typing import Any

from pykd.errors import nearest

logger = logging.getLogger(__name__)

#: Names that configurations have for one and the same number.
HIDDEN = ("hidden_size", "d_model", "dim")
HEADS = ("num_attention_heads", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads")
KEY_HEADS = ("num_key_value_heads",)
HEAD_SIZE = ("head_dim", "d_kv")
NEURONS = ("intermediate_size", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
DEPTH = ("num_hidden_layers", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


@dataclass(frozen=True)
class Size:
    """Layers, width of the residual stream, attention heads, and neurons of a feed-forward block."""

    depth: int
    hidden_size: int
    heads: int
    intermediate_size: int


#: Sizes of published students (and of their teacher), layers x width.
PRESETS: dict[str, Size] = {
    "12x768": Size(12, 768, 12, 3072),  # BERT base, Devlin et al. 2019
    "6x768": Size(6, 768, 12, 3072),  # DistilBERT, Sanh et al. 2019; TinyBERT-6, Jiao et al. 2020
    "6x512": Size(6, 512, 8, 2048),
    "4x312": Size(4, 312, 12, 1200),  # TinyBERT-4
    "12x384": Size(12, 384, 12, 1536),  # MiniLM, Wang et al. 2020
    "2x384": Size(2, 384, 12, 1536),
}

#: Heads that a size which is not among them has, where they divide its width.
HEADS_OF_OTHERS = 12


def size_of(preset: str, *, heads: int = HEADS_OF_OTHERS) -> Size:
    """A preset by name, or any other "layers x width": then 4 neurons per channel, and heads that divide the width.

    Raises ValueError for a name that is neither.

    >>> size_of("4x312"), size_of("3x96", heads=12).intermediate_size
    (Size(depth=4, hidden_size=312, heads=12, intermediate_size=1200), 384)
    """
    if preset in PRESETS:
        return PRESETS[preset]
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", preset)
    if found is None:
        raise ValueError(nearest("preset", preset, PRESETS) + " Or any other layers x width, as 3x256.")
    depth, hidden = int(found[1]), int(found[2])
    return Size(depth, hidden, heads_that_divide(hidden, heads), 4 * hidden)


def heads_that_divide(hidden_size: int, heads: int) -> int:
    """The largest head count up to ``heads`` that divides the width.

    >>> heads_that_divide(512, 12), heads_that_divide(384, 12)
    (8, 12)
    """
    return next(count for count in range(min(heads, hidden_size), 0, -1) if hidden_size % count == 0)


def fewer_heads(found: int, wanted: int, hidden_size: int) -> str:
    """What is said where heads do not divide the width.

    >>> fewer_heads(8, 12, 512)
    '8 attention heads instead of 12: 12 do not divide the width 512'
    """
    return f"{found} attention heads instead of {wanted}: {wanted} do not divide the width {hidden_size}"


def preset_config(preset: str, model_type: str, **more: Any) -> dict[str, Any]:
    """What ``load_huggingface(None, task, config=...)`` builds a model of this size and family from; ``more`` is added.

    A width that is no published one and that 12 heads do not divide gets fewer, which is logged.

    >>> preset_config("6x512", "distilbert", vocab_size=32000)["n_heads"]
    8
    """
    from transformers import AutoConfig

    size, default = size_of(preset), vars(AutoConfig.for_model(model_type))
    if preset not in PRESETS and size.heads < HEADS_OF_OTHERS and not set(HEADS) & set(more):
        logger.warning("%s", fewer_heads(size.heads, HEADS_OF_OTHERS, size.hidden_size))
    wanted = {HIDDEN: size.hidden_size, HEADS: size.heads, KEY_HEADS: size.heads, NEURONS: size.intermediate_size,
              HEAD_SIZE: size.hidden_size // size.heads, DEPTH: size.depth}  # fmt: skip
    values = {name: value for names, value in wanted.items() for name in names if name in default}
    return {"model_type": model_type, **values, **more}


def has_fixed_heads(config: Any) -> bool:
    """Whether the configuration says the width of a head itself, whatever the width of the stream (T5, Llama)."""
    return value_of(config, HEAD_SIZE) is not None


def value_of(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of these numbers that a configuration holds itself."""
    return next((vars(config)[name] for name in names if isinstance(vars(config).get(name), int)), None)


def resized_config(
    config: Any, *, hidden_size: int | None, heads: int | None, intermediate_size: int | None
) -> tuple[Any, list[str]]:
    """A copy of a configuration with another width, and what had to be chosen otherwise than asked for, in words.

    hidden_size None keeps the width. heads: wanted query heads; by default as many as before, or in proportion where
    the configuration fixes the width of a head (T5, Llama). Where heads share the width, the largest count that divides
    it is taken. intermediate_size: by default in proportion. Raises ValueError for numbers above those of ``config``.
    """
    old_hidden, old_heads, old_neurons = (value_of(config, names) for names in (HIDDEN, HEADS, NEURONS))
    if old_hidden is None:
        raise ValueError(f"the configuration of {config.model_type!r} does not tell its width: use width= or depth=")
    hidden = hidden_size or old_hidden
    for name, new, old in (("hidden_size", hidden, old_hidden), ("heads", heads, old_heads),
                           ("intermediate_size", intermediate_size, old_neurons)):  # fmt: skip
        if new is not None and (old is None or not 1 <= new <= old):
            raise ValueError(f"{name} must be between 1 and the teacher's {old}, got {new}")
    new, notes = copy.deepcopy(config), list[str]()
    _set(new, HIDDEN, hidden)
    if intermediate_size is not None or old_neurons is not None:
        share = hidden / old_hidden
        _set(new, NEURONS, intermediate_size or max(1, round((old_neurons or 0) * share)))
    if "kv_lora_rank" in vars(config):  # latent attention: its heads are made of a narrow code, whatever the width
        if heads is not None:
            raise ValueError(f"the heads of {config.model_type!r} share a latent code and stay: leave heads out")
    elif old_heads is not None and (heads is not None or hidden != old_hidden):
        fixed = has_fixed_heads(config)
        wanted = heads or (max(1, round(old_heads * hidden / old_hidden)) if fixed else old_heads)
        found, key_heads = _fitting(config, hidden, wanted, fixed)
        if found != wanted:
            shared = f"{found} attention heads instead of {wanted}: its key heads cannot be shared so"
            notes.append(shared if fixed else fewer_heads(found, wanted, hidden))
            logger.warning("%s", notes[-1])
        _set(new, HEADS, found)
        _set(new, KEY_HEADS, key_heads)
    return new, notes


def _fitting(config: Any, hidden: int, wanted: int, fixed: bool) -> tuple[int, int]:
    """Query and key heads nearest below what is wanted that the configuration can say."""
    heads, key_heads = value_of(config, HEADS) or wanted, value_of(config, KEY_HEADS)
    if not fixed:
        wanted = heads_that_divide(hidden, wanted)
    if key_heads is None:
        return wanted, wanted
    shared = heads // key_heads
    for count in range(wanted, 0, -1):
        for keys in range(1, min(key_heads, count) + 1):
            if count % keys == 0 and count // keys <= shared and (fixed or hidden % count == 0):
                return count, keys
    return 1, 1


def _set(config: Any, names: tuple[str, ...], value: int) -> None:
    for name in names:
        if isinstance(vars(config).get(name), int):
            setattr(config, name, value)
