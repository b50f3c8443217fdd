"""Whether a student and a teacher can be compared class by class."""

from __future__ import annotations

from typing import Any

from torch import nn

from pykd.models.adapter import num_classes, unwrap
from pykd.training.record import require_finite_weights


def common_classes(
    student: nn.Module, teacher: nn.Module, *, student_tokenizer: Any = None, teacher_tokenizer: Any = None
) -> int:
    """Classes that both models score, after checking that each means the same to both.

    With both tokenizers given their vocabularies must be equal, and widths padded beyond the vocabulary may differ: the
    first ``len(tokenizer)`` logits count. Raises ValueError for a pair that cannot be compared and for NaN weights.
    """
    if student is teacher:
        raise ValueError("student and teacher are the same object: derive a student, or copy the teacher first")
    require_finite_weights(teacher, "teacher")
    require_finite_weights(student, "student")
    mine, its = num_classes(student), num_classes(teacher)
    vocabulary = None
    tokens = tuple(_tokens(model) for model in (student, teacher))
    if student_tokenizer is not None and teacher_tokenizer is not None:
        vocabulary = _common_vocabulary(student_tokenizer, teacher_tokenizer)
    elif None not in tokens and tokens[0] != tokens[1]:
        raise ValueError(
            f"the student reads {tokens[0]} tokens, the teacher {tokens[1]}: they must share a vocabulary; pass both "
            "tokenizers if the sizes differ by padding only"
        )
    if mine == its:
        return mine
    if vocabulary is not None and min(mine, its) >= vocabulary:
        return vocabulary
    raise ValueError(
        f"the student has {mine} classes, the teacher {its}: give both the same (derive(teacher, num_classes=...) or "
        "num_labels=...), or pass both tokenizers if the widths differ by padding only"
    )


def _tokens(model: nn.Module) -> int | None:
    """How many tokens a model can read; None for a model that does not read tokens."""
    table: Any = getattr(unwrap(model), "get_input_embeddings", lambda: None)() if _reads_tokens(model) else None
    return getattr(table, "num_embeddings", None)


def _reads_tokens(model: nn.Module) -> bool:
    return getattr(unwrap(model), "main_input_name", None) == "input_ids"


def _common_vocabulary(student: Any, teacher: Any) -> int:
    mine, its = student.get_vocab(), teacher.get_vocab()
    if mine != its:
        different = sorted(token for token in mine.keys() | its.keys() if mine.get(token) != its.get(token))
        token = different[0]
        raise ValueError(
            f"student and teacher have different tokenizers: {len(different)} tokens differ, the first is {token!r} "
            f"with id {mine.get(token)} in the student's and {its.get(token)} in the teacher's; use one for both"
        )
    return 1 + max(map(int, mine.values()))
