"""Real data sets from any Debian or Ubuntu machine: package descriptions, for three tasks.

    python benchmarks/data/debian.py --output runs/debian.parquet
    python benchmarks/data/debian.py --task translation --output runs/debian_de.parquet --tokenizer runs/debian_de
    python benchmarks/data/debian.py --task ner --output runs/debian_ner.parquet

Reads the package index that apt keeps. Where the descriptions are missing (containers leave them out), apt fetches
them from the machine's own sources into a private folder; neither root nor any change to the system is needed. Every
file has the columns package and split (`train` or `test`), and

- sections: text, label (section without `contrib/`, `universe/` ...). Packages made from one source may describe
  themselves alike and fall into both splits. With `--flagged admin,net` the label is only whether the section is one
  of these, `flagged` or `passed`: texts to be told from all others, in a guardrail's shape.
- translation: source (English), target (German or `--language`): synopses and paragraphs of descriptions of which both
  languages have the same number. Whole packages are held out. `--tokenizer` also trains a SentencePiece-like unigram
  tokenizer (Kudo 2018) on the training pairs.
- ner: tokens, tags (`O`, `B-PACKAGE`, `I-PACKAGE`): words of descriptions that name a package on which their own
  package depends, recommends or suggests. Whole packages are held out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from debian_rows import (
    Record,
    Row,
    hold_out_packages,
    hold_out_texts,
    join,
    pairs,
    paragraphs,
    tagged,
    train_tokenizer,
)

APT_HELPER = "/usr/lib/apt/apt-helper"

#: Configuration of a private index: some languages, no hooks of the machine, nothing outside the folder.
PRIVATE = """#clear Acquire::Languages;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::Languages {{ {languages} }};
Dir::State::lists "{folder}/lists";
Dir::Cache "{folder}/cache";
APT::Sandbox::User "";
"""


@contextmanager
def index(languages: Sequence[str]) -> Iterator[dict[str, list[str]]]:
    """Index files by kind ("Packages" and each language); descriptions that this machine lacks are fetched by apt."""
    with tempfile.TemporaryDirectory() as folder:
        yield find_index(Path(folder), languages)


def find_index(folder: Path, languages: Sequence[str]) -> dict[str, list[str]]:
    """Index files of this machine, or of a private index in ``folder``."""
    files = index_files([], languages)
    if not all(files[language] for language in languages):
        print("apt keeps no such descriptions here; fetching the index into a private folder ...", file=sys.stderr)
        configuration = folder / "apt.conf"
        wanted = " ".join(f'"{language}";' for language in languages)
        configuration.write_text(PRIVATE.format(folder=folder, languages=wanted), encoding="utf-8")
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        run(["apt-get", "-c", str(configuration), "-qq", "update"])
        files = index_files(["-c", str(configuration)], languages)
    for kind, found in files.items():
        if not found:
            what = "package index" if kind == "Packages" else f"package index with descriptions in {kind!r}"
            raise SystemExit(f"apt found no {what}: check the machine's apt sources and network")
    return files


def index_files(options: Sequence[str], languages: Sequence[str]) -> dict[str, list[str]]:
    """Files of the index that exist, by kind: Packages, and translations by language."""
    lines = run(["apt-get", *options, "indextargets", "--format", "$(CREATED_BY)\t$(LANGUAGE)\t$(FILENAME)"])
    files: dict[str, list[str]] = {"Packages": [], **{language: [] for language in languages}}
    for line in lines.splitlines():
        kind, language, name = line.split("\t")
        kind = language if kind == "Translations" else kind
        if kind in files:
            files[kind].append(name)
    return files


def records(files: Sequence[str]) -> Iterator[Record]:
    """Records of index files in whatever compression apt keeps them."""
    for name in files:
        yield from paragraphs(run([APT_HELPER, "cat-file", name]).splitlines())


def run(command: list[str]) -> str:
    """Standard output of a command; the program ends with one sentence when the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is missing: this data set can be made on Debian and Ubuntu only") from None
    if done.returncode != 0:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"{Path(command[0]).name} failed with status {done.returncode}: {last}")
    return done.stdout.decode("utf-8", errors="replace")


def write(rows: list[Row], output: Path) -> None:
    """Write a .parquet, .jsonl or .csv file."""
    import pyarrow
    from pyarrow import csv, parquet

    writers = {".parquet": parquet.write_table, ".csv": csv.write_csv}
    if output.suffix not in (*writers, ".jsonl"):
        raise SystemExit(f"cannot write {output}: the ending must be .parquet, .jsonl or .csv")
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".jsonl":
        output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return
    writers[output.suffix](pyarrow.Table.from_pylist(rows), output)


def sections(options: argparse.Namespace) -> list[Row]:
    """Texts by section; the same share of every section is held out."""
    with index(["en"]) as files:
        rows = join(records(files["Packages"]), records(files["en"]))
    if options.flagged:
        rows = flag(rows, options.flagged.split(","))
    return hold_out_texts(rows, options.test_size, options.seed)


def flag(rows: list[Row], sections: Sequence[str]) -> list[Row]:
    """The rows labelled by whether their section is one of these; the program ends for a section that has no texts."""
    known = {row["label"] for row in rows}
    if unknown := sorted(set(sections) - known):
        raise SystemExit(f"no text is of section {unknown[0]!r}; there are {', '.join(sorted(map(str, known)))}")
    return [{**row, "label": "flagged" if row["label"] in sections else "passed"} for row in rows]


def translation(options: argparse.Namespace) -> list[Row]:
    """Pairs of English and another language, and where it is asked for a tokenizer made for them."""
    with index(["en", options.language]) as files:
        rows = pairs(records(files["en"]), records(files[options.language]), language=options.language)
    rows = hold_out_packages(rows, options.test_size, options.seed)
    if options.tokenizer:
        train = (row[side] for row in rows if row["split"] == "train" for side in ("source", "target"))
        train_tokenizer(train, options.vocabulary).save_pretrained(options.tokenizer)
    return rows


def ner(options: argparse.Namespace) -> list[Row]:
    """Words of descriptions with the names of packages tagged."""
    with index(["en"]) as files:
        rows = tagged(list(records(files["Packages"])), list(records(files["en"])))
    return hold_out_packages(rows, options.test_size, options.seed)


TASKS = {"sections": sections, "translation": translation, "ner": ner}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", choices=list(TASKS), default="sections", help="what the rows are for")
    parser.add_argument("--output", type=Path, required=True, help="file to write: .parquet, .jsonl or .csv")
    parser.add_argument("--test-size", type=int, help="rows held out (default: 3000; ner: 1000)")
    parser.add_argument("--flagged", help="sections: names, with commas between, of those to be told from all others")
    parser.add_argument("--seed", type=int, default=0, help="decides which rows are held out (default: 0)")
    parser.add_argument("--language", default="de", help="translation: into which language (default: de)")
    parser.add_argument("--tokenizer", type=Path, help="translation: folder for a tokenizer trained on the pairs")
    parser.add_argument("--vocabulary", type=int, default=8000, help="translation: its size (default: 8000)")
    options = parser.parse_args(arguments)
    if options.test_size is None:
        options.test_size = 1000 if options.task == "ner" else 3000
    rows = TASKS[options.task](options)
    write(rows, options.output)
    held_out = sum(row["split"] == "test" for row in rows)
    classes = f", {len({row['label'] for row in rows})} classes" if options.task == "sections" else ""
    print(f"{options.output}: {len(rows):,} rows{classes}, {held_out:,} of them held out")


if __name__ == "__main__":
    main()
