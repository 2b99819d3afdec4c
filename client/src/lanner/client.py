"""`Client`: every call of the HTTP API that a user of Lanner needs, as a method."""

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn
from urllib.parse import unquote

import httpx

from lanner.errors import LannerError
from lanner.packing import pack

TERMINAL = ("succeeded", "failed", "cancelled")
STAGES = ("preprocess", "train", "optimize")
FORM_IMAGES, FORM_BYTES = 64, 16 << 20  # of one request to predict; a server takes 256, and 64 MiB as it comes
PATIENCE_S = 60.0  # how long `follow` looks past an API that does not answer, while it is restarted

Json = dict[str, Any]
Image = bytes | str | Path


class Client:
    """Talks to one Lanner. Every method raises LannerError with the server's code and message."""

    def __init__(self, url: str = "http://127.0.0.1:8000", timeout_s: float = 60.0):
        self.url = url.rstrip("/")
        try:
            self._http = httpx.Client(base_url=self.url, timeout=timeout_s)
        except httpx.InvalidURL as e:
            raise LannerError(f"{url} is no address ({e}): expected http://HOST:PORT", "bad_url") from e

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._http.close()

    # Data in

    def upload(self, path: str | Path, progress: Callable[[int, int], None] | None = None) -> Json:
        """Send a folder, zip or tar. `progress(sent, total)` is called in between, in bytes.

        Returns the server's answer with `id` and `source`, the word for `submit_pipeline`.
        """
        body = pack(Path(path))
        upload_id = f"u-{datetime.now(UTC):%Y%m%d}-{secrets.token_hex(4)}"
        digest = hashlib.sha256()

        def pieces() -> Iterator[bytes]:
            sent = 0
            for piece in body.pieces():
                digest.update(piece)
                yield piece
                sent += len(piece)
                if progress:
                    progress(sent, body.size)

        answer = self._call("PUT", f"/v1/uploads/{upload_id}", content=pieces(), timeout=600.0,
                            params={"filename": body.path.name},
                            headers={"Content-Length": str(body.size), "Content-Type": body.content_type})
        if answer["sha256"] != digest.hexdigest():
            raise LannerError(f"upload {upload_id} arrived with other bytes than were sent: send it again", "damaged")
        return {**answer, "id": upload_id, "source": f"upload:{upload_id}"}

    # Jobs

    def submit_pipeline(self, source: str, *, name: str = "", preprocess: Json | None = None, train: Json | None = None,
                        optimize: Json | None = None) -> Json:
        """Data -> Dataset -> Model -> Variants.

        Returns {pipeline, jobs: {preprocess, train, optimize}, dataset_id, model_id}.
        """
        body = {"source": source, "preprocess": preprocess or {}, "train": train or {}, "optimize": optimize or {}}
        return self._call("POST", "/v1/pipelines", json={**body, "name": name} if name else body)

    def submit_tune(self, dataset_id: str, *, name: str = "", trials: int = 0, budget_s: float = 0.0,
                    recipes: Sequence[str] = (), epochs: int = 0, seed: int = 0) -> dict[str, Json]:
        """Search for a recipe on a Dataset, then optimize the best Model. What is left out stays with the server.

        Returns both jobs' views, {tune, optimize}; the Model is in `tune`'s `job.model_id`.
        """
        choice = {"name": name, "trials": trials, "budget_s": budget_s, "recipes": list(recipes), "epochs": epochs,
                  "seed": seed}
        body = {"kind": "tune", "dataset_id": dataset_id, **{k: v for k, v in choice.items() if v}}
        tune = self._call("POST", "/v1/jobs", json=body)
        after = {"kind": "optimize", "model_id": tune["job"]["model_id"]}
        return {"tune": tune, "optimize": self._call("POST", "/v1/jobs", json=after)}

    def submit_predict(self, name: str, source: str, *, alias: str = "production", version: int = 0, variant: str = "",
                       embedding: bool = False) -> Json:
        """Have every image of a source labelled. source: `upload:<id>`, `dataset:<id>` or `dataset:<id>/<split>`.

        Returns the job's view; its end makes Predictions, whose id is in `job.predictions_id`.
        """
        choice = {"alias": alias, "version": version, "variant": variant, "embedding": embedding}
        body = {"kind": "predict", "name": name, "source": source, **{k: v for k, v in choice.items() if v}}
        return self._call("POST", "/v1/jobs", json=body)

    def download_predictions(self, predictions_id: str, path: str | Path) -> int:
        """Write the table of Predictions, as Parquet, to `path`; returns its size in bytes. Whole or not at all."""
        return self._save(f"/v1/predictions/{predictions_id}/predictions.parquet", Path(path))

    def _save(self, url: str, final: Path) -> int:
        size, fresh = 0, final.with_name(f".{final.name}.part")
        try:
            with self._http.stream("GET", url) as response, open(fresh, "wb") as f:
                if response.is_error:
                    response.read()
                    self._raise(response)
                for piece in response.iter_bytes(1 << 20):
                    size += f.write(piece)
            fresh.replace(final)
        except httpx.TransportError as e:
            raise LannerError(f"{self.url} broke off ({type(e).__name__}: {e}): ask again", "no_answer") from e
        finally:
            fresh.unlink(missing_ok=True)
        return size

    def system(self) -> Json:
        """Who works, what waits, how full the volume is: {redis, keeper, queues, disk, trouble}."""
        return self._call("GET", "/v1/system")

    def jobs(self, *, state: str = "", kind: str = "", limit: int = 0) -> list[Json]:
        """The latest jobs, newest first: 50, unless `limit` says more; of a state or a kind alone."""
        asked = {key: value for key, value in (("state", state), ("kind", kind), ("limit", limit)) if value}
        return list(self._call("GET", "/v1/jobs", params=asked)["jobs"])

    def uploads(self) -> list[Json]:
        """Every upload: id, size, sha256, filename, created_at."""
        return list(self._call("GET", "/v1/uploads")["uploads"])

    def job(self, job_id: str) -> Json:
        """State, progress, attempts, result or error of a job."""
        return self._call("GET", f"/v1/jobs/{job_id}")

    def cancel(self, job_id: str) -> Json:
        return self._call("POST", f"/v1/jobs/{job_id}/cancel", json={})

    def log(self, job_id: str, attempt: int = 0) -> str:
        """What an attempt at a job logged; its last one by default."""
        path = f"/v1/jobs/{job_id}/log" + (f"?attempt={attempt}" if attempt else "")
        return self._request("GET", path).text

    def cancel_pipeline(self, pipeline_id: str) -> Json:
        """Ask every job of a pipeline that has not ended to end."""
        return self._call("POST", f"/v1/pipelines/{pipeline_id}/cancel", json={})

    def pipeline(self, pipeline_id: str) -> Json:
        """A pipeline with its jobs: {pipeline, name, state, jobs: {stage: job}}."""
        return self._call("GET", f"/v1/pipelines/{pipeline_id}")

    def retry(self, job_id: str) -> Json:
        """Try again a job that failed or was cancelled, with those that did not run since it had.

        Returns the new job's view; `jobs` has the id of each kind that was accepted again.
        """
        return self._call("POST", f"/v1/jobs/{job_id}/retry", json={})

    def follow(self, job_id: str, every_s: float = 0.5) -> Iterator[Json]:
        """The job each time something about it has changed, the last time when it has ended."""
        for _, view in self.follow_all({"": job_id}, every_s):
            yield view

    def follow_all(self, jobs: dict[str, str], every_s: float = 0.5) -> Iterator[tuple[str, Json]]:
        """(label, job) each time one of the labelled jobs has changed, until all have ended."""
        seen: dict[str, Json] = {}
        heard = time.monotonic()
        while True:
            for label, job_id in jobs.items():
                if seen.get(label, {}).get("state") in TERMINAL:
                    continue
                try:
                    view = self.job(job_id)
                except LannerError as e:
                    if e.code != "no_answer" and e.status < 500 or time.monotonic() - heard > PATIENCE_S:
                        raise
                    break
                heard = time.monotonic()
                if view != seen.get(label):
                    seen[label] = view
                    yield label, view
            if len(seen) == len(jobs) and all(v["state"] in TERMINAL for v in seen.values()):
                return
            time.sleep(every_s)

    # Models

    def datasets(self) -> list[Json]:
        """Every Dataset's manifest without its files, the latest first: id, name, summary, ..."""
        return list(self._call("GET", "/v1/datasets")["datasets"])

    def dataset(self, dataset_id: str) -> Json:
        """A Dataset's manifest and statistics; of what was skipped some paths with the reason."""
        return self._call("GET", f"/v1/datasets/{dataset_id}")

    def models(self) -> list[Json]:
        return list(self._call("GET", "/v1/models")["models"])

    def model(self, name: str) -> Json:
        """Versions and aliases of a Name."""
        return self._call("GET", f"/v1/models/{name}")

    def delete(self, path: str) -> None:
        """What the API has at /v1/<path>: datasets/ID, models/NAME/versions/N, models/NAME/aliases/ALIAS,
        predictions/ID or uploads/ID. What something still stands on is refused.
        """
        self._request("DELETE", f"/v1/{path.strip('/')}")

    def example(self, dataset_id: str, split: str = "test", number: int = 0) -> tuple[bytes, str]:
        """One image of a Dataset as a PNG, and its label."""
        response = self._request("GET", f"/v1/datasets/{dataset_id}/images/{split}/{number}")
        return response.content, unquote(response.headers["X-Label"])

    def card(self, model_id: str) -> Json:
        """The release card of a Model."""
        return self._call("GET", f"/v1/cards/{model_id}")

    def promote(self, name: str, version: int, variant: str, alias: str = "production") -> Json:
        """Point an alias at a Variant of a version."""
        return self._call("PUT", f"/v1/models/{name}/aliases/{alias}", json={"version": version, "variant": variant})

    def roll_back(self, name: str, alias: str = "production") -> Json:
        """Point an alias at what it pointed at before."""
        return self._call("POST", f"/v1/models/{name}/aliases/{alias}/rollback")

    def download(self, name: str, path: str | Path, *, version: int, variant: str) -> int:
        """Write a Variant to `path`, a zip with all that runs it elsewhere; variant `keras`: the Keras model's file.

        Returns its size in bytes. Whole or not at all.
        """
        what = "model.keras" if variant == "keras" else f"variants/{variant}.zip"
        return self._save(f"/v1/models/{name}/versions/{version}/{what}", Path(path))

    def shadow(self, name: str) -> Json:
        """How a Name's candidate answers live images beside production.

        Returns {share, production, candidate, mirrored, dropped, failed, disagreements, rate, interval, confusion,
        run_ms, ...}; the interval has 95 %.
        """
        return self._call("GET", f"/v1/models/{name}/shadow")

    def predict(self, name: str, images: Image | Sequence[Image], *, alias: str = "production", version: int = 0,
                variant: str = "", top_k: int = 0) -> Json:
        """Label images with the Variant that an alias of a Name points at, or that of a version, or a named Variant.

        images: one or several, each a path or the bytes of an encoded image; many are sent in several requests.
        Returns {model, version, variant, digest, device, predictions: [{top: [{label, index, probability}]}]}.

        Raises LannerError (alias_moved) where two requests were answered by different Variants.
        """
        many = [images] if isinstance(images, (bytes, str, Path)) else list(images)
        choice = {"alias": alias, "version": version, "variant": variant, "top_k": top_k}
        params = {k: v for k, v in choice.items() if v}
        answers = [self._call("POST", f"/v1/models/{name}/predict", files=files, params=params)
                   for files in _forms(many)]
        if len({answer.get("digest") for answer in answers}) > 1:
            raise LannerError(f"{name} was moved to another variant between two requests: ask again", "alias_moved")
        return {**answers[0], "predictions": [row for answer in answers for row in answer["predictions"]]}

    def ready(self) -> bool:
        """Whether the API has a model to serve."""
        try:
            self._call("GET", "/readyz")
        except LannerError as e:
            if e.status == 503:
                return False
            raise
        return True

    def _call(self, method: str, path: str, **options: Any) -> Json:
        response = self._request(method, path, **options)
        body = _json(response)
        if body is None:
            raise self._not_lanner(response)
        return body

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as e:
            raise LannerError(f"{self.url} does not answer ({type(e).__name__}: {e}): is Lanner up?",
                              "no_answer") from e
        except httpx.InvalidURL as e:
            raise LannerError(f"{path!r} is nothing that could be asked for ({e})", "bad_url") from e
        if response.is_error:
            self._raise(response)
        return response

    def _raise(self, response: httpx.Response) -> NoReturn:
        error = (_json(response) or {}).get("error")
        if not error:
            raise self._not_lanner(response)
        raise LannerError(error["message"], error["code"], response.status_code)

    def _not_lanner(self, response: httpx.Response) -> LannerError:
        what = f"{response.request.method} {response.request.url.path} answered {response.status_code}"
        return LannerError(f"{what}, but not as Lanner does: is {self.url} Lanner?", "not_lanner", response.status_code)


def _json(response: httpx.Response) -> Json | None:
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _forms(images: Sequence[Image]) -> Iterator[list[tuple[str, tuple[str, bytes]]]]:
    """Parts of forms, each of which the server takes; one at least, for it to say what is missing."""
    form: list[tuple[str, tuple[str, bytes]]] = []
    size = 0
    for image in images:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        if form and (len(form) == FORM_IMAGES or size + len(data) > FORM_BYTES):
            yield form
            form, size = [], 0
        form.append(("image", (_filename(image), data)))
        size += len(data)
    yield form


def _filename(image: Image) -> str:
    return "image" if isinstance(image, bytes) else Path(image).name
