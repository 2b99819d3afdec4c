"""The local stack: real processes and a real Valkey, started and stopped as `./run` does it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.system


class LocalStack:
    """A state folder and a port of its own; `call` is the command line of the supervisor."""

    def __init__(self, state: Path):
        self.state = state
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]

    def call(self, command: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "shared.supervisor", command, "--state", str(self.state), *args],
                              env={**os.environ, "PORT": str(self.port), **env},
                              capture_output=True, text=True, timeout=120)

    def processes(self) -> dict[int, str]:
        """pid -> command line of every live process that belongs to this state folder."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = (folder / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if command and (str(self.state) in command or str(self.state) in environment):
                found[int(folder.name)] = command
        return found

    def pid_of(self, words: str) -> list[int]:
        return [pid for pid, command in self.processes().items() if words in command]

    def livez(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/livez", timeout=5) as answer:
            return answer.status


def wait_until(what, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not (seen := what()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return seen


@pytest.fixture
def stack(tmp_path):
    made = LocalStack(tmp_path / "a state folder")
    yield made
    made.call("down")
    assert made.processes() == {}


def test_up_returns_when_the_api_answers_and_down_leaves_no_process(stack):
    up = stack.call("up")
    assert up.returncode == 0, up.stdout
    assert f"http://127.0.0.1:{stack.port}" in up.stdout
    assert stack.livez() == 200
    again = stack.call("up")
    assert (again.returncode, "already up" in again.stdout) == (0, True)
    assert stack.call("status").returncode == 0
    assert stack.call("down").returncode == 0
    assert stack.processes() == {}
    assert stack.call("status").returncode == 3


def test_a_killed_process_is_started_again_and_valkey_keeps_its_keys(stack):
    assert stack.call("up").returncode == 0
    keeper, valkey = stack.pid_of("shared.keeper")[0], stack.pid_of("valkey-server")[0]
    os.kill(keeper, signal.SIGKILL)
    os.kill(valkey, signal.SIGKILL)
    assert wait_until(lambda: [p for p in stack.pid_of("shared.keeper") if p != keeper])
    assert wait_until(lambda: [p for p in stack.pid_of("valkey-server") if p != valkey])
    assert "restarts 1" in stack.call("status").stdout


@pytest.mark.parametrize("who", ["guard", "supervisor"])
def test_kill_9_of_a_watcher_leaves_no_process(stack, who):
    assert stack.call("up").returncode == 0
    guard, supervisor = sorted(stack.pid_of("shared.supervisor run"))
    os.kill(guard if who == "guard" else supervisor, signal.SIGKILL)
    wait_until(lambda: not stack.processes())
    assert stack.call("up").returncode == 0


def test_a_taken_port_is_named_before_anything_starts(stack):
    with socket.socket() as s:
        s.bind(("127.0.0.1", stack.port))
        s.listen()
        up = stack.call("up")
    assert up.returncode == 1
    assert f"port {stack.port} of 127.0.0.1 is taken" in up.stdout
    assert stack.processes() == {}


def test_a_program_that_ends_at_once_is_named_with_its_last_lines(stack):
    (stack.state / "redis").mkdir(parents=True)
    (stack.state / "redis" / "appendonlydir").write_text("no folder")
    up = stack.call("up")
    assert up.returncode == 1
    assert "ends at once" in up.stdout
    assert "append-only dir" in up.stdout
    assert stack.processes() == {}


def test_the_stack_of_an_owner_ends_with_it(stack):
    owner = subprocess.Popen(["sleep", "300"])
    assert stack.call("up", "--owner", str(owner.pid)).returncode == 0
    assert stack.call("down", "--owner", "1").returncode == 0
    assert stack.livez() == 200
    owner.kill()
    owner.wait()
    wait_until(lambda: not stack.processes())


def test_a_process_that_hides_in_a_session_of_its_own_is_ended_too(tmp_path):
    code = ("import os, time; from pathlib import Path; from shared import processes; processes.adopt_orphans();"
            f"log = Path({str(tmp_path / 'log')!r});"
            "processes.start(['/bin/sh', '-c', 'setsid sleep 300 & echo started'], dict(os.environ), log);"
            "\nwhile not (log.exists() and log.read_text()): time.sleep(0.01)\n"
            "time.sleep(0.2); print(len(processes.descendants(os.getpid()))); processes.kill_descendants();"
            "print(len(processes.descendants(os.getpid())))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "0"], done.stderr
