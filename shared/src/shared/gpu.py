"""GPUs: what this host has, and a lease on one for each job. Imports no CUDA library: the driver's nvidia-smi is asked.

A lease is a flock on the shared volume: the kernel gives it back when its holder dies, and two containers that see the
same GPUs see the same leases.
"""

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.errors import Refused

# The oldest driver that runs CUDA 12 programs: CUDA 12 release notes, table "CUDA Toolkit and Minimum Required Driver
# Version for CUDA Minor Version Compatibility" (docs.nvidia.com/cuda/cuda-toolkit-release-notes), Linux x86_64.
MIN_DRIVER = (525, 60, 13)
FIELDS = "uuid,name,driver_version,memory.total,compute_cap"


@dataclass(frozen=True)
class Gpu:
    """uuid as CUDA_VISIBLE_DEVICES takes it; memory in MiB; capability as "9.0"."""

    uuid: str
    name: str
    driver: str
    memory_mib: int
    capability: str


def find() -> list[Gpu]:
    """The GPUs this process may use, in the driver's order; empty where there is no driver.

    Honours CUDA_VISIBLE_DEVICES when it lists indices or uuids.
    """
    try:
        text = subprocess.run(["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"], check=True,
                              capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    gpus = [Gpu(uuid, name, driver, int(float(memory)), capability) for uuid, name, driver, memory, capability in rows]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    wanted = [c.strip() for c in chosen.split(",") if c.strip()]
    return [g for i, g in enumerate(gpus) if str(i) in wanted or g.uuid in wanted]


def check() -> list[Gpu]:
    """The GPUs of a host that must have one, for the start of a process under DEVICE=gpu.

    Raises:
        SystemExit: no GPU is visible, or the driver is older than CUDA 12 needs. The sentence says what to do.
    """
    gpus = find()
    if not gpus:
        raise SystemExit("DEVICE=gpu, but no GPU is visible (nvidia-smi shows none). Install the NVIDIA driver and the "
                         "NVIDIA Container Toolkit, or set DEVICE=cpu.")
    for gpu in gpus:
        if tuple(int(part) for part in gpu.driver.split(".")) < MIN_DRIVER:
            raise SystemExit(f"{gpu.name}: driver {gpu.driver} is too old, CUDA 12 needs at least "
                             f"{'.'.join(map(str, MIN_DRIVER))}. Update the driver on the host, or set DEVICE=cpu.")
    return gpus


@contextmanager
def lease(root: Path, waiting: Callable[[], None]) -> Iterator[Gpu]:
    """Hold one GPU alone; until one is free, call `waiting` (which may raise) about twice a second.

    Sets CUDA_VISIBLE_DEVICES to it, so it must be taken before any CUDA library is imported.

    Raises:
        Refused: the host has no GPU.
    """
    gpus = find()
    if not gpus:
        raise Refused("this job needs a GPU and none is visible; set DEVICE=cpu, or give the container a GPU",
                      "gpu_missing")
    folder = root / ".gpus"
    folder.mkdir(parents=True, exist_ok=True)
    files = [open(folder / f"{gpu.uuid}.lock", "ab") for gpu in gpus]  # noqa: SIM115  closed below
    try:
        while True:
            for gpu, file in zip(gpus, files, strict=True):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu.uuid
                yield gpu
                return
            waiting()
            time.sleep(0.5)
    finally:
        for file in files:
            file.close()
