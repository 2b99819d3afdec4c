"""When the volume is full."""

import errno
import shutil
from pathlib import Path

RESERVE = 256 << 20  # bytes that are left free: for the jobs' records, and for what a running job still writes
SAID = ("No space left on device", "Disk quota exceeded")  # by libraries that raise something of their own


def free(root: Path) -> int:
    """Bytes that may still be written to the volume."""
    return max(0, shutil.disk_usage(root).free - RESERVE)


def is_full(error: BaseException) -> bool:
    """Whether this was raised since the volume, or a quota on it, is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(said in str(error) for said in SAID)
