"""Runs `pykd run` again and again in real processes and stops each at a chosen point by a real signal.

    python tests/pipeline_driver.py RECIPE OUTPUT POINT...

A point is WHERE:SIGNAL. The heavy imports happen once, here; each run is a fork, so that ten of them cost seconds.
Prints one JSON line per point: exit code, what went to stderr. The runs after the first resume; fresh=OUTPUT and
again=OUTPUT go on in another folder. As one of several launched processes each run takes its own of the PORTS.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from typing import Any, NoReturn

import pykd.cli
import pykd.evaluation.measure as measure
import pykd.pipeline.runner as runner
from pykd.pipeline.reload import Reload
from pykd.pipeline.saved import evaluate_saved
from pykd.training.run import Run

for heavy in ("sklearn.datasets", "transformers.models.vit.modeling_vit", "matplotlib.figure"):
    importlib.import_module(heavy)  # once, for all the forks
measure.measure_throughput = functools.partial(measure.measure_throughput, seconds=0.01)


def reload_here(model: Any, recipe: Any, predictions: Any, *, batch_size: int) -> Reload:
    """The saved model evaluated in this process, not in one that imports everything again."""
    found = evaluate_saved(model, recipe=recipe, batch_size=batch_size, latency_rounds=1).predictions
    return Reload("pykd evaluate", len(found), sum(a != b for a, b in zip(found, predictions, strict=True)))


def stop_here(ready: int) -> None:
    """Tell the parent that the point is reached and wait for its signal."""
    os.write(ready, b"!")
    time.sleep(60)


def arm(where: str, ready: int) -> None:
    """Make the process reach its point: a training's first step, a stage's middle, a measurement, the reload."""
    if where.startswith("train:"):
        label, step = where.removeprefix("train:"), Run.step
        reached: list[int] = []

        def stepping(self: Any, *arguments: Any) -> None:
            step(self, *arguments)
            if self.store.directory is not None and label in str(self.store.directory) and not reached:
                reached.append(self.history.steps)
                os.write(ready, b"!")
                time.sleep(0.3)  # the loop notes Ctrl-C and ends the step by itself

        Run.step = stepping  # type: ignore[method-assign]
        return
    name = {"stage": "apply_stage", "measure": "evaluate", "reload": "check_reload"}[where.partition("=")[0]]
    original, kind = getattr(runner, name), where.partition("=")[2]

    def stopping(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options) if name == "apply_stage" else None
        if not kind or kind == getattr(arguments[0], "kind", options.get("name")):
            stop_here(ready)
        return result if name == "apply_stage" else original(*arguments, **options)

    setattr(runner, name, stopping)


def child(words: list[str], where: str, ready: int, stderr: str) -> NoReturn:
    """One `pykd run`, with its stderr in a file."""
    os.dup2(os.open(stderr, os.O_WRONLY), 2)
    if where.startswith("disk="):
        size = int(where.removeprefix("disk="))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    elif where != "end":
        arm(where, ready)
    os._exit(pykd.cli.main(words))


def main(recipe: str, output: str, points: list[str]) -> None:
    resume, ports = False, os.environ.get("PORTS", "").split()
    if ports:
        runner.check_reload = reload_here
    for point in points:
        how, _, folder = point.partition("=")
        if how in ("fresh", "again"):
            output, resume = folder, how == "again"
            continue
        where, _, name = point.rpartition(":")
        words = ["run", recipe, "--output", output, *(["--resume"] if resume else [])]
        if ports:
            os.environ["MASTER_PORT"] = ports.pop(0)
        with tempfile.NamedTemporaryFile() as stderr:
            waiting, ready = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(waiting)
                child(words, where, ready, stderr.name)
            os.close(ready)
            if name != "none":
                os.read(waiting, 1)
                time.sleep(0.05)
                os.kill(pid, getattr(signal, name))
            os.close(waiting)
            _, status = os.waitpid(pid, 0)
            text, resume = stderr.read().decode(), True
        print(json.dumps({"point": point, "code": os.waitstatus_to_exitcode(status), "stderr": text}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
