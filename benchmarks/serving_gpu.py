"""The API's side of `./run bench gpu`: upload, jobs and predictions over HTTP, and predictions beside a training."""

import http.client
import itertools
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from serving import load

PATIENCE_S = 300.0  # for a first answer: an engine is loaded and its golden batch compared
WARM_UP_S = 3.0  # of predictions beside a training, in which its programs get shorter if SERVING_P99_MS is passed
CONNECTIONS = 16  # of predictions beside a training
PREDICT, IMAGE = "/v1/models/images/predict", {"Content-Type": "application/octet-stream"}
Row = dict[str, Any]


class Api:
    """A server on this host: a connection for each question, and one that is kept for what is timed."""

    def __init__(self, port: int):
        self.port = port
        self.kept = self.connect()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON. Raises SystemExit for an error, OSError where nobody listens."""
        text = None if body is None else json.dumps(body)
        status, found = _send(self.connect(), method, path, text, {"Content-Type": "application/json"})
        if status >= 400:
            raise SystemExit(f"{method} {path}: {status} {found['error']['message']}")
        return found

    def predict(self, image: bytes, query: str = "") -> tuple[int, Any]:
        """Status and answer. Raises OSError; the next request then connects anew."""
        try:
            return _send(self.kept, "POST", PREDICT + query, image, IMAGE)
        except (http.client.HTTPException, OSError):
            self.kept.close()
            raise


def _send(connection: http.client.HTTPConnection, method: str, path: str, body: Any,
          headers: dict[str, str]) -> tuple[int, Any]:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def upload(api: Api, folder: Path, archive: Path) -> Row:
    """A folder as a tar over HTTP; seconds are those of the request."""
    subprocess.run(["tar", "--sort=name", "-C", folder, "-cf", archive, "."], check=True)
    size, began = archive.stat().st_size, time.monotonic()
    with open(archive, "rb") as body:
        status, found = _send(api.connect(), "PUT", f"/v1/uploads/images?filename={archive.name}", body,
                              {"Content-Type": "application/x-tar", "Content-Length": str(size)})
    seconds = time.monotonic() - began
    archive.unlink()
    if status >= 400:
        raise SystemExit(f"upload: {status} {found['error']['message']}")
    return {"part": "upload", "seconds": seconds, "failed": False,
            "what": f"{size / 1e6:,.1f} MB, {size / 1e6 / seconds:,.0f} MB/s, HTTP {status}"}


def first_answer(api: Api, images: list[bytes], check: Callable[[], None]) -> Row:
    """Ask until the API labels an image; seconds are those until then. SystemExit where no variant was promoted."""
    began, status, found = time.monotonic(), 0, {}
    while True:
        check()
        try:
            if "production" in api.ask("GET", "/v1/models/images")["aliases"]:
                break
            raise SystemExit("no variant of images is production: what `optimize` says of the gate tells why")
        except OSError:
            time.sleep(0.1)
    while time.monotonic() - began < PATIENCE_S and status != 200:
        check()
        try:
            status, found = api.predict(images[0])
        except OSError:
            time.sleep(0.1)
    seconds = time.monotonic() - began
    what = (f"version {found['version']}, {found['variant']} on {found['device']}" if status == 200
            else f"status {status} after {seconds:.0f} s: {found}")
    return {"part": "HTTP 200 on predict", "seconds": seconds, "failed": status != 200, "what": what}


def submit_to_served(api: Api, body: Row, image: bytes, check: Callable[[], None]) -> Row:
    """Ask for a pipeline and predict until its version answers: a row that has what each of its jobs took."""
    began = time.monotonic()
    posted = api.ask("POST", "/v1/pipelines", body)
    view, spent = follow(api, posted["pipeline"], check)
    done = time.monotonic() - began
    row: Row = {"part": "submit to served", "seconds": done, "stages": spent, "failed": True}
    if view["state"] != "succeeded":
        return row | {"what": "; ".join(f"{stage} {job['state']}: {(job['error'] or {}).get('message')}"
                                        for stage, job in view["jobs"].items())}
    answered, found = first_of(api, api.ask("GET", f"/v1/cards/{posted['model_id']}")["version"], image)
    jobs = [f"{stage} {took(job):.1f} s ({stages_of(spent[stage])})" for stage, job in view["jobs"].items()]
    seconds = time.monotonic() - began
    return row | {"seconds": seconds, "failed": not answered, "made": posted["model_id"],
                  "what": f"{'; '.join(jobs)}; first answer {seconds - done:.1f} s after, {found}"}


def follow(api: Api, pipeline_id: str, check: Callable[[], None]) -> tuple[Row, dict[str, dict[str, float]]]:
    """A pipeline's view once it is over, and seconds: job -> stage as its progress names it -> how long it was seen."""
    spent: dict[str, dict[str, float]] = {}
    seen = time.monotonic()
    while True:
        check()
        time.sleep(0.02)
        view: Row = api.ask("GET", f"/v1/pipelines/{pipeline_id}")
        before, seen = seen, time.monotonic()
        for name, job in view["jobs"].items():
            stages = spent.setdefault(name, {})
            if job["state"] == "running" and (stage := (job["progress"] or {}).get("stage")):
                stages[stage] = stages.get(stage, 0.0) + seen - before
        if view["state"] not in ("queued", "running"):
            return view, spent


def first_of(api: Api, version: int, image: bytes) -> tuple[bool, str]:
    """Predict until the version answers, PATIENCE_S at most: whether it did, and the last answer."""
    until, told = time.monotonic() + PATIENCE_S, "no answer"
    while time.monotonic() < until:
        status, found = api.predict(image)
        told = f"HTTP {status}, version {found.get('version')}, {found.get('variant')} on {found.get('device')}"
        if status == 200 and found["version"] == version:
            return True, told
        time.sleep(0.01)
    return False, told


def stages_of(spent: dict[str, float]) -> str:
    return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in spent.items() if seconds >= 0.5)


def took(view: Row) -> float:
    """Seconds of a job's last attempt."""
    began, ended = (datetime.fromisoformat(view["attempts"][-1][at]) for at in ("started_at", "ended_at"))
    return (ended - began).total_seconds()


def variants(api: Api, device: str) -> dict[str, str]:
    """Of the production version, those of the format that computes on the device: variant -> query that asks for it."""
    version = api.ask("GET", "/v1/models/images")["aliases"]["production"]["version"]
    published = [v["variant"] for v in api.ask("GET", f"/v1/models/images/versions/{version}")["variants"]]
    form = "tensorrt-" if device == "gpu" else "onnx-"
    return {name: f"?version={version}&variant={name}" for name in published if name.startswith(form)}


def predictions(api: Api, images: list[bytes], query: str, go_on: Callable[[int], bool]) -> dict[str, Any]:
    """One image a request, one request after the other, while go_on(requests so far): milliseconds of each."""
    api.kept.close()  # the server may have closed it while nothing was sent
    took, statuses, found = [], {}, {}
    began = time.monotonic()
    for number, image in enumerate(itertools.cycle(images)):
        if not go_on(number):
            break
        sent = time.monotonic_ns()
        status, found = api.predict(image, query)
        took.append((time.monotonic_ns() - sent) / 1e6)
        statuses[str(status)] = statuses.get(str(status), 0) + 1
    return {"requests": len(took), "statuses": statuses, "p50_ms": percentile(took, 0.5),
            "p99_ms": percentile(took, 0.99), "most_ms": max(took), "per_s": len(took) / (time.monotonic() - began),
            "variant": found.get("variant", ""), "device": found.get("device", ""), "answer": found.get("error")}


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]


def row_of(part: str, serving: dict[str, Any], more: str = "") -> Row:
    statuses = ", ".join(f"{count:,} x HTTP {status}" for status, count in serving["statuses"].items())
    what = (f"{serving['variant'] or serving['answer']} on {serving['device']}: {statuses}; "
            f"p50 {serving['p50_ms']:.2f} ms, p99 {serving['p99_ms']:.2f} ms, {serving['per_s']:,.0f} requests/s{more}")
    return {"part": part, "seconds": serving["requests"] / serving["per_s"], "what": what, "serving": serving,
            "failed": set(serving["statuses"]) != {"200"}}


@contextmanager
def training(api: Api, dataset_id: str, check: Callable[[], None]) -> Iterator[str]:
    """The id of a training that is past its first epoch, and so has compiled; cancelled at the end."""
    body = {"kind": "train", "dataset_id": dataset_id, "name": "beside", "recipe": "small", "epochs": 10_000}
    job = api.ask("POST", "/v1/jobs", body)["id"]
    try:
        while ((api.ask("GET", f"/v1/jobs/{job}")["progress"] or {}).get("metrics") or {}).get("epoch", 0) < 2:
            check()
            if (view := api.ask("GET", f"/v1/jobs/{job}"))["ended_at"]:
                raise SystemExit(f"the training beside the predictions has {view['state']}: {view['error']}")
            time.sleep(0.1)
        yield job
    finally:
        api.ask("POST", f"/v1/jobs/{job}/cancel")
        while not api.ask("GET", f"/v1/jobs/{job}")["ended_at"]:
            time.sleep(0.1)


def steps_a_second(api: Api, job: str, since: float, until: float) -> float:
    """What a training did between two moments (time.time), by its progress events; 0 where it told of none."""
    path = f"/v1/jobs/{job}/events?format=json&after={int(1000 * since)}-0"  # ids begin with Redis' milliseconds
    told = [(int(e["id"].partition("-")[0]) / 1000, e["step"]) for e in api.ask("GET", path)["events"]
            if e["what"] == "progress" and e.get("stage") == "train"]
    told = [(at, step) for at, step in told if at <= until]
    if len(told) < 2 or told[-1][0] == told[0][0]:
        return 0.0
    return float((told[-1][1] - told[0][1]) / (told[-1][0] - told[0][0]))


def under_load(api: Api, image: bytes, seconds: float) -> dict[str, Any]:
    """As `predictions`, of CONNECTIONS at once by wrk, each with its next request when it has its answer."""
    _, one = api.predict(image)
    with tempfile.NamedTemporaryFile() as file:
        file.write(image)
        file.flush()
        seen = load(api.port, PREDICT, Path(file.name), IMAGE, CONNECTIONS, max(1, round(seconds)), None)
    answered = round(seen["per_s"] * seconds)
    return {"requests": answered, "statuses": {"200": answered} | ({"other": seen["bad"]} if seen["bad"] else {}),
            "p50_ms": seen["p50_us"] / 1000, "p99_ms": seen["p99_us"] / 1000, "per_s": seen["per_s"],
            "variant": one.get("variant", ""), "device": one.get("device", ""), "answer": one.get("error")}


def beside_training(api: Api, image: bytes, dataset_id: str, seconds: float,
                    check: Callable[[], None]) -> tuple[dict[str, Any], str]:
    """Predictions while a training runs, and a sentence on what that did in the meantime and just before."""
    with training(api, dataset_id, check) as job:
        before = time.time()
        time.sleep(seconds / 2)
        began = time.time()
        under_load(api, image, WARM_UP_S)
        measured = time.time()
        yielded = _yielded(api, job)
        found = under_load(api, image, seconds)
        found["steps_per_s"] = steps_a_second(api, job, measured, time.time())
        found["steps_per_s_alone"] = steps_a_second(api, job, before, began)
        found["yielded_s"] = _yielded(api, job) - yielded
    return found, (f"; training {found['steps_per_s']:,.0f} steps/s, without requests "
                   f"{found['steps_per_s_alone']:,.0f}, paused for {found['yielded_s']:.1f} s")


def _yielded(api: Api, job: str) -> float:
    return float(api.ask("GET", f"/v1/jobs/{job}")["progress"]["metrics"].get("yielded_s", 0))
