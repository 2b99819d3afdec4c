"""A source as a flat list of members that any process can read in any order: a folder, a zip or a tar."""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from shared.errors import Refused

MAX_MEMBERS = 2_000_000  # ImageNet's training set has 1.28 million
MAX_FILE = 128 << 20  # bytes of one file; the largest raw image that may be decoded has 75 MB
SMALL = 1 << 14  # bytes of a file that is read at one go, without asking for its size
STORED, DEFLATED = 0, 8  # zip's numbers
BAD_ARCHIVE = "bad_archive"
UNREADABLE = "{} can't be read by this worker's user, {}: give everybody the right, `chmod -R a+rX FOLDER`"


class Member(NamedTuple):
    """One file of a source. In an archive: its bytes unpacked and packed, where it begins, its packing, its CRC-32."""

    path: str
    size: int = -1
    offset: int = 0
    packed: int = 0
    method: int = STORED
    crc: int = 0


@dataclass(frozen=True)
class Tree:
    """kind: "folder" (then `folder` is its path), "zip" or "tar" (then `fd` is the open file)."""

    kind: str
    members: list[Member]
    folder: str = ""
    fd: int = -1


def safe_path(name: str, what: str) -> str:
    """`name` as a relative path with single slashes.

    Raises:
        Refused: (bad_archive) it is absolute, climbs out, is not UTF-8, or could not be a file's name.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    wrong = name.startswith("/") or ".." in parts or "\0" in name or name[1:3] in (":/", ":\\")
    try:
        wrong = wrong or len(name.encode()) > 4096
    except UnicodeEncodeError:
        wrong = True
    if wrong or not parts:
        raise Refused(f"the {what} names a member {name[:200]!r}: expected relative paths in UTF-8 without '..'; "
                      "pack it anew from the folder itself", BAD_ARCHIVE)
    return "/".join(parts)


def is_clutter(path: str) -> bool:
    """Whether a file is what systems and packers leave beside images: hidden, a Mac's metadata, Windows' thumbnails."""
    rooted = f"/{path}"
    return "/." in rooted or "/__MACOSX/" in rooted or rooted.endswith(("/Thumbs.db", "/desktop.ini"))


def scan(folder: str, within: str) -> Tree:
    """Every file below a folder, in order of path.

    Raises:
        Refused: (bad_dataset) a link leads out of `within` or to a folder, or there are too many files;
            (source_unavailable) a folder can't be read.
    """
    members: list[Member] = []
    root = os.path.realpath(within)
    todo = [""]
    while todo:
        below = todo.pop()
        with _scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                path = f"{below}/{entry.name}" if below else entry.name
                if entry.is_file(follow_symlinks=False):  # asked first: nearly all are
                    members.append(Member(path if path.isascii() else safe_path(path, "folder")))
                elif entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if not target.startswith(root + os.sep) or not os.path.isfile(target):
                        raise Refused(f"{path} is a link to {target}: expected files and folders, and links only to "
                                      "files inside the imports folder; copy what it points to", "bad_dataset")
                    members.append(Member(safe_path(path, "folder")))
                elif entry.is_dir(follow_symlinks=False):
                    todo.append(path)
        if len(members) > MAX_MEMBERS:
            raise Refused(f"the folder has more than {MAX_MEMBERS:,} files: split the dataset", "bad_dataset")
    members.sort(key=itemgetter(0))
    return Tree("folder", members, folder=folder)


def _scandir(path: str) -> AbstractContextManager[Iterator["os.DirEntry[str]"]]:
    try:
        return os.scandir(path)
    except PermissionError:
        raise Refused(UNREADABLE.format(path, os.getuid()), "source_unavailable") from None


def read(kind: str, folder: str, fd: int, member: Member) -> bytes:
    """A member's bytes. `kind`, `folder` and `fd` are a Tree's.

    Raises:
        Refused: (bad_archive) the archive lied about the member; (too_large) it has more than MAX_FILE bytes.
        OSError: a file of a folder can't be read.
    """
    if member.size > MAX_FILE:
        raise _too_large(member.size)
    match kind:
        case "folder":
            return _read_file(f"{folder}/{member.path}")
        case "tar":
            data = os.pread(fd, member.size, member.offset)
        case _:
            data = _read_zip(fd, member)
    if len(data) != member.size:
        raise _lied(member)
    return data


def _read_file(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        data = os.read(fd, SMALL)
        if len(data) < SMALL:
            return data
        size = os.fstat(fd).st_size
        if size > MAX_FILE:
            raise _too_large(size)
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)


def _read_zip(fd: int, member: Member) -> bytes:
    # By pread and not by zipfile: it shares no file position among processes, and each need not parse the directory.
    header = os.pread(fd, 30, member.offset)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise _lied(member)
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    data = os.pread(fd, member.packed, member.offset + 30 + name_length + extra_length)
    if member.method == DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
        except zlib.error:
            raise _lied(member) from None
    if zlib.crc32(data) != member.crc:
        raise _lied(member)
    return data


def _lied(member: Member) -> Refused:
    return Refused(f"the archive's {member.path} is not the {member.size} bytes that its directory says: the archive "
                   "is damaged; send it again", BAD_ARCHIVE)


def _too_large(size: int) -> Refused:
    return Refused(f"the file has {size} bytes: expected at most {MAX_FILE}", "too_large")
