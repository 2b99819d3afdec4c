"""Whether the process is asked to end: for answers that would otherwise go on for ever."""

import os
import select
import signal

READ, _write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # nobody reads: once readable, always readable


def notice_signals() -> None:
    """Have every signal that Python handles noticed, whoever handles it: granian sets its own handlers later."""
    signal.set_wakeup_fd(_write, warn_on_full_buffer=False)


def wait(seconds: float) -> bool:
    """Sleep; whether the process was asked to end meanwhile or before."""
    return bool(select.select([READ], [], [], seconds)[0])
