"""Changes of structure that are made whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put back every layer, parameter and attribute, of the config too, when the block fails.

    What is cut is replaced by new tensors and never written to, so that the old ones are still there.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> with contextlib.suppress(ZeroDivisionError), restored_on_error(model):
    ...     model[0] = nn.ReLU()
    ...     _ = 1 / 0
    >>> model[0]
    Linear(in_features=2, out_features=2, bias=True)
    """
    tables = ("_parameters", "_buffers", "_modules")
    saved: list[tuple[Any, dict[str, Any], dict[str, dict[str, Any]]]] = [
        (module, dict(module.__dict__), {name: dict(getattr(module, name)) for name in tables})
        for module in model.modules()
    ]
    config = getattr(model, "config", None)
    said = dict(getattr(config, "__dict__", {}))
    try:
        yield
    except BaseException:
        for module, attributes, held in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, entries in held.items():
                getattr(module, name).clear()
                getattr(module, name).update(entries)
        if said:
            config.__dict__.clear()
            config.__dict__.update(said)
        raise
