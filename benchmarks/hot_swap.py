"""What a client notices of a promotion: requests dropped, and p99 while Variants are swapped beside p99 without.

    ./run bench hot-swap [--swaps 10] [--every 2] [--connections 16] [--network small] [--out hot-swap.json] [--docs]
    ./run bench hot-swap --url http://127.0.0.1:8000 --name NAME     an API that runs already, its `previous` at hand
    ./run bench hot-swap --docs-from hot-swap.json

Two Models of one network are versions 1 and 2 of a Name. A closed loop asks for JPEGs of 32 x 32 pixels without a
pause; every --every seconds one call, `rollback`, lets the other version answer. A swap's window goes from that call
until a tenth of a second after the new version's first answer, so that the old one's end is in it; all else is steady.
Server and client have one core each. It ends with 1 where a request was dropped.
"""

import argparse
import http.client
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from serving import LISTED, SERVING, TOP, cpu_name, our_server, picture

AFTER_S = 0.1  # of a window, after the first answer of the new version
AIM = 2.0
WARM_S = 3.0
Row = dict[str, Any]


def publish(root: Path, network: str) -> None:
    """Versions 1 and 2 of `swapped`, random weights of one network; promoted once each. In a process with Keras."""
    sys.path.insert(0, str(SERVING))
    import keras
    import models

    from shared import artifacts
    for number in (1, 2):
        keras.utils.set_random_seed(number)
        model = models.tiny() if network == "bench-tiny" else models.build(models.SMALL, models.SPEC)
        models.publish(root, f"swapped-{number}", model, golden=256)
        artifacts.register_version(root, "swapped", f"m-swapped-{number}")
    for folder in root.glob("aliases/swapped-*/production.json"):  # of `publish`: one Name alone is served
        folder.unlink()
    for number in (1, 2):
        artifacts.promote(root, "swapped", "production", number, "onnx-fp32", by="bench")


def call(at: str, method: str, path: str) -> Row:
    connection = http.client.HTTPConnection(at, timeout=30)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        found: Row = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        raise SystemExit(f"{method} {path}: HTTP {response.status} {found}")
    return found


def wait_ready(at: str, log: Path | None) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if call(at, "GET", "/readyz")["ready"]:
                return
        except (OSError, SystemExit):
            time.sleep(0.1)
    raise SystemExit(f"the API is not ready: {log.read_text()[-2000:] if log else at}")


def drive(args: argparse.Namespace, at: str, name: str, folder: Path, cores: list[int]) -> Row:
    """The load, and the calls meanwhile."""
    (folder / "image.body").write_bytes(picture())
    seconds = WARM_S + args.every * (args.swaps + 1)
    client = subprocess.Popen(["taskset", "-c", str(cores[1]), sys.executable, str(SERVING / "closed_loop.py"),
                               at.rsplit(":", 1)[1], f"/v1/models/{name}/predict", str(folder / "image.body"),
                               "image/jpeg", str(args.connections), str(seconds), str(folder / "log.npz")])
    began = time.monotonic() + WARM_S
    calls: list[Row] = []
    for number in range(1, args.swaps + 1):
        time.sleep(max(0.0, began + args.every * number - time.monotonic()))
        asked = time.monotonic()
        moved = call(at, "POST", f"/v1/models/{name}/aliases/production/rollback")
        calls.append({"asked": asked, "call_ms": 1000 * (time.monotonic() - asked), "version": moved["version"]})
    if client.wait(seconds):
        raise SystemExit("the client failed")
    with np.load(folder / "log.npz") as log:
        return summed(dict(log), calls, began)


def summed(log: dict[str, np.ndarray], calls: list[Row], since: float) -> Row:
    """Figures of requests (began, ended, status, version: arrays of one length) and calls of a run."""
    whole = log["status"] == 200
    ms = 1000 * (log["ended"] - log["began"])
    steady = whole & (log["began"] > since)
    swaps = []
    for entry in calls:
        of_new = log["ended"][whole & (log["version"] == entry["version"]) & (log["ended"] > entry["asked"])]
        if not len(of_new):
            raise SystemExit(f"version {entry['version']} never answered; statuses: "
                             f"{dict(Counter(log['status'].tolist()))}")
        until = float(of_new.min()) + AFTER_S
        inside = whole & (log["ended"] > entry["asked"]) & (log["began"] < until)
        steady &= ~inside
        swaps.append({"until_new_ms": 1000 * (until - AFTER_S - entry["asked"]), "call_ms": entry["call_ms"],
                      "requests": int(inside.sum()), "p50_ms": percentile(ms[inside], 50),
                      "p99_ms": percentile(ms[inside], 99),
                      "most_ms": float(ms[inside].max())})
    return {"requests": len(ms), "dropped": int((~whole).sum()), "swaps": swaps,
            "per_s": len(ms) / float(log["ended"].max() - log["began"].min()),
            "steady": {"requests": int(steady.sum()), "p50_ms": percentile(ms[steady], 50),
                       "p99_ms": percentile(ms[steady], 99), "most_ms": float(ms[steady].max())}}


def percentile(values: np.ndarray, percent: int) -> float:
    return float(np.percentile(values, percent))


def run(args: argparse.Namespace) -> Row:
    from importlib.metadata import version
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("one core for the server and one for the client: this process may use only one")
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        folder = Path(made)
        if args.url:
            at, name, log = urlsplit(args.url).netloc, args.name, None
        else:
            root, name, log = folder / "artifacts", "swapped", folder / "lanner.log"
            root.mkdir()
            subprocess.run([sys.executable, __file__, "--network", args.network, "--publish", str(root)], check=True,
                           capture_output=True)
            server = our_server(root, log, cores[0])
            stack.callback(server.close)
            at = f"127.0.0.1:{server.port}"
        wait_ready(at, log)
        found = drive(args, at, name, folder, cores)
    return {"date": date.today().isoformat(), "command": command(args), "cpu": cpu_name(), "cores": os.cpu_count(),
            "load": os.getloadavg()[0], "network": args.network if not args.url else f"{name} at {args.url}",
            "connections": args.connections, "every_s": args.every,
            "versions": {"python": platform.python_version()} | {n: version(n) for n in LISTED}, **found}


def command(args: argparse.Namespace) -> str:
    at = ["--url", args.url, "--name", args.name] if args.url else ["--network", args.network]
    return " ".join(["./run bench hot-swap --swaps", str(args.swaps), "--every", f"{args.every:g}", "--connections",
                     str(args.connections), *at])


def render(run: Row) -> str:
    swaps, steady = run["swaps"], run["steady"]
    ratio = median(s["p99_ms"] for s in swaps) / steady["p99_ms"]
    worst = max(s["p99_ms"] for s in swaps) / steady["p99_ms"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    aims = [("requests dropped: none", str(run["dropped"]), run["dropped"] == 0),
            (f"p99 in the window of a swap, median of {len(swaps)}: at most {AIM:g} times the steady p99",
             f"{ratio:.2f}", ratio <= AIM)]
    return "\n".join([
        "# Hot swap", "",
        "Written from hot-swap.json by `./run bench hot-swap --docs`; by the rules of "
        "[protocol.md](../../benchmarks/protocol.md).", "",
        f"`{run['command']}`, {run['date']}, {run['cpu']}, {run['cores']} cores, load {run['load']:.1f} over the last "
        f"minute, this run's own share in it. {versions}.", "",
        f"Network: {run['network']}. JPEGs of 32 x 32 pixels, closed loop with {run['connections']} connections, "
        f"{run['requests']:,} requests, {run['per_s']:,.0f} a second. Every {run['every_s']:g} s one call of "
        "`POST /v1/models/NAME/aliases/production/rollback`: the other version is read, hashed, checked by its golden "
        "batch and warmed in the process that answers, then swapped in. A window goes from the call until "
        f"{AFTER_S:g} s after the new version's first answer. One run; p99 of steady time is of "
        f"{steady['requests']:,} requests.", "",
        "| aim | measured | |", "|---|---|---|",
        *(f"| {aim} | {value} | {'met' if met else '**missed**'} |" for aim, value, met in aims), "",
        f"The worst window has {worst:.2f} times the steady p99.", "",
        "| | requests | p50 ms | p99 ms | most ms | call ms | call to first answer, ms |",
        "|---|---|---|---|---|---|---|",
        f"| steady | {steady['requests']:,} | {steady['p50_ms']:.2f} | {steady['p99_ms']:.2f} | "
        f"{steady['most_ms']:.1f} | | |",
        *(f"| swap {i} | {s['requests']:,} | {s['p50_ms']:.2f} | {s['p99_ms']:.2f} | {s['most_ms']:.1f} | "
          f"{s['call_ms']:.0f} | {s['until_new_ms']:.0f} |" for i, s in enumerate(swaps, 1)), ""])


def write(run: Row) -> None:
    folder = TOP / "docs/benchmarks"
    (folder / "hot-swap.json").write_text(json.dumps(run, indent=1) + "\n")
    (folder / "hot-swap.md").write_text(render(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--every", type=float, default=2.0, help="seconds from one swap to the next")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--network", choices=("small", "bench-tiny"), default="small")
    parser.add_argument("--url", default="", help="an API that runs already, on this host")
    parser.add_argument("--name", default="", help="of --url: a Name whose production alias has moved before")
    parser.add_argument("--out", type=Path, default=Path("hot-swap.json"))
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks/hot-swap.md and its JSON")
    parser.add_argument("--docs-from", type=Path, help="only write them, from the JSON of another run")
    parser.add_argument("--publish", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.publish:
        publish(args.publish, args.network)
        return
    if args.docs_from:
        write(json.loads(args.docs_from.read_text()))
        return
    result = run(args)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(render(result))
    if args.docs:
        write(result)
    sys.exit(1 if result["dropped"] else 0)


if __name__ == "__main__":
    main()
