"""Programs that XLA has compiled, kept on the volume: the next training of the same shape on the same GPU loads them.

TensorFlow writes them in place, so a process that is killed may leave half a one, which the next would fail on. Each
attempt therefore works on a folder of its own, with links to what is kept, and adds what it compiled once it has run.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from shared import gpu
from shared.artifacts import locked
from shared.attempt import Attempt, Cancelled, Stopped

FOLDER = ".compiled"  # under the root
MOST_BYTES = 1 << 30  # a program of `speedrun` has about 1 MiB
# Both names: with XLA_GPU_JIT alone TensorFlow 2.21 neither writes nor reads a file.
DEVICES = "GPU,XLA_GPU_JIT"
LIBRARIES = ("tensorflow", "tensorflow-cpu", "keras", "nvidia-cudnn-cu12", "nvidia-cublas-cu12")


@contextmanager
def kept(ctx: Attempt) -> Iterator[None]:
    """Have TensorFlow load and keep programs while it is in use; enter before TensorFlow compiles, when it reads the
    flags, once. Nothing happens on a CPU, nor where TF_XLA_FLAGS names a folder already.

    An attempt that follows one which crashed or was killed does without, and drops what is kept: it may have been why,
    since TensorFlow fails where it can't load a program. The next training compiles once more.
    """
    if ctx.settings.device != "gpu" or "persistent_cache_directory" in os.environ.setdefault("TF_XLA_FLAGS", ""):
        yield
        return
    store, own = ctx.root / FOLDER / _valid_for(), ctx.work / "compiled"
    if own.exists():
        for path in store.glob("*.pb"):
            path.unlink(missing_ok=True)
        yield
        return
    own.mkdir(parents=True)
    store.mkdir(parents=True, exist_ok=True)
    with locked(ctx.root / f"{FOLDER}.lock"):  # other trainings keep theirs there, too
        _link(store, own)
    _add_flags(f"--tf_xla_persistent_cache_directory={own}", f"--tf_xla_persistent_cache_device_types={DEVICES}")
    try:
        yield
    except (Stopped, Cancelled):
        with suppress(OSError):  # what ends the training is said, not that its programs could not be kept
            _add(own, store)
        raise
    _add(own, store)


def _link(store: Path, own: Path) -> None:
    if sum(path.stat().st_size for path in store.iterdir()) > MOST_BYTES:
        shutil.rmtree(store)
        store.mkdir()
    for path in store.glob("*.pb"):
        with suppress(FileNotFoundError):  # one that follows a crash drops them without waiting
            os.link(path, own / path.name)


def _add(own: Path, store: Path) -> None:
    """Move what is new to the store; each file is there whole or not at all."""
    with locked(store.parent.with_name(f"{FOLDER}.lock")):
        store.mkdir(exist_ok=True)
        for path in own.glob("*.pb"):
            if not (store / path.name).exists():
                os.replace(path, store / path.name)
    shutil.rmtree(own)


def _add_flags(*flags: str) -> None:
    os.environ["TF_XLA_FLAGS"] = " ".join([*os.environ.setdefault("TF_XLA_FLAGS", "").split(), *flags])


def _valid_for() -> str:
    """GPU model, driver and libraries: a compiled program fits no other."""
    cards = sorted({f"{card.name}-{card.driver}" for card in gpu.find()}) or ["no-gpu"]
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name.removeprefix('nvidia-').removesuffix('-cu12')}-{metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([*cards, *versions])).lower()
