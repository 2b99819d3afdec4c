"""Unloading gives the memory back and loading brings the model back, whatever happens meanwhile."""

import gc
import threading
from pathlib import Path

import numpy as np
import psutil
from flask import Flask
from flask.testing import FlaskClient
from onnx import TensorProto, helper, numpy_helper

from inference.predictor import Predictor
from shared import artifacts

from .conftest import LABELS, RED, SIZE, png, publish_model, until

REPOSITORY = "/v2/repository/models/colors"


def state(client: FlaskClient) -> dict[str, tuple[str, str]]:
    """model/version -> (state, reason)."""
    return {f"{e['name']}/{e['version']}": (e["state"], e["reason"]) for e in client.post("/v2/repository/index").json}


def ask(client: FlaskClient, query: str = "", name: str = "colors") -> int:
    return client.post(f"/v1/models/{name}/predict{query}", data=png(RED), content_type="image/png").status_code


def open_variants() -> list[str]:
    """Whose Session is open in this process."""
    return sorted(p.name for p in gc.get_objects() if isinstance(p, Predictor) and not p.ended.is_set())


def test_unloading_closes_every_variant_of_the_name_and_loading_opens_them(serving: FlaskClient, root: Path) -> None:
    publish_model(root, "colors", "m-2")
    assert ask(serving, "?version=2") == 200
    assert open_variants() == ["m-1 onnx-fp32", "m-2 onnx-fp32"]
    assert serving.post(f"{REPOSITORY}/unload").status_code == 200
    assert open_variants() == []
    assert [ask(serving), ask(serving, "?version=2"), ask(serving, "?variant=onnx-fp32")] == [404] * 3
    assert serving.get("/v2/health/ready").status_code == 400
    ready = serving.get("/readyz")
    assert (ready.status_code, ready.json["unloaded"]) == (503, ["colors"])
    assert "unloaded" in ready.json["error"]["message"]
    assert serving.post(f"{REPOSITORY}/unload", json={"parameters": {"unload_dependents": True}}).status_code == 200
    assert serving.post(f"{REPOSITORY}/load").status_code == 200
    assert open_variants() == ["m-1 onnx-fp32"]
    assert ask(serving) == 200


def wide_network(neurons: int) -> bytes:
    """A Variant's network with a product of neurons x neurons float32 in it."""
    draw = np.random.default_rng(0).normal
    weights = {"a": (3, neurons), "b": (neurons, neurons), "c": (neurons, len(LABELS))}
    nodes = [helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMean", ["pixels", "axes"], ["x"], keepdims=0),
             helper.make_node("MatMul", ["x", "a"], ["xa"]), helper.make_node("MatMul", ["xa", "b"], ["xb"]),
             helper.make_node("MatMul", ["xb", "c"], ["logits"]),
             helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)]
    graph = helper.make_graph(
        nodes, "wide", [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", len(LABELS)])],
        [*(numpy_helper.from_array(draw(0, 1e-3, shape).astype(np.float32), name) for name, shape in weights.items()),
         numpy_helper.from_array(np.array([1, 2], np.int64), "axes")])
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)],
                                   ir_version=10).SerializeToString())


def test_unloading_gives_the_memory_back(client: FlaskClient, root: Path) -> None:
    publish_model(root, "wide", "m-1", onnx_fp32=wide_network(4000))
    artifacts.promote(root, "wide", "production", 1, "onnx-fp32", by="test")
    until(lambda: client.get("/readyz").status_code == 200)
    memory, loaded, unloaded = psutil.Process().memory_info, [], []
    for _ in range(3):
        loaded.append(memory().rss)
        client.post("/v2/repository/models/wide/unload")
        unloaded.append(memory().rss)
        client.post("/v2/repository/models/wide/load")
    assert loaded[-1] - unloaded[-1] > 4000 ** 2 * 4
    assert unloaded[-1] - unloaded[0] < 4000 ** 2 * 4 / 4


def test_a_promotion_does_not_load_what_was_unloaded(serving: FlaskClient, root: Path) -> None:
    serving.post(f"{REPOSITORY}/unload")
    publish_model(root, "colors", "m-2")
    serving.put("/v1/models/colors/aliases/production", json={"version": 2, "variant": "onnx-fp32"})
    publish_model(root, "shapes", "m-3")
    artifacts.promote(root, "shapes", "production", 1, "onnx-fp32", by="test")
    until(lambda: state(serving).get("shapes/1") == ("READY", ""))
    assert state(serving)["colors/2"] == ("UNAVAILABLE", "unloaded")
    assert serving.post(f"{REPOSITORY}/load").status_code == 200
    assert state(serving)["colors/2"] == ("READY", "")
    assert state(serving)["colors/1"] == ("UNAVAILABLE", "not in memory: a request for it loads it")


def test_a_variant_that_another_name_serves_stays(serving: FlaskClient, root: Path) -> None:
    artifacts.register_version(root, "shapes", "m-1")
    artifacts.promote(root, "shapes", "production", 1, "onnx-fp32", by="test")
    until(lambda: state(serving).get("shapes/1") == ("READY", ""))
    serving.post(f"{REPOSITORY}/unload")
    assert open_variants() == ["m-1 onnx-fp32"]
    assert (ask(serving), ask(serving, name="shapes")) == (404, 200)


def test_requests_during_unload_and_load_are_answered_or_told(serving: FlaskClient, app: Flask) -> None:
    seen: list[int] = []
    stop = threading.Event()

    def load() -> None:
        with app.test_client() as client:
            while not stop.is_set():
                seen.append(ask(client))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert serving.post(f"{REPOSITORY}/unload").status_code == 200
        assert serving.post(f"{REPOSITORY}/load").status_code == 200
    stop.set()
    for thread in threads:
        thread.join()
    assert set(seen) <= {200, 404}
    assert ask(serving) == 200
    assert open_variants() == ["m-1 onnx-fp32"]


def test_loading_what_is_damaged_says_why_and_a_mended_one_is_loaded(serving: FlaskClient, root: Path) -> None:
    serving.post(f"{REPOSITORY}/unload")
    path = root / "variants/m-1/onnx-fp32/model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    answer = serving.post(f"{REPOSITORY}/load")
    assert (answer.status_code, "model.onnx has" in answer.json["error"]) == (400, True)
    assert state(serving)["colors/1"][0] == "UNAVAILABLE"
    assert "model.onnx has" in state(serving)["colors/1"][1]
    path.write_bytes(whole)
    assert serving.post(f"{REPOSITORY}/load").status_code == 200
    assert serving.post("/v2/repository/index", json={"ready": True}).json == [
        {"name": "colors", "version": "1", "state": "READY", "reason": ""}]


def test_names_that_do_not_exist_and_parameters_that_change_nothing_are_refused(serving: FlaskClient) -> None:
    for action in ("load", "unload"):
        assert serving.post(f"/v2/repository/models/nope/{action}").status_code == 404
        assert serving.post(f"{REPOSITORY}/{action}", data=b"{").status_code == 400
    assert serving.post(f"{REPOSITORY}/load", json={"parameters": {"file:1/model.onnx": "AA"}}).status_code == 400
    assert serving.get("/v2/models/colors/ready").status_code == 200


def test_ready_is_what_is_in_memory(serving: FlaskClient, root: Path) -> None:
    publish_model(root, "colors", "m-2")
    ready = "/v2/models/colors/versions/2/ready"
    assert serving.get(ready).status_code == 400
    assert serving.get("/v2/models/colors/versions/2/config").json.keys() >= {"input", "output"}
    assert serving.get(ready).status_code == 400, "asking for its configuration loaded it"
    assert ask(serving, "?version=2") == 200
    assert serving.get(ready).status_code == 200
