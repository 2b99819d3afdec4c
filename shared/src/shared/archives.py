"""Open a zip or tar as a Tree: recognised by its first bytes, checked before anything is read, never extracted.

A packed tar (gzip, bzip2, xz) can only be read from its beginning, so it is unpacked once into a file without a name,
which the kernel removes with the last process that holds it.
"""

import bz2
import gzip
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from shared.artifacts import read_json
from shared.attempt import Attempt
from shared.errors import NotFound, Refused
from shared.jobs import check_import
from shared.tree import BAD_ARCHIVE, DEFLATED, MAX_MEMBERS, STORED, UNREADABLE, Member, Tree, safe_path

# Images hardly shrink: the densest honest dataset, blank PNGs, packs about 1:30. A bomb needs thousands to hurt.
RATIO = 100
SLACK = 64 << 20  # bytes that may be unpacked whatever the ratio
SLACK_PACKED = 4096  # bytes by which a tiny file may have become larger
DIRECTORY_BYTES = 128 << 20  # of a zip's directory, which is held in memory
HEADER_BYTES = 1 << 20  # of a tar's extended header, which is held in memory
BLOCK = 1 << 20
UNAVAILABLE = "source_unavailable"
PACKED: dict[bytes, tuple[str, Callable[[IO[bytes]], IO[bytes]]]] = {
    b"\x1f\x8b": ("gzip", lambda f: gzip.GzipFile(fileobj=f)),  # type: ignore[dict-item, return-value]
    b"BZh": ("bzip2", bz2.BZ2File),  # type: ignore[dict-item]
    b"\xfd7zXZ\0": ("xz", lzma.LZMAFile),  # type: ignore[dict-item]
}


def uploaded(root: Path, upload: str) -> Path:
    """The archive that was uploaded. Raises Refused (source_unavailable) when it is not there, or not whole."""
    path = root / "raw" / upload / "data"
    try:
        size = read_json(path.with_name("upload.json"))["size"]
        found = path.stat().st_size
    except (NotFound, FileNotFoundError):
        raise Refused(f"upload {upload} does not exist: send a zip or tar with PUT /v1/uploads/{upload} first",
                      UNAVAILABLE) from None
    if found != size:
        raise Refused(f"upload {upload} has {found} bytes, expected {size}: send it again under another id",
                      UNAVAILABLE)
    return path


def imported(imports: Path, name: str) -> Path:
    """The folder or archive of that path below the imports folder.

    Raises:
        Refused: (bad_name) it names no place inside it; (source_unavailable) it is not there, or can't be read.
    """
    check_import(name)
    root = os.path.realpath(imports)
    path = os.path.realpath(os.path.join(root, name))
    if not path.startswith(root + os.sep):
        raise Refused(f"import {name!r} leads out of the imports folder: copy the data into it", "bad_name")
    if not os.path.exists(path):
        raise Refused(f"import {name!r} does not exist: put the folder or archive into the imports folder, {root} for "
                      "the worker", UNAVAILABLE)
    if not os.access(path, os.R_OK):
        raise Refused(UNREADABLE.format(path, os.getuid()), UNAVAILABLE)
    return Path(path)


@contextmanager
def open_archive(path: Path, ctx: Attempt) -> Iterator[Tree]:
    """The archive as a Tree, open as long as the context is.

    Raises:
        Refused: (bad_archive) it is neither zip nor tar, is damaged or encrypted, holds links, devices or names that
            lead out, lists too many members, or unpacks to more than RATIO times its size.
    """
    with ExitStack() as stack:
        f: IO[bytes] = stack.enter_context(open(path, "rb"))
        start = f.read(512)
        f.seek(0)
        if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            yield Tree("zip", _zip_members(f), fd=f.fileno())
            return
        for magic, (name, unpacker) in PACKED.items():
            if start.startswith(magic):
                f = _unpack(f, name, unpacker, stack.enter_context(TemporaryFile(dir=ctx.work)), ctx)
                start = f.read(512)
                f.seek(0)
        if not _is_tar(start):
            raise Refused(f"the archive begins with {start[:8]!r}: expected a zip, or a tar, plain or packed by gzip, "
                          "bzip2 or xz", BAD_ARCHIVE)
        yield Tree("tar", _tar_members(f), fd=f.fileno())


def _unpack(packed: IO[bytes], name: str, unpacker: Callable[[IO[bytes]], IO[bytes]], out: IO[bytes],
            ctx: Attempt) -> IO[bytes]:
    size = os.fstat(packed.fileno()).st_size
    most = size * RATIO + SLACK
    with unpacker(packed) as stream:
        while True:
            ctx.check()
            try:
                block = stream.read(BLOCK)
            except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, MemoryError) as e:
                raise Refused(f"the archive can't be unpacked as {name} ({e}): it is damaged or cut off; send it again",
                              BAD_ARCHIVE) from None
            if not block:
                break
            if out.tell() + len(block) > most:
                raise Refused(f"the archive's {size} bytes unpack to more than {most}: a bomb is not a dataset",
                              BAD_ARCHIVE)
            out.write(block)
            ctx.report("unpack", packed.tell(), size)
    out.seek(0)
    return out


# zip


def _zip_members(f: IO[bytes]) -> list[Member]:
    size = os.fstat(f.fileno()).st_size
    _check_directory(f, size)
    try:
        with zipfile.ZipFile(f) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError) as e:
        raise Refused(f"the zip's directory can't be read ({e}): it is damaged or cut off; send it again",
                      BAD_ARCHIVE) from None
    named = [(_zip_name(info).replace("\\", "/"), info) for info in infos]
    members = [_zip_member(name, info) for name, info in named if not name.endswith("/")]
    _check_members(members, size, "zip")
    end = 0
    for m in sorted(members, key=lambda m: m.offset):
        if m.offset < end or m.offset + m.packed > size:
            raise Refused(f"the zip's member {m.path} overlaps another or lies outside the file: it is damaged or "
                          "made to hurt; pack it anew", BAD_ARCHIVE)
        end = m.offset + 30 + m.packed
    return members


def _zip_member(name: str, info: zipfile.ZipInfo) -> Member:
    path = safe_path(name, "zip")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise Refused(f"the zip's member {path} is a link or a device: expected files and folders", BAD_ARCHIVE)
    if info.flag_bits & 0x2041:  # encrypted; strongly encrypted; the directory encrypted
        raise Refused(f"the zip's member {path} is encrypted: pack it without a password", BAD_ARCHIVE)
    if info.compress_type not in (STORED, DEFLATED):
        raise Refused(f"the zip's member {path} is packed by method {info.compress_type}: expected stored or deflated",
                      BAD_ARCHIVE)
    if info.compress_type == STORED and info.file_size != info.compress_size:
        raise Refused(f"the zip's member {path} has two lengths, {info.compress_size} and {info.file_size}: it is "
                      "damaged; pack it anew", BAD_ARCHIVE)
    if info.compress_size > 2 * info.file_size + SLACK_PACKED:
        raise Refused(f"the zip's member {path} has {info.compress_size} packed bytes for {info.file_size}: packing "
                      "does not make files larger; pack it anew", BAD_ARCHIVE)
    return Member(path, info.file_size, info.header_offset, info.compress_size, info.compress_type, info.CRC)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name: zipfile takes it for code page 437 unless told otherwise, Info-ZIP writes UTF-8 untold."""
    if not info.flag_bits & 0x800:
        with suppress(UnicodeError):
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename


def _check_directory(f: IO[bytes], size: int) -> None:
    """Refuse a directory too large to be held in memory, looking for its length where zipfile does."""
    length = min(size, 22 + 65535 + 76)
    f.seek(size - length)
    tail = f.read(length)
    f.seek(0)
    end = tail.rfind(b"PK\x05\x06", 0, len(tail) - 18)
    directory = struct.unpack_from("<I", tail, end + 12)[0] if end >= 0 else 0
    if end >= 76 and tail.startswith(b"PK\x06\x06", end - 76):  # the record with 64-bit numbers, and its locator
        directory = struct.unpack_from("<Q", tail, end - 76 + 40)[0]
    if directory > DIRECTORY_BYTES:
        raise Refused(f"the zip's directory has {directory} bytes, expected at most {DIRECTORY_BYTES}: send a tar, or "
                      "import the folder", BAD_ARCHIVE)


# tar


class _Headers:
    """A tar as tarfile reads it to list its members: headers alone, and none that would not fit in memory."""

    def __init__(self, f: IO[bytes]):
        self._f = f
        self.seek, self.tell = f.seek, f.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise Refused(f"the tar has an extended header of {size} bytes that no dataset needs: pack it anew",
                          BAD_ARCHIVE)
        return self._f.read(size)


def _is_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _tar_members(f: IO[bytes]) -> list[Member]:
    size = os.fstat(f.fileno()).st_size
    members = []
    try:
        with tarfile.open(fileobj=_Headers(f), mode="r:") as archive:  # type: ignore[call-overload]
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined] # it would keep every header
                if not info.isdir():
                    members.append(_tar_member(info, size))
                if len(members) > MAX_MEMBERS:
                    break
            end = archive.offset  # type: ignore[attr-defined]
        f.seek(end)
        # tarfile takes a bad header for the end; and where a file ends without a mark, who knows what was to come?
        block = f.read(tarfile.BLOCKSIZE)
        if len(members) <= MAX_MEMBERS and (not block or block.strip(b"\0")):
            raise Refused(f"the tar has neither a file nor its end mark at byte {end}, behind {len(members)} files: it "
                          "is damaged or cut off; pack it anew and send it again", BAD_ARCHIVE)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as e:
        raise Refused(f"the tar can't be read ({e}): it is damaged or cut off; send it again", BAD_ARCHIVE) from None
    _check_members(members, size, "tar")
    return members


def _tar_member(info: Any, size: int) -> Member:
    path = safe_path(info.name, "tar")
    if not info.isreg() or info.issparse():
        raise Refused(f"the tar's member {path} is a link, a device or sparse: expected files and folders", BAD_ARCHIVE)
    if not 0 <= info.size <= size - info.offset_data:
        raise Refused(f"the tar's member {path} should have {info.size} bytes, more than the file holds: it is cut "
                      "off; send it again", BAD_ARCHIVE)
    return Member(path, info.size, info.offset_data)


def _check_members(members: list[Member], size: int, kind: str) -> None:
    if len(members) > MAX_MEMBERS:
        raise Refused(f"the {kind} has more than {MAX_MEMBERS:,} members: split the dataset", BAD_ARCHIVE)
    total = sum(m.size for m in members)
    if total > size * RATIO + SLACK:
        raise Refused(f"the {kind}'s {size} bytes unpack to {total}: a bomb is not a dataset", BAD_ARCHIVE)
    members.sort()
    for one, two in zip(members, members[1:], strict=False):
        if one.path == two.path:
            raise Refused(f"the {kind} lists {one.path} twice: pack it anew", BAD_ARCHIVE)
