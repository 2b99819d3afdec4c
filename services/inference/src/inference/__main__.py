"""`python -m inference`: the API under granian, until SIGTERM; requests in flight are answered first."""

import logging
import os
import signal
import socket
import tempfile
from importlib import metadata

from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels

from inference.body import BODY_SLOTS
from inference.front import BEHIND, behind
from shared import fitted, gpu
from shared.settings import load, threads

SPARE_THREADS = 64  # for requests without a body while every body slot waits for a slow client
LIBRARIES = ("onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-cu12", "cuda-bindings", "ai-edge-litert")
DRAIN_S = 8  # below the 10 s that the supervisor and Compose allow a process to stop


def check_gpu() -> None:
    """Log what this process predicts on and with. Raises SystemExit as `gpu.check`, which says what to do."""
    log = logging.getLogger("lanner.inference")
    for card in gpu.check():
        log.info("%s, %d MiB, capability %s, driver %s", card.name, card.memory_mib, card.capability, card.driver)
    log.info("libraries: %s", ", ".join(f"{name} {number}" for name, number in installed().items()))


def installed() -> dict[str, str]:
    """Versions of LIBRARIES, of those that are there."""
    names = {d.name for d in metadata.distributions()}
    return {name: metadata.version(name) for name in LIBRARIES if name in names}


def check_address(host: str, port: int) -> None:
    """Several processes share it: then nobody would be told that another program has it. Raises SystemExit."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as e:
        raise SystemExit(f"{host}:{port} can't be listened on: {e.strerror or e}. Set HOST and PORT") from None


def keep_sigterm_over_a_fork() -> None:
    """granian's worker is a fork: until it serves, SIGTERM would run the parent's handler in it, and be lost; also one
    that comes before the child has run at all, so it has to wait until the handler is another one."""
    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    os.register_at_fork(before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}),
                        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}),
                        after_in_child=in_child)


def main() -> None:
    settings = load()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if settings.device == "gpu":
        check_gpu()
    # granian advises against many threads for compute; ours wait, for a slow client or for the Predictor
    logging.getLogger("_granian").addFilter(lambda record: "seems quite high" not in record.getMessage())
    processes = settings.http_processes or fitted.processes(settings.artifacts, threads(settings))
    os.environ["HTTP_PROCESSES"] = str(processes)  # what those that answer read
    if not settings.http_processes:
        logging.getLogger("lanner.inference").info("HTTP_PROCESSES=0: %d, as what is promoted was fitted", processes)
    keep_sigterm_over_a_fork()
    check_address(settings.host, settings.port)
    with tempfile.TemporaryDirectory(prefix="lanner-") as folder:
        os.environ[BEHIND] = f"{folder}/api.sock"
        Granian("inference.app:serve", factory=True, interface=Interfaces.WSGI, uds=behind(),
                workers=processes, blocking_threads=BODY_SLOTS + SPARE_THREADS,
                workers_kill_timeout=DRAIN_S, websockets=False, log_level=LogLevels(settings.log_level.lower())).serve()


if __name__ == "__main__":
    main()
