"""The facts of the machine are there and are plain values."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pykd.evaluation.environment import cpu_model, environment, version


def test_it_names_versions_and_machine() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["threads"] == torch.get_num_threads() and found["isa"] and found["cpu"]
    assert found["versions"]["torch"] == torch.__version__ and found["memory_gb"] > 0
    assert {"seqeval", "sacrebleu", "rouge-score", "accelerate", "scipy"} <= set(found["versions"])


def test_the_cpu_is_read_from_cpuinfo(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Fast Chip 9000\nmodel name\t: other\n")
    assert cpu_model(file) == "Fast Chip 9000"
    file.write_text("processor\t: 0\n")
    assert cpu_model(file) and cpu_model(tmp_path / "absent")


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert version("no-such-package-anywhere") is None
