"""The one import hook of pykd: it acts around the import of a few modules of other packages, and is idle otherwise.

- `torchvision._meta_registrations` fails beside a torch that cannot load torchvision's compiled operators; the two
  missing schemas are put in place while it runs (pykd.models.torchvision.missing_schemas).
- `transformers.quantizers.auto` is where the quantizer "pykd" has to be registered (pykd.io.huggingface_plugin).
- `transformers.models.auto` holds the tables of configurations and of models, where pykd's own family belongs
  (pykd.models.router).

Importing either package on behalf of a user who may never need it would cost more than a second; the hook costs one
dictionary look-up per module that Python imports from disk.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Module to act around -> (our module, its function that returns a context manager to execute the module in).
AROUND: dict[str, tuple[str, str]] = {
    "torchvision._meta_registrations": ("pykd.models.torchvision", "missing_schemas"),
    "transformers.quantizers.auto": ("pykd.io.import_hook", "quantizer"),
    "transformers.models.auto.configuration_auto": ("pykd.io.import_hook", "configuration"),
    "transformers.models.auto.modeling_auto": ("pykd.io.import_hook", "family"),
}


class _Finder:
    """Finds the watched modules where everyone finds them, and wraps how they are executed."""

    def __init__(self) -> None:
        self.searching: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in AROUND or name in self.searching:
            return None
        self.searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, name)
        return spec


class _Loader(Loader):
    """The loader of a watched module, whose execution happens inside our context manager."""

    def __init__(self, loader: Any, name: str) -> None:
        self.loader = loader
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        with _around(self.name):
            self.loader.exec_module(module)


def _around(name: str) -> Any:
    module, function = AROUND[name]
    return getattr(importlib.import_module(module), function)()


@contextlib.contextmanager
def registration(module: str, what: str) -> Iterator[None]:
    """Import the module of ours that registers ``what``, once the body has executed the one that it registers with."""
    yield
    try:
        importlib.import_module(module)
    except ImportError as error:
        warnings.warn(
            f"pykd could not register its {what} with this version of transformers ({error}), so such models "
            "will not load; pip install 'pykd[huggingface]' installs one that works.",
            RuntimeWarning,
            stacklevel=2,
        )


quantizer = functools.partial(registration, "pykd.io.huggingface_plugin", "quantizer")
configuration = functools.partial(registration, "pykd.models.router_config", "router's configuration")
family = functools.partial(registration, "pykd.models.router", "router")


def install() -> None:
    """Put the hook in front of Python's own finders, once, and register with a transformers that is already there."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in AROUND:
        if name.startswith("transformers.") and name in sys.modules:
            with _around(name):
                pass
