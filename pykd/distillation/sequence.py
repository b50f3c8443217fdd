"""Sequence-level distillation: the student is trained on what the teacher writes, in place of the data's targets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.data.bundle import Batch, Collate, DataBundle, Item, MapDataset, digest
from pykd.data.language import padded
from pykd.distillation.cache_files import fingerprint
from pykd.distillation.generation import written
from pykd.errors import DataError
from pykd.io.files import atomic_write
from pykd.models.adapter import move
from pykd.training.labels import IGNORED
from pykd.training.source import Loader


def sequence_loss(student_logits: Tensor, labels: Tensor, *, shift: bool = False) -> Tensor:
    """Cross entropy of the teacher's sequences (Kim & Rush 2016, eq. 9, with its best sequence for the sum).

    Logits (rows, positions, classes), labels (rows, positions) with -100 where a position does not count. shift:
    position i belongs to label i + 1.

    >>> round(sequence_loss(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).item(), 4)
    1.3863
    """
    if shift:
        student_logits, labels = student_logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(student_logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


class Written:
    """A training set whose items bring the sequence that the teacher wrote, and how much of it was given."""

    def __init__(self, base: MapDataset, sequences: list[tuple[list[int], int]]) -> None:
        self.base, self.sequences = base, sequences

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int, /) -> Item:
        ids, given = self.sequences[index]
        return {"item": self.base[index], "sequence": ids, "given": given}


def teacher_writes(
    teacher: nn.Module,
    data: DataBundle | Loader,
    *,
    beams: int = 4,
    batch_size: int = 32,
    path: str | Path | None = None,
    progress: bool | None = None,
) -> DataBundle:
    """The bundle with the teacher's best sequences, by beam search, as training targets; the test split stays.

    Encoder-decoders answer each source, causal models continue the first half of each batch's shortest row (see
    ``written``). path: file in which the sequences are kept, and from which they are taken when teacher, data and
    options are the same. Raises DataError for other tasks, and for data that is no DataBundle.
    """
    if not isinstance(data, DataBundle) or data.task not in ("seq2seq-lm", "causal-lm"):
        found = data.task if isinstance(data, DataBundle) else type(data).__name__
        raise DataError(f"a teacher writes sequences for a DataBundle of task seq2seq-lm or causal-lm, not for {found}")
    identity = digest([fingerprint(teacher), data.fingerprint, len(data.train), beams, batch_size])
    kept = Path(path) if path is not None else None
    if kept is not None and kept.is_file() and (known := json.loads(kept.read_text()))["identity"] == identity:
        sequences = [(ids, given) for ids, given in known["sequences"]]
    else:
        sequences = _sequences(teacher, data, beams, batch_size, progress)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(kept, json.dumps({"identity": identity, "sequences": sequences}))
    return dataclasses.replace(
        data,
        train=Written(data.train, sequences),
        collate=_collate(data.collate, causal=data.task == "causal-lm"),
        fingerprint=digest([data.fingerprint, identity]),
    )


def _sequences(
    teacher: nn.Module, data: DataBundle, beams: int, batch_size: int, progress: bool | None
) -> list[tuple[list[int], int]]:
    from tqdm import tqdm

    device = next(teacher.parameters()).device
    found: list[tuple[list[int], int]] = []
    starts = range(0, len(data.train), batch_size)
    for start in tqdm(starts, "teacher writes", unit="batch", disable=None if progress is None else not progress):
        rows = range(start, min(start + batch_size, len(data.train)))
        batch = move(data.collate([data.train[row] for row in rows]), device)
        answer = written(teacher, batch, num_beams=beams, do_sample=False)
        labels = answer["labels"]
        if data.task == "seq2seq-lm":
            found += [(row[row != IGNORED].tolist(), 0) for row in labels]
        else:
            for ids, mask, row in zip(answer["input_ids"], answer["attention_mask"], labels, strict=True):
                given = int((row != IGNORED).long().argmax())
                found.append((ids[mask.bool()].tolist(), given))
    return found


def _collate(base: Collate, *, causal: bool) -> Any:
    def collate(items: list[Item]) -> Batch:
        if "sequence" not in items[0]:  # of the held-out split
            return base(items)
        batch = base([item["item"] for item in items])
        sequences = [item["sequence"] for item in items]
        if not causal:
            return {**batch, "labels": padded(sequences, IGNORED)[0]}
        ids, mask = padded(sequences, 0)
        labels = ids.masked_fill(mask == 0, IGNORED)
        given = torch.tensor([item["given"] for item in items])
        before = torch.arange(ids.shape[1]) < given[:, None]
        return {**batch, "input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(before, IGNORED)}

    return collate
