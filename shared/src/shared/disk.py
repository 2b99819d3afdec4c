"""When the volume is full."""

import errno
import shutil
import tempfile
from pathlib import Path

RESERVE = 256 << 20  # bytes that are left free: for the jobs' records, and for what a running job still writes
LITTLE = 1 << 20  # bytes
SAID = ("No space left on device", "Disk quota exceeded")  # by libraries that raise something of their own


def free(root: Path) -> int:
    """Bytes that may still be written to the volume."""
    return max(0, shutil.disk_usage(root).free - RESERVE)


def is_full(error: BaseException, root: Path) -> bool:
    """Whether this was raised since the volume, or a quota on it, is full; not the folder for temporary files, which a
    container has in memory.
    """
    if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and not any(s in str(error) for s in SAID):
        return False
    name = getattr(error, "filename", None)
    if isinstance(name, str | Path):
        return Path(name).absolute().is_relative_to(root.absolute())
    return free(root) == 0 or all(shutil.disk_usage(folder).free > LITTLE for folder in _elsewhere())


def _elsewhere() -> list[Path]:
    return [folder for folder in (Path(tempfile.gettempdir()), Path("/dev/shm")) if folder.is_dir()]
