"""Bodies over 1 MiB at the front: whole as any other's, within the memory set aside, given up with their clients."""

import json
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from inference.body import PIECE, Intake
from shared.settings import Settings

from .conftest import BLUE, GREEN, RED, Granian, Held, answer, label, png, request, until

LARGE = png(GREEN) + bytes(3 << 20)  # decoders read no further than the image
EXPECTS = "\r\nExpect: 100-continue"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, request_limit_mib=4)


def free(intake: Intake) -> tuple[int, int]:
    return intake._free, intake._slots


def test_large_ones_are_answered_in_their_turn_by_the_front(connect: Callable[[], socket.socket], granian: Granian,
                                                            intake: Intake) -> None:
    at_first, connection = free(intake), connect()
    sent = request(png(RED)) + request(LARGE) + request(LARGE) + request(png(BLUE))
    cuts = sorted(random.Random(7).sample(range(1, len(sent)), 20))
    for start, stop in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        connection.sendall(sent[start:stop])
        time.sleep(0.005)
    stream, found = connection.makefile("rb"), []
    for _ in range(4):
        head = b"".join(iter(stream.readline, b"\r\n"))
        found.append((head[:15], label(stream.read(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])))))
    assert found == [(b"HTTP/1.1 200 OK", color) for color in ("red", "green", "green", "blue")]
    assert granian.seen == []
    assert free(intake) == at_first


def test_one_who_asks_whether_to_send_is_told_to_go_on(connect: Callable[[], socket.socket], granian: Granian) -> None:
    connection, whole = connect(), request(LARGE, EXPECTS)
    head = whole.index(b"\r\n\r\n") + 4
    for _ in range(2):
        connection.sendall(whole[:head])
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(whole[head:])
        assert label(answer(connection)[2]) == "green"
    assert granian.seen == []


def test_one_who_sends_at_once_is_not(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(request(png(RED), EXPECTS))
    assert connection.recv(12) == b"HTTP/1.1 200"


def test_what_fills_the_memory_is_turned_away_and_nothing_of_it_kept(connect: Callable[[], socket.socket],
                                                                     intake: Intake) -> None:
    slots = intake._slots
    intake.take(intake._free - PIECE)
    connection = connect()
    connection.sendall(request(LARGE)[:PIECE + 4096])
    status, headers, body = answer(connection)
    assert (status, json.loads(body)["error"]["code"], headers["Connection"]) == (503, "busy", "close")
    until(lambda: free(intake) == (PIECE, slots))


@pytest.mark.parametrize("sent", [3000, PIECE, PIECE + 4096])
def test_a_client_that_leaves_before_its_body_is_whole_leaves_its_room(connect: Callable[[], socket.socket],
                                                                       intake: Intake, sent: int) -> None:
    at_first, connection = free(intake), connect()
    connection.sendall(request(LARGE)[:sent])
    until(lambda: intake._slots == at_first[1] - 1 and intake._free < at_first[0])
    connection.close()
    until(lambda: free(intake) == at_first)


def test_a_body_cut_off_is_told(connect: Callable[[], socket.socket], intake: Intake) -> None:
    at_first, connection = free(intake), connect()
    connection.sendall(request(LARGE)[:PIECE + 4096])
    connection.shutdown(socket.SHUT_WR)
    status, _, body = answer(connection)
    assert status == 400
    assert f"its Content-Length is {len(LARGE)}: send it again" in json.loads(body)["error"]["message"]
    until(lambda: free(intake) == at_first)


def test_what_waits_for_a_client_that_is_gone_is_not_run(connect: Callable[[], socket.socket], held: Held) -> None:
    first, gone = connect(), connect()
    first.sendall(request())
    assert held.running.wait(10)
    held.slow(0.0)
    gone.sendall(request(LARGE))
    until(lambda: held.predictor.images == 2)
    (_, _, waiting), = held.predictor._waiting
    gone.close()
    until(lambda: waiting.gone)
    held.go.set()
    assert answer(first)[0] == 200
    assert held.batches == [1]


def test_more_than_the_limit_is_granian_s(connect: Callable[[], socket.socket], granian: Granian) -> None:
    connection = connect()
    connection.sendall(request(bytes((4 << 20) + 1))[:1000])
    assert answer(connection)[0] == 299
    assert len(granian.seen) == 1


def test_one_that_is_turned_away_while_it_sends_gets_its_answer(connect: Callable[[], socket.socket],
                                                                intake: Intake) -> None:
    intake.take(intake._free - PIECE)
    whole = request(LARGE)
    for _ in range(10):
        connection = connect()
        with suppress(OSError):
            for at in range(0, len(whole), 1 << 16):
                connection.sendall(whole[at:at + (1 << 16)])
                time.sleep(0.001)
        assert answer(connection)[0] == 503
    until(lambda: intake._free == PIECE)
