"""Fetch a large file over HTTP: resumed where it broke off, kept only with the right SHA-256."""

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from shared.artifacts import fsync_dir, locked, sha256
from shared.attempt import Attempt
from shared.errors import Refused

BLOCK = 1 << 20
TIMEOUT_S = 20.0
UNAVAILABLE = "source_unavailable"


def download(url: str, path: Path, digest: str, remedy: str, ctx: Attempt) -> Path:
    """The file of that SHA-256 at `path`: the one that is there, or fetched; whole or absent.

    Raises:
        Refused: (source_unavailable) it can't be had, or has other bytes; `remedy` says what to do instead.
    """
    part = path.with_suffix(".part")
    with locked(path.with_suffix(".lock")):
        if path.exists() and sha256(path) == digest:
            return path
        try:
            _fetch(url, part, ctx)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            raise Refused(f"{url} can't be had ({getattr(e, 'reason', '') or e}): {remedy}", UNAVAILABLE) from None
        found = sha256(part)
        if found != digest:
            part.unlink()
            raise Refused(f"{url} has the SHA-256 {found}, expected {digest}: {remedy}", UNAVAILABLE)
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
        fsync_dir(path.parent)
    return path


def _fetch(url: str, part: Path, ctx: Attempt) -> None:
    """Append to `part` until it is whole, trying again as long as each try brings something."""
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_rest(url, part, have, ctx):
                return
            raise ConnectionError("the connection ended early")
        except urllib.error.HTTPError as e:
            if e.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
                return  # nothing is left to send: the checksum decides
            raise
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError):
            if not part.exists() or part.stat().st_size <= have:
                raise


def _fetch_rest(url: str, part: Path, have: int, ctx: Attempt) -> bool:
    """One request, from byte `have` on if the server can; returns whether all that it announced has come."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        total = int(answer.headers.get("Content-Length", 0)) + (have if resumed else 0)
        with open(part, "ab" if resumed else "wb") as f:
            while block := answer.read(BLOCK):
                f.write(block)
                ctx.report("download", f.tell(), total)
                ctx.check()
            return f.tell() >= total
