"""Lower never imports upper, siblings never import each other: docs/ARCHITECTURE.md, "Which way things point"."""

from __future__ import annotations

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

#: From the bottom to the top; names on one line are siblings.
LAYERS = [
    ["kernels", "errors"],
    ["ops"],
    ["nn"],
    ["models", "data"],
    ["io"],
    ["evaluation"],
    ["training", "calibration", "monitoring"],
    ["distillation", "pruning", "quantization"],
    ["recipe"],
    ["pipeline"],
    ["serve"],
    ["cli"],
    ["__init__", "__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

#: What everything may read from the package itself: its version. Names that are loaded lazily belong to the top.
PLAIN = {"__version__"}


def files() -> list[pathlib.Path]:
    return sorted((ROOT / "pykd").rglob("*.py"))


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: pathlib.Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 2:
        parts.pop()
    return ".".join(parts)


def modules(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    """(line, absolute module) of every import, also those inside functions and by importlib.import_module("...")."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            if base == "pykd":
                found += [(node.lineno, "pykd" if n.name in PLAIN else f"pykd.{n.name}") for n in node.names]
            else:
                found.append((node.lineno, base))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found += [(node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant)]
    return found


def wrong_imports(path: pathlib.Path, source: str) -> list[str]:
    module = module_of(path)
    room = room_of(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    wrong = []
    for line, target in modules(ast.parse(source), package):
        if target.split(".")[0] != "pykd" or target in ("pykd", "pykd._C"):
            continue
        other = room_of(target)
        assert other in LEVEL, f"{path}:{line} imports pykd.{other}, which has no place in docs/ARCHITECTURE.md"
        if other != room and LEVEL[other] >= LEVEL[room]:
            wrong.append(f"{path.relative_to(ROOT)}:{line} ({room}) imports {target} ({other})")
    return wrong


def test_lower_never_imports_upper_and_siblings_never_import_each_other() -> None:
    wrong = [message for path in files() for message in wrong_imports(path, path.read_text(encoding="utf-8"))]
    assert wrong == []


def test_every_room_has_a_place() -> None:
    rooms = {room_of(module_of(path)) for path in files()}
    assert rooms - set(LEVEL) == set()


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("nn", "from pykd.io import save_pretrained"),
        ("nn", "def f():\n    import pykd.models.adapter"),
        ("pruning", "from pykd.quantization import quantize"),
        ("ops", "from ..nn import Linear4bit"),
        ("data", "from pykd import models"),
        ("io", "import importlib\nimportlib.import_module('pykd.cli')"),
    ],
)
def test_the_rule_catches(room: str, source: str) -> None:
    assert len(wrong_imports(ROOT / "pykd" / room / "example.py", source)) == 1


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for line, target in modules(ast.parse(path.read_text(encoding="utf-8")), "pykd.kernels"):
            assert target.split(".")[0] in allowed or target.startswith("pykd.kernels"), f"{path}:{line}: {target}"


def includes(path: pathlib.Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"), re.M)


def test_native_sources_have_no_torch_and_python_only_in_the_bindings() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        names = includes(path)
        assert not [n for n in names if re.match(r"(torch|ATen|c10|caffe2)/", n)], path
        if path.name != "bindings.cpp":
            assert not [n for n in names if "Python.h" in n or n.startswith("pybind11")], path
    assert "pybind11/pybind11.h" in includes(ROOT / "csrc" / "bindings.cpp")
