"""Processes of this machine, for the supervisor: start one in its own session, find what descends from it, end it all.

Linux alone: /proc, and prctl for adopting orphans.
"""

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that none can slip away."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signum: int) -> None:
    """Get `signum` when the thread that forked this process ends."""
    _prctl(PR_SET_PDEATHSIG, signum)


def start(argv: Sequence[str], env: Mapping[str, str], log: Path) -> int:
    """Run a program in a session of its own, its output appended to `log`; returns its pid."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return os.posix_spawn(
        argv[0], list(argv), dict(env), setsid=True,
        setsigmask=[], setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                      (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                      (os.POSIX_SPAWN_DUP2, 1, 2)])


def reap() -> Iterator[tuple[int, int]]:
    """(pid, exit code, negative for a signal) of every child that has ended, adopted ones included."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def _table() -> dict[int, tuple[int, int]]:
    """pid -> (parent, session) of every live process."""
    table = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(OSError):  # it ended while we looked
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                table[int(name)] = (int(fields[1]), int(fields[3]))
    return table


def descendants(pid: int) -> list[int]:
    """Every live process below `pid`."""
    table, found = _table(), [pid]
    for parent in found:
        found += [child for child, (p, _) in table.items() if p == parent]
    return found[1:]


def session_members(session: int) -> list[int]:
    return [pid for pid, (_, s) in _table().items() if s == session]


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_descendants() -> None:
    """End everything below this process, and wait until it is gone. A fork may race the look, so look again."""
    while left := descendants(os.getpid()):
        kill(left)
        time.sleep(0.02)
        list(reap())
    list(reap())
