"""A real text-classification data set from any Debian or Ubuntu machine: package descriptions, labelled by section.

    python benchmarks/data/debian.py --output runs/debian.parquet

Reads the package index that apt keeps. Where the English descriptions are missing (containers leave them out), apt
fetches them from the machine's own sources into a private folder; neither root nor any change to the system is needed.
Columns: text, label (section without `contrib/`, `universe/` ...), package, split (`train` or `test`). Packages made
from one source may describe themselves alike and fall into both splits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

APT_HELPER = "/usr/lib/apt/apt-helper"

#: Configuration of a private index: English only, no hooks of the machine, nothing outside the folder.
PRIVATE = """#clear Acquire::Languages;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::Languages {{ "en"; }};
Dir::State::lists "{folder}/lists";
Dir::Cache "{folder}/cache";
APT::Sandbox::User "";
"""

Record = dict[str, str]
Row = dict[str, str]


def paragraphs(lines: Iterable[str]) -> Iterator[Record]:
    """Records of a Debian control file: `Field: value`, continued on indented lines; a blank line ends a record."""
    record: Record = {}
    field = ""
    for line in lines:
        line = line.rstrip("\n")
        if not line:
            if record:
                yield record
            record = {}
        elif line[0] in " \t":
            record[field] += "\n" + line[1:]
        else:
            field, _, value = line.partition(":")
            record[field] = value.strip()
    if record:
        yield record


def clean(description: str) -> str:
    """One text of a description: the synopsis, then the paragraphs (`.` stands for a blank line), each on one line."""
    synopsis, *rest = description.split("\n")
    blocks: list[list[str]] = [[synopsis.strip()], []]
    for line in rest:
        if line.strip() == ".":
            blocks.append([])
        else:
            blocks[-1].append(line.strip())
    return "\n".join(" ".join(block) for block in blocks if block)


def join(packages: Iterable[Record], translations: Iterable[Record], *, at_least: int = 10) -> list[Row]:
    """Rows of text, label and package, by package name: each text once, no class with fewer than ``at_least``."""
    sections = {
        (record["Package"], record["Description-md5"]): record["Section"].rpartition("/")[2]
        for record in packages
        if record.get("Section") and "Description-md5" in record
    }
    found: dict[str, Row] = {}
    described = [record for record in translations if "Description-en" in record]
    for record in sorted(described, key=lambda record: (record["Package"], record["Description-md5"])):
        label = sections.get((record["Package"], record["Description-md5"]))
        text = clean(record["Description-en"])
        if label and text:
            found.setdefault(text, {"text": text, "label": label, "package": record["Package"]})
    sizes = Counter(row["label"] for row in found.values())
    return [row for row in found.values() if sizes[row["label"]] >= at_least]


def split(rows: list[Row], test_size: int, seed: int) -> list[Row]:
    """The rows with a column `split`: ``test_size`` of them, the same share of every class, say `test`."""
    from pykd.data.bundle import stratified_split

    names = sorted({row["label"] for row in rows})
    labels = [names.index(row["label"]) for row in rows]
    held_out = set(stratified_split(labels, test_size, seed=seed, name="debian")[1])
    return [{**row, "split": "test" if index in held_out else "train"} for index, row in enumerate(rows)]


def read_index(folder: Path) -> list[Row]:
    """Rows of this machine's index; English descriptions that it lacks are fetched into ``folder`` by apt."""
    files = index_files([])
    if not files["Translations"]:
        print("apt keeps no English descriptions here; fetching the index into a private folder ...", file=sys.stderr)
        configuration = folder / "apt.conf"
        configuration.write_text(PRIVATE.format(folder=folder), encoding="utf-8")
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        run(["apt-get", "-c", str(configuration), "-qq", "update"])
        files = index_files(["-c", str(configuration)])
    if not files["Translations"] or not files["Packages"]:
        raise SystemExit(
            "apt found no package index with English descriptions: check the machine's apt sources and network"
        )
    return join(records(files["Packages"]), records(files["Translations"]))


def index_files(options: Sequence[str]) -> dict[str, list[str]]:
    """Files of the index that exist, by kind: Packages, and Translations into English."""
    lines = run(["apt-get", *options, "indextargets", "--format", "$(CREATED_BY)\t$(LANGUAGE)\t$(FILENAME)"])
    files: dict[str, list[str]] = {"Packages": [], "Translations": []}
    for line in lines.splitlines():
        kind, language, name = line.split("\t")
        if kind == "Packages" or (kind == "Translations" and language == "en"):
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
    """Write a .parquet or .csv file."""
    import pyarrow
    from pyarrow import csv, parquet

    writers = {".parquet": parquet.write_table, ".csv": csv.write_csv}
    if output.suffix not in writers:
        raise SystemExit(f"cannot write {output}: the ending must be {' or '.join(writers)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    writers[output.suffix](pyarrow.Table.from_pylist(rows), output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="file to write: .parquet or .csv")
    parser.add_argument("--test-size", type=int, default=3000, help="texts held out (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="decides which texts are held out (default: 0)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = split(read_index(Path(folder)), options.test_size, options.seed)
    write(rows, options.output)
    classes = len({row["label"] for row in rows})
    print(f"{options.output}: {len(rows):,} texts, {classes} classes, {options.test_size:,} of the texts held out")


if __name__ == "__main__":
    main()
