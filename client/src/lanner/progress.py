"""Live progress of uploads and jobs: bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lanner.client import Client, Json
from lanner.errors import LannerError

LINE_EVERY_S = 10.0  # without a terminal, at most this often a line a job, unless its stage or state has changed


def plain_console() -> Console:
    """Prints what it is given: labels and messages may hold brackets or colons, which rich would take for its own."""
    return Console(highlight=False, markup=False, emoji=False)


def eta(seconds: float | None) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(job: Json) -> tuple[float, str, str]:
    """(percent, ETA, what is going on) of a job."""
    state, progress = job["state"], job["progress"]
    if state not in ("running", "queued", "waiting") or not progress:
        return (100.0 if state == "succeeded" else 0.0), "", state
    if "step" not in progress:  # it waits, such as for disk space
        return 0.0, "", str(progress["stage"])
    percent = progress["percent"] or 0.0
    words = [f"{progress['stage']} {progress['step']:g}/{progress['of']:g}"]
    words += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in progress["metrics"].items()]
    return percent, eta(progress["eta_s"]), "  ".join(words)


@contextmanager
def upload_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback for Client.upload."""
    if not console.is_terminal:
        yield lambda sent, total: None
        return
    with _bars(console) as bars:
        task = bars.add_task(f"upload {what}", total=None, eta="", doing="")
        began = time.monotonic()

        def show(sent: int, total: int) -> None:
            left = (time.monotonic() - began) / sent * (total - sent) if sent else None
            doing = f"{sent / 1e6:.1f}/{total / 1e6:.1f} MB"
            bars.update(task, completed=sent, total=total, eta=eta(left), doing=doing)

        yield show


def watch(client: Client, jobs: dict[str, str], console: Console) -> dict[str, Json]:
    """Show the labelled jobs until all have ended. Returns each as it ended.

    Raises:
        LannerError: one has failed or was cancelled; code and message are the job's.
    """
    last: dict[str, Json] = {}
    follow = client.follow_all(jobs)
    if console.is_terminal:
        with _bars(console) as bars:
            tasks = {label: bars.add_task(label, total=100, eta="", doing="") for label in jobs}
            for label, job in follow:
                percent, left, doing = describe(job)
                bars.update(tasks[label], completed=percent, eta=left, doing=doing)
                last[label] = _unless_failed(label, job)
        return last
    printed: dict[str, tuple[Any, float]] = {}
    for label, job in follow:
        percent, left, doing = describe(job)
        key = (job["state"], (job["progress"] or {}).get("stage"))
        before, at = printed.get(label, (None, 0.0))
        if key != before or time.monotonic() - at > LINE_EVERY_S:
            console.print(f"{label}: {percent:.0f} %  {doing}" + (f"  ETA {left}" if left else ""), soft_wrap=True)
            printed[label] = (key, time.monotonic())
        last[label] = _unless_failed(label, job)
    return last


def _unless_failed(label: str, job: Json) -> Json:
    if job["state"] in ("failed", "cancelled"):
        error = job["error"] or {"code": job["state"], "message": job["state"]}
        raise LannerError(f"{label} {job['state']}: {error['message']}", error["code"])
    return job


def _bars(console: Console) -> Progress:
    return Progress(TextColumn("{task.description:<12}", markup=False), BarColumn(bar_width=30),
                    TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[eta]:>7}"),
                    TextColumn("{task.fields[doing]}", markup=False), console=console)
