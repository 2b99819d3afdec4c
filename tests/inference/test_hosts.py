"""DNS rebinding: a page whose name points at this host is not of the API's own origin."""

import socket
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient

from inference.hosts import is_known

from .conftest import Granian, png, request


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "192.168.1.9", "inference:8000",
                                  "gpu-box", "gpu.local", "GPU.Local.", "lanner.default.svc.cluster.local:8000", "",
                                  "app.localhost", "gpu.home.arpa", "gpu.corp.internal", "[fe80::1%25eth0]:1"])
def test_what_no_stranger_can_own_is_known(host: str) -> None:
    assert is_known(host, "")


@pytest.mark.parametrize("host", ["evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80",
                                  "evil.example.", "1.2.3", "a.b", "a_b.evil.example:8000", "a b.evil.example"])
def test_a_public_name_is_not_unless_it_is_listed(host: str) -> None:
    assert not is_known(host, "")
    assert not is_known(host, "lanner.example")
    assert is_known(host, "*")
    assert is_known(host, f"x, {host.partition(':')[0].upper()}")


@pytest.mark.parametrize("host", ["evil.example:8000", "a_b.evil.example:8000"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/jobs"), ("POST", "/v1/pipelines"), ("GET", "/"),
                                              ("POST", "/v1/models/colors/predict"), ("GET", "/v2")])
def test_a_request_by_such_a_name_is_refused(serving: FlaskClient, method: str, path: str, host: str) -> None:
    told = serving.open(path, method=method, headers={"Host": host}, data=png((1, 2, 3)), content_type="image/png")
    assert told.status_code == 403
    assert "list the name in ALLOWED_HOSTS" in told.text


def test_what_is_answered_ahead_of_flask_looks_at_it_too(app: Flask, connect: Callable[[], socket.socket],
                                                         granian: Granian) -> None:
    connection = connect()
    connection.sendall(request().replace(b"Host: x", b"Host: evil.example"))
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 299 granian")
    assert len(granian.seen) == 1


@pytest.mark.parametrize(("path", "said"), [
    ("/v1/jobs?state=queued&limits=3", "no query parameter 'limits': expected state, kind, limit"),
    ("/v1/models?alias=production", "no query parameter 'alias': it takes none"),
    ("/v1/datasets/d-1?full", "no query parameter 'full': it takes none")])
def test_a_query_that_nobody_reads_is_refused(client: FlaskClient, path: str, said: str) -> None:
    told = client.get(path)
    assert (told.status_code, told.json["error"]["code"], said in told.json["error"]["message"]) == (
        422, "bad_request", True)


def test_head_takes_the_query_that_get_takes(client: FlaskClient) -> None:
    assert client.head("/v1/jobs?limit=3").status_code == 200
