"""The other processes of this API, where HTTP_PROCESSES makes several: asked for their figures, told what to do.

Each listens on a Unix socket in a folder that only their user may enter. A call that one of them makes runs here in the
thread of that connection. None joins later and none leaves alone: when one ends they all do.
"""

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from shared.errors import LannerError, Unavailable

PATIENCE_S = 5.0
Actions = Mapping[str, Callable[..., Any]]


class Peers:
    """Safe to share among threads. Without a folder there are no others."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._own = folder / f"{os.getpid()}.peer" if folder else None

    def serve(self, actions: Actions) -> None:
        """Let the others call these by name, from now on for as long as the process lives."""
        if self._own is not None:
            listener = Listener(str(self._own), "AF_UNIX", backlog=64)
            threading.Thread(target=_accept, args=(listener, actions), name="peers", daemon=True).start()

    def ask(self, action: str, *args: Any, patience_s: float = PATIENCE_S) -> list[Any]:
        """What each of the others answers; they must be able to send it as a pickle.

        Raises what an action does, and Unavailable where one does not answer in time.
        """
        if self._folder is None:
            return []
        return [_call(path, action, args, patience_s) for path in sorted(self._folder.glob("*.peer"))
                if path != self._own]


def _call(path: Path, action: str, args: tuple[Any, ...], patience_s: float) -> Any:
    try:
        with Client(str(path), "AF_UNIX") as connection:
            connection.send((action, args))
            if not connection.poll(patience_s):
                raise Unavailable(f"process {path.stem} of this API does not answer", "busy")
            kind, value, code = connection.recv()
    except (OSError, EOFError) as e:
        raise Unavailable(f"process {path.stem} of this API does not answer: {e}", "busy") from None
    if kind is None:
        return value
    raise kind(value, code)


def _accept(listener: "Listener", actions: Actions) -> None:
    while True:
        try:
            connection = listener.accept()
        except OSError:  # who called is gone already
            continue
        threading.Thread(target=_answer, args=(connection, actions), daemon=True).start()


def _answer(connection: "Connection[Any, Any]", actions: Actions) -> None:
    with connection:
        try:
            action, args = connection.recv()
            told: tuple[Any, Any, Any] = None, actions[action](*args), None
        except LannerError as e:
            told = type(e), str(e), e.code
        except Exception as e:  # the boundary: whatever it is, who called must not wait for it
            told = Unavailable, f"{type(e).__name__}: {e}", "unavailable"
        with suppress(OSError):  # it waits no longer
            connection.send(told)
