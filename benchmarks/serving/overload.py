"""More than can be answered: an open loop at three times the capacity, and bodies that never end."""

import http.client
import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
NETWORKS = ("bench-tiny", "small", "seed-cnn")
LOADS = (0.5, 0.8, 1.0, 3.0)  # of the capacity
QUEUE_MS = 5
SLOW = 200
CALLS = 200
Row = dict[str, Any]


def open_loop(port: int, network: str, image: Path, rate: float, seconds: int, core: int, seed: int) -> Row:
    done = subprocess.run(["taskset", "-c", str(core), sys.executable, str(HERE / "openloop.py"), "--port", str(port),
                           "--path", f"/v1/models/{network}/predict", "--file", str(image), "--header",
                           "Content-Type=image/jpeg", "--rate", f"{rate:.0f}", "--seconds", str(seconds), "--seed",
                           str(seed)], capture_output=True, text=True, check=True)
    found: Row = json.loads(done.stdout)
    return found


def add(row: Row, load: float, seen: Row) -> None:
    """row["loads"][load]: a list of each figure, one entry a round."""
    kept = row["loads"].setdefault(f"{load:g}", {})
    for key, value in seen.items():
        kept.setdefault(key, []).append(value)


def slow_bodies(port: int, path: str, method: str) -> Row:
    """How long /livez takes beside SLOW requests of which half the body came."""
    with ExitStack() as stack:
        for i in range(SLOW):
            held = stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            held.sendall(f"{method} {path.format(i)} HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
                         "Content-Length: 1000\r\n\r\nhalf".encode())
        time.sleep(1)
        took = []
        for _ in range(CALLS):
            began = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/livez")
            if connection.getresponse().status != 200:
                raise SystemExit("/livez failed")
            connection.close()
            took.append(1000 * (time.perf_counter() - began))
    return {"request": f"{method} {path.format('ID')}", "median_ms": median(took), "most_ms": max(took)}


def peak(row: Row) -> float:
    """Requests/s: the most that any load was answered."""
    return max(median(row["capacity"]), *(median(row["loads"][f"{load:g}"]["good"]) for load in LOADS))


def render(rows: list[Row], slow: list[Row]) -> str:
    lines = [f"An open loop: requests begin at times drawn before (Poisson), with QUEUE_MS={QUEUE_MS}. Capacity is the "
             "closed loop with 64 connections, without QUEUE_MS; good is what was answered 200, turned away 503; "
             "latency is of the good, from the time that was drawn. Turning away is done by the core that computes; "
             "it weighs least beside `seed-cnn`, an image of which takes about 0.6 ms.", "",
             "| network | load | asked/s | good/s | turned away/s | failed | p50 ms | p99 ms | client late, p99 ms |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        for load in LOADS:
            seen = {key: median(values) for key, values in row["loads"][f"{load:g}"].items()}
            lines.append(f"| {row['network']} | {load:g} of {median(row['capacity']):,.0f}/s | {seen['rate']:,.0f} | "
                         f"{seen['good']:,.0f} | {seen['turned_away']:,.0f} | {seen['bad']:.0f} | "
                         f"{seen['p50_us'] / 1000:.2f} | {seen['p99_us'] / 1000:.2f} | {seen['late_us'] / 1000:.2f} |")
    lines += ["", f"/livez beside {SLOW} requests that sent half of their body, {CALLS} calls:", "",
              "| request | median ms | most ms |", "|---|---|---|"]
    lines += [f"| `{s['request']}` | {s['median_ms']:.1f} | {s['most_ms']:.1f} |" for s in slow]
    return "\n".join(lines)


def aims(rows: list[Row], slow: list[Row]) -> list[tuple[str, float, bool]]:
    """(aim, what was found, whether it is met)."""
    found = []
    for row in rows:
        over, half = row["loads"]["3"], row["loads"]["0.5"]
        good = median(over["good"]) / peak(row)
        late = median(over["p99_us"]) / median(half["p99_us"])
        what = f"`{row['network']}` at 3 times its capacity"
        if (behind := median(over["late_us"]) / 1000) > QUEUE_MS:  # then it is the client that is measured
            what += f", with a client that was itself late by {behind:,.0f} ms"
        found += [(f"{what}: goodput at least 0.95 of the peak", good, good >= 0.95),
                  (f"{what}: p99 of the answered at most 2 times that at half", late, late <= 2)]
    most = max(s["most_ms"] for s in slow)
    return [*found, (f"/livez beside {SLOW} slow bodies: under 100 ms", most, most < 100)]
