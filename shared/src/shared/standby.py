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


class Standby:
    """Forks at once. The child calls `begin`, imports `modules`, waits for `hand_over`, and calls `work` with what that
    was given; `work` must not return.

    A child whose worker has ended ends too, once it has imported. One that can't import a module waits all the same:
    the job will fail on it, with a record of why.

    Raises OSError where no process can be had.
    """

    def __init__(self, modules: Sequence[str], begin: Callable[[], None], work: Callable[[dict[str, str]], None]):
        read, self._write = os.pipe()
        try:
            self.pid = os.fork()
        except OSError:
            os.close(read)
            os.close(self._write)
            raise
        if self.pid == 0:
            os.close(self._write)
            _wait(read, modules, begin, work)
        os.close(read)

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
            os.close(self._write)

    def end(self) -> None:
        """End a child that was handed nothing."""
        os.close(self._write)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _wait(read: int, modules: Sequence[str], begin: Callable[[], None],
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
        with open(read, encoding="utf-8") as told:
            line = told.readline()
        if line:  # else the worker has closed its end
            work(json.loads(line))
    except BaseException:
        log.exception("the process that waited for a job")
    finally:
        os._exit(1)
