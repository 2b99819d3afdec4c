"""Zip and tar: recognised by content, refused where they could hurt, nothing left behind."""

import bz2
import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import archives
from shared.archives import open_archive
from shared.attempt import Attempt, Cancelled
from shared.errors import Refused
from shared.tree import Tree, read


def contents(tree: Tree) -> dict[str, bytes]:
    return {m.path: read(tree.kind, tree.folder, tree.fd, m) for m in tree.members}


def make_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def make_zip(path: Path, *members: tuple[zipfile.ZipInfo | str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for info, data in members:
            archive.writestr(info, data)
    return path


@pytest.fixture
def refused(ctx: Attempt, tmp_path: Path) -> Callable[[Path], str]:
    """Open and read an archive that must be refused; returns the sentence."""

    def check(path: Path) -> str:
        before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
        with pytest.raises(Refused) as e, open_archive(path, ctx) as opened:
            contents(opened)
        assert e.value.code == "bad_archive"
        assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before
        return str(e.value)

    return check


MEMBERS = {"cat/1.jpg": b"one", "dog/2.jpg": b"two" * 1000, "dog/empty": b""}


@pytest.mark.parametrize("name", ["data", "misnamed.rar"])
@pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_is_known_by_its_content(ctx: Attempt, tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    if kind == "zip":
        make_zip(path, *MEMBERS.items())
    else:
        make_tar(path, *((tarfile.TarInfo(n), d) for n, d in MEMBERS.items()), mode=kind)
    with open_archive(path, ctx) as opened:
        assert contents(opened) == MEMBERS
        assert list(ctx.work.iterdir()) == []


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(ctx: Attempt, tmp_path: Path, format: int) -> None:
    name = "Käse/" + ("x" * 80 + "/") + "1.jpg"
    with tarfile.open(tmp_path / "a", "w", format=format) as archive:
        info = tarfile.TarInfo(name)
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with open_archive(tmp_path / "a", ctx) as opened:
        assert contents(opened) == {name: b"abc"}


@pytest.mark.parametrize("content", [b"", b"hello", b"Rar!\x1a\x07\x00" + b"x" * 600, b"\0" * 2048,
                                     gzip.compress(b"no tar", mtime=0), bz2.compress(b"x" * 2000)])
def test_what_is_neither_zip_nor_tar_is_refused(refused: Callable[[Path], str], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert "expected a zip, or a tar" in refused(tmp_path / "a")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "C:/x", "a/..", "\\..\\x", "/"])
def test_names_that_lead_out_are_refused(refused: Callable[[Path], str], tmp_path: Path, name: str) -> None:
    if not name.startswith("\\"):
        assert "relative paths" in refused(make_tar(tmp_path / "a", (tarfile.TarInfo(name), b"x")))
    if name != "/":
        assert "relative paths" in refused(make_zip(tmp_path / "b", (zipfile.ZipInfo(name), b"x")))


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(refused: Callable[[Path], str], tmp_path: Path, type: bytes) -> None:
    info = tarfile.TarInfo("cat/1.jpg")
    info.type, info.linkname = type, "/etc/passwd"
    assert "link, a device or sparse" in refused(make_tar(tmp_path / "a", (info, b"")))


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_are_refused(refused: Callable[[Path], str], tmp_path: Path, mode: int) -> None:
    info = zipfile.ZipInfo("cat/1.jpg")
    info.external_attr = (mode | 0o644) << 16
    assert "link or a device" in refused(make_zip(tmp_path / "a", (info, b"/etc/passwd")))


def test_a_zip_with_folders_as_windows_writes_them_has_no_files_of_their_name(ctx: Attempt, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a", ("data\\", b""), ("data\\cats\\", b""), ("data\\cats\\1.jpg", b"1"))
    with open_archive(path, ctx) as tree:
        assert [m.path for m in tree.members] == ["data/cats/1.jpg"]


def test_a_name_listed_twice_is_refused(refused: Callable[[Path], str], tmp_path: Path) -> None:
    assert "twice" in refused(make_tar(tmp_path / "a", (tarfile.TarInfo("x"), b"1"), (tarfile.TarInfo("./x"), b"2")))
    with pytest.warns(UserWarning, match="Duplicate name"):
        make_zip(tmp_path / "b", ("x", b"1"), ("x", b"2"))
    assert "twice" in refused(tmp_path / "b")


def _patched(path: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def _set(signature: bytes, at: int, format: str, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(format, data, data.index(signature) + at, value)


DIRECTORY = b"PK\x01\x02"


@pytest.mark.parametrize(("change", "sentence"), [
    (_set(DIRECTORY, 8, "<H", 1), "encrypted"),
    (_set(DIRECTORY, 10, "<H", 12), "packed by method 12"),
    (_set(DIRECTORY, 24, "<I", 2999), "not the 2999 bytes"),
    (_set(DIRECTORY, 24, "<I", 3001), "not the 3001 bytes"),
    (_set(DIRECTORY, 16, "<I", 1), "not the 3000 bytes"),
    (_set(DIRECTORY, 20, "<I", 1 << 30), "has 1073741824 packed bytes for 3000"),
    (lambda data: struct.pack_into("<HHH", data, data.index(DIRECTORY) + 28, 0, 0, 9), "names a member ''"),
    (_set(DIRECTORY, 20, "<I", 9000), "lies outside"),
    (_set(DIRECTORY, 42, "<I", 5), "not the 3000 bytes"),
    (_set(b"PK\x05\x06", 12, "<I", 1 << 31), "directory has 2147483648 bytes"),
    (_set(b"PK\x05\x06", 16, "<I", 1 << 31), "lies outside"),
    (_set(DIRECTORY, 0, "<I", 0), "can't be read"),
])
def test_a_zip_that_lies_is_refused(refused: Callable[[Path], str], tmp_path: Path,
                                    change: Callable[[bytearray], None], sentence: str) -> None:
    assert sentence in refused(_patched(make_zip(tmp_path / "a", ("cat/1.jpg", b"abc" * 1000)), change))


def test_a_64_bit_directory_too_large_for_memory_is_refused(refused: Callable[[Path], str], tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a", ("x", b"abc"))
    data = path.read_bytes()
    at = data.index(b"PK\x05\x06")
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, 1 << 40, at)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, at, 1)
    path.write_bytes(data[:at] + record + locator + data[at:])
    assert "directory has 1099511627776 bytes" in refused(path)


def test_members_that_share_bytes_are_refused(refused: Callable[[Path], str], tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a", ("x", b"1" * 100), ("y", b"1" * 100), method=zipfile.ZIP_STORED)

    def overlap(data: bytearray) -> None:
        second = data.index(DIRECTORY, data.index(DIRECTORY) + 4)
        struct.pack_into("<I", data, second + 42, 10)

    assert "overlaps" in refused(_patched(path, overlap))


@pytest.mark.parametrize("kind", ["zip", "w:gz", "w:bz2", "w:xz"])
def test_bombs_are_refused(refused: Callable[[Path], str], tmp_path: Path, kind: str) -> None:
    zeros = b"\0" * (80 << 20)
    if kind == "zip":
        path = make_zip(tmp_path / "a", ("x", zeros))
    else:
        path = make_tar(tmp_path / "a", (tarfile.TarInfo("x"), zeros), mode=kind)
    assert "a bomb is not a dataset" in refused(path)


def test_too_many_members_are_refused(refused: Callable[[Path], str], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 10)
    names = [f"cat/{i}" for i in range(11)]
    assert "more than 10 members" in refused(make_tar(tmp_path / "a", *((tarfile.TarInfo(n), b"") for n in names)))
    assert "more than 10 members" in refused(make_zip(tmp_path / "b", *((n, b"") for n in names)))


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_cut_off_archive_is_refused(refused: Callable[[Path], str], tmp_path: Path, kind: str, kept: float) -> None:
    noise = os.urandom(100_000)
    if kind == "zip":
        path = make_zip(tmp_path / "a", ("x", noise))
    else:
        path = make_tar(tmp_path / "a", (tarfile.TarInfo("x"), noise), mode=kind)
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * kept)])
    assert "damaged or cut off" in refused(path) or "it is cut off" in refused(path)


def test_a_tar_with_an_extended_header_that_would_fill_memory_is_refused(
        refused: Callable[[Path], str], tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    assert "no dataset needs" in refused(make_tar(tmp_path / "a", (info, b"0" * (2 << 20))))


def test_a_sparse_member_is_refused(refused: Callable[[Path], str], tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_SPARSE
    assert "sparse" in refused(make_tar(tmp_path / "a", (info, b"")))


def test_unpacking_can_be_cancelled(ctx: Attempt, root: Path, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a", (tarfile.TarInfo("x"), b"abc"), mode="w:gz")
    (root / "jobs" / ctx.job_id / "cancel").touch()
    with pytest.raises(Cancelled), open_archive(path, ctx):
        pass
    assert list(ctx.work.iterdir()) == []


@pytest.mark.parametrize("harm", ["checksum", "cut in a header", "cut before a header"])
def test_a_tar_that_is_damaged_between_members_is_refused(refused: Callable[[Path], str], tmp_path: Path,
                                                          harm: str) -> None:
    path = make_tar(tmp_path / "a", *((tarfile.TarInfo(f"{i}.jpg"), b"x" * 100) for i in range(10)))
    data, header = bytearray(path.read_bytes()), 5 * 1024
    match harm:
        case "checksum":
            data[header + 148] ^= 1
        case "cut in a header":
            del data[header + 100:]
        case _:
            del data[header:]
    path.write_bytes(data)
    assert "damaged or cut off" in refused(path)


def test_names_that_info_zip_writes_are_utf_8(ctx: Attempt, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a", ("café/1.jpg", b"one"), ("日本/2.jpg", b"two"), ("plain/3.jpg", b"three"))
    data = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):  # the flag's upper byte says UTF-8
        start = 0
        while (start := data.find(signature, start)) >= 0:
            data[start + at] &= ~0x08
            start += 1
    path.write_bytes(data)
    with zipfile.ZipFile(path) as plain:
        assert "café/1.jpg" not in plain.namelist()
    with open_archive(path, ctx) as opened:
        assert set(contents(opened)) == {"café/1.jpg", "日本/2.jpg", "plain/3.jpg"}


def test_names_in_code_page_437_stay_what_they_are(ctx: Attempt, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a", ("caf_/1.jpg", b"one"))
    path.write_bytes(path.read_bytes().replace(b"caf_", b"caf\x82"))
    with open_archive(path, ctx) as opened:
        assert set(contents(opened)) == {"café/1.jpg"}
