"""Labelled texts: every supported source gives the same bundle, and every bad row is named."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pykd.data import DataBundle, load_text
from pykd.errors import DataError

Rows = list[dict[str, Any]]


@pytest.fixture
def rows(extract: Path) -> Rows:
    with extract.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = {".csv": write_csv, ".tsv": write_csv, ".jsonl": write_jsonl, ".json": write_jsonl, ".parquet": write_parquet}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_data(
    ending: str, rows: Rows, extract: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path = WRITERS[ending](tmp_path / f"debian{ending}", rows)
    one = load_text(extract, tokenizer=tokenizer, test_size=50)
    other = load_text(path, tokenizer=tokenizer, test_size=50)
    assert other.class_names == ("fonts", "games", "haskell", "python", "ruby")
    assert [other.test[i] for i in range(50)] == [one.test[i] for i in range(50)]
    assert one.fingerprint == other.fingerprint


def test_a_batch_is_cut_and_padded(extract: Path, tokenizer: Any) -> None:
    data = load_text(extract, tokenizer=tokenizer, test_size=50, max_length=12)
    batch = data.example(8)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, 12)
    assert batch["labels"].tolist() == [data.test[i]["labels"] for i in range(8)]
    assert batch["labels"].dtype == torch.int64
    short, long = sorted((data.test[i] for i in range(50)), key=lambda item: len(item["text"].split()))[:: 50 - 1]
    mixed = load_text(extract, tokenizer=tokenizer, test_size=50, max_length=64).collate([short, long])
    assert mixed["attention_mask"][0].sum() < mixed["attention_mask"][1].sum() <= 64
    assert (mixed["input_ids"][0][mixed["attention_mask"][0] == 0] == tokenizer.pad_token_id).all()


def test_the_split_is_stratified_seeded_and_in_the_fingerprint(extract: Path, tokenizer: Any) -> None:
    def load(**options: Any) -> DataBundle:
        return load_text(extract, tokenizer=tokenizer, **{"test_size": 50, **options})

    one, same, other = load(seed=1), load(seed=1), load(seed=2)
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other.fingerprint, load(seed=1, max_length=7).fingerprint}) == 3
    assert Counter(one.test[i]["labels"] for i in range(50)) == dict.fromkeys(range(5), 10)
    texts = {one.train[i]["text"] for i in range(len(one.train))}
    assert len(one.train) == 150 and not texts & {one.test[i]["text"] for i in range(50)}


def test_a_column_can_say_the_split(rows: Rows, extract: Path, tokenizer: Any) -> None:
    data = load_text(extract, tokenizer=tokenizer, split_column="split")
    assert [data.test[i]["text"] for i in range(50)] == [row["text"] for row in rows if row["split"] == "test"]


def test_the_held_out_texts_can_be_another_file(rows: Rows, tokenizer: Any, tmp_path: Path) -> None:
    train, test = write_csv(tmp_path / "a.csv", rows[:150]), write_jsonl(tmp_path / "b.jsonl", rows[150:])
    data = load_text(train, tokenizer=tokenizer, test_source=test)
    assert (len(data.train), len(data.test)) == (150, 50) and data.test[0]["text"] == rows[150]["text"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 2, 10, 2], ("2", "10")),
        (["10", "2", "10", "2"], ("2", "10")),
        (["b", "a", "b", "a"], ("a", "b")),
        ([True, False, True, False], ("False", "True")),
    ],
)
def test_labels_become_sorted_class_names(
    labels: list[Any], names: tuple[str, ...], tokenizer: Any, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    data = load_text(path, tokenizer=tokenizer, test_size=1)
    assert data.class_names == names
    items = [*(data.train[i] for i in range(3)), data.test[0]]
    assert {item["text"]: item["labels"] for item in items} == {"t0": 1, "t1": 0, "t2": 1, "t3": 0}


def test_given_class_names_number_the_labels(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(6)]
    data = load_text(
        write_csv(tmp_path / "x.csv", rows), tokenizer=tokenizer, test_size=2, class_names=["no", "yes", "maybe"]
    )
    assert data.class_names == ("no", "yes", "maybe")
    assert {data.train[i]["labels"] for i in range(4)} == {0, 1}


def test_texts_that_look_like_missing_values_stay(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"text": text, "label": label} for text, label in [("NA", "None"), ("null", "NaN"), ("x", "None"), ("y", "NaN")]
    ]
    data = load_text(write_csv(tmp_path / "x.csv", rows), tokenizer=tokenizer, test_size=1)
    assert data.class_names == ("NaN", "None")


def test_a_datasets_folder_with_splits_and_class_names(rows: Rows, tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "debian"
    folder.mkdir()
    feature = datasets.ClassLabel(names=["ruby", "python", "haskell", "games", "fonts"])
    columns = {"text": datasets.Value("string"), "label": feature}
    for split, part in (("train", rows[:140]), ("validation", rows[140:]), ("test", rows[:20])):
        values = {
            "text": [row["text"] for row in part],
            "label": [-1 if split == "test" else feature.str2int(row["label"]) for row in part],
        }
        datasets.Dataset.from_dict(values, features=datasets.Features(columns)).to_parquet(folder / f"{split}.parquet")
    data = load_text(str(folder), tokenizer=tokenizer)
    assert data.class_names == ("ruby", "python", "haskell", "games", "fonts")
    assert (len(data.train), len(data.test)) == (140, 60), "an unlabelled test split gives way to validation"
    assert data.class_names[data.test[0]["labels"]] == rows[140]["label"]


def test_a_tokenizer_can_be_a_folder(extract: Path, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = load_text(extract, tokenizer=tmp_path / "tokenizer", test_size=50)
    assert torch.equal(
        data.example(4)["input_ids"], load_text(extract, tokenizer=tokenizer, test_size=50).example(4)["input_ids"]
    )
    assert data.preprocessing["tokenizer"] == str(tmp_path / "tokenizer")


BAD_ROWS = [
    (
        [{"text": "a", "label": "x"}, {"text": " ", "label": "y"}],
        r"x\.jsonl, line 2: column 'text' is empty; delete the row",
    ),
    ([{"text": "a", "label": "x"}, {"text": 7, "label": "y"}], r"line 2: column 'text' must hold text, got 7 \(int\)"),
    ([{"text": "a", "label": "x"}, {"text": "b"}], r"line 2: column 'label' is empty; label the row or delete it"),
    (
        [{"text": "a", "label": "x"}, {"text": "b", "label": 1.5}],
        r"line 2: label 1\.5 is a float; labels must be strings",
    ),
    (
        [{"text": "a", "label": "x"}, {"text": "b", "label": 1}],
        r"mixes strings \('x', line 1\) and numbers \(1, line 2\)",
    ),
    (
        [{"text": "a", "label": 0}, {"text": "b", "label": -1}],
        r"line 2: label -1 is out of range; class numbers start at 0",
    ),
    ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], r"column 'label' holds the single label 'x'"),
    ([{"text": "a", "lable": "x"}], r"x\.jsonl: unknown column 'label': did you mean 'lable'\? Known: lable, text"),
    ([{"txt": "a", "label": "x"}, {"txt": "b", "label": "y"}], r"unknown column 'text': did you mean 'txt'\?"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_bad_rows_are_named(rows: Rows, message: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_text(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer=tokenizer, test_size=1)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (2, r"line 2: label 2 is out of range, there are 2 classes \(0\.\.1\); correct column 'label' or class_names"),
        ("yess", "line 2: unknown label 'yess': did you mean 'yes'"),
    ],
)
def test_labels_outside_the_given_names_are_refused(label: Any, message: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0 if isinstance(label, int) else "yes"}, {"text": "b", "label": label}]
    with pytest.raises(DataError, match=message):
        load_text(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer=tokenizer, class_names=["no", "yes"], test_size=1)


def test_a_held_out_label_must_occur_in_training(rows: Rows, tokenizer: Any, tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", rows[:100])
    test = write_csv(tmp_path / "b.csv", [{**rows[0], "label": "pythn"}])
    with pytest.raises(DataError, match=r"b\.csv, line \d+: unknown label 'pythn': did you mean 'python'"):
        load_text(train, tokenizer=tokenizer, test_source=test)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 1}\n\n{"text": "b",, "label": 2}\n', r"line 3: not valid JSON \(.*column 1\d\)"),
        ("[1, 2]\n", r"line 1: expected a JSON object, got list; write \{\.\.\.\}"),
        ("\n", r"x\.jsonl holds no rows; give it at least two labelled texts"),
    ],
)
def test_lines_that_are_not_json_objects_are_named(content: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_text(path, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,b,c\n", r"line 2: 3 cells under 2 column names; quote cells that contain ','"),
        ('text,label\n"a" b,c\n', r"line 2: not valid CSV \(.*\); check the quotes"),
        ("text,label\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_lines_that_are_not_csv_are_named(content: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_text(path, tokenizer=tokenizer)


def test_files_that_cannot_be_read_are_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv does not exist; check the path"):
        load_text(tmp_path / "gone.csv", tokenizer=tokenizer)
    (tmp_path / "reviews.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"review\.csv does not exist: unknown file .*did you mean 'reviews\.csv'"):
        load_text(tmp_path / "review.csv", tokenizer=tokenizer)
    (tmp_path / "latin.csv").write_bytes("text,label\nd\xe9j\xe0,1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.csv is not UTF-8 text \(byte \d+.*convert it to UTF-8"):
        load_text(tmp_path / "latin.csv", tokenizer=tokenizer)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cut\.parquet is not a readable parquet file"):
        load_text(tmp_path / "cut.parquet", tokenizer=tokenizer)
    (tmp_path / "x.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot tell the format from the ending '\.xlsx'; use \.csv"):
        load_text(tmp_path / "x.xlsx", tokenizer=tokenizer)


def test_the_split_column_says_train_or_test(rows: Rows, tokenizer: Any, tmp_path: Path) -> None:
    odd = write_jsonl(tmp_path / "x.jsonl", [*rows[:3], {**rows[3], "split": "dev"}])
    with pytest.raises(DataError, match="line 4: column 'split' must say 'train' or 'test', got 'dev'"):
        load_text(odd, tokenizer=tokenizer, split_column="split")
    one = write_jsonl(tmp_path / "y.jsonl", [{**row, "split": "train"} for row in rows])
    with pytest.raises(DataError, match="no row of column 'split' says 'test'; both splits need rows"):
        load_text(one, tokenizer=tokenizer, split_column="split")


def test_other_bad_options(extract: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="max_length must be at least 2 tokens, got 1"):
        load_text(extract, tokenizer=tokenizer, max_length=1)
    with pytest.raises(DataError, match=r"test_size=5000 does not fit .*debian_sections\.csv.*between 1 and 195"):
        load_text(extract, tokenizer=tokenizer, test_size=5000)
    with pytest.raises(DataError, match=r"cannot load the tokenizer .*nowhere.*give the folder of a saved tokenizer"):
        load_text(extract, tokenizer=str(tmp_path / "nowhere"), test_size=20)


def test_a_data_set_that_cannot_be_had_says_why(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot load the data set 'no/such' \(en\): .*give the path of a local \.csv"):
        load_text("no/such", tokenizer=tokenizer, subset="en")
    folder = tmp_path / "only_test"
    folder.mkdir()
    write_csv(folder / "test.csv", [{"text": "a", "label": "x"}])
    with pytest.raises(DataError, match="unknown split 'train': Known: test"):
        load_text(str(folder), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("library", "source", "message"),
    [
        ("datasets", "some/name", r"'some/name' needs the datasets library: `pip install 'pykd\[huggingface\]'`"),
        ("pyarrow", "x.parquet", r"reading parquet needs pyarrow; `pip install 'pykd\[huggingface\]'` brings it"),
    ],
)
def test_a_missing_library_is_named(
    library: str, source: str, message: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == library:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=message):
        load_text(source, tokenizer=tokenizer)


def test_a_missing_file_is_said_before_a_tokenizer_is_sought(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv"):
        load_text(str(tmp_path / "gone.csv"), tokenizer=str(tmp_path / "nor-this"), max_length=8)
