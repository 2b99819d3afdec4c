"""How a Variant serves most images on a host: found by optimization, written beside the card, read by the API at load.

cards/<model>.serving.json says it for each Variant that passed the gate, and on which host. On another host nothing of
it holds, and the API takes its defaults.
"""

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.artifacts import aliases, names, now, read_json, versions, write_json
from shared.errors import LannerError, NotFound

log = logging.getLogger("lanner.fitted")
MOST_PROCESSES = 8  # that are tried, and that start by themselves


@dataclass(frozen=True)
class Fit:
    """Threads of the runtime in each process, and the most images that run together there.

    device: what computed where this was found. bounded: a target of latency was kept, which holds for no larger batch.
    """

    threads: int
    batch: int
    device: str
    bounded: bool = False


def write_fits(root: Path, model: str, cores: int, target_ms: int, variants: dict[str, dict[str, Any]]) -> None:
    """variants: of each `device`, and `by_processes`, a list of the `processes`, `threads` and `batch` that serve most
    with so many; cores: that were there to take."""
    write_json(_path(root, model), {"schema": 2, "model": model, "created_at": now(), "cpu": cpu_name(),
                                    "cores": cores, "target_ms": target_ms, "variants": variants})


def read_fit(root: Path, model: str, variant: str, cores: int, processes: int = 1) -> Fit | None:
    """What was found for this Variant on this host, where so many processes share its cores.

    None where nothing was, or what is written can't be used.
    """
    fit: Fit | None = None
    with _unusable(model):
        found, entry = _entry(root, model, variant, cores)
        rows = {row["processes"]: row for row in entry["by_processes"]}
        # On a GPU threads make no difference: until several processes are tried they take what one does.
        best = rows[processes if processes in rows or entry["device"] == "cpu" else 1]
        fit = Fit(int(best["threads"]), int(best["batch"]), str(entry["device"]), bool(found["target_ms"]))
    return fit if fit and 1 <= fit.threads <= cores and fit.batch >= 1 else None


def processes(root: Path, cores: int) -> int:
    """With how many processes what production points at serves most on this host: of several Names the most, 1 where
    nothing was found.
    """
    most = 1
    for name in names(root):
        with _unusable(name):
            record = aliases(root, name)["production"]
            model = versions(root, name)[record["version"]]
            most = max(most, min(MOST_PROCESSES, int(_entry(root, model, record["variant"], cores)[1]["processes"])))
    return most


def _entry(root: Path, model: str, variant: str, cores: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file beside a card, and what it says of this Variant. Raises LookupError where that is not of this host."""
    found = read_json(_path(root, model))
    if (found["cpu"], found["cores"], found["schema"]) != (cpu_name(), cores, 2):
        raise LookupError
    return found, found["variants"][variant]


@contextmanager
def _unusable(what: str) -> Iterator[None]:
    """What is not there, or not of this host, is nothing; what makes no sense is said."""
    try:
        yield
    except (NotFound, LookupError):
        pass
    except (LannerError, TypeError, ValueError) as e:
        log.warning("%s: what its card says of serving is left alone: %s", what, e)


def cpu_name() -> str:
    """The processor's name as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _path(root: Path, model: str) -> Path:
    return root / "cards" / f"{model}.serving.json"
