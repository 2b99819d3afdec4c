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
    """Threads of the runtime, and the most images that run together. device: what computed where this was found."""

    threads: int
    batch: int
    device: str


def write_fits(root: Path, model: str, cores: int, target_ms: int, variants: dict[str, dict[str, Any]]) -> None:
    """variants: of each its `threads`, `batch` and `device`, and what was measured; cores: that were there to take."""
    write_json(_path(root, model), {"schema": 1, "model": model, "created_at": now(), "cpu": cpu_name(),
                                    "cores": cores, "target_ms": target_ms, "variants": variants})


def read_fit(root: Path, model: str, variant: str, cores: int) -> Fit | None:
    """What was found for this Variant on this host; None where nothing was, or what is written can't be used."""
    try:
        found = read_json(_path(root, model))
        if (found["cpu"], found["cores"]) != (cpu_name(), cores):
            return None
        entry = found["variants"][variant]
        fit = Fit(int(entry["threads"]), int(entry["batch"]), str(entry["device"]))
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
