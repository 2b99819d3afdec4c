"""What an upload consists of: a file as it is, a folder as a tar that is made while it is sent."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lanner.errors import LannerError

PIECE = 1 << 20
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Body:
    """size: bytes that `pieces()` gives in total; content_type: what the server is told."""

    path: Path
    size: int
    content_type: str
    members: tuple[tuple[str, int], ...] = ()

    def pieces(self) -> Iterator[bytes]:
        if self.content_type != "application/x-tar" or not self.members:
            yield from _read(self.path, self.size)
            return
        for name, size in self.members:
            yield _header(name, size)
            yield from _read(self.path / name, size)
            yield bytes(-size % BLOCK)
        yield bytes(2 * BLOCK)


def pack(path: Path) -> Body:
    """The body of an upload. Hidden files and links to folders stay out; a link to a file is sent as that file.

    Raises:
        LannerError: there is nothing at `path`, a folder without files, or a folder in it that can't be read.
    """
    if path.is_file():
        kind = {".zip": "application/zip", ".tar": "application/x-tar"}.get(path.suffix, "application/octet-stream")
        return Body(path, path.stat().st_size, kind)
    if not path.is_dir():
        raise LannerError(f"{path} does not exist: expected a folder of images, a zip or a tar", "no_such_path")
    members = []
    for folder, folders, files in os.walk(path, onerror=_refuse):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(f for f in files if not f.startswith(".")):
            full = Path(folder, file)
            if full.is_file():
                members.append((str(full.relative_to(path)), full.stat().st_size))
    if not members:
        raise LannerError(f"{path} holds no files: expected one folder of images a class", "no_images")
    size = sum(len(_header(n, s)) + s + -s % BLOCK for n, s in members) + 2 * BLOCK
    return Body(path, size, "application/x-tar", tuple(members))


def _refuse(error: OSError) -> None:
    raise LannerError(f"{error.filename} can't be read ({error.strerror}): a dataset without it would lack images",
                      "unreadable")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


def _read(path: Path, size: int) -> Iterator[bytes]:
    """Exactly `size` bytes of the file. Raises LannerError where it has changed since it was counted."""
    left = size
    with open(path, "rb") as f:
        while left and (piece := f.read(min(PIECE, left))):
            left -= len(piece)
            yield piece
        if left or f.read(1):
            raise LannerError(f"{path} changed while it was sent: send it again once it is at rest", "changed")
