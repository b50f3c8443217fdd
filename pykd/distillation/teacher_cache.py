"""Reading what `cache_teacher` wrote."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykd.distillation import cache_files as files
from pykd.errors import ArtifactError, DataError


class TeacherCache:
    """What `cache_teacher` wrote, by the index of the training example; memory-mapped, so processes share one copy.

    `cache[index]` is (ids, log_probs): (k,) each, or (positions, k) of a token model, ready for `kd_loss_topk` with
    `missing=cache.missing, stored_temperature=cache.temperature`; id -1 is no entry. It can be pickled and used in the
    workers of a DataLoader. verify: compare every shard with its checksum first, which reads them once.

    Raises ArtifactError naming the file that is missing, truncated or altered, and for a cache that is not finished.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest = files.read_manifest(self.path)
        shards, self._size = self.manifest["shards"], int(self.manifest["data"]["examples"])
        done = shards[-1]["last"] if shards else 0
        if done != self._size:
            raise ArtifactError(
                f"{self.path} is not finished: it holds {done} of {self._size} examples; "
                "run cache_teacher with the same arguments again."
            )
        files.check_shards(self.path, self.manifest, contents=verify)
        self.per_position = bool(self.manifest["per_position"])
        self.k, self.classes = int(self.manifest["columns"]), int(self.manifest["classes"])
        self.temperature, self.missing = float(self.manifest["temperature"]), str(self.manifest["missing"])
        self.fingerprint = str(self.manifest["data"]["fingerprint"])
        self._lasts = [shard["last"] for shard in shards]
        self._open: dict[int, tuple[Any, Tensor | None]] = {}

    def __len__(self) -> int:
        return self._size

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # each process maps the files itself

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        shard, rows = self._place(index)
        high = shard.get_slice("ids_high")[rows] if self.classes >= files.NARROW_CLASSES else None
        return files.unpack_ids(shard.get_slice("ids")[rows], high), shard.get_slice("log_probs")[rows]

    def tail(self, index: int) -> Tensor:
        """Mass of the classes that were not kept, () or (positions,), float16; 0 where nothing is missing."""
        shard, rows = self._place(index)
        if "tail" in shard.keys():  # noqa: SIM118 (a file of tensors is no dict)
            mass: Tensor = shard.get_slice("tail")[rows]
            return mass
        return torch.zeros_like(shard.get_slice("log_probs")[rows][..., 0], dtype=torch.float16)

    def batch(self, rows: Sequence[int], counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(ids, log_probs) of several examples: (examples, k), or of a token model (examples, time, k).

        counted (examples, time), bool: the positions that are no padding; the others get id -1 and -inf. Raises
        DataError where an example has another number of positions than when it was cached.
        """
        pairs = [self[row] for row in rows]
        if not self.per_position:
            return torch.stack([ids for ids, _ in pairs]), torch.stack([values for _, values in pairs])
        if counted is None:
            counted = torch.ones(len(pairs), max(len(ids) for ids, _ in pairs), dtype=torch.bool)
        for row, (ids, _), now in zip(rows, pairs, counted.sum(1).tolist(), strict=True):
            if len(ids) != now:
                raise DataError(
                    f"example {row} has {now} positions in this batch and {len(ids)} in {self.path}: "
                    "truncate it as when it was cached, and pass its attention mask"
                )
        all_ids = torch.full((*counted.shape, self.k), -1, dtype=torch.int32)
        all_values = torch.full((*counted.shape, self.k), -torch.inf, dtype=files.DTYPES[self.manifest["dtype"]])
        all_ids[counted], all_values[counted] = (torch.cat(part) for part in zip(*pairs, strict=True))
        return all_ids, all_values

    def _place(self, index: int) -> tuple[Any, int | slice]:
        """The file with an example, and where in its tensors it is."""
        if not 0 <= index < self._size:
            raise IndexError(f"the cache holds examples 0..{self._size - 1}, got {index}")
        number = bisect.bisect_right(self._lasts, index)
        if number not in self._open:
            from safetensors import safe_open

            handle: Any = safe_open(self.path / self.manifest["shards"][number]["file"], framework="pt")
            self._open[number] = handle, handle.get_slice("offsets")[:] if self.per_position else None
        handle, offsets = self._open[number]
        row = index - self.manifest["shards"][number]["first"]
        return handle, row if offsets is None else slice(int(offsets[row]), int(offsets[row + 1]))
