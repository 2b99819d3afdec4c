"""/v1/uploads through Flask's client; what only a real connection shows is in test_server.py."""

import base64
import hashlib
import io
import os
import time
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from inference import receive
from shared.errors import Unavailable

DATA = b"some archive " * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()
DIGEST = f"sha-256=:{base64.b64encode(bytes.fromhex(SHA256)).decode()}:"


def left(root: Path) -> list[str]:
    """What is in raw/, hidden names too."""
    return sorted(os.listdir(root / "raw")) if (root / "raw").exists() else []


def chunked(client: FlaskClient, path: str, data: bytes, **headers: str) -> Any:
    return client.put(path, input_stream=io.BytesIO(data), headers={"Transfer-Encoding": "chunked", **headers},
                      environ_overrides={"wsgi.input_terminated": True})


def test_an_upload_is_stored_with_its_digest(client: FlaskClient, root: Path) -> None:
    answer = client.put("/v1/uploads/u-1?filename=../My%20Flowers.zip", data=DATA)
    assert answer.status_code == 201
    assert {k: answer.json[k] for k in ("id", "size", "sha256", "filename")} == {
        "id": "u-1", "size": len(DATA), "sha256": SHA256, "filename": "My Flowers.zip"}
    assert (root / "raw/u-1/data").read_bytes() == DATA
    assert client.get("/v1/uploads/u-1").json == answer.json
    assert client.get("/v1/uploads").json == {"uploads": [answer.json]}
    assert left(root) == ["u-1"]


@pytest.mark.parametrize("headers", [{"X-Content-SHA256": SHA256.upper()}, {"Content-Digest": DIGEST},
                                     {"Content-Digest": f"md5=:aaaa:, {DIGEST}"}])
def test_a_digest_that_fits_is_accepted(client: FlaskClient, headers: dict[str, str]) -> None:
    assert client.put("/v1/uploads/u-1", data=DATA, headers=headers).status_code == 201


@pytest.mark.parametrize(("headers", "status", "code"), [
    ({"X-Content-SHA256": "0" * 64}, 422, "digest_mismatch"),
    ({"Content-Digest": f"sha-256=:{base64.b64encode(bytes(32)).decode()}:"}, 422, "digest_mismatch"),
    ({"X-Content-SHA256": "abc"}, 400, "malformed"),
    ({"Content-Digest": "sha-256=:abc:"}, 400, "malformed"),
    ({"Content-Digest": "md5=:aaaa:"}, 400, "malformed"),
    ({"Content-Digest": DIGEST, "X-Content-SHA256": "0" * 64}, 400, "malformed"),
    ({"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
])
def test_a_digest_that_does_not_fit_leaves_nothing(client: FlaskClient, root: Path, headers: dict[str, str],
                                                   status: int, code: str) -> None:
    answer = client.put("/v1/uploads/u-1", data=DATA, headers=headers)
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code)
    assert left(root) == []


def test_an_empty_upload_leaves_nothing(client: FlaskClient, root: Path) -> None:
    answer = client.put("/v1/uploads/u-1", input_stream=io.BytesIO(), headers={"Content-Length": "0"})
    assert (answer.status_code, answer.json["error"]["code"]) == (422, "empty_upload")
    assert left(root) == []


def test_the_same_bytes_again_are_the_same_upload(client: FlaskClient, root: Path) -> None:
    first = client.put("/v1/uploads/u-1", data=DATA)
    for headers in ({}, {"X-Content-SHA256": SHA256}):
        again = client.put("/v1/uploads/u-1", data=DATA, headers=headers)
        assert (again.status_code, again.json) == (200, first.json)
    assert left(root) == ["u-1"]


def test_other_bytes_under_the_same_id_are_a_conflict(client: FlaskClient, root: Path) -> None:
    client.put("/v1/uploads/u-1", data=DATA)
    other = hashlib.sha256(b"other").hexdigest()
    for headers in ({}, {"X-Content-SHA256": other}):
        answer = client.put("/v1/uploads/u-1", data=b"other", headers=headers)
        assert (answer.status_code, answer.json["error"]["code"]) == (409, "upload_exists")
    assert (root / "raw/u-1/data").read_bytes() == DATA
    assert left(root) == ["u-1"]


def test_a_body_over_the_limit_leaves_nothing(client: FlaskClient, root: Path) -> None:
    over = bytes((8 << 20) + 1)
    for answer in (client.put("/v1/uploads/u-1", data=over),
                   chunked(client, "/v1/uploads/u-1", over, **{"X-Content-SHA256": "0" * 64})):
        assert (answer.status_code, answer.json["error"]["code"]) == (413, "too_large")
    assert left(root) == []


def test_a_body_of_unknown_length_needs_a_digest(client: FlaskClient, root: Path) -> None:
    answer = chunked(client, "/v1/uploads/u-1", DATA)
    assert (answer.status_code, answer.json["error"]["code"]) == (411, "length_required")
    assert left(root) == []
    assert chunked(client, "/v1/uploads/u-1", DATA, **{"X-Content-SHA256": SHA256}).status_code == 201


def test_a_disk_without_room_is_told_before_the_bytes_are_sent(root: Path) -> None:
    def unread() -> Any:
        raise AssertionError("the body was read")
        yield

    with pytest.raises(Unavailable) as e:
        receive.receive(root / "raw", "u-1", unread(), size=1 << 60)
    assert e.value.code == "disk_full"
    assert left(root) == []


def test_a_deleted_upload_is_gone(client: FlaskClient, root: Path) -> None:
    client.put("/v1/uploads/u-1", data=DATA)
    assert client.delete("/v1/uploads/u-1").status_code == 204
    assert client.get("/v1/uploads/u-1").status_code == 404
    assert client.delete("/v1/uploads/u-1").status_code == 404
    assert left(root) == []


def test_an_upload_that_a_job_reads_is_not_deleted(client: FlaskClient) -> None:
    client.put("/v1/uploads/u-1", data=DATA)
    job = client.post("/v1/jobs", json={"kind": "preprocess", "source": "upload:u-1", "name": "flowers"}).json["id"]
    answer = client.delete("/v1/uploads/u-1")
    assert (answer.status_code, answer.json["error"]["code"]) == (409, "in_use")
    assert job in answer.json["error"]["message"]


def test_what_a_dead_process_left_is_swept_and_what_is_being_written_is_not(root: Path) -> None:
    raw = root / "raw"

    def pieces() -> Any:
        yield b"first"
        for temp in raw.glob(".*"):
            old = time.time() - 2 * receive.STALE_S
            os.utime(temp, (old, old))
        receive.sweep(raw)
        yield b"second"

    (raw / ".u-0.dead").mkdir(parents=True)
    (raw / ".u-0.dead/data").write_bytes(b"half")
    receive.receive(raw, "u-1", pieces())
    assert left(root) == ["u-1"]
    assert (raw / "u-1/data").read_bytes() == b"firstsecond"


@pytest.mark.parametrize("name", ["UPPER", "a.b", "a%20b", "%2e%2e", "a%2f..%2fb", "a" * 64, "-a", "a%00", "a%0a"])
@pytest.mark.parametrize("method", ["put", "get", "delete"])
def test_a_name_that_is_no_id_is_refused(client: FlaskClient, root: Path, method: str, name: str) -> None:
    answer = getattr(client, method)(f"/v1/uploads/{name}", **({"data": DATA} if method == "put" else {}))
    assert answer.status_code in (404, 422)
    assert answer.json["error"]["code"] in ("bad_name", "not_found")
    assert left(root) == []
