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
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from shared import processes, stack
from shared.running import SIGNALS, START_LIMIT_S, Supervisor, say
from shared.settings import load

STOP_LIMIT_S = 90.0


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
