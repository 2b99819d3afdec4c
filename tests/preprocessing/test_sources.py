"""Where a job's raw images are, and the download."""

import functools
import hashlib
import http.server
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from preprocessing.download import download
from preprocessing.sources import locate
from shared.attempt import Attempt, Cancelled
from shared.errors import Refused
from shared.jobs import PreprocessJob, new_id
from shared.tree import scan

CONTENT = bytes(range(256)) * 20_000  # 5 MB: several blocks
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT with ranges; `breaks` connections end after 2 MB, `asked` keeps the ranges that came."""

    breaks = 0
    ranges = True
    asked: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.asked.append(wanted)
        start = int(wanted[len("bytes="):-1]) if wanted and self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[start:]
        if self.server.breaks:
            self.server.breaks -= 1
            body = body[:2_000_000]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def fetch(server: Server, tmp_path: Path, ctx: Attempt) -> Callable[..., Path]:
    url, path = f"http://127.0.0.1:{server.server_port}/archive", tmp_path / "raw" / "set" / "archive"
    return functools.partial(download, url, path, DIGEST, "use a copy", ctx)


def test_a_file_is_fetched_once_and_kept(fetch: Callable[..., Path], server: Server) -> None:
    assert fetch().read_bytes() == CONTENT
    assert fetch().read_bytes() == CONTENT
    assert server.asked == [""]


def test_a_broken_download_goes_on_where_it_broke_off(fetch: Callable[..., Path], server: Server) -> None:
    server.breaks = 2
    assert fetch().read_bytes() == CONTENT
    assert server.asked[0] == ""
    assert all(r.startswith("bytes=") for r in server.asked[1:])
    assert len(server.asked) == 3


def test_a_server_without_ranges_sends_it_from_the_beginning(fetch: Callable[..., Path], server: Server) -> None:
    server.breaks, server.ranges = 1, False
    assert fetch().read_bytes() == CONTENT


def test_a_part_that_was_whole_is_used(fetch: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "raw" / "set").mkdir(parents=True)
    (tmp_path / "raw" / "set" / "archive.part").write_bytes(CONTENT)
    assert fetch().read_bytes() == CONTENT


def test_other_bytes_are_refused_and_not_kept(server: Server, tmp_path: Path, ctx: Attempt) -> None:
    path = tmp_path / "archive"
    with pytest.raises(Refused, match=f"SHA-256 {DIGEST}, expected 00.*: use a copy") as e:
        download(f"http://127.0.0.1:{server.server_port}/x", path, "00" * 32, "use a copy", ctx)
    assert e.value.code == "source_unavailable"
    assert sorted(p.name for p in tmp_path.glob("archive*")) == ["archive.lock"]


def test_a_file_damaged_after_its_download_is_fetched_anew(fetch: Callable[..., Path]) -> None:
    fetch().write_bytes(b"damaged")
    assert fetch().read_bytes() == CONTENT


def test_an_unreachable_server_is_said_with_the_remedy(attempt_at: Callable[..., Attempt]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound and not listening: refuses connections
        url = f"http://127.0.0.1:{s.getsockname()[1]}/cifar-10-binary.tar.gz"
        ctx = attempt_at(PreprocessJob(new_id("d"), "cifar10"), CIFAR10_URL=url)
        with pytest.raises(Refused, match=r"can't be had \(.*refused\): upload the archive .*--data PATH") as e:
            locate("cifar10", ctx)
    assert e.value.code == "source_unavailable"


def test_a_cancelled_download_stops_and_can_go_on_later(
        fetch: Callable[..., Path], ctx: Attempt, root: Path, server: Server) -> None:
    (root / "jobs" / ctx.job_id / "cancel").touch()
    with pytest.raises(Cancelled):
        fetch()
    (root / "jobs" / ctx.job_id / "cancel").unlink()
    assert fetch().read_bytes() == CONTENT
    assert server.asked[1].startswith("bytes=")


@pytest.mark.parametrize("name", ["..", "../secret", "a/../../secret", "/etc", "", ".", "a//b", "nul\0"])
def test_an_import_s_name_can_not_leave_the_imports(ctx: Attempt, name: str) -> None:
    with pytest.raises(Refused) as e:
        locate(f"import:{name}", ctx)
    assert e.value.code == "bad_name"


def test_an_import_that_is_a_link_out_is_refused(ctx: Attempt, imports: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (imports / "pets").symlink_to(tmp_path / "outside")
    with pytest.raises(Refused, match="leads out"):
        locate("import:pets", ctx)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("below", ["", "cats"])
def test_an_import_that_may_not_be_read_is_refused_and_says_for_whom(ctx: Attempt, imports: Path, below: str) -> None:
    (imports / "pets" / "cats").mkdir(parents=True)
    closed = imports / "pets" / below
    closed.chmod(0)
    try:
        with pytest.raises(Refused, match=f"user, {os.getuid()}: give everybody the right") as e:
            scan(str(locate("import:pets", ctx)), str(imports))
    finally:
        closed.chmod(0o755)
    assert e.value.code == "source_unavailable"


def test_an_import_may_lie_deeper(ctx: Attempt, imports: Path) -> None:
    (imports / "2024" / "pets").mkdir(parents=True)
    assert locate("import:2024/pets", ctx) == imports.resolve() / "2024" / "pets"


@pytest.mark.parametrize("source", ["import:absent", "upload:u-absent"])
def test_a_source_that_is_not_there_says_what_to_do(ctx: Attempt, source: str) -> None:
    with pytest.raises(Refused, match="does not exist: (put|send)") as e:
        locate(source, ctx)
    assert e.value.code == "source_unavailable"


def test_an_upload_of_another_length_than_it_came_with_is_refused(ctx: Attempt, root: Path) -> None:
    folder = root / "raw" / "u-1"
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"12345")
    (folder / "upload.json").write_text(json.dumps({"size": 6}))
    with pytest.raises(Refused, match="has 5 bytes, expected 6"):
        locate("upload:u-1", ctx)
