"""`python -m inference`: the API under granian, until SIGTERM; requests in flight are answered first."""

import logging
import os
import signal

from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels

from inference.body import BODY_SLOTS
from shared.settings import load

SPARE_THREADS = 64  # for requests without a body while every body slot waits for a slow client
DRAIN_S = 8  # below the 10 s that the supervisor and Compose allow a process to stop


def main() -> None:
    settings = load()
    # granian advises against many threads for compute; ours wait, for a slow client or for the Predictor
    logging.getLogger("_granian").addFilter(lambda record: "seems quite high" not in record.getMessage())
    # granian's worker is a fork: until it serves, SIGTERM would run the parent's handler in it, and be lost
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    Granian("inference.app:from_environment", factory=True, interface=Interfaces.WSGI, address=settings.host,
            port=settings.port, workers=1, blocking_threads=BODY_SLOTS + SPARE_THREADS, workers_kill_timeout=DRAIN_S,
            websockets=False, log_level=LogLevels(settings.log_level.lower())).serve()


if __name__ == "__main__":
    main()
