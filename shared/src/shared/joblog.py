"""What an attempt at a job logs, beside its record: jobs/<id>/attempt-<n>.log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
MOST = 1 << 20  # bytes of one attempt's log; what comes after goes to the worker's own alone


class _Capped(logging.FileHandler):
    """A file that takes no more once it is long, and none where the disk is full."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.stream is None or self.stream.tell() < MOST:
                super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """The worker's own log has it."""


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write what this process logs to `path`, too."""
    handler = _Capped(path, "a", encoding="utf-8", delay=True, errors="backslashreplace")
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        with suppress(OSError):  # on a full disk
            handler.close()
