"""The Open Inference Protocol v2 through NVIDIA's own client, on the API in its own granian process."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException, shared_memory

from shared import artifacts
from shared.artifacts import manifest_digest

from .conftest import BLUE, GREEN, LABELS, RED, SIZE, Server, png, publish_model, start_server, until

SWAPPED = np.eye(3)[::-1] * 0.05  # calls red blue
CODINGS = (None, "gzip", "deflate")


@pytest.fixture(scope="module")
def v2_server(tmp_path_factory: pytest.TempPathFactory, valkey_server: Any) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("artifacts")
    publish_model(root, "colors", "m-1", onnx_fp32=None, onnx_int8=SWAPPED)
    publish_model(root, "colors", "m-2", onnx_fp32=SWAPPED)
    artifacts.promote(root, "colors", "production", 1, "onnx-fp32", by="test")
    artifacts.promote(root, "colors", "candidate", 2, "onnx-fp32", by="test")
    os.environ["SYSTEM_SHARED_MEMORY"] = "on"
    try:
        server = start_server(root, valkey_server.url)
    finally:
        del os.environ["SYSTEM_SHARED_MEMORY"]
    until(lambda: server.call("GET", "/v2/models/colors@candidate/ready")[0] == 200)
    until(lambda: server.call("GET", "/v2/models/colors/ready")[0] == 200)
    yield server
    server.process.terminate()
    server.process.wait(20)


@pytest.fixture
def client(v2_server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{v2_server.port}", concurrency=4) as client:
        yield client


def pixels(*colors: tuple[int, int, int]) -> np.ndarray:
    """uint8 [N, SIZE, SIZE, 3]."""
    return np.stack([np.full((SIZE, SIZE, 3), color, np.uint8) for color in colors])


def given(array: np.ndarray, datatype: str = "UINT8", binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("images", list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def wanted(binary: bool = True, classes: int = 0) -> triton.InferRequestedOutput:
    return triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=classes)


def labels(result: triton.InferResult) -> list[str]:
    return [LABELS[i] for i in result.as_numpy("probabilities").argmax(1)]


def test_the_acceptance_script(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colors")
    assert not client.is_model_ready("no_such_model")
    meta, config = client.get_model_metadata("colors"), client.get_model_config("colors", "1")
    assert meta["inputs"][0]["shape"][0] == -1
    assert config["max_batch_size"] >= 1
    x = np.random.default_rng(0).uniform(0, 255, (3, SIZE, SIZE, 3)).astype(np.float32)
    reference = client.infer("colors", [given(x, "FP32")]).as_numpy("probabilities")
    for binary_in, binary_out, sent, answered in itertools.product((True, False), (True, False), CODINGS, CODINGS):
        result = client.infer("colors", [given(x, "FP32", binary_in)], outputs=[wanted(binary_out)], request_id="7",
                              model_version="1", request_compression_algorithm=sent,
                              response_compression_algorithm=answered)
        assert np.allclose(result.as_numpy("probabilities"), reference)
        assert result.get_response()["id"] == "7"
    top = client.infer("colors", [given(x, "FP32")], outputs=[wanted(classes=2)]).as_numpy("probabilities")
    assert top.shape == (3, 2)
    assert top[0, 0].count(b":") == 2
    for asked in [client.async_infer("colors", [given(x, "FP32")]) for _ in range(8)]:
        assert np.allclose(asked.get_result().as_numpy("probabilities"), reference)
    assert client.get_model_repository_index()[0]["state"] == "READY"
    assert client.get_inference_statistics("colors")["model_stats"][0]["inference_count"] > 0
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'no_such_model' is not found"):
        client.infer("no_such_model", [given(x, "FP32")])


def test_metadata_and_config_are_what_the_variant_takes(client: triton.InferenceServerClient) -> None:
    assert client.get_model_metadata("colors") == {
        "name": "colors", "versions": ["1", "2"], "platform": "onnxruntime_onnx",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, SIZE, SIZE, 3]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}]}
    config = client.get_model_config("colors@candidate")
    assert (config["name"], config["max_batch_size"]) == ("colors@candidate", 256)
    assert config["input"][0]["dims"] == [SIZE, SIZE, 3]
    assert config["parameters"]["labels"]["string_value"] == '["red", "green", "blue"]'
    assert config["instance_group"][0]["kind"] == "KIND_CPU"


def test_what_is_advertised_is_what_works(client: triton.InferenceServerClient) -> None:
    assert set(client.get_server_metadata()["extensions"]) == {
        "binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters", "statistics",
        "system_shared_memory"}


@pytest.mark.parametrize(("array", "datatype", "binary"), [
    *((pixels(RED, GREEN, BLUE).astype(kind), datatype, binary) for kind, datatype in
      ((np.uint8, "UINT8"), (np.int32, "INT32"), (np.int64, "INT64"), (np.uint16, "UINT16"), (np.float32, "FP32"),
       (np.float64, "FP64")) for binary in (True, False)),
    (pixels(RED, GREEN, BLUE).astype(np.float16), "FP16", True),
    (np.array([png(RED), png(GREEN, 77, "JPEG"), png(BLUE, 300, "WEBP")], object), "BYTES", True),
    (np.array([[png(RED)], [png(GREEN)], [png(BLUE)]], object), "BYTES", True)])
def test_images_come_as_pixels_of_any_datatype_or_encoded(client: triton.InferenceServerClient, array: np.ndarray,
                                                         datatype: str, binary: bool) -> None:
    assert labels(client.infer("colors", [given(array, datatype, binary)])) == LABELS


def test_an_alias_a_version_and_a_variant_are_reached(client: triton.InferenceServerClient,
                                                      v2_server: Server) -> None:
    red = [given(pixels(RED))]

    def answer(model: str, version: str = "", **parameters: str) -> tuple[str, str, str, str]:
        result = client.infer(model, red, model_version=version, parameters=parameters)
        told = result.get_response()
        place = f"variants/m-{told['model_version']}/{told['parameters']['variant']}"
        assert told["parameters"]["model_digest"] == manifest_digest(v2_server.root, place)
        return told["model_name"], told["model_version"], told["parameters"]["variant"], labels(result)[0]

    assert answer("colors") == ("colors", "1", "onnx-fp32", "red")
    assert answer("colors@production") == ("colors@production", "1", "onnx-fp32", "red")
    assert answer("colors@candidate") == ("colors@candidate", "2", "onnx-fp32", "blue")
    assert answer("colors", "2") == ("colors", "2", "onnx-fp32", "blue")
    assert answer("colors", variant="onnx-int8") == ("colors", "1", "onnx-int8", "blue")


def test_the_likeliest_classes_come_with_their_labels(client: triton.InferenceServerClient) -> None:
    scores = client.infer("colors", [given(pixels(GREEN))]).as_numpy("probabilities")[0]
    for binary in (True, False):
        top = client.infer("colors", [given(pixels(GREEN))], outputs=[wanted(binary, 5)]).as_numpy("probabilities")
        first = top[0, 0] if binary else top[0, 0].encode()
        assert top.shape == (1, 3)
        assert first == f"{scores[1]:.6f}:1:green".encode()


def test_tensors_in_system_shared_memory(client: triton.InferenceServerClient) -> None:
    images = pixels(RED, BLUE)
    region_in = shared_memory.create_shared_memory_region("in", f"/lanner-in-{os.getpid()}", images.nbytes + 7)
    region_out = shared_memory.create_shared_memory_region("out", f"/lanner-out-{os.getpid()}", 24)
    try:
        shared_memory.set_shared_memory_region(region_in, [images], offset=7)
        client.register_system_shared_memory("in", f"/lanner-in-{os.getpid()}", images.nbytes + 7)
        client.register_system_shared_memory("out", f"/lanner-out-{os.getpid()}", 24)
        status = client.get_system_shared_memory_status()
        assert [(r["name"], r["byte_size"]) for r in status] == [("in", images.nbytes + 7), ("out", 24)]
        with pytest.raises(InferenceServerException, match="already in manager"):
            client.register_system_shared_memory("in", f"/lanner-in-{os.getpid()}", 8)
        tensor = triton.InferInput("images", list(images.shape), "UINT8")
        tensor.set_shared_memory("in", images.nbytes, 7)
        output = wanted()
        output.set_shared_memory("out", 24)
        told = client.infer("colors", [tensor], outputs=[output]).get_response()["outputs"]
        assert told == [{"name": "probabilities", "datatype": "FP32", "shape": [2, 3]}]
        scores = shared_memory.get_contents_as_numpy(region_out, np.float32, [2, 3])
        assert scores.argmax(1).tolist() == [0, 2]
        output.set_shared_memory("out", 20)
        with pytest.raises(InferenceServerException, match="should be at least 24 bytes"):
            client.infer("colors", [tensor], outputs=[output])
        tensor.set_shared_memory("in", images.nbytes, 8)
        with pytest.raises(InferenceServerException, match="Invalid offset"):
            client.infer("colors", [tensor])
        tensor.set_shared_memory("in", images.nbytes, 7)
        os.truncate(f"/dev/shm/lanner-in-{os.getpid()}", 100)
        with pytest.raises(InferenceServerException, match="fewer bytes than it was registered with"):
            client.infer("colors", [tensor])
        client.unregister_system_shared_memory("in")
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'in'"):
            client.infer("colors", [tensor])
        client.unregister_system_shared_memory()
        assert client.get_system_shared_memory_status() == []
        assert labels(client.infer("colors", [given(pixels(RED))])) == ["red"]
    finally:
        client.unregister_system_shared_memory()
        shared_memory.destroy_shared_memory_region(region_in)
        shared_memory.destroy_shared_memory_region(region_out)


def test_a_tensor_larger_than_a_request_may_be_is_not_read(client: triton.InferenceServerClient) -> None:
    path = Path(f"/dev/shm/lanner-vast-{os.getpid()}")
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # takes no memory: nothing is written
    try:
        client.register_system_shared_memory("vast", path.name, 1 << 40)
        tensor = triton.InferInput("images", [1, SIZE, SIZE, 3], "UINT8")
        tensor.set_shared_memory("vast", 1 << 40)
        with pytest.raises(InferenceServerException, match="at most 1048576 are accepted"):
            client.infer("colors", [tensor])
    finally:
        client.unregister_system_shared_memory("vast")
        path.unlink()


@pytest.mark.parametrize("key", ["/../etc/passwd", "a/b", "..", "", "/", "/etc\x00", "/no-such-region", "x" * 300])
def test_a_key_that_is_no_shared_memory_is_refused(client: triton.InferenceServerClient, key: str) -> None:
    with pytest.raises(InferenceServerException, match="shared memory"):
        client.register_system_shared_memory("odd", key, 8)


def test_a_link_in_shared_memory_is_not_followed(client: triton.InferenceServerClient, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    link = Path(f"/dev/shm/lanner-link-{os.getpid()}")
    link.symlink_to(tmp_path / "secret")
    try:
        with pytest.raises(InferenceServerException, match="Unable to open shared memory region"):
            client.register_system_shared_memory("link", link.name, 64)
    finally:
        link.unlink()


def test_an_unloaded_name_answers_again_when_it_is_loaded(client: triton.InferenceServerClient) -> None:
    client.unload_model("colors")
    assert not client.is_model_ready("colors")
    assert not client.is_model_ready("colors@candidate")
    assert {(e["name"], e["version"], e["state"], e["reason"]) for e in client.get_model_repository_index()} == {
        ("colors", "1", "UNAVAILABLE", "unloaded"), ("colors", "2", "UNAVAILABLE", "unloaded"),
        ("colors@candidate", "2", "UNAVAILABLE", "unloaded")}
    for version in ("", "2"):
        with pytest.raises(InferenceServerException, match="unknown model.*colors is unloaded"):
            client.infer("colors", [given(pixels(RED))], model_version=version)
    client.load_model("colors")
    assert client.is_model_ready("colors")
    assert labels(client.infer("colors@candidate", [given(pixels(RED))])) == ["blue"]
    with pytest.raises(InferenceServerException, match="unknown model"):
        client.load_model("nope")
    with pytest.raises(InferenceServerException, match="loaded as it was published"):
        client.load_model("colors", config="{}")


def test_a_region_that_clients_may_not_use(server: Server) -> None:
    for method, path in (("GET", "status"), ("POST", "unregister"), ("POST", "region/in/register")):
        status, body = server.call(method, f"/v2/systemsharedmemory/{path}", b'{"key": "/in", "byte_size": 8}'
                                   if method == "POST" else None)
        assert (status, b"SYSTEM_SHARED_MEMORY=on allows it" in body) == (400, True)
    assert b"system_shared_memory" not in server.call("GET", "/v2")[1]
