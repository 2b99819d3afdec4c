"""The local stack as plain processes: `python -m shared.supervisor up|run|down|status|url --state FOLDER`.

Two processes watch over it. The supervisor starts the programs, restarts what dies and stops them in order. Its parent,
the guard, does nothing but wait: when the supervisor is gone, even by kill -9, it ends every process that is left. Both
adopt orphans, so a worker's forked children are found even after the worker died.
"""

import argparse
import errno
import fcntl
import json
import os
import select
import signal
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from redis import RedisError

from shared import processes, stack
from shared.artifacts import write_json
from shared.queue import connect
from shared.settings import load
from shared.stack import Program, Stack

START_LIMIT_S = 180.0
STOP_LIMIT_S = 90.0
QUICK_S = 10.0  # a process that lived shorter than this counts as having died at once
QUICK_DEATHS = 3
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def say(text: str) -> None:
    print(text, flush=True)


@dataclass
class Running:
    """A program's process: pid 0 while it is down, until `retry_at`."""

    program: Program
    pid: int = 0
    started: float = 0.0
    retry_at: float = 0.0
    deaths: int = 0
    quick_deaths: int = 0


class Supervisor:
    """Keeps the programs of a Stack running. `run()` returns 0 after an ordered stop, 1 if the stack never came up."""

    def __init__(self, the_stack: Stack, owner: int):
        self.stack, self.owner, self.ready = the_stack, owner, False
        self.running = [Running(p) for p in the_stack.programs]
        self.owner_fd = os.pidfd_open(owner) if owner else -1

    def run(self) -> int:
        began = time.monotonic()
        failure = ""
        while not failure and not self._asked_to_stop():
            self._collect()
            self._start_due()
            if not self.ready:
                failure = self._look_whether_ready(time.monotonic() - began)
        if failure:
            say(failure)
        self._stop()
        return 1 if failure else 0

    def _asked_to_stop(self) -> bool:
        """Wait a moment for a signal; True if it asks to stop, or the process that this stack is for has ended."""
        info = signal.sigtimedwait(SIGNALS, 0.2)
        if info and info.si_signo != signal.SIGCHLD:
            say(f"stopping on {signal.Signals(info.si_signo).name}")
            return True
        if self.owner_fd >= 0 and select.select([self.owner_fd], [], [], 0)[0]:
            say(f"stopping: process {self.owner}, which this stack was started for, has ended")
            return True
        return False

    def _collect(self) -> None:
        """Note which programs have ended, end what they forked, and set when each is started again."""
        ended = dict(processes.reap())
        for r in self.running:
            if r.pid not in ended:
                continue
            processes.kill(processes.session_members(r.pid))
            lived, code = time.monotonic() - r.started, ended[r.pid]
            r.pid, r.deaths = 0, r.deaths + 1
            r.quick_deaths = r.quick_deaths + 1 if lived < QUICK_S else 0
            wait = min(30.0, 0.5 * 2 ** min(r.quick_deaths, 6)) if r.quick_deaths else 0.0
            r.retry_at = time.monotonic() + wait
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            say(f"{r.program.name} ended after {lived:.1f} s ({how}); starting it again in {wait:g} s")
            if r.quick_deaths >= QUICK_DEATHS:
                say(f"{r.program.name} ended at once {r.quick_deaths} times in a row; its last lines:\n{self._tail(r)}")
            self._write()

    def _start_due(self) -> None:
        for r in self.running:
            if r.pid or r.retry_at > time.monotonic():
                continue
            if r.program.name != "valkey" and not self._valkey_answers():
                break
            r.pid = processes.start(r.program.argv, self.stack.env, self.stack.log(r.program.name))
            r.started = time.monotonic()
            self._write()

    def _valkey_answers(self) -> bool:
        try:
            return bool(connect(self.stack.settings, timeout_s=1.0).ping())
        except RedisError:
            return False

    def _look_whether_ready(self, elapsed: float) -> str:
        """Set `ready` once everything answers; returns why the stack can't come up, or nothing."""
        needed = [r for r in self.running if not r.program.optional]
        for r in needed:
            if r.quick_deaths >= QUICK_DEATHS:
                return f"the stack can't start: {r.program.name} ends at once; see {self.stack.log(r.program.name)}"
        missing = [r.program.name for r in needed if not r.pid] or self._silent()
        if not missing:
            self.ready = True
            self._write()
            say(f"ready at {self.stack.url} after {elapsed:.1f} s")
        elif elapsed > START_LIMIT_S:
            return f"the stack is not up after {START_LIMIT_S:.0f} s: no answer from {', '.join(missing)}"
        return ""

    def _silent(self) -> list[str]:
        """Workers that have not registered yet, and the API while it does not answer."""
        try:
            redis = connect(self.stack.settings, timeout_s=1.0)
            silent = [w for w in stack.WORKERS if not redis.scard(f"rq:workers:{w}")]
        except RedisError:
            return ["valkey"]
        try:
            with urllib.request.urlopen(f"{self.stack.url}/livez", timeout=1.0):
                return silent
        except OSError:
            return [*silent, "inference"]

    def _stop(self) -> None:
        """SIGTERM in reverse order, the workers together; SIGKILL for what outstays its grace."""
        groups: list[list[Running]] = []
        for r in reversed([r for r in self.running if r.pid]):
            if groups and r.program.name in stack.WORKERS and groups[-1][0].program.name in stack.WORKERS:
                groups[-1].append(r)
            else:
                groups.append([r])
        for group in groups:
            for r in group:
                with suppress(ProcessLookupError):
                    os.kill(r.pid, signal.SIGTERM)
            end = time.monotonic() + max(r.program.grace_s for r in group)
            left = {r.pid for r in group}
            while left and time.monotonic() < end:
                left -= {pid for pid, _ in processes.reap()}
                signal.sigtimedwait([signal.SIGCHLD], 0.1)
            for r in group:
                if r.pid in left:
                    say(f"{r.program.name} did not stop within {r.program.grace_s:g} s: killed")
                processes.kill(processes.session_members(r.pid))
        processes.kill_descendants()

    def _tail(self, r: Running, lines: int = 15) -> str:
        text = self.stack.log(r.program.name).read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(f"    {line}" for line in text)

    def _write(self) -> None:
        write_json(self.stack.state / "stack.json", {
            "pid": os.getppid(), "url": self.stack.url, "owner": self.owner, "ready": self.ready,
            "tensorboard": any(r.program.name == "tensorboard" for r in self.running),
            "processes": {r.program.name: {"pid": r.pid, "restarts": r.deaths} for r in self.running}})


def run(state: Path, owner: int, tensorboard: bool) -> int:
    """Be the guard of a stack until it has stopped: hold its lock, pass signals on, leave no process behind."""
    lock = _lock(state)
    if lock is None:
        say("the stack of this folder is already up")
        return 1
    (state / "stack.json").unlink(missing_ok=True)
    the_stack = stack.prepare(state, os.environ, tensorboard)
    processes.adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        processes.die_with_parent(signal.SIGTERM)
        processes.adopt_orphans()
        os._exit(Supervisor(the_stack, owner).run() if os.getppid() == guard else 1)
    code = None
    while code is None:
        signum = signal.sigwait(SIGNALS)
        if signum != signal.SIGCHLD:
            os.kill(child, signal.SIGTERM)
        code = dict(processes.reap()).get(child)
    if code < 0:
        say(f"the supervisor was killed (signal {-code}): ending every process of the stack")
    processes.kill_descendants()
    (state / "stack.json").unlink(missing_ok=True)
    lock.close()
    return 1 if code else 0


def _lock(state: Path) -> TextIO | None:
    """The stack's lock, or None while another process holds it. Guard and supervisor hold it together."""
    state.mkdir(parents=True, exist_ok=True)
    f = open(state / "stack.lock", "a")  # noqa: SIM115 - held for the life of the process
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        f.close()
        if e.errno != errno.EWOULDBLOCK:
            raise
        return None
    return f


def _is_up(state: Path) -> bool:
    lock = _lock(state)
    if lock is None:
        return True
    lock.close()
    return False


def _read(state: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((state / "stack.json").read_text()))
    except FileNotFoundError:
        return {}


def up(state: Path, owner: int, tensorboard: bool) -> int:
    """Start the stack in the background and return when it is ready."""
    if _is_up(state):
        return _wait_ready(state, 0, "Lanner is already up")
    (state / "stack.json").unlink(missing_ok=True)
    settings = load(stack.with_cpu(os.environ))
    if not stack.port_is_free(settings.host, settings.port):
        say(f"port {settings.port} of {settings.host} is taken by another program: stop that one, or choose another "
            f"with PORT=<number>")
        return 1
    if tensorboard and not stack.port_is_free("127.0.0.1", stack.TENSORBOARD_PORT):
        say(f"port {stack.TENSORBOARD_PORT} is taken: going on without TensorBoard")
        tensorboard = False
    log = state / "logs" / "supervisor.log"
    offset = log.stat().st_size if log.exists() else 0
    argv = [sys.executable, "-m", "shared.supervisor", "run", "--state", str(state), "--owner", str(owner)]
    pid = processes.start([*argv, "--tensorboard"] if tensorboard else argv, os.environ, log)
    return _wait_ready(state, pid, "Lanner is up", offset)


def _wait_ready(state: Path, pid: int, greeting: str, offset: int = 0) -> int:
    end = time.monotonic() + START_LIMIT_S + STOP_LIMIT_S
    while time.monotonic() < end:
        seen = _read(state)
        if seen.get("ready"):
            board = f", TensorBoard at http://127.0.0.1:{stack.TENSORBOARD_PORT}" if seen["tensorboard"] else ""
            say(f"{greeting} at {seen['url']}{board}; logs in {state / 'logs'}; ./run down stops it.")
            return 0
        over = os.waitpid(pid, os.WNOHANG)[0] == pid if pid else not _is_up(state)
        if over:
            break
        time.sleep(0.1)
    log = state / "logs" / "supervisor.log"
    say(f"The stack did not come up.\n{log.read_bytes()[offset:].decode(errors='replace').strip()}")
    return 1


def down(state: Path, owner: int) -> int:
    """Stop the stack and wait until it has; with an owner, only the stack that was started for it."""
    if not _is_up(state):
        if not owner:
            say("Lanner is not up.")
        return 0
    seen = _read(state)
    if owner and seen.get("owner") != owner:
        return 0
    end = time.monotonic() + STOP_LIMIT_S
    while not seen and _is_up(state) and time.monotonic() < end:  # it is only just starting
        time.sleep(0.1)
        seen = _read(state)
    with suppress(ProcessLookupError, KeyError):  # the guard is gone, and the supervisor is stopping
        guard = os.pidfd_open(seen["pid"])
        signal.pidfd_send_signal(guard, signal.SIGTERM)
        select.select([guard], [], [], STOP_LIMIT_S)
    while _is_up(state):
        if time.monotonic() > end:
            say(f"the stack did not stop within {STOP_LIMIT_S:.0f} s: see {state / 'logs' / 'supervisor.log'}")
            return 1
        time.sleep(0.05)
    say("Lanner is down.")
    return 0


def status(state: Path) -> int:
    if not _is_up(state):
        say("Lanner is not up.")
        return 3
    seen = _read(state)
    say(f"{'up' if seen.get('ready') else 'starting'} at {seen.get('url')}")
    for name, p in seen.get("processes", {}).items():
        say(f"  {name:14} {'pid ' + str(p['pid']) if p['pid'] else 'down':12} restarts {p['restarts']}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.supervisor", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("up", "run", "down", "status", "url"))
    parser.add_argument("--state", type=Path, required=True, help="the state folder")
    parser.add_argument("--owner", type=int, default=0, help="pid: the stack ends when that process does")
    parser.add_argument("--tensorboard", action="store_true")
    args = parser.parse_args()
    state = args.state.resolve()
    match args.command:
        case "up":
            return up(state, args.owner, args.tensorboard)
        case "run":
            return run(state, args.owner, args.tensorboard)
        case "down":
            return down(state, args.owner)
        case "status":
            return status(state)
        case _:
            say(str(_read(state).get("url", "")))
            return 0


if __name__ == "__main__":
    sys.exit(main())
