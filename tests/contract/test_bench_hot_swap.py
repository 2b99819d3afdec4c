"""The benchmark of swaps counts what was dropped and keeps what a swap costs apart from the rest; against a server."""

import importlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

TOP = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "benchmarks")
    return importlib.import_module("hot_swap")


def log(**changes):
    """A request every 10 ms for 4 s, of 1 ms; from 2.00 to 2.05 s of 9 ms; version 2 answers from 2.05 s on."""
    began = np.arange(0, 4, 0.01)
    slow = (began >= 2.0) & (began < 2.05)
    return {"began": began, "ended": began + np.where(slow, 0.009, 0.001), "status": np.full(len(began), 200),
            "version": np.where(began < 2.05, 1, 2), **changes}


def test_a_window_holds_the_swap_and_nothing_else_does(bench):
    found = bench.summed(log(), [{"asked": 2.0, "call_ms": 5.0, "version": 2}], since=0.5)
    assert found["dropped"] == 0
    assert found["steady"]["p99_ms"] == found["steady"]["most_ms"] == pytest.approx(1)
    swap = found["swaps"][0]
    assert (swap["most_ms"], swap["until_new_ms"]) == (pytest.approx(9), pytest.approx(51))
    assert swap["requests"] == 16  # 0.05 s until the new one's first, 0.1 s after it


def test_a_dropped_request_and_a_slow_swap_are_missed_aims(bench):
    status = np.full(400, 200)
    status[[3, 250]] = 503, 0
    found = bench.summed(log(status=status), [{"asked": 2.0, "call_ms": 5.0, "version": 2}], since=0.5)
    run = {"command": "x", "date": "2030-01-01", "cpu": "x", "cores": 2, "load": 1.0, "versions": {}, "network": "x",
           "connections": 16, "every_s": 2.0, **found}
    lines = bench.render(run).splitlines()
    assert "| requests dropped: none | 2 | **missed** |" in lines
    assert any(line.startswith("| p99 in the window of a swap") and line.endswith("**missed** |") for line in lines)


def test_a_version_that_never_answers_says_what_came_instead(bench):
    with pytest.raises(SystemExit, match="version 7 never answered; statuses: {200: 400}"):
        bench.summed(log(), [{"asked": 2.0, "call_ms": 5.0, "version": 7}], since=0.5)


class Handler(BaseHTTPRequestHandler):
    """Answers; every 5th request gets 503, every 7th a closed connection."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.count = number = self.server.count + 1
        if number % 7 == 0:
            self.server.closed += 1
            self.close_connection = True
            return
        self.server.refused += number % 5 == 0
        body = b'{"model":"x","version":3,"predictions":[]}'
        self.send_response(503 if number % 5 == 0 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_the_client_keeps_every_request_of_its_loop(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.count = server.refused = server.closed = 0
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        (tmp_path / "body").write_bytes(b"x" * 100)
        subprocess.run([sys.executable, TOP / "benchmarks/serving/closed_loop.py", str(server.server_port), "/x",
                        tmp_path / "body", "image/jpeg", "1", "1", tmp_path / "log.npz"], check=True, timeout=30)
    finally:
        server.shutdown()
        server.server_close()
    with np.load(tmp_path / "log.npz") as kept:
        status, version = kept["status"], kept["version"]
        assert (kept["ended"] >= kept["began"]).all()
    assert len(status) == server.count > 10
    assert ((status == 503).sum(), (status == 0).sum()) == (server.refused, server.closed)
    assert set(version[status == 200]) == {3}


def test_the_page_is_what_the_recorded_run_gives(bench):
    recorded = TOP / "docs" / "benchmarks" / "hot-swap.json"
    assert bench.render(json.loads(recorded.read_text())) == recorded.with_suffix(".md").read_text()
