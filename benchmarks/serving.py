"""Requests/s and latency of one JPEG a request: ours, other Python servers, Triton; and ours beside the bare engine.

    ./run bench serving [--rounds 5] [--seconds 2] [--only NAME,...] [--peers FOLDER] [--out serving.json] [--docs]
    ./run bench serving --docs-from serving.json

Every server hosts the same ONNX file under the same ONNX Runtime with one thread, on one core; wrk asks it from another
one, in a closed loop with 1, 16 and 64 connections; a generator of our own asks in an open loop, up to three times of
what can be answered. Servers take turns, those that wait are stopped (SIGSTOP), and
every second round goes backwards. Answers are compared first. Each peer has a venv of its own under --peers, made by
this command with pinned versions; one that can't be installed or started is a row that says so. wrk is a package of
Debian and Ubuntu.
"""

import argparse
import http.client
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TOP = Path(__file__).parents[1]
SERVING = Path(__file__).parent / "serving"
sys.path.insert(0, str(SERVING))
import overload  # noqa: E402
import page  # noqa: E402
from peers import OURS, PEERS, Peer, binary, body, install, start, versions  # noqa: E402

from shared.runtimes.onnx import OnnxSession  # noqa: E402
from shared.stack import free_port  # noqa: E402

CONNECTIONS = (1, 16, 64)
PATIENCE_S = 60.0
TENSORS = 64  # images of a request of tensors
LISTED = ("granian", "uvloop", "flask", "onnxruntime", "simplejpeg", "orjson", "numpy")
Row = dict[str, Any]


class Server:
    """A process group on one core. `asked` is what wrk sends: path, file, headers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, pauses: bool = True):
        self.process, self.port, self._pauses = process, port, pauses

    def pause(self) -> None:
        """Stop it, until `resume`, if it bears that."""
        if self._pauses:
            self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        """End the whole group, also where its first process has ended already."""
        for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                self.signal(number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1 if number == signal.SIGCONT else 10)

    def ask(self, path: str, content: bytes, headers: dict[str, str]) -> bytes:
        """One answer. Raises OSError or http.client.HTTPException, ValueError for another status than 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", path, content, headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}: {data[:200]!r}")
        return data


class Contender:
    """What is measured: a form of request to a server."""

    def __init__(self, name: str, server: Server, path: str, form: str, image: bytes, folder: Path):
        self.name, self.server, self.path = name, server, path
        self.content, self.headers = body(form, image)
        self.file = folder / f"{name}.body"
        self.file.write_bytes(self.content)

    def check(self, best: int) -> None:
        """Its likeliest class is `best`. Raises ValueError, and TimeoutError as `wait`."""
        if (found := self.wait()) != best:
            raise ValueError(f"it answers class {found}, the engine {best}")

    def wait(self) -> int:
        """The likeliest class of its first answer. Raises TimeoutError."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return likeliest(self.server.ask(self.path, self.content, self.headers))
            except (OSError, ValueError, http.client.HTTPException) as e:
                if self.server.process.poll() is not None or time.monotonic() > end:
                    raise TimeoutError(f"it does not answer: {e}") from None
                time.sleep(0.2)


def likeliest(answer: bytes) -> int:
    """The first class of an answer in any of the forms: our JSON, the peers', /v2 in JSON or binary."""
    if not answer.rstrip().endswith(b"}"):
        return int(np.frombuffer(answer[-40:], "<f4").argmax())
    told = json.loads(answer)
    if "outputs" in told:
        return int(np.argmax(told["outputs"][0]["data"]))
    top = told["predictions"][0]["top"] if "predictions" in told else told["top"]
    return int(top[0]["index"])


def load(port: int, path: str, file: Path, headers: dict[str, str], connections: int, seconds: int,
         core: int | None) -> Row:
    """What wrk saw; core: None for all, where it may have several threads."""
    threads = 1 if core is not None else min(connections, 4)
    done = subprocess.run([*on(core), "wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds}s", "--timeout",
                           "10s", "-s", str(SERVING / "post.lua"), f"http://127.0.0.1:{port}{path}", "--", str(file),
                           *(f"{name}={value}" for name, value in headers.items())],
                          capture_output=True, text=True, check=True)
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def on(core: int | None) -> list[str]:
    """What a command begins with that runs on one core."""
    return [] if core is None else ["taskset", "-c", str(core)]


def our_server(root: Path, log: Path, core: int | None, **more: str) -> Server:
    """more: settings beside those that every figure has."""
    port = free_port()
    env = {**os.environ, **more, "DEVICE": "cpu", "ARTIFACTS": str(root), "REDIS_URL": "redis://127.0.0.1:1/0",
           "PORT": str(port), "LOG_LEVEL": "WARNING", "SERVING_P99_MS": "0"}
    with open(log, "wb") as out:
        return Server(subprocess.Popen([*on(core), sys.executable, "-m", "inference"], env=env, stdout=out, stderr=out,
                                       start_new_session=True), port)


def contenders(stack: ExitStack, args: argparse.Namespace, folder: Path, root: Path, image: bytes,
               best: int) -> tuple[list[Contender], dict[str, str], dict[str, dict[str, str]]]:
    """Those that answer; why the others don't; versions."""
    found, missing, told = [], {}, {}
    model = root / "variants/m-bench-tiny/onnx-fp32/model.onnx"
    ours = our_server(root, folder / "lanner.log", args.server_core)
    stack.callback(ours.close)
    entries: list[tuple[str, Server | Peer, str, str]] = [
        *((key, ours, path, form) for key, (_, path, form) in OURS.items()),
        *((key, PEERS[key], PEERS[key].path, PEERS[key].body) for key in PEERS if key in args.only)]
    for key, server, path, form in entries:
        try:
            if isinstance(server, Peer):
                print(f"{key}: installing and starting", file=sys.stderr)
                if why := install(server, args.peers / key):
                    raise ValueError(f"it can't be installed: {why}")
                told[key] = versions(server, args.peers / key)
                port, pauses = free_port(), server.pauses
                server = Server(start(server, args.peers / key, port, model, folder / key, folder / f"{key}.log",
                                      args.server_core), port, pauses)
                stack.callback(server.close)
            contender = Contender(key, server, path, form, image, folder)
            contender.check(best)
        except (ValueError, TimeoutError, subprocess.SubprocessError) as e:
            missing[key] = str(e)
            print(f"{key}: {e}", file=sys.stderr)
            continue
        found.append(contender)
        if server is not ours:
            server.pause()
    ours.pause()
    return found, missing, told


def turns(found: list[Contender], args: argparse.Namespace) -> list[Row]:
    """Every contender at every number of connections, `rounds` times."""
    rows = [{"server": c.name, "connections": n, "per_s": [], "p50_us": [], "p99_us": [], "bad": 0}
            for c in found for n in CONNECTIONS]
    for number in range(args.rounds):
        for contender in found if number % 2 == 0 else reversed(found):
            contender.server.resume()
            for _ in range(20):
                with suppress(OSError, ValueError, http.client.HTTPException):  # wrk counts those that matter
                    contender.server.ask(contender.path, contender.content, contender.headers)
            for row in rows:
                if row["server"] == contender.name:
                    add(row, load(contender.server.port, contender.path, contender.file, contender.headers,
                                  row["connections"], args.seconds, args.client_core))
            contender.server.pause()
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    return rows


def add(row: Row, seen: Row) -> None:
    for key in ("per_s", "p50_us", "p99_us"):
        row[key].append(seen[key])
    row["bad"] += seen["bad"]


def beside_the_engine(root: Path, server: Server, image: bytes, folder: Path, args: argparse.Namespace) -> list[Row]:
    """images/s of a loop over the Session and of the API with the same network, in turns."""
    engine = subprocess.Popen(["taskset", "-c", str(args.server_core), sys.executable, str(SERVING / "engine.py"),
                               str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert engine.stdin is not None
    assert engine.stdout is not None
    pixels = np.random.default_rng(1).integers(0, 256, (TENSORS, 32, 32, 3), np.uint8).tobytes()
    tensors, headers = binary({"name": "images", "datatype": "UINT8", "shape": [TENSORS, 32, 32, 3],
                               "parameters": {"binary_data_size": len(pixels)}}, pixels)
    (folder / "tensors.body").write_bytes(tensors)
    (folder / "image.body").write_bytes(image)
    rows = []
    for name in ("small", "bench-tiny"):
        rows += [{"network": name, "what": f"engine, batch {n}", "batch": n, "per_s": []} for n in (1, TENSORS)]
        rows += [{"network": name, "what": f"JPEG, {n} connections", "connections": n, "per_s": []} for n in (16, 64)]
        rows += [{"network": name, "what": f"tensors of {TENSORS}, 4 connections", "images": TENSORS, "connections": 4,
                  "per_s": []}]
    for number in range(args.rounds):
        for row in rows if number % 2 == 0 else reversed(rows):
            if "batch" in row:
                engine.stdin.write(f"{row['network']} {row['batch']} {args.seconds}\n")
                engine.stdin.flush()
                row["per_s"].append(json.loads(engine.stdout.readline())["per_s"])
                continue
            server.resume()
            images = row.get("images", 1)
            path = f"/v1/models/{row['network']}/predict" if images == 1 else f"/v2/models/{row['network']}/infer"
            seen = load(server.port, path, folder / ("image.body" if images == 1 else "tensors.body"),
                        {"Content-Type": "image/jpeg"} if images == 1 else headers, row["connections"], args.seconds,
                        args.client_core)
            server.pause()
            row["per_s"].append(seen["per_s"] * images)
            if seen["bad"]:
                raise SystemExit(f"{row['what']} of {row['network']}: {seen['bad']} requests failed")
    engine.stdin.close()
    engine.wait()
    return rows


def overloaded(root: Path, server: Server, image: bytes, folder: Path, args: argparse.Namespace) -> Row:
    """The open loop on a server with QUEUE_MS, its load by the closed loop on `server`, which has none; slow bodies."""
    limited = our_server(root, folder / "limited.log", args.server_core, QUEUE_MS=str(overload.QUEUE_MS))
    try:
        for name in overload.NETWORKS:
            Contender(name, limited, f"/v1/models/{name}/predict", "jpeg", image, folder).wait()
        rows: list[Row] = [{"network": name, "capacity": [], "loads": {}} for name in overload.NETWORKS]
        slow = [overload.slow_bodies(limited.port, "/v1/models/bench-tiny/predict", "POST"),
                overload.slow_bodies(limited.port, "/v1/uploads/u-{}", "PUT")]
        for number in range(args.rounds):
            for row in rows:
                limited.pause()
                server.resume()
                closed = load(server.port, f"/v1/models/{row['network']}/predict", folder / "image.body",
                              {"Content-Type": "image/jpeg"}, 64, args.seconds, args.client_core)
                row["capacity"].append(closed["per_s"])
                server.pause()
                limited.resume()
                for share in overload.LOADS if number % 2 == 0 else reversed(overload.LOADS):
                    overload.add(row, share, overload.open_loop(limited.port, row["network"], folder / "image.body",
                                                                share * row["capacity"][-1], args.seconds,
                                                                args.client_core, number))
    finally:
        limited.close()
    return {"rows": rows, "slow": slow}


def several(root: Path, image: bytes, folder: Path, args: argparse.Namespace) -> list[Row]:
    """The API as one process and as one a core, on every core, which wrk shares: what HTTP_PROCESSES brings."""
    servers = {n: our_server(root, folder / f"{n}.log", None, HTTP_PROCESSES=str(n)) for n in (1, os.cpu_count() or 1)}
    rows: list[Row] = [{"network": name, "processes": n, "connections": c, "per_s": [], "p50_us": [], "p99_us": [],
                        "bad": 0} for name in overload.NETWORKS for n in servers for c in (1, 64)]
    try:
        for server in servers.values():
            for name in overload.NETWORKS:
                Contender(name, server, f"/v1/models/{name}/predict", "jpeg", image, folder).wait()
            server.pause()
        for number in range(args.rounds):
            for row in rows if number % 2 == 0 else reversed(rows):
                server = servers[row["processes"]]
                server.resume()
                add(row, load(server.port, f"/v1/models/{row['network']}/predict", folder / "image.body",
                              {"Content-Type": "image/jpeg"}, row["connections"], args.seconds, None))
                server.pause()
    finally:
        for server in servers.values():
            server.close()
    return rows


def picture() -> bytes:
    """A JPEG of 32 x 32 pixels: a gradient with noise, so that it has as many bytes as a photograph of that size."""
    y, x = np.mgrid[:32, :32]
    pixels = np.stack([8 * y, 8 * x, 4 * (x + y)], -1) * 0.9 + np.random.default_rng(1).normal(12, 8, (32, 32, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def run(args: argparse.Namespace) -> Row:
    from importlib.metadata import version
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        folder, root, image = Path(made), Path(made) / "artifacts", picture()
        root.mkdir()
        subprocess.run([sys.executable, SERVING / "models.py", root], check=True, capture_output=True)
        session = OnnxSession(root / "variants/m-bench-tiny/onnx-fp32/model.onnx")
        best = int(session.run(np.asarray(Image.open(io.BytesIO(image)))[None])[0].argmax())
        found, missing, told = contenders(stack, args, folder, root, image, best)
        engine = beside_the_engine(root, found[0].server, image, folder, args)
        over = overloaded(root, found[0].server, image, folder, args)
        processes = several(root, image, folder, args)
        rows = turns(found, args)
        return {"date": date.today().isoformat(), "command": command(args),
                "cpu": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg()[1], "rounds": args.rounds,
                "seconds": args.seconds, "bytes": len(image),
                "versions": {"lanner": {"python": platform.python_version()} | {n: version(n) for n in LISTED}, **told},
                "missing": missing, "rows": rows, "engine": engine, "overload": over, "processes": processes}


def command(args: argparse.Namespace) -> str:
    """With the arguments that change what is measured; the rest are paths."""
    changed = [] if set(args.only) == set(PEERS) else ["--only", ",".join(args.only)]
    return " ".join(["./run bench serving --rounds", str(args.rounds), "--seconds", str(args.seconds), *changed])


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of one measurement")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PEERS), help=", ".join(PEERS))
    parser.add_argument("--peers", type=Path, default=TOP / ".lanner/peers", help="where their venvs are made")
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks/serving.md and its JSON")
    parser.add_argument("--docs-from", type=Path, help="only write them, from the JSON of another run")
    args = parser.parse_args()
    if args.docs_from:
        page.write(TOP / "docs/benchmarks", json.loads(args.docs_from.read_text()))
        return
    cores = sorted(os.sched_getaffinity(0))
    for tool in ("wrk", "taskset"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed: apt-get install wrk util-linux")
    if len(cores) < 2:
        raise SystemExit("one core for the server and one for the client: this process may use only one")
    args.server_core, args.client_core, args.peers = cores[0], cores[1], args.peers.absolute()
    result = run(args)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(page.render(result))
    if args.docs:
        page.write(TOP / "docs/benchmarks", result)


if __name__ == "__main__":
    main()
