"""Fixtures of the API's tests: the app on an artifacts folder, tiny real Variants, a real granian process."""

import dataclasses
import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from flask import Flask
from flask.testing import FlaskClient
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from inference.app import create_app
from inference.body import Intake
from inference.front import Front
from shared import artifacts
from shared.runtimes.onnx import OnnxSession
from shared.settings import Settings
from shared.stack import free_port

SIZE, LABELS = 32, ["red", "green", "blue"]
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def png(color: tuple[int, int, int], size: int = SIZE, form: str = "PNG") -> bytes:
    """An encoded image of one colour; the tiny Variants say which of the three it is."""
    out = io.BytesIO()
    Image.new("RGB", (size, size), color).save(out, form)
    return out.getvalue()


def onnx_bytes(weights: np.ndarray, size: int = SIZE) -> bytes:
    """A network of a Variant's form: uint8 NHWC -> mean over the pixels -> a product -> softmax; float32 [3, 3]."""
    nodes = [helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
             helper.make_node("MatMul", ["means", "weights"], ["logits"]),
             helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)]
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", size, size, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", len(LABELS)])],
        [numpy_helper.from_array(weights.astype(np.float32), "weights"),
         numpy_helper.from_array(np.array([1, 2], np.int64), "axes")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def publish_variant(root: Path, model_id: str, variant: str = "onnx-fp32",
                    weights: np.ndarray | bytes | None = None, size: int = SIZE) -> None:
    """A Variant as optimization publishes it; weights other than the identity change what it answers.

    Bytes are those of another network of a Variant's form.
    """
    staging = artifacts.stage(root, "j-test")
    network = weights if isinstance(weights, bytes) else \
        onnx_bytes(np.eye(3) * 0.05 if weights is None else weights, size)
    (staging / "model.onnx").write_bytes(network)
    images = np.random.default_rng(0).integers(0, 256, (16, size, size, 3), np.uint8)
    session = OnnxSession(staging / "model.onnx")
    np.savez(staging / "golden.npz", images=images, probabilities=session.run(images))
    session.close()
    form, precision = variant.split("-")
    spec = {"size": size, "labels": LABELS, "mean": [0.5] * 3, "std": [0.25] * 3}
    artifacts.publish(root, staging, f"variants/{model_id}/{variant}",
                      {"format": form, "precision": precision, "spec": spec, "model": model_id, "summary": {}})


def publish_model(root: Path, name: str, model_id: str, *, size: int = SIZE,
                  **variants: np.ndarray | bytes | None) -> int:
    """A Model's version under a Name with its Variants (`onnx_fp32=weights`). Returns the version."""
    staging = artifacts.stage(root, "j-test")
    (staging / "model.keras").write_bytes(b"weights")
    artifacts.publish(root, staging, f"models/{model_id}", {"name": name, "summary": {"validation_accuracy": 0.9}})
    for variant, weights in (variants or {"onnx_fp32": None}).items():
        publish_variant(root, model_id, variant.replace("_", "-"), weights, size)
    return artifacts.register_version(root, name, model_id)


def until(happens: Callable[[], Any], seconds: float = 15.0) -> Any:
    """The first true value of `happens()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := happens():
            return value
        time.sleep(0.02)
    raise AssertionError(f"did not happen within {seconds:g} s")


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def settings(root: Path, valkey: Any) -> Settings:
    return Settings(device="cpu", artifacts=root, redis_url=valkey.url, refresh_s=0.05, upload_limit_mib=8,
                    request_limit_mib=1)


@pytest.fixture
def app(settings: Settings) -> Iterator[Flask]:
    app = create_app(settings)
    yield app
    app.extensions["lanner"].loaded.close()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def serving(root: Path, client: FlaskClient) -> FlaskClient:
    """A client of an API that serves `colors`: version 1, onnx-fp32, as production."""
    version = publish_model(root, "colors", "m-1")
    artifacts.promote(root, "colors", "production", version, "onnx-fp32", by="test")
    until(lambda: client.get("/readyz").status_code == 200)
    return client


@dataclasses.dataclass
class Server:
    """The API in its own granian process."""

    process: subprocess.Popen[bytes]
    port: int
    root: Path

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def send(self, head: str, body: bytes = b"") -> socket.socket:
        """A connection on which a request's head and some of its body went out; the caller closes it."""
        connection = socket.create_connection(("127.0.0.1", self.port), 20)
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return connection


def start_server(root: Path, redis_url: str, ready: bool = True) -> Server:
    port = free_port()
    env = {**os.environ, "DEVICE": "cpu", "ARTIFACTS": str(root), "REDIS_URL": redis_url, "PORT": str(port),
           "REFRESH_S": "0.05", "UPLOAD_LIMIT_MIB": "512", "REQUEST_LIMIT_MIB": "1"}
    server = Server(subprocess.Popen([sys.executable, "-m", "inference"], env=env), port, root)
    if ready:
        until(lambda: answers(port))
    return server


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory, valkey_server: Any) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("artifacts"), valkey_server.url)
    yield server
    server.process.terminate()
    server.process.wait(20)


@pytest.fixture
def server(module_server: Server, valkey: Any) -> Server:
    """The module's server, without uploads."""
    shutil.rmtree(module_server.root / "raw", ignore_errors=True)
    return module_server


@pytest.fixture
def own_server(root: Path, valkey: Any) -> Iterator[Server]:
    """A server that the test may end."""
    server = start_server(root, valkey.url)
    yield server
    server.process.terminate()
    server.process.wait(20)


IMAGE = png(RED)
HEAD = f"POST /v1/models/colors/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(IMAGE)}"


class Granian:
    """In granian's place: notes what reaches it and ends the connection with an answer of its own."""

    def __init__(self, path: Path):
        self.seen: list[bytes] = []
        self.path = path
        self.patience_s = 0.3  # without a byte: then it answers
        self.reply = b"HTTP/1.1 299 granian\r\nContent-Length: 0\r\n\r\n"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(self.patience_s)
                data = b""
                try:
                    while piece := connection.recv(1 << 16):
                        data += piece
                except TimeoutError:
                    pass
                if not data:  # the front asks whether somebody is there
                    continue
                self.seen.append(data)
                with suppress(OSError):  # the front may have given it up
                    connection.sendall(self.reply)

    def close(self) -> None:
        with suppress(OSError):  # closed before
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def granian(tmp_path: Path) -> Iterator[Granian]:
    granian = Granian(tmp_path / "api.sock")
    yield granian
    granian.close()


@pytest.fixture
def front(app: Flask, serving: Any, granian: Granian, tmp_path: Path) -> Iterator[Front]:
    front = Front(app.wsgi_app, tmp_path / "api.sock")  # type: ignore[arg-type]
    front.port = free_port()  # type: ignore[attr-defined]
    front.start("127.0.0.1", front.port, shared=False)  # type: ignore[attr-defined]
    until(lambda: answers(front.port))  # type: ignore[attr-defined]
    yield front
    front.close()


@pytest.fixture
def connect(front: Front) -> Iterator[Callable[[], socket.socket]]:
    made: list[socket.socket] = []

    def connect() -> socket.socket:
        made.append(socket.create_connection(("127.0.0.1", front.port), 20))  # type: ignore[attr-defined]
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


@pytest.fixture
def intake(app: Flask) -> Intake:
    found: Intake = app.extensions["lanner"].intake
    return found


class Held:
    """Keeps the Variant from running until `go`; notes how many images each run had."""

    def __init__(self, app: Flask):
        self.predictor = app.extensions["lanner"].loaded.resolve("colors", "production").loaded.predictor
        self.go, self.running, self.batches = threading.Event(), threading.Event(), list[int]()
        self._run = self.predictor._session.run
        self.slow(1.0)  # it runs in a thread of its own
        self.predictor._session.run = self.run

    def slow(self, seconds: float) -> None:
        """How long a run is taken to last."""
        self.predictor._run_s = seconds

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.running.set()
        assert self.go.wait(20)
        self.batches.append(len(batch))
        scores: np.ndarray = self._run(batch)
        return scores


@pytest.fixture
def held(app: Flask, front: Front) -> Iterator[Held]:
    held = Held(app)
    yield held
    held.go.set()


def request(image: bytes = IMAGE, more: str = "") -> bytes:
    return HEAD.replace(str(len(IMAGE)), str(len(image))).encode() + more.encode() + b"\r\n\r\n" + image


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, dict(response.headers), response.read()


def label(body: bytes) -> str:
    found: str = json.loads(body)["predictions"][0]["top"][0]["label"]
    return found
