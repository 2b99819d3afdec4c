"""HTTP_PROCESSES=2: two real processes on one port behave as one API."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from inference.peers import Peers
from inference.statistics import Figures, Sum, added_up
from shared import artifacts
from shared.errors import NotFound, Unavailable
from shared.fitted import write_fits

from .conftest import RED, Server, png, publish_model, start_server, until

PREDICT, UNLOAD, LOAD = "/v1/models/colors/predict", "/v2/repository/models/colors/unload", \
    "/v2/repository/models/colors/load"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, valkey_server: Any) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("artifacts")
    publish_model(root, "colors", "m-1")
    artifacts.promote(root, "colors", "production", 1, "onnx-fp32", by="test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTP_PROCESSES", "2")
        patch.setenv("SYSTEM_SHARED_MEMORY", "on")
        server = start_server(root, valkey_server.url)
    assert len(workers(server)) == 2
    until(lambda: statuses(server) == {200})
    yield server
    server.process.terminate()
    server.process.wait(20)


def test_the_candidate_s_answers_in_all_processes_are_added_up(root: Path, valkey: Any,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    for alias, model, weights in (("production", "m-1", None), ("candidate", "m-2", np.eye(3)[::-1] * 0.05)):
        artifacts.promote(root, "colors", alias, publish_model(root, "colors", model, onnx_fp32=weights), "onnx-fp32",
                          by="test")
    monkeypatch.setenv("HTTP_PROCESSES", "2")
    monkeypatch.setenv("SHADOW_SHARE", "1")
    server = start_server(root, valkey.url)
    try:
        def shadow() -> dict[str, Any]:
            told: dict[str, Any] = json.loads(server.call("GET", "/v1/models/colors/shadow")[1])
            return told

        until(lambda: all(shadow().get("candidate") for _ in range(12)))  # in both processes
        assert statuses(server, 40) == {200}
        told = until(lambda: (t := shadow())["mirrored"] == 40 and t)
        assert (told["disagreements"], told["confusion"]) == (40, [{"production": "red", "candidate": "blue",
                                                                    "images": 40}])
        assert told["run_ms"]["candidate"]["runs"] == 40
    finally:
        server.process.terminate()
        server.process.wait(20)


@pytest.mark.parametrize(("cores", "expected"), [(0, 2), (1, 1)], ids=["here", "elsewhere"])
def test_as_many_processes_as_the_card_says_start_by_themselves(root: Path, valkey: Any, cores: int, expected: int,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts.promote(root, "colors", "production", publish_model(root, "colors", "m-1"), "onnx-fp32", by="test")
    rows = [{"processes": n, "threads": 1, "batch": 8} for n in (1, 2)]
    write_fits(root, "m-1", len(os.sched_getaffinity(0)) + cores, 0, {
        "onnx-fp32": {"device": "cpu", **rows[1], "by_processes": rows}})
    monkeypatch.setenv("HTTP_PROCESSES", "0")
    server = start_server(root, valkey.url)
    try:
        until(lambda: len(workers(server)) == expected and statuses(server) == {200})
        told = json.loads(server.call("GET", "/readyz")[1])["models"][0]
        assert told["fitted"] is (cores == 0)
    finally:
        server.process.terminate()
        server.process.wait(20)


def workers(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def statuses(server: Server, count: int = 24) -> set[int]:
    """Of as many predictions, each on a connection of its own: the kernel spreads them over the processes."""
    return {server.call("POST", PREDICT, png(RED), **{"Content-Type": "image/png"})[0] for _ in range(count)}


def count(server: Server) -> tuple[int, int]:
    """inference_count of the statistics, images of the metrics."""
    stats = json.loads(server.call("GET", "/v2/models/colors/stats")[1])["model_stats"][0]
    told = server.call("GET", "/metrics")[1].decode()
    images = re.search(r'^lanner_images_total{model="colors"} (\S+)$', told, re.MULTILINE)
    assert images
    return stats["inference_count"], int(float(images[1]))


def test_figures_are_added_up(two: Server) -> None:
    before = count(two)
    assert statuses(two, 40) == {200}
    after = count(two)
    assert {n - m for n, m in zip(after, before, strict=True)} == {40}
    assert {count(two) for _ in range(10)} == {after}, "whoever is asked says the same"
    told = two.call("GET", "/metrics")[1].decode()
    assert "lanner_loaded_variants 2.0" in told
    names = re.findall(r"^# TYPE (\S+)", told, re.MULTILINE)
    assert len(names) == len(set(names))
    assert told.count('lanner_jobs{state="queued"}') == 1


def test_both_answer(two: Server) -> None:
    def busy(process: psutil.Process) -> float:
        return sum(process.cpu_times()[:2])

    before = [busy(process) for process in workers(two)]
    until(lambda: statuses(two) and all(busy(p) > b for p, b in zip(workers(two), before, strict=True)))


def test_unload_and_load_reach_both(two: Server) -> None:
    assert two.call("POST", UNLOAD)[0] == 200
    assert statuses(two) == {404}
    assert "lanner_loaded_variants 0.0" in two.call("GET", "/metrics")[1].decode()
    assert two.call("POST", LOAD)[0] == 200
    assert statuses(two) == {200}


def test_a_region_is_known_to_both(two: Server) -> None:
    path = Path("/dev/shm/lanner-test-processes")
    path.write_bytes(bytes(64))
    try:
        region = json.dumps({"key": path.name, "offset": 0, "byte_size": 64})
        assert two.call("POST", "/v2/systemsharedmemory/region/r/register", region)[0] == 200
        assert {len(json.loads(two.call("GET", "/v2/systemsharedmemory/status")[1])) for _ in range(16)} == {1}
        assert two.call("POST", "/v2/systemsharedmemory/unregister")[0] == 200
        assert {len(json.loads(two.call("GET", "/v2/systemsharedmemory/status")[1])) for _ in range(16)} == {0}
    finally:
        path.unlink()


def test_a_promotion_reaches_both(two: Server) -> None:
    version = publish_model(two.root, "colors", "m-2", onnx_fp32=np.eye(3)[::-1] * 0.05)
    artifacts.promote(two.root, "colors", "production", version, "onnx-fp32", by="test")

    def versions() -> set[int]:
        return {json.loads(two.call("POST", PREDICT, png(RED), **{"Content-Type": "image/png"})[1])["version"]
                for _ in range(24)}

    until(lambda: versions() == {version})


def test_when_one_dies_all_end(root: Path, valkey: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROCESSES", "2")
    server = start_server(root, valkey.url)
    children = until(lambda: found if len(found := workers(server)) == 2 else None)
    os.kill(children[0].pid, signal.SIGKILL)
    server.process.wait(20)
    until(lambda: not any(child.is_running() for child in children))


def test_an_address_that_is_taken_is_said(two: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env = {**os.environ, "DEVICE": "cpu", "ARTIFACTS": str(tmp_path), "PORT": str(two.port), "HTTP_PROCESSES": "2"}
    done = subprocess.run([sys.executable, "-m", "inference"], env=env, capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode != 0
    assert f"127.0.0.1:{two.port} can't be listened on" in done.stderr


def test_a_peer_says_what_it_raises(tmp_path: Path) -> None:
    def raises(*_: Any) -> None:
        raise NotFound("no such model", "unloaded")

    there = Peers(tmp_path)
    there._own = tmp_path / "1.peer"
    there.serve({"unload": raises, "figures": lambda: {"a": 1}, "bug": lambda: 1 / 0})
    here = Peers(tmp_path)
    assert here.ask("figures") == [{"a": 1}]
    with pytest.raises(NotFound, match="no such model") as told:
        here.ask("unload", "colors")
    assert told.value.code == "unloaded"
    with pytest.raises(Unavailable, match="ZeroDivisionError"):
        here.ask("bug")
    (tmp_path / "2.peer").touch()
    with pytest.raises(Unavailable, match="process 2 of this API does not answer"):
        here.ask("figures")
    assert Peers().ask("figures") == []


def test_adding_up_figures() -> None:
    one, other = Figures(last_ms=5, images=2, success=Sum(1, 10)), Figures(last_ms=3, images=4, success=Sum(2, 5))
    one.of_size(8).infer.add(7)
    other.of_size(8).infer.add(1)
    other.of_size(1).infer.add(2)
    total = added_up([{("a", 1): one}, {("a", 1): other, ("b", 1): other}])
    assert total["b", 1] == other
    assert (total["a", 1].last_ms, total["a", 1].images, total["a", 1].success) == (5, 6, Sum(3, 15))
    assert {size: batches.infer for size, batches in total["a", 1].batches.items()} == {8: Sum(2, 8), 1: Sum(1, 2)}
