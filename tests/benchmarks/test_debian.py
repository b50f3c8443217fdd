"""The builder of the Debian data set: the parser on a literal index, and the rows as a bundle."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pykd.data import load_text

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "data"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


debian = script("debian")

PACKAGES = """Package: tree
Version: 2.1.0-1
Depends: libc6 (>= 2.34),
 libfoo
Description: displays an indented directory tree
Description-md5: aaa
Section: utils

Package: tree-extra
Section: contrib/utils
Description-md5: bbb

Package: nameless
Description-md5: ccc

Package: robots
Section: universe/games
Description-md5: ddd
"""
TRANSLATIONS = """Package: tree
Description-md5: aaa
Description-en: displays an indented directory tree,
 in color
 .
 Tree is a recursive directory listing command
 that produces an indented listing.

Package: tree-extra
Description-md5: bbb
Description-en: more trees

Package: tree-extra
Description-md5: old
Description-en: trees of another version

Package: nameless
Description-md5: ccc
Description-en: has no section

Package: robots
Description-md5: ddd
Description-en: fight
"""


def parsed(text: str) -> list[dict[str, str]]:
    return list(debian.paragraphs(text.splitlines(keepends=True)))


def test_paragraphs_keep_continued_lines() -> None:
    first = parsed(PACKAGES)[0]
    assert first["Package"] == "tree" and first["Depends"] == "libc6 (>= 2.34),\nlibfoo"
    assert [record["Package"] for record in parsed(PACKAGES)] == ["tree", "tree-extra", "nameless", "robots"]
    assert parsed("A: 1\n\n\n\nB: 2: 3") == [{"A": "1"}, {"B": "2: 3"}]


def test_a_description_becomes_its_paragraphs() -> None:
    assert debian.clean("short\nlong line\ngoes on\n.\nnext") == "short\nlong line goes on\nnext"
    assert debian.clean("short") == "short"


def test_texts_meet_their_sections_by_package_and_digest() -> None:
    rows = debian.join(parsed(PACKAGES), parsed(TRANSLATIONS), at_least=1)
    assert [(row["package"], row["label"]) for row in rows] == [
        ("robots", "games"),
        ("tree", "utils"),
        ("tree-extra", "utils"),
    ]
    assert rows[1]["text"] == (
        "displays an indented directory tree,\nin color\n"
        "Tree is a recursive directory listing command that produces an indented listing."
    )


def test_small_classes_and_repeated_texts_are_left_out() -> None:
    rows = debian.join(parsed(PACKAGES), parsed(TRANSLATIONS), at_least=2)
    assert {row["label"] for row in rows} == {"utils"}
    twice = [*parsed(TRANSLATIONS), {"Package": "robots", "Description-md5": "ddd", "Description-en": "more trees"}]
    texts = [row["text"] for row in debian.join(parsed(PACKAGES), twice, at_least=1)]
    assert texts.count("more trees") == 1


def test_the_written_file_loads(tmp_path: Path, tokenizer: object) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2], "package": f"p{i}"} for i in range(40)]
    for ending in ("parquet", "csv"):
        debian.write(debian.split(rows, 10, 0), tmp_path / "made" / f"x.{ending}")
        data = load_text(tmp_path / "made" / f"x.{ending}", tokenizer=tokenizer, split_column="split")
        assert (len(data.train), len(data.test), data.class_names) == (30, 10, ("a", "b"))


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"cannot write .*x\.txt: the ending must be \.parquet or \.csv"):
        debian.write([], tmp_path / "x.txt")


def test_a_command_that_is_missing_or_fails_is_one_sentence() -> None:
    with pytest.raises(SystemExit, match="no-such-apt is missing: this data set can be made on Debian and Ubuntu only"):
        debian.run(["no-such-apt"])
    with pytest.raises(SystemExit, match="sh failed with status 3: out of luck"):
        debian.run(["sh", "-c", "echo out of luck >&2; exit 3"])


def test_an_index_without_descriptions_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "run", lambda command: "")
    with pytest.raises(SystemExit, match="apt found no package index with English descriptions"):
        debian.read_index(tmp_path)
    written = (tmp_path / "apt.conf").read_text()
    assert f'Dir::State::lists "{tmp_path}/lists";' in written and (tmp_path / "lists" / "partial").is_dir()


@pytest.mark.network
@pytest.mark.slow
def test_this_machines_index(tmp_path: Path) -> None:
    rows = debian.read_index(tmp_path)
    assert len(rows) > 10_000 and len({row["label"] for row in rows}) > 20


def test_a_missing_encoder_names_the_way_out(tmp_path: Path) -> None:
    minilm = script("minilm")
    with pytest.raises(FileNotFoundError, match=r"no_such_encoder with its weights is not installed.*pykd\[bench\]"):
        minilm.minilm_path("no_such_encoder")
