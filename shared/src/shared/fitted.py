"""How a Variant serves most images on a host: found by optimization, written beside the card, read by the API at load.

cards/<model>.serving.json says it for each Variant that passed the gate, and on which host. On another host nothing of
it holds, and the API takes its defaults.
"""

import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.artifacts import now, read_json, write_json
from shared.errors import LannerError, NotFound

log = logging.getLogger("lanner.fitted")


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
    try:
        found = read_json(_path(root, model))
        if (found["cpu"], found["cores"], found["schema"]) != (cpu_name(), cores, 2):
            return None
        entry = found["variants"][variant]
        best = {row["processes"]: row for row in entry["by_processes"]}[processes]
        fit = Fit(int(best["threads"]), int(best["batch"]), str(entry["device"]), bool(found["target_ms"]))
    except NotFound:
        return None
    except (LannerError, LookupError, TypeError, ValueError) as e:
        if not isinstance(e, LookupError):
            log.warning("%s: the serving figures beside its card are left alone: %s", model, e)
        return None
    return fit if 1 <= fit.threads <= cores and fit.batch >= 1 else None


def cpu_name() -> str:
    """The processor's name as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _path(root: Path, model: str) -> Path:
    return root / "cards" / f"{model}.serving.json"
