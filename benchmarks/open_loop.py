"""An open-loop load: requests leave at times drawn before, whether or not earlier ones are answered.

`run_generator` runs in a process of its own, which is this file as a program. A latency counts from the time at which
the request was due, so that a generator or a service that falls behind shows in it.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def arrivals(rate: float, seconds: float, seed: int, spacing: str) -> list[float]:
    """Times at which requests leave: a Poisson process, or all equally far apart."""
    if spacing == "fixed":
        return [number / rate for number in range(round(rate * seconds))]
    draw, times = random.Random(seed), [0.0]
    while times[-1] < seconds:
        times.append(times[-1] + draw.expovariate(rate))
    return times[:-1]


async def generate(url: str, texts: Sequence[str], times: Sequence[float]) -> dict[str, Any]:
    """Send a text at each of the times; latencies from those times, errors, and the time it all took."""
    import aiohttp

    latencies, errors = list[float](), list[str]()
    bodies = [json.dumps({"text": texts[number % len(texts)]}).encode() for number in range(len(times))]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(body: bytes, due: float) -> None:
            try:
                async with session.post(
                    f"{url}/predict", data=body, headers={"Content-Type": "application/json"}
                ) as answer:
                    await answer.read()
                    if answer.status != 200:
                        errors.append(str(answer.status))
                        return
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                errors.append(type(error).__name__)
                return
            latencies.append(1000 * (time.perf_counter() - due))

        started, tasks = time.perf_counter() + 0.05, []
        for body, due in zip(bodies, times, strict=True):
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(body, started + due)))
        sending_s = time.perf_counter() - started
        await asyncio.gather(*tasks)
        took_s = time.perf_counter() - started
    cpu_s = time.process_time()
    return {"latencies": latencies, "errors": errors, "sending_s": sending_s, "took_s": took_s, "cpu_s": cpu_s}


def run_generator(url: str, texts: Sequence[str], times: Sequence[float]) -> dict[str, Any]:
    """`generate` in a process of its own, so that it shares no interpreter with anything else."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"url": url, "texts": list(texts), "times": list(times)}, file)
        file.flush()
        done = subprocess.run([sys.executable, __file__, file.name], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


if __name__ == "__main__":
    import uvloop

    print(json.dumps(uvloop.run(generate(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))))
