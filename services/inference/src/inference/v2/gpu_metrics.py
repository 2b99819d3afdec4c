"""nv_gpu_*: what nvidia-smi says of the GPUs, under the names that Triton's tools read. Nothing where there is none."""

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

FRESH_S = 1.0  # that an answer of nvidia-smi is told again: a call takes long where no process keeps the driver
GAUGES = (("utilization", "share of time the GPU computed, 0 to 1", "utilization.gpu", 0.01),
          ("power_usage", "watts", "power.draw", 1.0),
          ("power_limit", "watts", "power.limit", 1.0),
          ("memory_used_bytes", "memory in use", "memory.used", 1 << 20),
          ("memory_total_bytes", "memory of the GPU", "memory.total", 1 << 20))


class GpuMetrics(Collector):
    """Safe to share among threads: one of them asks, the others take its answer."""

    def __init__(self) -> None:
        self._program = shutil.which("nvidia-smi")
        self._lock = threading.Lock()
        self._rows: list[list[str]] = []
        self._asked = -FRESH_S

    def collect(self) -> Iterator[GaugeMetricFamily]:
        rows = self._fresh() if self._program else []
        for i, (name, what, _, factor) in enumerate(GAUGES if rows else ()):
            family = GaugeMetricFamily(f"nv_gpu_{name}", what, labels=["gpu_uuid"])
            for uuid, *values in rows:
                try:
                    family.add_metric([uuid], float(values[i]) * factor)
                except ValueError:  # "[N/A]": this GPU does not tell
                    continue
            yield family

    def _fresh(self) -> list[list[str]]:
        with self._lock:
            if time.monotonic() - self._asked >= FRESH_S:
                self._rows = _ask(str(self._program))
                self._asked = time.monotonic()
            return self._rows


def _ask(program: str) -> list[list[str]]:
    """[uuid, a text for each of GAUGES] per GPU; none when the driver does not answer."""
    fields = ",".join(["uuid", *(query for _, _, query, _ in GAUGES)])
    try:
        text = subprocess.run([program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"], check=True,
                              capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
