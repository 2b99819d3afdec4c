"""The process that waits for a worker's next job with what it imports: it runs it, and is never in the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("standin")]


def waiting(stack, worker):
    """The id of the process that waits below a worker."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    return stack.until(lambda: [int(pid) for pid in children.read_text().split()], what="a waiting process")[0]


def test_each_job_runs_in_the_process_that_waited_and_has_imported(stack, job):
    worker = stack.worker()
    seen = set()
    for _ in range(3):
        pid = waiting(stack, worker)
        view = stack.ended(stack.accept(job(steps=1)))
        assert view["result"]["ahead"]
        assert [a["pid"] for a in view["attempts"]] == [pid]
        stack.until(lambda pid=pid: waiting(stack, worker) != pid)
        seen.add(pid)
    assert len(seen) == 3


def test_switched_off_no_process_waits_and_jobs_run_as_well(stack, job):
    worker = stack.worker(IMPORT_AHEAD="off")
    view = stack.ended(stack.accept(job(steps=1)))
    assert view["state"] == "succeeded"
    assert not view["result"]["ahead"]
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    stack.until(lambda: not children.read_text(), 5, "no process below the worker")  # the job's own ends just after it


def test_where_the_waiting_process_died_the_job_gets_another(stack, job):
    worker = stack.worker()
    pid = waiting(stack, worker)
    os.kill(pid, signal.SIGKILL)
    view = stack.ended(stack.accept(job(steps=1)))
    assert (view["state"], len(view["attempts"])) == ("succeeded", 1)
    assert view["attempts"][0]["pid"] != pid
    assert not view["result"]["ahead"]


def test_a_job_of_a_process_that_could_not_import_says_so_itself(stack, job, monkeypatch, tmp_path):
    (tmp_path / "standin_ahead.py").write_text("raise RuntimeError('planted')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    stack.worker()
    view = stack.ended(stack.accept(job(steps=1)))
    assert (view["state"], view["result"]["ahead"]) == ("succeeded", False)
    assert "standin_ahead can't be imported" in (stack.root / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_worker(stack, number):
    worker = stack.worker()
    pid = waiting(stack, worker)
    stack.until(lambda: stack.redis.scard("rq:workers:preprocessing"))
    time.sleep(0.3)  # the worker's own handlers of signals come just after
    worker.send_signal(number)
    worker.wait(10)
    stack.until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def test_importing_ahead_leaves_the_worker_itself_clean():
    code = ("import sys, training.jobs, optimization.jobs; "
            "assert not {'tensorflow', 'keras'} & set(sys.modules), 'imported'; "
            "print([*training.jobs.AHEAD, *optimization.jobs.AHEAD])")
    env = {**os.environ, "PYTHONPATH": ""}
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env).stdout
    assert "optimization.release" in told
