"""The students of a study beside each other: ranked under weights, and what every way to train them is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pykd.errors import RecipeError
from pykd.evaluation.intervals import PairedTest, paired_test
from pykd.evaluation.report import Report
from pykd.pipeline.result import Finding, Measured

#: What is compared with what: one arm, another, and how a sentence says what the first one has more.
GAINS = (
    ("direct", "labels", "distillation over labels alone"),
    ("chain", "labels", "the chain over labels alone"),
    ("chain", "direct", "the chain over distillation from the first teacher"),
)


@dataclass(frozen=True)
class Place:
    """One student in the ranking: its score, and its shares 0..1 of the best quality, speed, size and explanations."""

    name: str
    score: float
    shares: dict[str, float]


def rank(entries: Sequence[Measured], weights: Mapping[str, float]) -> list[Place]:
    """Students from best to worst: the weighted mean of what each has of the best one's quality, speed, smallness and
    likeness of explanations to the teacher (cosine, at least 0). Weights need not sum to 1; equal scores keep order.

    Raises RecipeError when all weights are zero, or one is for explanations that were not measured.
    """
    values: dict[str, list[float]] = {
        "quality": [entry.report.quality() for entry in entries],
        "speed": [speed(entry.report) for entry in entries],
        "size": [1.0 / entry.report.size_bytes for entry in entries],
    }
    alike = [entry.details.get("explanations", {}).get("cosine") for entry in entries]
    if weights.get("explanations", 0) > 0:
        if None in alike:
            raise RecipeError("study.weights.explanations needs explanations: set study.explain above 0, or weigh it 0")
        values["explanations"] = [max(0.0, value) for value in alike]
    whole = sum(weights.get(name, 0) for name in values)
    if whole <= 0:
        raise RecipeError("study.weights: at least one weight must be above 0")
    shares = {name: [value / max(max(column), 1e-12) for value in column] for name, column in values.items()}
    places = [
        Place(
            entry.report.name,
            sum(weights.get(name, 0) * column[row] for name, column in shares.items()) / whole,
            {name: column[row] for name, column in shares.items()},
        )
        for row, entry in enumerate(entries)
    ]
    return sorted(places, key=lambda place: -place.score)


def ranking_of(places: Sequence[Place]) -> Finding:
    """The ranking as a table."""
    names = list(places[0].shares)
    rows = [["rank", "model", "score", *names]]
    for number, place in enumerate(places, start=1):
        rows.append([str(number), place.name, f"{place.score:.4f}", *(f"{place.shares[name]:.3f}" for name in names)])
    return Finding("Ranking under the weights", rows)


def gains_of(entries: Sequence[Measured]) -> Finding | None:
    """Every student by every arm with the likeness of its explanations, and paired tests of the arms that compare them.

    The first student of a chain has the first teacher for its guide: there the chain is the direct way too. None where
    no arm was trained beside the chain.
    """
    students: dict[str, dict[str, Measured]] = {}
    for entry in entries:
        students.setdefault(entry.details["student"], {})[entry.details["method"]] = entry
    if all(len(arms) < 2 for arms in students.values()):
        return None
    ways = [way for way in ("labels", "direct", "chain") if any(way in arms for arms in students.values())]
    rows = [["student", "parameters", *ways, *(f"explanations, {way}" for way in ways)]]
    for name, arms in students.items():
        shown = [f"{arms[way].report.quality():.4f}" if way in arms else "-" for way in ways]
        size = next(iter(arms.values())).report.parameters
        rows.append([name, f"{size:,}", *shown, *(_cosine(arms.get(way)) for way in ways)])
    said = []
    for one, other, words in GAINS:
        tests = [_test(arms, one, other) for arms in students.values()]
        known = [test for test in tests if test is not None]
        if known:
            cells = ["-" if test is None else sentence(test) for test in tests]
            rows = [[*row, cell] for row, cell in zip(rows, [f"{one} - {other}", *cells], strict=True)]
            sure = sum(test.significant and test.difference > 0 for test in known)
            better = sum(test.difference > 0 for test in known)
            said.append(f"{words}: better for {better} of {len(known)} students, told from chance for {sure}")
    return Finding("What distillation and the chain are worth", rows, tuple(said))


def trial_score(final: Report, teacher: Report, weights: Mapping[str, float]) -> float:
    """What a trial is worth: the weighted mean of its quality on every second example relative to the teacher's, and
    of the shares of bytes and of time that it saves; 1 is the teacher's quality, or nothing left of size or time."""
    mine, its = (sum(report.scores()[::2]) / len(report.scores()[::2]) for report in (final, teacher))
    parts = {
        "quality": 1 + (mine - its) / max(abs(its), 1e-12),
        "size": 1 - final.size_bytes / teacher.size_bytes,
        "speed": 1 - 1 / final.speedup_over[teacher.name],
    }
    return sum(weights[name] * value for name, value in parts.items()) / sum(weights[name] for name in parts)


def change(test: PairedTest) -> str:
    """A difference with its interval.

    >>> change(PairedTest(0.0125, -0.01, 0.035, 0.4, "")), sentence(PairedTest(0.0125, -0.01, 0.035, 0.4, ""))
    ('+0.0125 (-0.0100 to +0.0350)', '+0.0125 (-0.0100 to +0.0350), p 0.4: may be chance')
    """
    return f"{test.difference:+.4f} ({test.low:+.4f} to {test.high:+.4f})"


def sentence(test: PairedTest) -> str:
    """The same with the chance that there is none."""
    return f"{change(test)}, p {test.p_value:.2g}{'' if test.significant else ': may be chance'}"


def speed(report: Report) -> float:
    """How many times faster than the teacher, by alternating rounds."""
    return next(iter(report.speedup_over.values()), 1.0 / report.latency_p50_ms)


def _test(arms: Mapping[str, Measured], one: str, other: str) -> PairedTest | None:
    if one not in arms or other not in arms:
        return None
    return paired_test(arms[one].report.scores(), arms[other].report.scores())


def _cosine(entry: Measured | None) -> str:
    alike = {} if entry is None else entry.details.get("explanations", {})
    return f"{alike['cosine']:.3f}" if "cosine" in alike else "-"
