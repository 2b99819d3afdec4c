"""Tensors at the front, whose bytes go straight to where they are read: cut anywhere, cut off, left by their client."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from inference.body import Intake
from inference.connection import AHEAD
from inference.v2 import infer as infer_v2
from shared.settings import Settings

from .conftest import BLUE, GREEN, RED, SIZE, Granian, answer, label, png, request, until

COLORS = np.array([RED, GREEN, BLUE], np.uint8)
OUTPUTS = [{"name": "probabilities", "parameters": {"binary_data": True}}]


def infer(chosen: np.ndarray) -> bytes:
    """A request that asks about images of COLORS at these indices."""
    pixels = np.broadcast_to(COLORS[chosen][:, None, None], (len(chosen), SIZE, SIZE, 3)).tobytes()
    tensor = {"name": "images", "datatype": "UINT8", "shape": [len(chosen), SIZE, SIZE, 3],
              "parameters": {"binary_data_size": len(pixels)}}
    head = json.dumps({"inputs": [tensor], "outputs": OUTPUTS}).encode()
    return (f"POST /v2/models/colors/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {len(head)}\r\n"
            f"Content-Length: {len(head) + len(pixels)}\r\n\r\n").encode() + head + pixels


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, request_limit_mib=8)


@pytest.mark.parametrize("seed", range(4))
def test_they_are_answered_in_order_however_they_arrive(connect: Callable[[], socket.socket], granian: Granian,
                                                        intake: Intake, seed: int) -> None:
    at_first, connection, rng = (intake._free, intake._slots), connect(), np.random.default_rng(seed)
    asked = [rng.integers(0, 3, count) for count in (40, 1, 256, 22, 100)]
    assert min(len(infer(chosen)) for chosen in asked) < AHEAD < max(len(infer(chosen)) for chosen in asked)
    sent = b"".join(infer(chosen) + request(png(GREEN)) for chosen in asked)
    cuts = sorted(random.Random(seed).sample(range(1, len(sent)), 25))
    for start, stop in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        connection.sendall(sent[start:stop])
        time.sleep(0.002)
    stream = connection.makefile("rb")

    def body() -> bytes:
        head = b"".join(iter(stream.readline, b"\r\n"))
        assert head.startswith(b"HTTP/1.1 200")
        return stream.read(int(head.lower().split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0]))

    for chosen in asked:
        scores = np.frombuffer(body()[-12 * len(chosen):], "<f4").reshape(-1, 3)
        np.testing.assert_array_equal(scores.argmax(1), chosen)
        assert label(body()) == "green"
    assert granian.seen == []
    assert (intake._free, intake._slots) == at_first


def test_two_million_empty_strings_hold_up_nobody(connect: Callable[[], socket.socket],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused by their number; and what is large at all is read beside the loop."""
    threads = set[str]()
    parse = infer_v2._parse

    def noted(*args: Any) -> Any:
        threads.add(threading.current_thread().name)
        return parse(*args)

    monkeypatch.setattr(infer_v2, "_parse", noted)
    data = bytes(4 * 2**20)
    for count, said in ((2**20, "batch-size must be <= 256"), (256, "expected 256 strings")):
        tensor = {"name": "images", "datatype": "BYTES", "shape": [count],
                  "parameters": {"binary_data_size": len(data)}}
        head, connection = json.dumps({"inputs": [tensor], "outputs": OUTPUTS}).encode(), connect()
        connection.sendall(
            (f"POST /v2/models/colors/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {len(head)}\r\n"
             f"Content-Length: {len(head) + len(data)}\r\n\r\n").encode() + head + data)
        status, _, body = answer(connection)
        assert (status, said in json.loads(body)["error"]) == (400, True)
    assert not [name for name in threads if name == "front"]


def test_one_cut_off_is_told(connect: Callable[[], socket.socket], intake: Intake) -> None:
    slots, connection, whole = intake._slots, connect(), infer(np.zeros(100, int))
    connection.sendall(whole[:AHEAD + 1000])
    until(lambda: intake._slots == slots - 1)
    connection.shutdown(socket.SHUT_WR)
    status, _, body = answer(connection)
    assert status == 400
    assert "send it again" in json.loads(body)["error"]
    until(lambda: intake._slots == slots)


def test_a_client_that_leaves_leaves_its_room(connect: Callable[[], socket.socket], intake: Intake) -> None:
    slots, connection = intake._slots, connect()
    connection.sendall(infer(np.zeros(100, int))[:AHEAD + 1000])
    until(lambda: intake._slots == slots - 1)
    connection.close()
    until(lambda: intake._slots == slots)
