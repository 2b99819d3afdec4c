"""What XLA has compiled, kept on disk: the next process that needs the same program for the same GPU only loads it.

Three caches of TensorFlow's own: whole programs, the kernels chosen for an operation by timing them, and compiled
kernels. A folder for each GPU model, driver and set of libraries, since nothing in them is valid for another.
"""

import os
import re
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from shared import gpu

KINDS = ("programs", "choices", "kernels")
MOST_BYTES = 4 << 30
# As CUDA graphs, XLA's default, the program of `speedrun` was refused on an H100 (CUDA_ERROR_INVALID_VALUE when a
# kernel was added to the graph). Its kernels are long enough to hide being launched one by one.
ONE_BY_ONE = "--xla_gpu_enable_command_buffer="
LIBRARIES = ("tensorflow", "nvidia-cudnn-cu12", "nvidia-cublas-cu12")


def keep(root: Path, kinds: Iterable[str] = KINDS, flags: Iterable[str] = ()) -> None:
    """Make TensorFlow keep what it compiles under `root`; before it is imported, it reads this once.

    flags: more of XLA's. What TF_XLA_FLAGS and XLA_FLAGS already set stands. A folder that has outgrown 4 GiB is
    emptied.
    """
    folder = root / _key()
    if sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) > MOST_BYTES:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    kinds, tf, xla = set(kinds), [], list(flags)
    if "programs" in kinds:
        tf = [f"--tf_xla_persistent_cache_directory={folder / 'programs'}",
              "--tf_xla_persistent_cache_device_types=XLA_GPU_JIT"]
    if "choices" in kinds:
        (folder / "choices").mkdir(exist_ok=True)
        xla += [f"--xla_gpu_per_fusion_autotune_cache_dir={folder / 'choices'}",
                "--xla_gpu_experimental_autotune_cache_mode=AUTOTUNE_CACHE_MODE_UPDATE"]
    if "kernels" in kinds:
        xla += [f"--xla_gpu_kernel_cache_file={folder / 'kernels'}",
                "--xla_gpu_enable_llvm_module_compilation_parallelism=true"]
    _add("TF_XLA_FLAGS", tf)
    _add("XLA_FLAGS", xla)


def _add(variable: str, flags: list[str]) -> None:
    """Behind the flags of an environment variable, those that it does not set already."""
    before = os.environ.setdefault(variable, "").split()
    known = {flag.partition("=")[0] for flag in before}
    os.environ[variable] = " ".join(before + [flag for flag in flags if flag.partition("=")[0] not in known])


def _key() -> str:
    """What a compiled program is valid for."""
    cards = sorted({f"{card.name}-{card.driver}" for card in gpu.find()}) or ["no-gpu"]
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name.split('-')[1] if '-' in name else name}-{metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([*cards, *versions])).lower()
