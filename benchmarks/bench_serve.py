"""`pykd serve` under load: P50, P95 and P99 of a 6x768 text classifier at 100 requests a second on two cores.

    python benchmarks/data/debian.py --output runs/debian.parquet
    python benchmarks/bench_serve.py --data runs/debian.parquet --seconds 30

The model has a real architecture (BERT, 12x768, cut to 6x768 by `derive`) and random weights, which decide what it says
and not how long that takes, in the forms of `FORMS`. It is saved, and served by a real `pykd serve` on loopback. The
generator is a process of its own and open-loop: requests leave at the times drawn before, whether or not earlier ones
are answered (`open_loop.py`). All processes together have two cores. Lengths are those of the Debian texts cut at 128
tokens (`--data`; without it, of the extract that the tests use), and in a second run every text has 128.

The columns after the percentiles say what limits it: the mean of texts computed together, the share of the time in
which a batch is computed, processor seconds a second of service and generator, the latency of one request at a time.
PYKD_BENCH=small, or pytest on the smallest shapes: a narrow model for two seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from open_loop import arrivals, percentile, run_generator
from running_service import cpu_seconds, scraped, service

SMALL = os.environ.get("PYKD_BENCH") == "small"
EXTRACT = Path(__file__).parents[1] / "tests" / "data_files" / "debian_sections.csv"
CLASSES, MAX_TOKENS = 58, 128
COLUMNS = "| form | lengths | sent/s | answered/s | errors | P50 ms | P95 ms | P99 ms | texts/batch | computing | CPU service | CPU generator | alone ms |"  # noqa: E501

Row = dict[str, Any]


def w8a8(model: Any) -> None:
    import pykd

    pykd.quantize(model, "w8a8", embeddings="w8a16")


def structured(share: float, *, layers: float = 0.0) -> Callable[[Any], None]:
    """Shares of the layers, then of heads and neurons cut, then w8a8: the width stays."""

    def apply(model: Any) -> None:
        import pykd

        if layers:
            pykd.prune(model, "layers", layers)
        pykd.prune(model, "heads", share)
        pykd.prune(model, "neurons", share)
        w8a8(model)

    return apply


def sparse(share: float) -> Callable[[Any], None]:
    """Single weights cut by ``share``, then w8a8."""

    def apply(model: Any) -> None:
        import pykd

        pykd.prune(model, "magnitude", share)
        w8a8(model)

    return apply


#: Form of the 6x768 model -> what is done to the dense one.
FORMS: dict[str, Callable[[Any], None]] = {
    "dense": lambda model: None,
    "w8a8": w8a8,
    "heads and neurons -50 %, w8a8": structured(0.5),
    "heads and neurons -75 %, w8a8": structured(0.75),
    "heads and neurons -90 %, w8a8": structured(0.9),
    "2 layers, heads and neurons -75 %, w8a8": structured(0.75, layers=2 / 3),
    "2 layers, heads and neurons -90 %, w8a8": structured(0.9, layers=2 / 3),
    "weights -80 %, w8a8": sparse(0.8),
}

DEFAULT = ["w8a8", *(f"heads and neurons -{share} %, w8a8" for share in (50, 75, 90))]


def build(form: str, folder: Path) -> Path:
    """The classifier in one of `FORMS`, saved with the tokenizer of MiniLM, a WordPiece of 30,522 entries."""
    import torch
    from data.minilm import minilm_path
    from transformers import AutoTokenizer

    import pykd
    from pykd.models.huggingface import load_huggingface
    from pykd.models.sizes import preset_config
    from pykd.models.students import derive

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_path()))
    big, little = ("4x64", "2x64") if SMALL else ("12x768", "6x768")
    config = preset_config(big, "bert", vocab_size=len(tokenizer))
    teacher = load_huggingface(None, "sequence-classification", num_labels=CLASSES, config=config)
    model = derive(teacher, preset=little).eval()
    FORMS[form](model)
    return pykd.save_pretrained(model, folder / re.sub(r"\W+", "-", form), tokenizer=tokenizer)


def texts_of(path: Path) -> list[str]:
    """The column `text` of a .csv or .parquet file."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return [str(text) for text in parquet.read_table(path, columns=["text"])["text"].to_pylist()]
    with path.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def of_full_length(texts: Sequence[str]) -> list[str]:
    """Texts of at least 128 tokens, by putting some after each other."""
    found, parts = list[str](), list[str]()
    for text in texts:
        parts.append(text)
        if sum(map(len, parts)) > 16 * MAX_TOKENS:
            found.append(" ".join(parts))
            parts = []
    return found


def measure(form: str, lengths: str, model: Path, texts: Sequence[str], settings: argparse.Namespace) -> Row:
    """One service under the load of the settings."""
    passed = {name: getattr(settings, name) for name in ("threads", "parallel", "batch_window_ms", "max_batch")}
    passed["max_tokens"] = MAX_TOKENS
    options = [word for name, value in passed.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    environment = dict(pair.split("=", 1) for pair in settings.env)
    with service(model, options, environment) as (url, process):
        slow = [number / 5 for number in range(10 if SMALL else 25)]
        alone = run_generator(url, texts, slow)  # so few that one never meets another; also warms up
        before, cpu = scraped(url), cpu_seconds(process)
        times = arrivals(settings.rate, settings.seconds, settings.seed, settings.arrivals)
        found = run_generator(url, texts, times)
        after, cpu = scraped(url), cpu_seconds(process) - cpu
    delta = {name: after[name] - before.get(name, 0.0) for name in after}
    return {
        "form": form, "lengths": lengths, "sent_per_s": len(times) / found["sending_s"],
        "answered_per_s": len(found["latencies"]) / found["took_s"], "errors": len(found["errors"]),
        "p50_ms": percentile(found["latencies"], 0.50), "p95_ms": percentile(found["latencies"], 0.95),
        "p99_ms": percentile(found["latencies"], 0.99),
        "texts_per_batch": delta["pykd_batch_inputs_sum"] / max(1.0, delta["pykd_batch_inputs_count"]),
        "computing": delta["pykd_batch_seconds_sum"] / found["took_s"], "cpu_service": cpu / found["took_s"],
        "cpu_generator": found["cpu_s"] / found["took_s"], "alone_ms": statistics.median(alone["latencies"]),
    }  # fmt: skip


def line(row: Row) -> str:
    """One line of the table."""
    cells = [
        row["form"],
        row["lengths"],
        f"{row['sent_per_s']:.1f}",
        f"{row['answered_per_s']:.1f}",
        str(row["errors"]),
    ]
    cells += [f"{row[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms")] + [f"{row['texts_per_batch']:.2f}"]
    cells += [f"{row['computing']:.0%}", f"{row['cpu_service']:.2f}", f"{row['cpu_generator']:.2f}"]
    return f"| {' | '.join([*cells, format(row['alone_ms'], '.1f')])} |"


def limit(row: Row) -> str:
    """What limits one run, in words."""
    if row["errors"]:
        return f"{row['form']}, {row['lengths']}: overloaded, {row['errors']} requests were refused"
    busy, alone, tail = row["computing"], row["alone_ms"], row["p95_ms"]
    what = "the model itself" if alone > tail / 2 else "waiting for requests before it"
    return f"{row['form']}, {row['lengths']}: {what} (a batch is computed {busy:.0%} of the time, {alone:.1f} ms alone)"


def run(settings: argparse.Namespace) -> list[Row]:
    """Every form at both lengths, printed as it is measured."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # and all processes that follow
    texts = texts_of(settings.data)
    random.Random(settings.seed).shuffle(texts)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        print(f"{settings.rate:g} requests/s for {settings.seconds:g} s, {settings.arrivals} arrivals, two cores\n")
        print(COLUMNS + "\n|---|---|" + "---:|" * (COLUMNS.count("|") - 3))
        for form in settings.form:
            model = build(form, Path(folder))
            for lengths, sent in (("Debian", texts), ("all 128", of_full_length(texts))):
                rows.append(measure(form, lengths, model, sent[:4000], settings))
                print(line(rows[-1]), flush=True)
    print("\nWhat limits it:", *map(limit, rows), sep="\n- ")
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Latency of `pykd serve` under an open-loop load on two cores.")
    parser.add_argument("--data", type=Path, default=EXTRACT, help=".parquet or .csv with a column `text`")
    parser.add_argument("--form", nargs="+", choices=list(FORMS), default=["w8a8"] if SMALL else DEFAULT)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=2.0 if SMALL else 20.0)
    parser.add_argument("--arrivals", choices=["exponential", "fixed"], default="exponential")
    parser.add_argument("--env", nargs="*", default=["OMP_WAIT_POLICY=passive"], help="NAME=VALUE, for the service")
    parser.add_argument("--threads", type=int, default=2, help="that compute")
    parser.add_argument("--parallel", type=int, default=2, help="batches computed at once")
    parser.add_argument("--batch-window-ms", type=float, default=0.0)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    settings = parse(arguments)
    rows = run(settings)
    if settings.json is not None:
        settings.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def test_every_request_is_answered() -> None:
    rows = main(["--form", "w8a8", "--seconds", "2" if SMALL else "20"])
    assert [row["errors"] for row in rows] == [0, 0]
    assert all(row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in rows)


if __name__ == "__main__":
    main()
