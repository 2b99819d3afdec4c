"""Named points at which a test lets the process die: FAULT=<point>[:worker][:always]; a no-op otherwise.

`:worker` takes the worker that forked this process along, `:always` dies every time instead of once.
"""

import os
import signal

from shared import settings

POINTS = (
    "after-pop", "mid-decode", "mid-train", "mid-export", "before-rename", "after-rename",
    "before-record-ends", "before-alias",
)


def point(name: str) -> None:
    """Die here by SIGKILL if FAULT names this point and it has not fired before."""
    config = settings.load()
    wanted, *options = config.fault.split(":")
    if wanted != name:
        return
    if "always" not in options:
        fired = config.artifacts / ".faults"
        fired.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(fired / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    if "worker" in options:
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
