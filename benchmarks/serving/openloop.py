"""An open loop: requests begin at random times, however long answers take. `python openloop.py --help`.

wrk's loop is closed: a server that is slow is asked less, and its overload is never seen. Here the times are drawn
first (Poisson); a request whose time has come takes a connection that is idle, or a new one, and its latency counts
from that time even if this program is late. The last line is the result as JSON: rate is what was asked a second, good
what was answered 200 while it asked, turned_away 429 and 503, bad all else, in number; late_us is by how much sending
was late, p99.
"""

import argparse
import json
import select
import socket
import time
from collections import deque
from pathlib import Path

import numpy as np

GRACE_S = 2.0  # after the last request, for answers


class Connection:
    """One that is kept alive; `began` is the time of the request that it carries, due by the plan."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.began, self.got = 0.0, b""

    def read(self) -> int:
        """The status of an answer that is whole, 0 before; -1 where the connection ended."""
        try:
            piece = self.socket.recv(1 << 16)
        except BlockingIOError:
            return 0
        except OSError:
            return -1
        self.got += piece
        if not piece:
            return -1
        head, found, body = self.got.partition(b"\r\n\r\n")
        if not found:
            return 0
        at = head.lower().find(b"content-length:")
        if at < 0 or len(body) < int(head[at + 15:].split(b"\r\n", 1)[0]):
            return 0
        self.got = b""
        return int(head[9:12])


class Load:
    def __init__(self, port: int, request: bytes, rate: float, seconds: float, connections: int, seed: int):
        self._port, self._request, self._most = port, request, connections
        gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 1.2) + 10).cumsum()
        self._due = deque((gaps[gaps < seconds]).tolist())
        self.offered, self._seconds = len(self._due), seconds
        self._idle: list[Connection] = []
        self._all: dict[int, Connection] = {}
        self._poll = select.epoll()
        self._end, self._in_time = 0.0, 0
        self.took: dict[int, list[float]] = {}
        self.late: list[float] = []

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        self._end = start + self._seconds
        while (now := time.perf_counter()) < self._end + GRACE_S and (self._due or len(self._idle) < len(self._all)):
            while self._due and start + self._due[0] <= now and self._send(start + self._due[0], now):
                self._due.popleft()
            rest = start + self._due[0] - time.perf_counter() if self._due else 0.01
            for number, _ in self._poll.poll(rest - 0.002 if rest > 0.003 else 0):  # poll rounds up to milliseconds
                self._receive(self._all[number])
        return self._result()

    def _send(self, due: float, now: float) -> bool:
        if not self._idle:
            if len(self._all) >= self._most:
                return False
            new = Connection(self._port)
            self._all[new.socket.fileno()] = new
            self._poll.register(new.socket, select.EPOLLIN)
            self._idle.append(new)
        connection = self._idle.pop()
        connection.began = due
        self.late.append(now - due)
        try:
            connection.socket.send(self._request)
        except OSError:
            self._lost(connection)
        return True

    def _receive(self, connection: Connection) -> None:
        status = connection.read()
        if status < 0:
            if connection in self._idle:
                self._idle.remove(connection)
            self._lost(connection)
        elif status:
            now = time.perf_counter()
            self.took.setdefault(status, []).append(now - connection.began)
            self._in_time += status == 200 and now < self._end
            self._idle.append(connection)

    def _lost(self, connection: Connection) -> None:
        self.took.setdefault(0, []).append(0.0)
        del self._all[connection.socket.fileno()]
        connection.socket.close()

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
    parser.add_argument("--connections", type=int, default=512, help="the most that are open")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    body = args.file.read_bytes()
    lines = [f"POST {args.path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}",
             *(header.replace("=", ": ", 1) for header in args.header)]
    request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    print(json.dumps(Load(args.port, request, args.rate, args.seconds, args.connections, args.seed).run()))


if __name__ == "__main__":
    main()
