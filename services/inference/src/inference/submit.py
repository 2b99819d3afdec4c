"""Accepting jobs: mint the ids, write the records, put the first on its queue. Files first, Redis second.

Redis is asked before anything is written, so a queue that is down is told to the client and leaves no record. Once a
record stands the job is accepted: should the delivery be lost after that, the keeper delivers it.
"""

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import RedisError

from inference.uploads import find_upload
from shared import disk
from shared.artifacts import open_artifact, versions
from shared.augmentation import LARGEST, check_augmentation
from shared.errors import Conflict, NotFound, Refused
from shared.jobs import ID, KINDS, RECIPES, Job, TrainJob, TuneJob, check_id, check_import, kind_of, new_id, parse
from shared.ledger import Ledger, Request
from shared.queue import deliver
from shared.tracing import TRACEPARENT
from shared.weights import find_weights

STAGES = ("preprocess", "train", "optimize")  # of a pipeline
KEY_LIMIT = 255


@dataclass(frozen=True)
class Pipeline:
    """What was accepted; `jobs` in the order in which they run."""

    id: str
    jobs: dict[str, Request]
    new: bool

    @property
    def dataset_id(self) -> str:
        return str(self.jobs["train"].job.dataset_id)  # type: ignore[union-attr]

    @property
    def model_id(self) -> str:
        return str(self.jobs["train"].job.model_id)  # type: ignore[union-attr]


def submit_pipeline(ledger: Ledger, root: Path, body: dict[str, Any], key: str = "",
                    traceparent: str = "") -> Pipeline:
    """Accept preprocess -> train -> optimize of one source. The same key with the same body is the same pipeline.

    body: {source, name?, preprocess?: {...}, train?: {...}, optimize?: {...}}, the stages with fields of their jobs.
    Of a source `dataset:<id>` there is nothing to preprocess.

    Raises:
        Refused: a field is unknown, missing or out of range.
        NotFound: the upload does not exist, or the Dataset does not and no job that still runs makes it.
        Conflict: the key stands for another body.
        RedisError: the queue does not answer; nothing was accepted.
    """
    unknown = sorted(set(body) - {"source", "name", *STAGES})
    if unknown:
        raise Refused(f"a pipeline has no field {unknown[0]!r}: expected source, name, {', '.join(STAGES)}", "bad_job")
    mint, parent = _minter(key), ""
    source = body.get("source")
    if ready := isinstance(source, str) and source.startswith("dataset:"):
        dataset_id, known = source.partition(":")[2], {"name": body["name"]} if "name" in body else {}
        parent = maker(ledger, root, "datasets", dataset_id, known)
        name = check_id(known.get("name"), "name")
    else:
        name, source = _name_and_source(root, body)
        dataset_id = mint("d")
    model_id = mint("m")
    ids = {"preprocess": {"name": name, "source": source, "dataset_id": dataset_id},
           "train": {"name": name, "dataset_id": dataset_id, "model_id": model_id},
           "optimize": {"name": name, "model_id": model_id}}
    if ready:
        del ids["preprocess"]
        if body.get("preprocess"):
            raise Refused(f"dataset {dataset_id} is prepared already: leave preprocess out, or name what it is to be "
                          "prepared from as source", "bad_job")
    jobs = {stage: parse(stage, {**_stage(body, stage, ids[stage]), **ids[stage]}) for stage in ids}
    _check_training(root, jobs["train"])
    pipeline, requests, new, trace = mint("p"), {}, False, told(traceparent)
    fresh: list[str] = []
    _ask_queue(ledger, [mint("j", stage) for stage in ids])
    try:
        for stage, job in jobs.items():
            requests[stage], first = ledger.accept(mint("j", stage), job, parent=parent, pipeline=pipeline,
                                                   traceparent=trace)
            new, parent = new or first, requests[stage].id
            if first:
                fresh.append(parent)
    except OSError:  # half a pipeline is none
        for job_id in fresh:
            with suppress(OSError):
                ledger.ask_cancel(job_id)
        raise
    deliver_first(ledger, next(iter(requests.values())))
    return Pipeline(pipeline, requests, new)


def submit_job(ledger: Ledger, root: Path, body: dict[str, Any], key: str = "",
               traceparent: str = "") -> tuple[Request, bool]:
    """Accept one stage: {kind, ...fields}. Ids that are absent are minted, the name is that of what it reads.

    Returns the request and whether it is new. Raises as `submit_pipeline`, and
        NotFound: the dataset or model does not exist and no job that still runs makes it.
        Conflict: the dataset or model that it is to make exists.
    """
    fields = dict(body)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        came = f"is {kind!r}" if "kind" in body else "is missing"
        raise Refused(f"kind {came}, expected one of {', '.join(KINDS)}", "bad_job")
    mint = _minter(key)
    job_id, parent = mint("j"), None
    match kind:
        case "preprocess":
            fields["name"], fields["source"] = _name_and_source(root, fields)
            fields.setdefault("dataset_id", mint("d"))
        case "train" | "tune":
            fields.setdefault("model_id", mint("m"))
            parent = maker(ledger, root, "datasets", fields.get("dataset_id"), fields)
        case "optimize":
            parent = maker(ledger, root, "models", fields.get("model_id"), fields)
        case "predict":
            fields.setdefault("predictions_id", mint("r"))
            _check_predict(root, fields)
    job = parse(kind, fields)
    _check_training(root, job)
    known = _ask_queue(ledger, [job_id])
    if not known and job.target and (root / job.target).exists():
        raise Conflict(f"{job.target} exists already: leave the id out and one is made", "id_taken")
    before = ledger.request(job_id).parent if known else parent or ""
    request, new = ledger.accept(job_id, job, parent=before, traceparent=told(traceparent))
    deliver_first(ledger, request)
    return request, new


def _check_predict(root: Path, fields: dict[str, Any]) -> None:
    """Raise NotFound when the Name, the upload or the Dataset does not exist."""
    if not versions(root, fields.get("name", "")):
        raise NotFound(f"model {fields.get('name')} does not exist: GET /v1/models lists those that do")
    version = fields.get("version")
    if type(version) is int and version and version not in versions(root, fields["name"]):
        raise NotFound(f"{fields['name']} has no version {version}: it has {sorted(versions(root, fields['name']))}")
    word, _, rest = str(fields.get("source", "")).partition(":")
    if word == "upload":
        find_upload(root, rest)
    elif word == "import" and rest:
        check_import(rest)
    elif word == "dataset":
        open_artifact(root, f"datasets/{check_id(rest.partition('/')[0], 'dataset id')}", hashes=False)


def _check_training(root: Path, job: Job) -> None:
    """What can be known now, not when a dataset has been prepared. Raises Refused."""
    match job:
        case TrainJob():
            asked, able = (job.recipe,), (*RECIPES, "auto")
        case TuneJob():
            asked, able = job.recipes, tuple(name for name in RECIPES if name != "speedrun")
        case _:
            return
    if unknown := [name for name in asked if name not in able]:
        raise Refused(f"recipe {unknown[0]!r} is unknown to {kind_of(job)}: expected one of {', '.join(able)}",
                      "unknown_recipe")
    if "transfer" in asked:
        find_weights(root, LARGEST)
    if isinstance(job, TrainJob):
        check_augmentation(job.augmentation, LARGEST, job.recipe)


def _minter(key: str) -> Callable[..., str]:
    """mint(letter, stage='') -> id: random, or the same for the same key: a repeated request finds its records."""
    if not key:
        made: dict[tuple[str, str], str] = {}
        return lambda letter, stage="": made.setdefault((letter, stage), new_id(letter))
    if len(key) > KEY_LIMIT or not key.isprintable():
        raise Refused(f"Idempotency-Key is not 1 to {KEY_LIMIT} printable characters", "malformed")
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    return lambda letter, stage="": f"{letter}-{digest}" + (f"-{stage}" if stage else "")


def _stage(body: dict[str, Any], stage: str, ids: dict[str, str]) -> dict[str, Any]:
    fields = body.get(stage, {})
    if not isinstance(fields, dict):
        raise Refused(f"{stage} is {fields!r}, expected an object of fields", "bad_job")
    taken = sorted(set(fields) & set(ids))
    if taken:
        raise Refused(f"{stage}.{taken[0]} is the pipeline's to give: set name and source beside the stages", "bad_job")
    return fields


def _name_and_source(root: Path, body: dict[str, Any]) -> tuple[str, str]:
    """The Name, by default its dataset's: cifar10, the upload's file without its suffix, the import's."""
    source, name = body.get("source", "cifar10"), body.get("name")
    if not isinstance(source, str):
        raise Refused(f"source is {source!r}, expected cifar10, upload:<id>, import:<name> or, of a pipeline, "
                      "dataset:<id>", "bad_job")
    word, _, rest = source.partition(":")
    if word == "upload":
        upload = find_upload(root, rest)
        rest = upload["filename"] or rest
    if word == "import" and rest:
        check_import(rest)
    return check_id(_slug(rest or word) if name is None else name, "name"), source


def _slug(text: str) -> str:
    """A valid name from a file's: without its suffixes, lower case, other characters as '-'."""
    stem = re.sub(r"(\.tar)?\.[a-z0-9]{1,5}$", "", text.rsplit("/", 1)[-1].lower())
    slug = re.sub(r"[^a-z0-9_-]+", "-", stem).strip("-_")[:63]
    return slug if ID.fullmatch(slug) else "dataset"


def maker(ledger: Ledger, root: Path, kind: str, made: Any, fields: dict[str, Any]) -> str:
    """The job whose success a stage waits for, '' where what it reads is published; fills in the name from either."""
    target = f"{kind}/{check_id(made, kind[:-1] + '_id')}"
    if not (root / target).exists():
        for request in ledger.requests():
            if request.job.target == target and ledger.ended(request.id) is None:
                fields.setdefault("name", request.job.name)
                return request.id
    if not (root / target).exists():  # asked again: its job may have ended while the others were read
        raise NotFound(f"{target} does not exist, and no job that still runs makes it")
    manifest = open_artifact(root, target, hashes=False)
    if "name" in manifest:
        fields.setdefault("name", manifest["name"])
    return ""


def _ask_queue(ledger: Ledger, job_ids: list[str]) -> bool:
    """Whether all of these are accepted already; if not, make sure that the queue answers. Raises RedisError."""
    for job_id in job_ids:
        try:
            ledger.request(job_id)
        except NotFound:
            ledger.redis.ping()
            return False
    return True


def told(traceparent: str) -> str:
    """The header, or "" where it is none that W3C knows: then it is as if it had not come."""
    return traceparent if TRACEPARENT.fullmatch(traceparent) else ""


def deliver_first(ledger: Ledger, request: Request) -> None:
    """Put it on its queue, unless it waits for another, is there or is over; on a full volume that is the keeper's."""
    if request.parent or not disk.free(ledger.folder.parent):
        return
    if ledger.ended(request.id) is None and "delivery" not in ledger.read_live(request.id):
        with suppress(RedisError):  # the record stands: the keeper delivers what is not on a queue
            deliver(ledger, request)
