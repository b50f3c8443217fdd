"""Rows of the Debian data sets, from the records of a package index: see debian.py."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

Record = dict[str, str]
Row = dict[str, Any]

#: Fields that name the packages a package works with.
RELATIONS = ("Depends", "Pre-Depends", "Recommends", "Suggests")
#: Words of a text: names are cut at punctuation, so that an entity can have several words.
WORD = re.compile(r"[^\W_]+|[^\w\s]|_")
#: What may stand in a package name (Debian Policy, section 5.6.7), for finding whole names only.
NAME = re.compile(r"(?<![\w.+-])[a-z0-9][a-z0-9+.-]*[a-z0-9+](?![\w+-])")
#: A name in a greater share of all descriptions than this is taken for an ordinary word (`file`, `make`).
COMMON = 0.002


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


def blocks(description: str) -> list[str]:
    """The synopsis, then the paragraphs (`.` stands for a blank line), each on one line."""
    synopsis, *rest = description.split("\n")
    found: list[list[str]] = [[synopsis.strip()], []]
    for line in rest:
        if line.strip() == ".":
            found.append([])
        else:
            found[-1].append(line.strip())
    return [" ".join(block) for block in found if block]


def join(packages: Iterable[Record], translations: Iterable[Record], *, at_least: int = 10) -> list[Row]:
    """Rows of text, label and package, by package name: each text once, no class with fewer than ``at_least``."""
    sections = {
        (record["Package"], record["Description-md5"]): record["Section"].rpartition("/")[2]
        for record in packages
        if record.get("Section") and "Description-md5" in record
    }
    found: dict[str, Row] = {}
    for record in described(translations, "en"):
        label = sections.get((record["Package"], record["Description-md5"]))
        text = "\n".join(blocks(record["Description-en"]))
        if label and text:
            found.setdefault(text, {"text": text, "label": label, "package": record["Package"]})
    sizes = Counter(row["label"] for row in found.values())
    return [row for row in found.values() if sizes[row["label"]] >= at_least]


def described(records: Iterable[Record], language: str) -> list[Record]:
    """Records with a description in a language, by package name and digest."""
    found = [record for record in records if f"Description-{language}" in record]
    return sorted(found, key=lambda record: (record["Package"], record["Description-md5"]))


def pairs(english: Iterable[Record], other: Iterable[Record], *, language: str) -> list[Row]:
    """Rows of source (English) and target: the blocks of descriptions with the same digest and number of blocks.

    A source occurs once; a block that was left untranslated is left out.
    """
    translated = {record["Description-md5"]: record for record in described(other, language)}
    found: dict[str, Row] = {}
    for record in described(english, "en"):
        match = translated.get(record["Description-md5"])
        if match is None:
            continue
        sources, targets = blocks(record["Description-en"]), blocks(match[f"Description-{language}"])
        if len(sources) != len(targets):
            continue
        for source, target in zip(sources, targets, strict=True):
            if source and target and source != target:
                found.setdefault(source, {"source": source, "target": target, "package": record["Package"]})
    return list(found.values())


def tagged(packages: Iterable[Record], translations: Iterable[Record]) -> list[Row]:
    """Rows of tokens and tags: the blocks, each once, that name a package of the own package's RELATIONS."""
    related = {record["Package"]: names_of(record) - {record["Package"]} for record in packages}
    texts = described(translations, "en")
    occurs = Counter(
        name for record in texts for name in {found.group() for found in NAME.finditer(record["Description-en"])}
    )
    most = max(2.0, COMMON * len(texts))
    rows: dict[tuple[str, ...], Row] = {}
    for record in texts:
        names = {name for name in related.get(record["Package"], ()) if occurs[name] <= most}
        for block in blocks(record["Description-en"]):
            tokens, tags = tag(block, names)
            if "B-PACKAGE" in tags:
                rows.setdefault(tuple(tokens), {"tokens": tokens, "tags": tags, "package": record["Package"]})
    return list(rows.values())


def names_of(record: Record) -> set[str]:
    """Names in the RELATIONS of a package, without versions, architectures and alternatives' bars.

    >>> sorted(names_of({"Package": "x", "Depends": "libc6 (>= 2.34), python3:any | python3-minimal"}))
    ['libc6', 'python3', 'python3-minimal']
    """
    entries = ",".join(record.get(field, "") for field in RELATIONS).replace("|", ",").split(",")
    found = (re.match(r"\s*([a-z0-9][a-z0-9+.-]+)", entry) for entry in entries)
    return {match.group(1) for match in found if match and len(match.group(1)) > 2}


def tag(text: str, names: set[str]) -> tuple[list[str], list[str]]:
    """Words and their BIO tags (Ramshaw and Marcus 1995): B-PACKAGE begins a name out of ``names``, I-PACKAGE goes on.

    >>> tag("needs lib-x, not y", {"lib-x"})
    (['needs', 'lib', '-', 'x', ',', 'not', 'y'], ['O', 'B-PACKAGE', 'I-PACKAGE', 'I-PACKAGE', 'O', 'O', 'O'])
    """
    spans = [found.span() for found in NAME.finditer(text) if found.group() in names]
    tokens, tags = [], []
    for word in WORD.finditer(text):
        inside = next((span for span in spans if span[0] <= word.start() < span[1]), None)
        tokens.append(word.group())
        tags.append("O" if inside is None else "B-PACKAGE" if word.start() == inside[0] else "I-PACKAGE")
    return tokens, tags


def hold_out_texts(rows: list[Row], test_size: int, seed: int) -> list[Row]:
    """The rows with a column `split`: ``test_size`` of them, the same share of every class, say `test`."""
    from pykd.data.bundle import stratified_split

    names = sorted({row["label"] for row in rows})
    labels = [names.index(row["label"]) for row in rows]
    held_out = set(stratified_split(labels, test_size, seed=seed, name="debian")[1])
    return [{**row, "split": "test" if index in held_out else "train"} for index, row in enumerate(rows)]


def hold_out_packages(rows: list[Row], test_size: int, seed: int) -> list[Row]:
    """The rows with a column `split`: those of random packages say `test`, ``test_size`` or as few more as whole
    packages allow. Raises SystemExit when no row would be left to train on."""
    sizes = Counter(row["package"] for row in rows)
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    held_out: set[str] = set()
    count = 0
    while names and count < test_size:
        name = names.pop()
        held_out.add(name)
        count += sizes[name]
    if not names:
        raise SystemExit(f"{len(rows)} rows are too few to hold out {test_size}: give a smaller --test-size")
    return [{**row, "split": "test" if row["package"] in held_out else "train"} for row in rows]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A T5-like unigram tokenizer (Kudo 2018) of at most ``vocabulary`` pieces: <pad> 0, </s> 1, <unk> 2."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
