"""An upload on its way to the volume: raw/<id>/data with its SHA-256 in raw/<id>/upload.json, whole or absent."""

import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.artifacts import fsync_dir, now, read_json, write_json
from shared.disk import RESERVE, free, is_full
from shared.errors import Conflict, Refused, Unavailable

STALE_S = 3600

Upload = dict[str, Any]


def receive(raw: Path, upload_id: str, pieces: Iterator[bytes], *, filename: str = "", size: int | None = None,
            expected: str = "") -> tuple[Upload, bool]:
    """Write an upload in constant memory. Returns its description and whether it is new.

    size is what the client says it will send, expected the SHA-256 that it says the bytes have (hex).

    Raises:
        Refused: no bytes came, or other bytes than `expected`.
        Conflict: the id stands for other bytes.
        Unavailable: `disk_full`.
    Whatever `pieces` raises passes through. No error leaves anything behind.
    """
    raw.mkdir(parents=True, exist_ok=True)
    check_space(raw, size or 0)
    temp = raw / f".{upload_id}.{uuid.uuid4().hex[:8]}"
    temp.mkdir()
    try:
        got, digest = _write(temp / "data", pieces)
        if got == 0:
            raise Refused("the upload is empty: send a zip or tar archive", "empty_upload")
        if expected and digest != expected:
            raise Refused(f"the bytes have SHA-256 {digest}, expected {expected}: send it again", "digest_mismatch")
        upload = {"id": upload_id, "size": got, "sha256": digest, "filename": filename, "created_at": now()}
        write_json(temp / "upload.json", upload)
        try:
            os.rename(temp, raw / upload_id)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return same(read_json(raw / upload_id / "upload.json"), digest), False
        fsync_dir(raw)
        return upload, True
    except OSError as e:
        if is_full(e, raw):
            raise _full(raw, size or 0) from None
        raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def same(upload: Upload, digest: str) -> Upload:
    """The upload that stands, if it has these bytes. Raises Conflict."""
    if upload["sha256"] != digest:
        raise Conflict(f"upload {upload['id']} has other bytes (SHA-256 {upload['sha256']}): use another id",
                       "upload_exists")
    return upload


def check_space(raw: Path, size: int) -> None:
    """Raises Unavailable (`disk_full`) when `size` more bytes would leave less than RESERVE free."""
    if free(raw) < size:
        raise _full(raw, size)


def sweep(raw: Path) -> None:
    """Remove what uploads left whose process died: over an hour old and locked by nobody."""
    for temp in raw.glob(".*") if raw.is_dir() else ():
        try:
            if time.time() - temp.stat().st_mtime < STALE_S:
                continue
            with open(temp / "data", "rb") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except FileNotFoundError:  # its process died before the first byte, or finished while this looked
            pass
        shutil.rmtree(temp, ignore_errors=True)


def _write(path: Path, pieces: Iterator[bytes]) -> tuple[int, str]:
    size, digest, checked = 0, hashlib.sha256(), 0
    with open(path, "wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        for piece in pieces:
            f.write(piece)
            digest.update(piece)
            size += len(piece)
            if size - checked >= RESERVE // 4:
                check_space(path.parent, 0)
                checked = size
        f.flush()
        os.fsync(f.fileno())
    return size, digest.hexdigest()


def _full(raw: Path, size: int) -> Unavailable:
    return Unavailable(f"the volume has {free(raw) >> 20} MiB free, beside {RESERVE >> 20} MiB that are reserved; this "
                       f"upload needs {size >> 20} MiB or more: delete uploads or datasets, or enlarge it", "disk_full")
