"""An open loop: requests begin at random times, however long answers take. `python openloop.py --help`.

wrk's loop is closed: a server that is slow is asked less, and its overload is never seen. Here the times are drawn
first (Poisson); a request whose time has come takes a connection that is idle, and its latency counts from that time
even if this program is late, or if there is none. The last line is the result as JSON: rate is what was asked a second,
good what was answered 200 while it asked, turned_away 429 and 503, bad all else, in number; late_us is by how much
sending was late, p99.
"""

import argparse
import json
import select
import socket
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

GRACE_S = 2.0  # after the last request, for answers


class Connection:
    """One that is kept alive; `began` is the time of the request that it carries, due by the plan."""

    __slots__ = ("began", "got", "number", "recv", "send", "socket")

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.send, self.recv, self.number = self.socket.send, self.socket.recv, self.socket.fileno()
        self.began, self.got = 0.0, b""


@lru_cache(4096)
def status_and_size(head: bytes) -> tuple[int, int]:
    """Of an answer with this head: its status, and its bytes, head and all. Cached: answers differ in their bodies."""
    at = head.lower().find(b"content-length:")
    if at < 0:
        raise SystemExit(f"an answer without Content-Length: {head[:200]!r}")
    return int(head[9:12]), len(head) + 4 + int(head[at + 15:].split(b"\r\n", 1)[0])


class Load:
    def __init__(self, port: int, request: bytes, rate: float, seconds: float, connections: int, seed: int):
        self._request = request
        gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 1.2) + 10).cumsum()
        self._due: list[float] = gaps[gaps < seconds].tolist()
        self.offered, self._seconds, self._port, self._most = len(self._due), seconds, port, connections
        self._idle: list[Connection] = []
        self._all: dict[int, Connection] = {}
        self._poll = select.epoll()
        self._end, self._in_time = 0.0, 0
        self.took: dict[int, list[float]] = {}
        self.late: list[float] = []

    def run(self) -> dict[str, float]:
        for _ in range(self._most):
            self._open()
        now, next_ = time.perf_counter, 0
        start = now()
        due = [start + at for at in self._due] + [float("inf")]
        self._end = start + self._seconds
        poll, every = self._poll.poll, self._all
        while now() < self._end + GRACE_S and (next_ < self.offered or len(self._idle) < len(every)):
            while due[next_] <= now() and self._idle:
                self._send(due[next_])
                next_ += 1
            rest = min(due[next_] - now(), 0.01)
            for number, _ in poll(rest - 0.002 if rest > 0.003 else 0):  # poll rounds up to milliseconds
                self._receive(every[number])
                if due[next_] <= now() and self._idle:  # those that are due do not wait for all that came
                    self._send(due[next_])
                    next_ += 1
        return self._result()

    def _open(self) -> None:
        new = Connection(self._port)
        self._all[new.number] = new
        self._poll.register(new.socket, select.EPOLLIN)
        self._idle.append(new)

    def _send(self, due: float) -> None:
        connection = self._idle.pop()
        connection.began = due
        self.late.append(time.perf_counter() - due)
        try:
            connection.send(self._request)
        except OSError:
            self._lost(connection)

    def _receive(self, connection: Connection) -> None:
        """What came; it is an answer that is whole in most cases."""
        try:
            got = connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            got = b""
        if not got:
            if connection in self._idle:
                self._idle.remove(connection)
            self._lost(connection)
            return
        if connection.got:
            got = connection.got + got
        end = got.find(b"\r\n\r\n")
        status, size = status_and_size(got[:end]) if end >= 0 else (0, 0)
        if not status or len(got) < size:
            connection.got = got
            return
        connection.got = b""
        now = time.perf_counter()
        self.took.setdefault(status, []).append(now - connection.began)
        self._in_time += status == 200 and now < self._end
        self._idle.append(connection)

    def _lost(self, connection: Connection) -> None:
        """It counts as a failed request; another one takes its place."""
        self.took.setdefault(0, []).append(0.0)
        del self._all[connection.number]
        connection.socket.close()
        with suppress(OSError):  # the server may be gone
            self._open()

    def _result(self) -> dict[str, float]:
        good = np.array(self.took.get(200, [0.0]))
        away = np.array([*self.took.get(429, []), *self.took.get(503, [])])
        answered = sum(len(times) for times in self.took.values())
        return {"rate": self.offered / self._seconds, "good": self._in_time / self._seconds,
                "turned_away": len(away) / self._seconds,
                "bad": self.offered - len(self.took.get(200, [])) - len(away),
                "unanswered": self.offered - answered,
                "p50_us": float(np.median(good)) * 1e6, "p99_us": float(np.quantile(good, 0.99)) * 1e6,
                "away_p99_us": float(np.quantile(away, 0.99)) * 1e6 if len(away) else 0.0,
                "late_us": float(np.quantile(self.late, 0.99)) * 1e6, "connections": len(self._all)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--file", type=Path, required=True, help="the body")
    parser.add_argument("--header", action="append", default=[], help="NAME=VALUE")
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--connections", type=int, default=512, help="open from the beginning")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    body = args.file.read_bytes()
    lines = [f"POST {args.path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}",
             *(header.replace("=", ": ", 1) for header in args.header)]
    request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    print(json.dumps(Load(args.port, request, args.rate, args.seconds, args.connections, args.seed).run()))


if __name__ == "__main__":
    main()
