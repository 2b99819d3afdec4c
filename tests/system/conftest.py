"""A stack of real processes: workers, keeper and Valkey, with everything in a temporary folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from shared.jobs import Job, PreprocessJob, new_id
from shared.ledger import TERMINAL, Ledger
from shared.queue import deliver

STANDIN = Path(__file__).parent / "standin"


class Stack:
    """Processes by name. Intervals are short, so that what production does in minutes takes seconds."""

    def __init__(self, root: Path, valkey: Any):
        self.root, self.valkey, self.redis = root, valkey, Redis.from_url(valkey.url)
        self.ledger = Ledger(root, self.redis)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.log = open(root / "log", "ab")  # noqa: SIM115  closed in `close`

    def start(self, name: str, *command: str, **env: str) -> "subprocess.Popen[bytes]":
        settings = {"ARTIFACTS": str(self.root), "REDIS_URL": self.valkey.url, "DEVICE": "cpu", "WORKER_TTL_S": "20",
                    "HEARTBEAT_S": "2", "MAINTENANCE_S": "2", "SILENCE_S": "3", "TF_CPP_MIN_LOG_LEVEL": "2", **env}
        self.processes[name] = subprocess.Popen([sys.executable, "-m", *command], env={**os.environ, **settings},
                                                stdout=self.log, stderr=self.log, start_new_session=True)
        return self.processes[name]

    def worker(self, service: str = "preprocessing", name: str = "", **env: str) -> "subprocess.Popen[bytes]":
        return self.start(name or service, "shared.worker", service, **env)

    def keeper(self, **env: str) -> "subprocess.Popen[bytes]":
        return self.start("keeper", "shared.keeper", **env)

    def accept(self, job: Job, parent: str = "") -> str:
        """Write the record and deliver, as the API does; returns the job's id."""
        request, _ = self.ledger.accept(new_id("j"), job, parent=parent)
        if not parent:
            deliver(self.ledger, request)
        return request.id

    def until(self, condition: Callable[[], Any], seconds: float = 30, what: str = "") -> Any:
        """Poll until the condition holds; fails with the stack's log after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.05)
        log = (self.root / "log").read_text()[-6000:]
        raise AssertionError(f"{what or 'condition'} not reached in {seconds} s\n{log}")

    def ended(self, job_id: str, seconds: float = 30) -> dict[str, Any]:
        """The job's view once it is terminal."""
        self.until(lambda: self.ledger.state(job_id) in TERMINAL, seconds, f"end of {job_id}")
        return self.ledger.view(job_id)

    def running(self, job_id: str, seconds: float = 30) -> None:
        begun = lambda: self.ledger.attempts(job_id) and self.ledger.is_running(job_id)  # noqa: E731
        self.until(begun, seconds, f"start of {job_id}")

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to one process; SIGKILL takes its children along, as a container's end does."""
        process = self.processes[name]
        if number == signal.SIGKILL:
            for child in descendants(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(child, number)
        process.send_signal(number)

    def stop(self, name: str) -> None:
        """End one process for good, with all below it."""
        self.kill(name)
        self.processes.pop(name).wait()

    def close(self) -> None:
        for process in self.processes.values():
            for pid in [*descendants(process.pid), process.pid]:
                if process.poll() is None or pid != process.pid:
                    with suppress(ProcessLookupError):  # it ended since it was seen
                        os.kill(pid, signal.SIGKILL)
        for process in self.processes.values():
            process.wait()
        self.redis.close()
        self.log.close()


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, deepest first."""
    try:
        children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except FileNotFoundError:
        return []
    return [d for c in children for d in [*descendants(c), c]]


@pytest.fixture
def stack(root: Path, valkey: Any) -> Iterator[Stack]:
    stack = Stack(root, valkey)
    yield stack
    stack.close()


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of the queue `preprocessing` run the stand-in service."""
    monkeypatch.setenv("PYTHONPATH", str(STANDIN))


@pytest.fixture
def job() -> Callable[..., PreprocessJob]:
    """A job of the stand-in: `steps` times 50 ms of work, then what the name says."""
    return lambda name="plain", steps=4: PreprocessJob(dataset_id=new_id("d"), name=name, seed=steps)
