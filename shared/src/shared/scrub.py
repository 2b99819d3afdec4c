"""Whether what was published is still what it was: every file hashed again, slowly, about once a day, by the keeper."""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.artifacts import KINDS, list_ids, manifest_digest, now, open_artifact, read_json, write_json
from shared.errors import Damaged, LannerError, NotFound

log = logging.getLogger("lanner.scrub")
BLOCK = 1 << 20  # bytes
REST = 3.0  # times as long as a block took nothing is read: others use the disk, and this processor


def report_of(root: Path) -> dict[str, Any] | None:
    """What the last one found: {at, artifacts, bytes, damaged: [{target, reason, manifest}]}; None before the first.

    Of what was damaged that which is still there, as it then was.
    """
    try:
        found: dict[str, Any] = read_json(_report(root))
    except LannerError:
        return None
    still = [d for d in found["damaged"]
             if (root / d["target"]).exists() and _digest(root, d["target"]) == d["manifest"]]
    return {**found, "damaged": still}


class Scrub:
    """Begins one when it is due, beside the keeper's own work; one at a time."""

    def __init__(self, root: Path, every_s: float):
        """every_s: from the end of one to the beginning of the next, 0 for never."""
        self._root, self._every_s = root, every_s
        self._thread: threading.Thread | None = None

    def begin_if_due(self) -> None:
        if not self._every_s or (self._thread and self._thread.is_alive()):
            return
        try:
            last = _report(self._root).stat().st_mtime
        except FileNotFoundError:
            last = 0.0
        if time.time() - last > self._every_s:
            self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            scrub(self._root)
        except Exception:  # the keeper's other work goes on; this is begun again at its next look
            log.exception("the scrub broke off")
            time.sleep(60)


def scrub(root: Path, rest: float = REST) -> dict[str, Any]:
    """Hash every file of every artifact and write what was found. Returns that, as `report_of`."""
    seen, size, damaged = 0, 0, []
    for target in _targets(root):
        try:
            size += _check(root, target, rest)
        except (NotFound, FileNotFoundError):  # deleted meanwhile
            continue
        except (Damaged, OSError, KeyError, TypeError, ValueError) as e:  # as of a bad sector, or an odd manifest
            reason = str(e) if isinstance(e, Damaged) else f"it can't be read ({type(e).__name__}: {e})"
            damaged.append({"target": target, "reason": reason, "manifest": _digest(root, target)})
            log.error("%s is damaged: %s", target, reason)
        seen += 1
    report = {"at": now(), "artifacts": seen, "bytes": size, "damaged": damaged}
    write_json(_report(root), report)
    log.info("%d artifacts of %d bytes hashed, %d damaged", seen, size, len(damaged))
    return report


def _targets(root: Path) -> Iterator[str]:
    for kind in KINDS:
        for artifact in list_ids(root, kind):
            if kind == "variants":
                yield from (f"variants/{artifact}/{variant}" for variant in list_ids(root, f"variants/{artifact}"))
            else:
                yield f"{kind}/{artifact}"


def _check(root: Path, target: str, rest: float) -> int:
    """The bytes of an artifact that is whole. Raises Damaged, NotFound, FileNotFoundError."""
    manifest, size = open_artifact(root, target, hashes=False), 0
    for name, entry in manifest["files"].items():
        digest = hashlib.sha256()
        with open(root / target / name, "rb") as f:
            while True:
                began = time.monotonic()
                block = f.read(BLOCK)
                if not block:
                    break
                digest.update(block)
                size += len(block)
                time.sleep(rest * (time.monotonic() - began))
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or it would push out what others read
        if digest.hexdigest() != entry["sha256"]:
            raise Damaged(f"{name} has other bytes than its manifest says")
    return size


def _digest(root: Path, target: str) -> str:
    """Of the manifest; "" where it can't be read."""
    with suppress(OSError):
        return manifest_digest(root, target)
    return ""


def _report(root: Path) -> Path:
    return root / "jobs" / ".scrub.json"
