"""A process that waits for a worker's next job with TensorFlow imported, so that the job begins at once.

It is forked from the worker as a job's process is, only earlier: the worker imports nothing of a GPU, and every job
still has a process of its own that ends with it. An import touches no GPU; it takes seconds, and of the host's memory
0.65 GB while the process waits (RSS with TensorFlow 2.21 on x86-64).
"""

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from importlib import import_module

log = logging.getLogger("lanner.worker")
READY = b"1"


class Standby:
    """Forks at once. The child calls `begin`, imports `modules`, waits for `hand_over`, and calls `work` with what that
    was given; `work` must not return.

    A child whose worker has ended ends too, once it has imported. One that can't import a module waits all the same:
    the job will fail on it, with a record of why.

    Raises OSError where no process can be had.
    """

    def __init__(self, modules: Sequence[str], begin: Callable[[], None], work: Callable[[dict[str, str]], None]):
        read, self._write = os.pipe()
        self._imported, tell = os.pipe()
        os.set_blocking(self._imported, False)
        try:
            self.pid = os.fork()
        except OSError:
            for end in (read, self._write, self._imported, tell):
                os.close(end)
            raise
        if self.pid == 0:
            os.close(self._write)
            os.close(self._imported)
            _wait(read, tell, modules, begin, work)
        os.close(read)
        os.close(tell)
        self._is_ready = False

    @property
    def is_ready(self) -> bool:
        """Whether the child has imported all."""
        if not self._is_ready:
            with contextlib.suppress(BlockingIOError):
                self._is_ready = os.read(self._imported, 1) == READY
        return self._is_ready

    def hand_over(self, **job: str) -> bool:
        """Give the child its job; False where it is not there any more."""
        try:
            alive = os.waitpid(self.pid, os.WNOHANG)[0] == 0
            if alive:
                os.write(self._write, json.dumps(job).encode() + b"\n")
            return alive
        except (BrokenPipeError, ChildProcessError):
            return False
        finally:
            self._close()

    def end(self) -> None:
        """End a child that was handed nothing."""
        self._close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _close(self) -> None:
        os.close(self._write)
        os.close(self._imported)


def _wait(read: int, tell: int, modules: Sequence[str], begin: Callable[[], None],
          work: Callable[[dict[str, str]], None]) -> None:
    """The child's life; it does not come back."""
    try:
        os.setpgrp()  # as RQ has it of a job's process: it is stopped with all that it started
        begin()
        for name in modules:
            try:
                import_module(name)
            except Exception:  # a library may raise what it likes when it is imported
                log.warning("%s can't be imported: the next job will tell", name, exc_info=True)
        with contextlib.suppress(BrokenPipeError):  # the worker is gone, as the next line tells
            os.write(tell, READY)
        os.close(tell)
        with open(read, encoding="utf-8") as told:
            line = told.readline()
        if line:  # else the worker has closed its end
            work(json.loads(line))
    except BaseException:
        log.exception("the process that waited for a job")
    finally:
        os._exit(1)
