"""The builder of the Debian data sets: the parser on a literal index, and the rows as bundles."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from pykd.data import load_pairs, load_text, load_tokens

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "data"))
debian: Any = importlib.import_module("debian")
debian_rows: Any = importlib.import_module("debian_rows")
minilm: Any = importlib.import_module("minilm")

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
    assert debian_rows.blocks("short\nlong line\ngoes on\n.\nnext") == ["short", "long line goes on", "next"]
    assert debian_rows.blocks("short") == ["short"]


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
        debian.write(debian.hold_out_texts(rows, 10, 0), tmp_path / "made" / f"x.{ending}")
        data = load_text(tmp_path / "made" / f"x.{ending}", tokenizer=tokenizer, split_column="split")
        assert (len(data.train), len(data.test), data.class_names) == (30, 10, ("a", "b"))


def test_sections_become_two_classes() -> None:
    rows = [{"text": "a", "label": label, "package": label} for label in ("net", "admin", "games")]
    assert [row["label"] for row in debian.flag(rows, ["admin", "net"])] == ["flagged", "flagged", "passed"]
    with pytest.raises(SystemExit, match="no text is of section 'nett'; there are admin, games, net"):
        debian.flag(rows, ["net", "nett"])


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"cannot write .*x\.txt: the ending must be \.parquet, \.jsonl or \.csv"):
        debian.write([], tmp_path / "x.txt")


def test_a_command_that_is_missing_or_fails_is_one_sentence() -> None:
    with pytest.raises(SystemExit, match="no-such-apt is missing: this data set can be made on Debian and Ubuntu only"):
        debian.run(["no-such-apt"])
    with pytest.raises(SystemExit, match="sh failed with status 3: out of luck"):
        debian.run(["sh", "-c", "echo out of luck >&2; exit 3"])


def test_an_index_without_descriptions_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "run", lambda command: "")
    with pytest.raises(SystemExit, match="apt found no package index: check the machine's apt sources and network"):
        debian.find_index(tmp_path, ["en", "de"])
    written = (tmp_path / "apt.conf").read_text()
    assert f'Dir::State::lists "{tmp_path}/lists";' in written and (tmp_path / "lists" / "partial").is_dir()
    assert 'Acquire::Languages { "en"; "de"; };' in written
    monkeypatch.setattr(debian, "run", lambda command: "Packages\t\tp\nTranslations\ten\te\nTranslations\tfr\tf\n")
    assert debian.index_files([], ["en"]) == {"Packages": ["p"], "en": ["e"]}
    second = tmp_path / "second"
    second.mkdir()
    with pytest.raises(SystemExit, match="no package index with descriptions in 'de': check"):
        debian.find_index(second, ["en", "de"])


ENGLISH = """Package: pair
Description-md5: aaa
Description-en: a synopsis
 The first
 paragraph.
 .
 Linux

Package: twin
Description-md5: bbb
Description-en: a synopsis

Package: uneven
Description-md5: ccc
Description-en: one block
"""
GERMAN = """Package: pair
Description-md5: aaa
Description-de: eine Kurzbeschreibung
 Der erste Absatz.
 .
 Linux

Package: twin
Description-md5: bbb
Description-de: noch eine Kurzbeschreibung

Package: uneven
Description-md5: ccc
Description-de: ein Block
 und noch einer
"""


def test_pairs_are_the_translated_blocks_of_descriptions_with_equally_many() -> None:
    rows = debian.pairs(parsed(ENGLISH), parsed(GERMAN), language="de")
    assert rows == [
        {"source": "a synopsis", "target": "eine Kurzbeschreibung", "package": "pair"},
        {"source": "The first paragraph.", "target": "Der erste Absatz.", "package": "pair"},
    ]


def test_names_of_related_packages_are_tagged() -> None:
    packages = parsed("Package: front\nDepends: back-end (>= 1), libc6\nSuggests: extra.d | make\n\nPackage: other\n")
    common = "".join(f"Package: p{i}\nDescription-md5: {i}\nDescription-en: make\n\n" for i in range(9))
    text = "for back-end, front, make, my-back-end\n back-end."
    described = f"{common}Package: front\nDescription-md5: x\nDescription-en: {text}\n"
    rows = debian.tagged(packages, parsed(described))
    assert " ".join(rows[0]["tokens"]) == "for back - end , front , make , my - back - end"
    assert rows[0]["tags"] == ["O", "B-PACKAGE", "I-PACKAGE", "I-PACKAGE", *["O"] * 10]
    assert rows[1] == {"tokens": ["back", "-", "end", "."], "tags": ["B-PACKAGE", "I-PACKAGE", "I-PACKAGE", "O"],
                       "package": "front"}  # fmt: skip
    assert len(rows) == 2


def test_whole_packages_are_held_out(tmp_path: Path, tokenizer: object) -> None:
    rows = [{"source": f"s {i}", "target": f"t {i}", "package": f"p{i // 3}"} for i in range(60)]
    held_out = debian.hold_out_packages(rows, 10, seed=0)
    assert sum(row["split"] == "test" for row in held_out) == 12
    assert all(len({row["split"] for row in held_out[i : i + 3]}) == 1 for i in range(0, 60, 3))
    assert held_out == debian.hold_out_packages(rows, 10, seed=0) != debian.hold_out_packages(rows, 10, seed=1)
    with pytest.raises(SystemExit, match="60 rows are too few to hold out 60: give a smaller --test-size"):
        debian.hold_out_packages(rows, 60, seed=0)
    debian.write(held_out, tmp_path / "pairs.parquet")
    data = load_pairs(tmp_path / "pairs.parquet", tokenizer=tokenizer, split_column="split")
    assert (len(data.train), len(data.test)) == (48, 12)


def test_tagged_words_load(tmp_path: Path, tokenizer: object) -> None:
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-PACKAGE"], "package": f"p{i}"} for i in range(20)]
    for ending in ("jsonl", "parquet"):
        debian.write(debian.hold_out_packages(rows, 5, 0), tmp_path / f"words.{ending}")
        data = load_tokens(tmp_path / f"words.{ending}", tokenizer=tokenizer, split_column="split")
        assert (len(data.train), len(data.test), data.class_names) == (15, 5, ("B-PACKAGE", "O"))


def test_the_tokenizer_is_t5_like_and_loads_again(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = [f"{word} {other}s" for word in ("small", "large", "green") for other in ("tree", "robot", "house")] * 4
    debian.train_tokenizer(texts, 60).save_pretrained(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    ids = made("small trees").input_ids
    assert ids[-1] == made.eos_token_id == 1 and made.pad_token_id == 0 and made.unk_token_id == 2
    assert made.decode(ids, skip_special_tokens=True) == "small trees" and len(made) <= 60


@pytest.mark.network
@pytest.mark.slow
def test_this_machines_index() -> None:
    with debian.index(["en"]) as files:
        rows = debian.join(debian.records(files["Packages"]), debian.records(files["en"]))
    assert len(rows) > 10_000 and len({row["label"] for row in rows}) > 20


def test_a_missing_encoder_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no_such_encoder with its weights is not installed.*pykd\[bench\]"):
        minilm.minilm_path("no_such_encoder")
