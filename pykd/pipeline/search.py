"""The results of a search, made once and kept: structures, models, measurements."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pykd.data import DataBundle
from pykd.distillation import distill
from pykd.errors import ArtifactError
from pykd.evaluation import Report, evaluate
from pykd.evaluation.counting import state_bytes
from pykd.evaluation.latency import measure_latency
from pykd.io.files import atomic_write
from pykd.io.load import from_pretrained
from pykd.io.save import save_pretrained
from pykd.nn.linear_4bit import is_4bit
from pykd.pipeline.candidates import Candidate, build
from pykd.pipeline.target import Point
from pykd.quantization import quantize
from pykd.training.checkpoint import has_checkpoint

#: Timed calls of a candidate that was not trained yet.
SURVEY_ROUNDS = 10


class Search:
    """Candidates of one model on disk: ``structures/`` trained ones, ``models/`` quantized ones, ``measured/`` reports.

    A result is there when its JSON file is, which is written last; what is there is not made again.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        data: DataBundle,
        folder: Path,
        quantization: dict[str, Any],
        training: dict[str, Any],
        seed: int,
    ) -> None:
        self.model, self.teacher, self.data, self.folder, self.seed = model, teacher, data, folder, seed
        self.quantization, self.training = quantization, training
        settings = {"quantize": quantization, "distill": training, "seed": seed}
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, default=str, sort_keys=True))
        self._built: tuple[Candidate, nn.Module] | None = None
        self._survey: dict[str, list[float]] = {}

    def bind(self) -> None:
        """Take the folder for this search. Raises ArtifactError when another one is in it."""
        digest = hashlib.sha256(json.dumps(self.settings).encode())
        for model in (self.model, self.teacher):
            for name, tensor in model.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digest.update(self.data.fingerprint.encode())
        identity, path = digest.hexdigest(), self.folder / "search.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if known is not None and known["identity"] != identity:
            raise ArtifactError(
                f"{self.folder} holds a search with another model, data or settings: choose another folder"
            )
        for name in ("structures", "models", "measured"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._survey = {} if known is None else known["survey"]
        self._identity = identity
        self._write()

    def survey(self, candidate: Candidate) -> Point:
        """Bytes and P95 of a call of the candidate as it is before training. Raises ValueError as the verbs do."""
        if candidate.key not in self._survey:
            made = self._quantized(self._untrained(candidate.structure), candidate, method="rtn")
            single = [self.data.example()]
            latency = measure_latency(made, single, rounds=SURVEY_ROUNDS, warmup=2).p95_ms
            self._survey[candidate.key] = [float(state_bytes(made)), latency]
            self._write()
        size, latency = self._survey[candidate.key]
        return Point(None, int(size), latency)

    def measure(self, candidate: Candidate, *, rounds: int) -> Report:
        """Make, save and evaluate a candidate, or read what was measured."""
        path = self.folder / "measured" / f"{candidate.key}.json"
        if not path.exists():
            made = self._quantized(self._trained(candidate.structure), candidate)
            folder = self.folder / "models" / candidate.key
            save_pretrained(made, folder, tokenizer=self.data.tokenizer, overwrite=True)
            report = evaluate(made, self.data, name=candidate.name, latency_rounds=rounds, path=folder)
            atomic_write(path, json.dumps(report.to_dict()))
        return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def load(self, candidate: Candidate) -> nn.Module:
        """The saved model of a candidate that was measured."""
        return from_pretrained(self.folder / "models" / candidate.key)

    def record(self, candidate: Candidate) -> dict[str, Any]:
        """The last entry of its report on itself."""
        return dict((getattr(self.load(candidate), "pykd_report", None) or [{}])[-1])

    def _untrained(self, structure: Candidate) -> nn.Module:
        if self._built is None or self._built[0] != structure:
            self._built = structure, build(self.model, structure, self.data, seed=self.seed).eval()
        return self._built[1]

    def _trained(self, structure: Candidate) -> nn.Module:
        """The structure after training, from its folder where it is finished."""
        if not structure.trained or not self.training["epochs"]:
            return self._untrained(structure)
        folder = self.folder / "structures" / structure.key
        if not folder.exists():
            checkpoints = folder.with_name(f"{structure.key}.checkpoints")
            made = build(self.model, structure, self.data, seed=self.seed)
            options: dict[str, Any] = {"checkpoint_dir": checkpoints, "resume": has_checkpoint(checkpoints)}
            options |= {"seed": self.seed, "label": structure.name}
            distill(made, self.teacher, self.data, **{**options, **self.training})
            save_pretrained(made, folder)
            shutil.rmtree(checkpoints, ignore_errors=True)
        return from_pretrained(folder)

    def _quantized(self, made: nn.Module, candidate: Candidate, *, method: str | None = None) -> nn.Module:
        """A quantized copy. method: instead of the search's, which is for 4-bit codes alone; bytes and times are as by
        any other."""
        made = copy.deepcopy(made).eval()
        if candidate.scheme is not None:
            plain = {} if is_4bit(candidate.scheme) else {"method": "rtn"}
            options = self.quantization | ({"method": method} if method is not None else plain)
            quantize(made, candidate.scheme, data=self.data, seed=self.seed, **options)
        return made

    def _write(self) -> None:
        content = {"identity": self._identity, "survey": self._survey, "settings": self.settings}
        atomic_write(self.folder / "search.json", json.dumps(content, indent=2) + "\n")
