"""Check an installed wheel: it imports, an op agrees with torch, no binary needs libtorch or an OpenMP of its own."""

from __future__ import annotations

import argparse
import pathlib
import subprocess

import torch

import pykd


def needed(binary: pathlib.Path) -> list[str]:
    """Names of the libraries that a binary asks the loader for."""
    lines = subprocess.run(["readelf", "-d", binary], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line]


def check_binaries(cuda: bool) -> None:
    folder = pathlib.Path(pykd.__file__).parent
    binaries = sorted(folder.glob("*.so"))
    assert any("_C" in binary.name for binary in binaries), f"no native module in {folder}"
    assert cuda == any("cuda" in binary.name for binary in binaries), f"CUDA library: wanted {cuda}, found {binaries}"
    for binary in binaries:
        libraries = needed(binary)
        forbidden = [name for name in libraries if any(part in name for part in ("torch", "c10", "gomp", "cudart"))]
        assert not forbidden, f"{binary.name} must not need {forbidden}"
        print(f"{binary.name}: {binary.stat().st_size} bytes, needs {', '.join(libraries)}")


def check_op() -> None:
    torch.manual_seed(0)
    student = torch.randn(8, 101, requires_grad=True)
    teacher = torch.randn(8, 101)
    loss = pykd.kl_div_loss(student, teacher, temperature=2.0)
    logs = torch.log_softmax(student / 2.0, -1), torch.log_softmax(teacher / 2.0, -1)
    expected = 4.0 * torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.grad is not None and bool(student.grad.isfinite().all())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuda", choices=["ON", "OFF"], required=True)
    arguments = parser.parse_args()
    info = pykd.build_info()
    assert info["native"], info["native_error"]
    assert len(info["openmp"]) <= 1, f"more than one OpenMP runtime: {info['openmp']}"
    check_binaries(arguments.cuda == "ON")
    check_op()
    print(f"pykd {info['version']} with torch {info['torch']}: native level {info['isa']} of {info['isa_levels']}")
