"""Jobs as processes: started, counted, stopped, killed, resumed, remembered over a restart of the service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pykd.errors import ArtifactError
from pykd.serve.allowed import AllowedRecipes
from pykd.serve.job_records import Job, JobRecords
from pykd.serve.jobs import Jobs, JobStateError, TooManyJobsError, UnknownJobError
from pykd.serve.processes import PROGRAM, began
from pykd.serve.progress import Progress, report_of

#: What stands for `pykd`: a process that begins a run, and then does what the recipe's file name says.
STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
words = sys.argv[1:]
kind, folder = pathlib.Path(words[1]).stem, pathlib.Path(words[words.index("--output") + 1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "run.json").write_text(json.dumps({"name": kind, "finished": False, "started": "1"}))
with open(folder / "events.jsonl", "a") as events:
    step = {"event": "step", "step": 1, "loss": 2.0, "lr": 0.1}
    for event in ({"event": "begin", "step": 0, "total_steps": 9}, step):
        events.write(json.dumps({"time": time.time(), "run": "1-distill", **event}) + "\\n")
print(" ".join(words), os.environ.get("PYKD_TOKEN"), flush=True)
if kind == "broken":
    sys.exit(print("pykd: the data is not there") or 2)
if kind == "killed":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("deaf", flush=True)
if kind != "quick" and "--resume" not in words:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
(folder / "run.json").write_text(json.dumps({"name": kind, "finished": True, "started": "1"}))
(folder / "report.html").write_text("<html>" + kind)
"""
RECIPE = (Path(__file__).parent.parent.parent / "recipes" / "digits_transformer.yaml").read_text(encoding="utf-8")


@pytest.fixture
def recipes(tmp_path: Path) -> AllowedRecipes:
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name in ("quick", "slow", "stubborn", "broken", "killed"):
        (folder / f"{name}.yaml").write_text(RECIPE, encoding="utf-8")
    return AllowedRecipes(folder)


@pytest.fixture
def make(tmp_path: Path, recipes: AllowedRecipes) -> Iterator[Callable[..., Jobs]]:
    """make(limit=...): the jobs of a service, all in one folder; stopped at the end."""
    made = []

    def service(**options: object) -> Jobs:
        made.append(Jobs(tmp_path / "state", recipes, program=(sys.executable, "-c", STAND_IN), **options))
        return made[-1]

    yield service
    for jobs in made:
        jobs.grace_s = 0.0
        jobs.close()


def until(reached: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def printed(jobs: Jobs, id: str) -> str:
    return jobs.output(id).read_text()


def test_a_job_runs_to_its_report(make: Callable[..., Jobs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKD_TOKEN", "a secret of the service")
    jobs = make()
    job = jobs.start("quick.yaml", {"seed": 3}, short=True)
    assert job.status == "running" and len(job.id) == 16
    done = jobs.wait(job.id, 20)
    assert (done.status, done.exit_code, done.pid) == ("finished", 0, None)
    words = printed(jobs, job.id).split()
    assert words[0] == "run" and words[2:] == ["--output", str(jobs.run(job.id)), "--short", "--set", "seed=3", "None"]
    (run,) = Progress(jobs.run(job.id)).snapshot()
    assert run["finished"] and run["report"] and run["trainings"][0]["total_steps"] == 9
    report = report_of(jobs.run(job.id), None)
    assert report is not None and report.read_text() == "<html>quick"
    assert report_of(jobs.run(job.id), "other") is None and report_of(jobs.run("none"), None) is None
    assert "file" not in done.public() and done.public()["overrides"] == ("seed=3",)


def test_as_many_run_as_are_allowed(make: Callable[..., Jobs]) -> None:
    jobs = make(limit=1)
    first = jobs.start("slow.yaml", {})
    with pytest.raises(TooManyJobsError, match="1 of 1 jobs run: wait for one to end, or stop it"):
        jobs.start("quick.yaml", {})
    with pytest.raises(JobStateError, match=f"job {first.id} is running: only interrupted and failed jobs"):
        jobs.resume(first.id)
    with pytest.raises(JobStateError, match=f"job {first.id} is running: stop it before it is removed"):
        jobs.remove(first.id)


def test_a_stopped_job_hears_ctrl_c_and_is_resumed(make: Callable[..., Jobs]) -> None:
    jobs = make()
    job = jobs.start("slow.yaml", {})
    until(lambda: printed(jobs, job.id))
    assert jobs.stop(job.id).status == "stopping"
    done = jobs.wait(job.id, 20)
    assert (done.status, done.exit_code) == ("interrupted", 130)
    assert jobs.stop(job.id) == done
    again = jobs.resume(job.id)
    assert again.id == job.id and again.exit_code is None
    assert jobs.wait(job.id, 20).status == "finished"
    assert printed(jobs, job.id).splitlines()[1].split()[-2] == "--resume"
    jobs.remove(job.id)
    assert not jobs.run(job.id).exists() and jobs.list() == [] and not list(jobs.folder.glob("jobs/*"))
    with pytest.raises(UnknownJobError, match="there is no job"):
        jobs.get(job.id)


def test_a_deaf_job_is_killed(make: Callable[..., Jobs]) -> None:
    jobs = make(grace_s=0.2)
    job = jobs.start("stubborn.yaml", {})
    until(lambda: "deaf" in printed(jobs, job.id))
    jobs.stop(job.id)
    done = jobs.wait(job.id, 20)
    assert (done.status, done.exit_code) == ("interrupted", -signal.SIGKILL)


def test_a_failed_job_says_why(make: Callable[..., Jobs]) -> None:
    jobs = make()
    done = jobs.wait(jobs.start("broken.yaml", {}).id, 20)
    assert (done.status, done.exit_code, done.error) == ("failed", 2, "pykd: the data is not there")


def test_a_process_that_cannot_be_started_takes_no_place(tmp_path: Path, recipes: AllowedRecipes) -> None:
    jobs = Jobs(tmp_path / "state", recipes, program=(str(tmp_path / "none"),))
    with pytest.raises(FileNotFoundError):
        jobs.start("quick.yaml", {})
    (job,) = jobs.list()
    assert job.status == "failed" and job.error is not None and job.error.startswith("it could not be started: ")
    assert [each.status for each in Jobs(tmp_path / "state", recipes).list()] == ["failed"]


def test_what_a_killed_run_had_started_ends_with_it(make: Callable[..., Jobs]) -> None:
    jobs = make()
    done = jobs.wait(jobs.start("killed.yaml", {}).id, 20)
    assert (done.status, done.exit_code) == ("interrupted", -signal.SIGKILL)
    child = int(printed(jobs, done.id).split()[-1])
    until(lambda: began(child) is None)


def test_a_full_disk_takes_no_place_and_keeps_no_job_running(
    make: Callable[..., Jobs], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: JobRecords, job: Job) -> Job:
        raise ArtifactError("no space left on the disk")

    jobs = make(limit=1)
    with monkeypatch.context() as disk:
        disk.setattr(JobRecords, "write", full)
        with pytest.raises(ArtifactError, match="no space left"):
            jobs.start("slow.yaml", {})
    assert jobs.list() == []
    job = jobs.start("slow.yaml", {})
    until(lambda: printed(jobs, job.id))
    monkeypatch.setattr(JobRecords, "write", full)
    jobs.stop(job.id)
    assert jobs.wait(job.id, 20).status == "interrupted"
    assert f"job {job.id} is interrupted, but its record is an old one: no space left on the disk" in caplog.text


def test_jobs_end_with_their_service_and_are_known_after_it(make: Callable[..., Jobs]) -> None:
    jobs = make(limit=2)
    done, slow = jobs.start("quick.yaml", {}), jobs.start("slow.yaml", {})
    jobs.wait(done.id, 20)
    until(lambda: printed(jobs, slow.id))
    jobs.close()
    again = make()
    assert [(job.id, job.status) for job in again.list()] == [(done.id, "finished"), (slow.id, "interrupted")]
    again.resume(slow.id)
    assert again.wait(slow.id, 20).status == "finished"


def test_a_job_outlives_a_killed_service_and_is_found_again(make: Callable[..., Jobs], tmp_path: Path) -> None:
    service = f"""
import sys, time
from pykd.serve.allowed import AllowedRecipes
from pykd.serve.jobs import Jobs
jobs = Jobs({str(tmp_path / "state")!r}, AllowedRecipes({str(tmp_path / "recipes")!r}), limit=2,
            program=(sys.executable, "-c", {STAND_IN!r}))
print(jobs.start("slow.yaml", {{}}).id, jobs.start("slow.yaml", {{}}).id, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", service], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        alive, dead = process.stdout.readline().split()
        process.kill()
    records = {id: json.loads((tmp_path / "state" / "jobs" / f"{id}.json").read_text()) for id in (alive, dead)}
    os.kill(records[dead]["pid"], signal.SIGKILL)
    until(lambda: began(records[dead]["pid"]) is None)
    jobs = make(limit=2)
    until(lambda: not jobs.get(dead).active)
    assert jobs.get(dead).status == "interrupted" and jobs.get(alive).status == "running"
    jobs.stop(alive)
    assert jobs.wait(alive, 20).status == "interrupted"


def test_a_process_number_that_was_given_away_is_not_signalled(make: Callable[..., Jobs]) -> None:
    jobs = make()
    job = jobs.wait(jobs.start("quick.yaml", {}).id, 20)
    record = jobs.folder / "jobs" / f"{job.id}.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "status": "running", "pid": os.getpid(), "pid_started": 1}))
    (jobs.folder / "jobs" / "torn.json").write_text('{"format_version": 1, "id"')
    for number, wrong in enumerate(({}, {"status": "odd"}, {"created": "now"}, {"pid": "12"}, {"pid": -1})):
        other = {"id": f"{number:016x}", **wrong} if wrong else {}
        (jobs.folder / "jobs" / f"{number:016x}.json").write_text(json.dumps({**content, **other}))
    again = make()
    again.stop(job.id)
    assert again.wait(job.id, 20).status == "finished" and [job.id for job in again.list()] == [job.id]


def test_a_run_hears_ctrl_c_where_its_service_did_not(tmp_path: Path) -> None:
    code = PROGRAM.replace("from pykd.cli import main\nsys.exit(main())", "print(signal.getsignal(2), os.nice(0))")
    ignoring = ["sh", "-c", 'trap "" INT; exec "$0" "$@"', sys.executable, "-c", code]
    found = subprocess.run(ignoring, capture_output=True, text=True, check=True).stdout
    assert "default_int_handler" in found and int(found.split()[-1]) >= 10
