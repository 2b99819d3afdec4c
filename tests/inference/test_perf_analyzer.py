"""NVIDIA's load generator against the API: PERF_ANALYZER=<its path>, a program for glibc 2.38 and later."""

import os
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from shared import artifacts

from .conftest import Server, publish_model, start_server, until

PROGRAM = os.environ.get("PERF_ANALYZER", "")
pytestmark = [pytest.mark.system, pytest.mark.skipif(not PROGRAM, reason="PERF_ANALYZER names no program")]
LOADS = {
    "synchronous": ["--concurrency-range", "1:3:2"],
    "asynchronous": ["-a", "--concurrency-range", "4"],
    "batches": ["-b", "8", "--concurrency-range", "2"],
    "request rate": ["--request-rate-range", "100"],
    "json": ["--input-tensor-format", "json"],
    "json answers": ["--output-tensor-format", "json"],
    "metrics": ["--collect-metrics", "--metrics-url", "127.0.0.1:{port}/metrics"],
    "alias": ["-m", "colors@candidate"],
    "version": ["-x", "2"],
    "shared memory": ["--shared-memory", "system", "-b", "4"],
    "output in shared memory": ["--shared-memory", "system", "--output-shared-memory-size", "4096"]}


@pytest.fixture(scope="module")
def loaded_server(tmp_path_factory: pytest.TempPathFactory, valkey_server: Any) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("artifacts")
    for model in ("m-1", "m-2"):
        publish_model(root, "colors", model)
    artifacts.promote(root, "colors", "production", 1, "onnx-fp32", by="test")
    artifacts.promote(root, "colors", "candidate", 2, "onnx-fp32", by="test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYSTEM_SHARED_MEMORY", "on")
        server = start_server(root, valkey_server.url)
    until(lambda: server.call("GET", "/v2/models/colors@candidate/ready")[0] == 200)
    yield server
    server.process.terminate()
    server.process.wait(20)


@pytest.mark.parametrize("load", LOADS)
def test_every_kind_of_load_runs(loaded_server: Server, load: str) -> None:
    options = [option.format(port=loaded_server.port) for option in LOADS[load]]
    model = [] if "-m" in options else ["-m", "colors"]
    done = subprocess.run([PROGRAM, *model, "-u", f"127.0.0.1:{loaded_server.port}", "-p", "500", "-s", "90", "-r",
                           "10", *options], capture_output=True, text=True, check=False, timeout=120)
    told = done.stdout + done.stderr
    if "Cannot open CUDA runtime library" in told:
        pytest.skip("this perf_analyzer needs libcudart.so for shared memory, of the system too")
    assert done.returncode == 0, told
    rates = [float(rate) for rate in re.findall(r"throughput: ([0-9.e+]+) infer/sec", told)]
    assert rates, told
    assert min(rates) > 0
    assert "Inference count" in told, "it found no statistics of the server"
