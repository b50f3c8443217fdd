"""The README's example runs as it stands there, and the files and commands it names exist."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_training_loop_runs_as_printed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    teacher, student = scope["teacher"], scope["again"]
    dense = sum(p.numel() * 4 for p in teacher.parameters())  # type: ignore[attr-defined]
    saved = (tmp_path / "student-4bit" / "model.safetensors").stat().st_size
    assert saved < dense / 20
    images = scope["batch"]["pixel_values"]  # type: ignore[index]
    assert (student.eval()(images) == scope["student"](images)).all()  # type: ignore[attr-defined, operator]


def test_every_recipe_it_names_exists() -> None:
    named = set(re.findall(r"recipes/\w+\.yaml", README))
    assert named and all((ROOT / name).is_file() for name in named)
