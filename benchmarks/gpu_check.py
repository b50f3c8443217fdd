"""The GPU gate: on a machine with an NVIDIA GPU, build the CUDA library, run the GPU tests and the GPU benchmarks.

It uses the Python that runs it with whatever torch, Triton and pytest that Python has, builds with CMake straight into
`build/gpu-check` without build isolation, and fetches nothing. Each part has a share of the nine minutes; a part that
runs over is stopped and recorded as such. The result goes to `benchmarks/results/gpu-<name>.json` whatever happens.

    make gpu-check PYTHON=python3
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGE = ROOT / "build" / "gpu-check" / "stage"
BUILD = ROOT / "build" / "gpu-check" / "cmake"
PEERS = ("liger_kernel", "bitsandbytes", "gemlite", "torchao")
BUILD_SECONDS, TEST_SECONDS, BENCH_SECONDS = 150, 200, 170


def run(command: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    """One bounded command: exit status, wall time and the end of what it printed."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        status, output = str(done.returncode), done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = f"stopped after {seconds:.0f} s", (error.stdout or b"").decode(errors="replace")
    print(output[-4000:], flush=True)
    seconds_taken = round(time.monotonic() - started, 1)
    return {"command": " ".join(command), "status": status, "seconds": seconds_taken, "tail": output[-4000:]}


def build(major: int, minor: int) -> list[dict[str, Any]]:
    """Configure, compile for this GPU's architecture and lay out an importable package in STAGE."""
    has_pybind = importlib.util.find_spec("pybind11") is not None
    python = "ON" if has_pybind else "OFF"
    options = [f"-DPYKD_PYTHON={python}", "-DPYKD_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    if has_pybind:
        import pybind11

        options.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}", *options]
    compile_ = ["cmake", "--build", str(BUILD), "-j", str(os.cpu_count() or 2)]
    install = ["cmake", "--install", str(BUILD), "--prefix", str(STAGE)]
    return [run(command, BUILD_SECONDS) for command in (configure, compile_, install)]


def environment(torch: Any) -> dict[str, Any]:
    """Versions and the machine, in words."""
    names = ("torch", "triton", "transformers", "torchvision", *PEERS)
    versions = {name: _version(name) for name in names}
    return {
        "gpu": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "not measured": [name for name in PEERS if versions[name] is None],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    try:
        import torch
    except ImportError:
        print(f"gpu-check: {sys.executable} has no torch; name a Python that has it: make gpu-check PYTHON=...")
        return 2
    from gpu_timing import copy_bytes_per_s

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no NVIDIA GPU on this machine, so nothing was run and no result was written")
        return 2
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "environment": environment(torch)}
    copied = copy_bytes_per_s(torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_(), rounds=18)
    result["copy_bandwidth_gb_s"] = round(copied / 1e9, 1)
    result["build"] = build(*torch.cuda.get_device_capability(0))
    benchmarks_json = BUILD / "benchmarks.json"
    inside = {"PYTHONPATH": str(STAGE), "PYTHONDONTWRITEBYTECODE": "1"}
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result["tests"] = run([*pytest, "-m", "gpu", "tests"], TEST_SECONDS, **inside)
    bench = [*pytest, "-c", "benchmarks/pytest.ini", "-m", "gpu", "benchmarks", f"--benchmark-json={benchmarks_json}"]
    result["benchmarks"] = run(bench, BENCH_SECONDS, **inside)
    if benchmarks_json.exists() and benchmarks_json.stat().st_size:
        rows = json.loads(benchmarks_json.read_text())["benchmarks"]
        result["timings"] = [
            {"name": row["name"], "median_ms": row["stats"]["median"] * 1e3, **row["extra_info"]} for row in rows
        ]
    name = re.sub(r"[^a-z0-9]+", "-", result["environment"]["gpu"].lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"gpu-check: wrote {path.relative_to(ROOT)}")
    parts = [*result["build"], result["tests"], result["benchmarks"]]
    return int(any(part["status"] != "0" for part in parts))


if __name__ == "__main__":
    sys.exit(main())
