"""Requests that cost much more than they weigh, and moments in which nothing may be lost or counted twice."""

import errno
import gzip
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image

from inference.codec import MEGAPIXEL, weight
from inference.front import LONG, Front
from inference.lane import Group
from inference.memory import Memory
from inference.metrics import Meters
from inference.predictor import Closed
from inference.scores import LIGHT, scores
from inference.steps import LOAD, Ask
from shared import images
from shared.ledger import Ledger
from shared.settings import load

from .conftest import RED, SIZE, Granian, Held, answer, png, publish_variant, request, until

INFER = "/v2/models/colors/infer"


def encoded(size: tuple[int, int], form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "options"), [
    ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"exif": b"Exif\0\0" + b"x" * 3000}), ("PNG", {}),
    ("WEBP", {"lossless": True}), ("WEBP", {"quality": 5})])
def test_few_bytes_of_many_pixels_are_not_light(form: str, options: dict[str, Any]) -> None:
    for size in ((3000, 2000), (700, 900)):
        large = encoded(size, form, **options)
        assert weight(large, len(large)) > LIGHT
    small = encoded((32, 32), form, **options)
    assert weight(small, len(small)) < LIGHT


def test_an_extended_webp_is_weighed_by_its_canvas() -> None:
    frames = [Image.new("RGB", (1500, 1200), color) for color in ((1, 2, 3), (3, 2, 1))]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert buffer.getvalue()[12:16] == b"VP8X"
    assert weight(buffer.getvalue(), len(buffer.getvalue())) == 1500 * 1200


def test_a_frame_header_inside_another_segment_deceives_nobody() -> None:
    real = encoded((3000, 2000), "JPEG")
    false = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 1, 1, 3)
    hidden = real[:2] + b"\xff\xfe" + struct.pack(">H", len(false) + 2) + false + real[2:]
    assert weight(hidden, len(hidden)) > LIGHT
    assert weight(real[:20], len(real)) == MEGAPIXEL  # its header did not come


@pytest.mark.parametrize(("data", "datatype", "shape"), [
    (["x" * 40_000, *[1] * 2000], "UINT8", [2001]),
    ([[1, 2], [3]], "UINT8", [3]),
    ([1, [2]], "UINT8", [2]),
    ([None, 1], "FP32", [2]),
    (["a", 1], "BYTES", [2]),
])
def test_a_list_of_anything_else_than_its_datatype_is_refused(serving: FlaskClient, data: list[Any], datatype: str,
                                                              shape: list[int]) -> None:
    asked = {"inputs": [{"name": "images", "datatype": datatype, "shape": shape, "data": data}]}
    told = serving.post(INFER, data=json.dumps(asked))
    assert (told.status_code, "that are not" in told.json["error"]) == (400, True)


def test_an_output_is_asked_for_once(serving: FlaskClient) -> None:
    asked = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3],
                         "data": [0] * SIZE * SIZE * 3}], "outputs": [{"name": "probabilities"}] * 2}
    told = serving.post(INFER, data=json.dumps(asked))
    assert (told.status_code, told.json["error"]) == (
        400, "expected at most 1 outputs but got 2 outputs for model 'colors'")


def test_large_json_of_anything_but_images_is_refused_unread(app: Flask, serving: FlaskClient) -> None:
    object.__setattr__(app.extensions["lanner"].settings, "request_limit_mib", 4)
    text = b'{"images":[' + b"{}," * 500_000 + b"{}]}"
    told = serving.post("/v1/models/colors/predict", data=text, content_type="application/json")
    assert (told.status_code, told.json["error"]["code"]) == (400, "malformed")


def test_a_body_of_several_gzip_members_is_read_to_its_end(serving: FlaskClient) -> None:
    asked = json.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3],
                                    "data": [0] * SIZE * SIZE * 3}]}).encode()
    headers = {"Content-Encoding": "gzip"}
    both = gzip.compress(asked[:40]) + gzip.compress(asked[40:])
    assert serving.post(INFER, data=both, headers=headers).status_code == 200
    assert serving.post(INFER, data=both + bytes(600), headers=headers).status_code == 200
    told = serving.post(INFER, data=gzip.compress(asked) + b"more", headers=headers)
    assert (told.status_code, "can't be decompressed" in told.json["error"]) == (400, True)


@pytest.mark.parametrize(("headers", "status"), [
    ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://localhost"}, 202),
    ({"Sec-Fetch-Site": "same-site"}, 403), ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxy.example"}, 202),
    ({}, 202)])
def test_a_page_of_another_site_may_not_write(serving: FlaskClient, root: Path, headers: dict[str, str],
                                              status: int) -> None:
    job = serving.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10"}).json["id"]
    assert serving.post(f"/v1/jobs/{job}/cancel", headers=headers).status_code == status
    assert Ledger(root, None).cancel_asked(job) == (status == 202)  # type: ignore[arg-type]


def test_a_prediction_with_an_origin_is_flask_s_which_looks_at_it(serving: FlaskClient) -> None:
    told = serving.post("/v1/models/colors/predict", data=png(RED), content_type="image/png",
                        headers={"Origin": "http://evil.example"})
    assert told.status_code == 403


def test_methods_that_nobody_knows_are_counted_together(serving: FlaskClient) -> None:
    for method in ("X1", "X2", "X3"):
        assert serving.open("/livez", method=method).status_code == 405
    told = serving.get("/metrics").text
    assert 'method="other"' in told
    assert 'method="X' not in told


def test_uploads_are_listed_whatever_else_lies_there(serving: FlaskClient, root: Path) -> None:
    (root / "raw" / "cifar10").mkdir(parents=True)
    assert serving.put("/v1/uploads/u-1", data=b"bytes").status_code == 201
    assert [upload["id"] for upload in serving.get("/v1/uploads").json["uploads"]] == ["u-1"]


def test_an_upload_that_a_predict_job_reads_stays(serving: FlaskClient) -> None:
    serving.put("/v1/uploads/u-1", data=b"bytes")
    job = {"kind": "predict", "name": "colors", "source": "upload:u-1"}
    assert serving.post("/v1/jobs", json=job).status_code == 202
    assert serving.delete("/v1/uploads/u-1").status_code == 409


def test_a_folder_that_is_no_name_hides_none(serving: FlaskClient, root: Path) -> None:
    (root / "aliases" / "lost+found").mkdir()
    assert [model["name"] for model in serving.get("/v1/models").json["models"]] == ["colors"]
    assert serving.post("/v2/repository/index").status_code == 200


def test_a_full_disk_is_said_and_leaves_no_half_pipeline(serving: FlaskClient, root: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    accept, accepted = Ledger.accept, []

    def full_at_the_second(self: Ledger, job_id: str, *args: Any, **options: Any) -> Any:
        if accepted:
            raise OSError(errno.ENOSPC, "No space left on device")
        accepted.append(job_id)
        return accept(self, job_id, *args, **options)

    monkeypatch.setattr(Ledger, "accept", full_at_the_second)
    told = serving.post("/v1/pipelines", json={"source": "cifar10"})
    assert (told.status_code, told.json["error"]["code"]) == (507, "disk_full")
    assert Ledger(root, None).cancel_asked(accepted[0])  # type: ignore[arg-type]


def test_refused_large_bodies_leave_their_room(app: Flask, connect: Callable[[], socket.socket], held: Held) -> None:
    context = app.extensions["lanner"]
    object.__setattr__(context.settings, "queue_ms", 100)
    object.__setattr__(context.settings, "request_limit_mib", 4)
    free = context.intake._free
    first = connect()
    first.sendall(request())
    assert held.running.wait(10)
    for _ in range(3):
        connection = connect()
        connection.sendall(request(png(RED) + bytes(2 << 20)))
        assert answer(connection)[0] == 503
    assert context.intake._free == free
    held.go.set()


def test_large_images_that_would_wait_for_a_thread_too_long_are_turned_away(app: Flask, front: Front) -> None:
    object.__setattr__(app.extensions["lanner"].settings, "queue_ms", 100)
    front._aside, front._aside_s = 2 * LONG, 0.2
    with socket.create_connection(("127.0.0.1", front.port), 20) as connection:  # type: ignore[attr-defined]
        connection.sendall(request(encoded((700, 700), "PNG")))
        status, _, body = answer(connection)
    assert (status, json.loads(body)["error"]["code"]) == (503, "busy")
    front._aside = 0
    with socket.create_connection(("127.0.0.1", front.port), 20) as connection:  # type: ignore[attr-defined]
        connection.sendall(request(encoded((700, 700), "PNG")))
        assert answer(connection)[0] == 200
    until(lambda: front._aside == 0)


def test_what_is_in_memory_does_not_wait_for_what_loads(root: Path) -> None:
    for model in ("m-1", "m-2"):
        publish_variant(root, model)
    memory = Memory(root, Meters(), 1)
    memory.get(("m-1", "onnx-fp32"))
    with memory.loading:
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(memory.get(("m-1", "onnx-fp32"))))
        thread.start()
        thread.join(5)
        assert len(got) == 1
    memory.close()


def test_a_client_that_left_in_the_same_turn_is_counted_once(app: Flask, serving: FlaskClient) -> None:
    statistics = app.extensions["lanner"].statistics
    served = app.extensions["lanner"].loaded.pointed("colors", "production")
    lane = SimpleNamespace(front=SimpleNamespace(fast=SimpleNamespace(api=app.extensions["lanner"])),
                           api=app.extensions["lanner"], name="colors", model="colors", beginning=lambda served: b"")
    group = Group(lane, served)  # type: ignore[arg-type]
    entry = SimpleNamespace(left=False, over=True, began=time.monotonic_ns())
    before = statistics.snapshot()
    group._leave(entry, None)  # type: ignore[arg-type]
    assert (statistics.snapshot(), entry.left) == (before, False)


def test_an_answer_that_comes_before_the_body_is_whole_reaches_the_client(connect: Callable[[], socket.socket],
                                                                          granian: Granian) -> None:
    early = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig"
    granian.close()
    path = granian.path
    path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if connection.recv(100):
                connection.sendall(early)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    for _ in range(20):
        connection = connect()
        connection.sendall(b"PUT /v1/uploads/u-1 HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n")
        try:
            for _ in range(40):
                connection.sendall(bytes(100_000))
        except OSError:
            pass
        assert answer(connection)[2] == b"big"
    listener.close()


def test_relative_artifacts_are_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTIFACTS", "here")
    assert load().artifacts == Path.cwd() / "here"


def test_a_replaced_variant_is_asked_for_again_in_a_thread_that_may_wait(root: Path) -> None:
    """`scores` says LOAD before it resolves again: the front's loop must not load."""
    spec = SimpleNamespace(size=SIZE)
    predictor = SimpleNamespace(check=lambda *a: None)
    served = SimpleNamespace(version=1, loaded=SimpleNamespace(predictor=predictor, spec=spec))
    resolved: list[int] = []
    context = SimpleNamespace(settings=SimpleNamespace(queue_ms=0), meters=Meters(), loaded=SimpleNamespace(
        is_at_hand=lambda *a: True, resolve=lambda *a: resolved.append(1) or served))
    timing = SimpleNamespace(found=lambda v: None, input_ns=0)
    steps = scores(context, timing, "colors", "production", None, None,  # type: ignore[arg-type]
                   lambda size: np.zeros((1, size, size, 3), np.uint8), 0, 0)
    assert isinstance(next(steps), Ask)
    assert steps.throw(Closed()) is LOAD
    assert len(resolved) == 1
    assert isinstance(next(steps), Ask)
    assert len(resolved) == 2
    steps.close()


@pytest.mark.parametrize(("path", "body", "code", "says"), [
    ("/v1/pipelines", {"source": "cifar10", "train": {"recipe": "resnet"}}, "unknown_recipe",
     "recipe 'resnet' is unknown to train: expected one of seed-cnn, small, speedrun, accurate, transfer, auto"),
    ("/v1/pipelines", {"source": "import:../../etc"}, "bad_name", "import '../../etc' is not valid"),
    ("/v1/jobs", {"kind": "predict", "name": "colors", "source": "dataset:d-1", "version": 99}, "not_found",
     "colors has no version 99: it has [1]"),
    ("/v1/jobs", {}, "bad_job", "kind is missing"),
])
def test_what_can_not_work_is_refused_before_it_is_accepted(serving: FlaskClient, root: Path, path: str,
                                                            body: dict[str, Any], code: str, says: str) -> None:
    told = serving.post(path, json=body).json["error"]
    assert told["code"] == code
    assert says in told["message"]
    assert not (root / "jobs").exists()


@pytest.mark.parametrize(("data", "says"), [
    (b"GIF89a" + bytes(20), "the image is a GIF: expected a JPEG, PNG or WebP file"),
    (b"BM" + bytes(20), "is a BMP"), (b"II*\0" + bytes(20), "is a TIFF"),
    (b"other", "the image's format is not recognised")])
def test_an_image_of_another_format_is_called_by_its_name(serving: FlaskClient, data: bytes, says: str) -> None:
    told = serving.post("/v1/models/colors/predict", data=data, content_type="image/png")
    assert (told.status_code, says in told.json["error"]["message"]) == (422, True)


def test_an_empty_body_an_unknown_query_and_another_method_say_so(serving: FlaskClient) -> None:
    path = "/v1/models/colors/predict"
    empty = serving.post(path, data=b"", content_type="image/png").json["error"]["message"]
    assert empty.startswith("the image is empty, it has 0 bytes")
    unknown = serving.post(f"{path}?topk=2", data=png(RED), content_type="image/png")
    assert (unknown.status_code, unknown.json["error"]["message"]) == (
        422, "predict knows no 'topk': expected some of alias, top_k, variant, version")
    large = serving.post(f"{path}?top_k=999999999999", data=png(RED), content_type="image/png")
    assert "from 1 to 100,000,000" in large.json["error"]["message"]
    assert serving.get(path).json["error"]["message"] == f"GET can't be asked of {path}: expected POST"
    assert serving.get("/v1/jobs/nope").json["error"]["message"] == (
        "job nope does not exist: GET /v1/jobs lists the latest")


def test_a_picture_of_too_many_pixels_says_how_many_are_accepted(serving: FlaskClient) -> None:
    for size in ((6000, 5000), (9000, 9000)):
        told = serving.post("/v1/models/colors/predict", data=encoded(size, "PNG"), content_type="image/png")
        assert (told.status_code, "25,000,000" in told.json["error"]["message"]) == (422, True)


def test_a_jpeg_of_few_bytes_and_many_pixels_is_decoded_beside_the_loop(connect: Callable[[], socket.socket],
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    real = images.simplejpeg.decode_jpeg

    def seen(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return real(*args, **options)

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", seen)
    large, small = encoded((1000, 800), "JPEG"), encoded((32, 32), "JPEG")
    assert len(large) < LIGHT
    connection = connect()
    for image in (small, large, small):
        connection.sendall(request(image))
        assert answer(connection)[0] == 200
    assert [name.split("_")[0] for name in threads] == ["front", "front", "front"]
    assert [name == "front" for name in threads] == [True, False, True]
