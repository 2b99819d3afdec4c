"""GPUs: what this host has, and a lease on one or several for each job.

Imports no CUDA library: the driver's nvidia-smi is asked.

A lease is a flock on the shared volume: the kernel gives it back when its holder dies, and two containers that see the
same GPUs see the same leases.
"""

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shared.errors import Refused, Unavailable

# The oldest driver that runs CUDA 12 programs: CUDA 12 release notes, table "CUDA Toolkit and Minimum Required Driver
# Version for CUDA Minor Version Compatibility" (docs.nvidia.com/cuda/cuda-toolkit-release-notes), Linux x86_64.
MIN_DRIVER = (525, 60, 13)
_kept: list[BinaryIO] = []  # locks of this process, which end with it
FIELDS = "uuid,name,driver_version,memory.total,compute_cap"


@dataclass(frozen=True)
class Gpu:
    """uuid as CUDA_VISIBLE_DEVICES takes it; memory in MiB, 0 if not known; capability as "9.0"."""

    uuid: str
    name: str
    driver: str
    memory_mib: int
    capability: str


def find() -> list[Gpu]:
    """The GPUs this process may use, in the driver's order or that of CUDA_VISIBLE_DEVICES, which may list indices or
    uuids; empty where there is no driver.
    """
    try:
        # Its exit status says that one GPU is in trouble even where it lists the others.
        text = subprocess.run(["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"], check=False,
                              capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    gpus = [Gpu(uuid, name, driver, int(_number(memory)), capability) for uuid, name, driver, memory, capability in
            (row for row in rows if len(row) == 5 and row[0].startswith(("GPU-", "MIG-")) and row[2][:1].isdigit())]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    wanted = [c.strip() for c in chosen.split(",") if c.strip()]
    named = {**{str(i): g for i, g in enumerate(gpus)}, **{g.uuid: g for g in gpus}}
    return list(dict.fromkeys(named[name] for name in wanted if name in named))


def _number(text: str) -> float:
    """0 where the driver has no figure, as for memory that a GPU shares with the host."""
    try:
        return float(text)
    except ValueError:
        return 0.0


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
def lease(root: Path, waiting: Callable[[], None], count: int = 1) -> Iterator[list[Gpu]]:
    """Hold `count` GPUs alone; until as many are free, call `waiting` (which may raise) about twice a second.

    All or none are taken, so no two jobs can wait for each other's. One at a time looks for GPUs, so a job that needs
    many is not passed by forever; those behind it wait even where a GPU is free that would do for them.

    Sets CUDA_VISIBLE_DEVICES to them, so it must be taken before any CUDA library is used; an import alone is none.

    Raises:
        Unavailable: none can be seen now, though the worker saw one when it began.
        Refused: the host has not that many GPUs.
    """
    gpus = find()
    if not gpus:
        raise Unavailable("this job needs a GPU and nvidia-smi shows none: look at the driver's log on the host, or "
                          "set DEVICE=cpu", "gpu_missing")
    if len(gpus) < count:
        raise Refused(f"this job needs {count} GPUs and {len(gpus)} can be seen: set GPUS_PER_TRAINING to at most "
                      f"{len(gpus)}, or give the container more", "gpu_missing")
    folder = root / ".gpus"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with open(folder / "turn.lock", "ab") as turn:
            while not _lock(turn):
                waiting()
                time.sleep(0.5)
            while not (mine := _take(folder, gpus, count, held)):
                waiting()
                time.sleep(0.5)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(g.uuid for g in mine)
        yield mine


def share(folder: Path, processes: int) -> Gpu:
    """The GPU of one of so many processes that do the same: each takes the next one, and all are of one model: that of
    the first in CUDA_VISIBLE_DEVICES, else the most capable. Others may have it, too.

    folder: where nobody but these processes leaves anything. Sets CUDA_VISIBLE_DEVICES to the GPU, so it must be called
    before any CUDA library is used. Raises Unavailable: none can be seen.
    """
    gpus = find()
    if not gpus:
        raise Unavailable("no GPU can be seen now, though one was when the API began: look at the driver's log on the "
                          "host, or set DEVICE=cpu", "gpu_missing")
    # Without a choice the most capable, as CUDA has it by itself.
    first = gpus[0] if "CUDA_VISIBLE_DEVICES" in os.environ else max(
        gpus, key=lambda gpu: (_number(gpu.capability), gpu.memory_mib))
    alike = [gpu for gpu in gpus if gpu.name == first.name]
    number = os.getpid()  # where all have theirs: one that is to end is replaced before it does
    for free in range(processes):
        file = open(folder / f"{free}.gpu", "ab")  # noqa: SIM115
        if _lock(file):
            _kept.append(file)
            number = free
            break
        file.close()
    mine = alike[number % len(alike)]
    os.environ["CUDA_VISIBLE_DEVICES"] = mine.uuid
    return mine


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take(folder: Path, gpus: list[Gpu], count: int, held: ExitStack) -> list[Gpu]:
    """`count` free GPUs, their locks given to `held`; or none of them."""
    with ExitStack() as ours:
        free: list[Gpu] = []
        for gpu in gpus:
            file = ours.enter_context(open(folder / f"{gpu.uuid}.lock", "ab"))
            if _lock(file):
                free.append(gpu)
            if len(free) == count:
                held.push(ours.pop_all())
                return free
    return []
