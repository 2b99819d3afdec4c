"""Keeping a Stack's programs running: start, restart with growing pauses, tell when all are ready, stop in order."""

import os
import select
import signal
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass

from redis import RedisError

from shared import processes, stack
from shared.artifacts import write_json
from shared.queue import connect
from shared.stack import Program, Stack

START_LIMIT_S = 180.0
QUICK_S = 10.0  # a process that lived shorter than this counts as having died at once
QUICK_DEATHS = 3
RETRY_S = 5.0  # after a process could not be started at all
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def say(text: str) -> None:
    with suppress(OSError):  # its log may be on a full disk
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
            try:
                r.pid = processes.start(r.program.argv, self.stack.env, self.stack.log(r.program.name))
            except OSError as e:
                r.retry_at = time.monotonic() + RETRY_S
                say(f"{r.program.name} can't be started ({e}); trying again in {RETRY_S:g} s")
                continue
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
        """For those who ask how the stack is. It goes on without: a full disk must not stop what still serves."""
        try:
            write_json(self.stack.state / "stack.json", {
                "pid": os.getppid(), "url": self.stack.url, "owner": self.owner, "ready": self.ready,
                "tensorboard": any(r.program.name == "tensorboard" for r in self.running),
                "processes": {r.program.name: {"pid": r.pid, "restarts": r.deaths} for r in self.running}})
        except OSError as e:
            say(f"stack.json can't be written: {e}")
