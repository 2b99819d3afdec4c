import io
import os
import tarfile

import pytest

from lanner import LannerError
from lanner.naming import name_of
from lanner.packing import pack


@pytest.fixture
def flowers(tmp_path):
    for name, data in {"rose/1.jpg": b"r" * 700, "rose/2.jpg": b"", "tulip/" + "x" * 180 + ".png": b"t" * 512,
                       "tulip/é.png": b"u", ".cache/no": b"n", "rose/.DS_Store": b"n"}.items():
        path = tmp_path / "flowers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "flowers"


def test_a_folder_becomes_a_tar_of_the_announced_size_without_hidden_files(flowers):
    body = pack(flowers)
    data = b"".join(body.pieces())
    assert len(data) == body.size
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    assert files == {"rose/1.jpg": b"r" * 700, "rose/2.jpg": b"", "tulip/é.png": b"u",
                     "tulip/" + "x" * 180 + ".png": b"t" * 512}


def test_a_linked_file_is_sent_as_that_file(flowers):
    (flowers / "rose" / "3.jpg").symlink_to("1.jpg")
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack(flowers).pieces()))) as tar:
        member = tar.getmember("rose/3.jpg")
        assert member.isreg()
        assert tar.extractfile(member).read() == b"r" * 700


def test_an_archive_is_sent_as_it_is(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK" + bytes(3_000_000))
    body = pack(tmp_path / "a.zip")
    assert (body.size, body.content_type) == (3_000_002, "application/zip")
    pieces = list(body.pieces())
    assert b"".join(pieces) == (tmp_path / "a.zip").read_bytes()
    assert max(map(len, pieces)) <= 1 << 20


def test_a_file_that_changes_while_it_is_sent_is_an_error(flowers):
    body = pack(flowers)
    (flowers / "rose" / "1.jpg").write_bytes(b"r" * 701)
    with pytest.raises(LannerError, match="changed while it was sent"):
        list(body.pieces())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_can_not_be_read_is_an_error(flowers):
    (flowers / "tulip").chmod(0)
    with pytest.raises(LannerError, match="tulip can't be read .*a dataset without it would lack images"):
        pack(flowers)


def test_a_folder_that_goes_while_it_is_listed_is_an_error(flowers, monkeypatch):
    scandir = os.scandir

    def refuses(path):
        if str(path).endswith("tulip"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuses)
    with pytest.raises(LannerError, match="tulip can't be read"):
        pack(flowers)


def test_nothing_to_send_is_an_error(tmp_path):
    with pytest.raises(LannerError, match="does not exist"):
        pack(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LannerError, match="holds no files"):
        pack(tmp_path / "empty")


@pytest.mark.parametrize(("path", "name"), [
    ("/data/cifar-10-binary.tar.gz", "cifar10"), ("CIFAR-10-python.tar.gz", "cifar10"), ("cifar10.zip", "cifar10"),
    ("cifar-10-batches-py", "cifar10"), ("cifar10.1_v6", "cifar10-1_v6"), ("cifar10-cats", "cifar10-cats"),
    ("cifar-10-c.tar", "cifar-10-c"), ("cifar-100.tar.gz", "cifar-100"), ("Meine Blumen (2).zip", "meine-blumen-2"),
    ("/x/flowers/", "flowers"), ("v1.2.tgz", "v1-2"), ("花", "dataset"), ("a" * 90, "a" * 63)])
def test_a_name_comes_from_the_path(path, name):
    from pathlib import Path

    assert name_of(Path(path)) == name
