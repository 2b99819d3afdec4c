"""Taking away what was published. What something still stands on is refused, with what that is.

All of these raise Unavailable (keeper_absent), with nothing deleted, where no keeper is there to take the data away.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.artifacts import (
    alias_seq,
    aliases,
    fsync_dir,
    list_ids,
    locked,
    model_of,
    names,
    open_artifact,
    read_json,
    versions,
    write_json,
)
from shared.deletions import delete
from shared.errors import Conflict, Damaged, NotFound
from shared.jobs import Job, PredictJob, check_id
from shared.ledger import Ledger


def remove_dataset(root: Path, ledger: Ledger, dataset_id: str) -> None:
    """With the Models that were trained on it and never became a version.

    Raises NotFound, and Conflict (in_use) while a version that was trained on it or a job stands on it.
    """
    target = f"datasets/{check_id(dataset_id, 'dataset id')}"
    _check_there(root, target)
    # In this order: what a training that ends between two looks has made is seen by the second, an optimize job's too.
    _check_jobs(ledger, f"dataset {dataset_id}", {dataset_id}, "")
    models = _trained_on(root, dataset_id)
    _check_jobs(ledger, f"dataset {dataset_id}", {*models}, "")
    for name in names(root):
        for number, model in versions(root, name).items():
            if model in models:
                raise Conflict(f"version {number} of {name} was trained on dataset {dataset_id}, and its variants are "
                               "made from both: delete that version first", "in_use")
    # The models are those that no Name has: no optimize job came to its end.
    delete(root, ledger.redis, [*[of for model in models for of in _all_of(model)], target])


def remove_version(root: Path, ledger: Ledger, name: str, number: int) -> None:
    """A version of a Name; with it the Model, its Variants and its card, unless another Name has that Model, too.

    Raises NotFound, and Conflict (in_use) while an alias points at it or a job stands on it.
    """
    model = model_of(root, name, number)
    _check_jobs(ledger, f"version {number} of {name}", {model}, name)
    with locked(root / "aliases" / name / ".lock"):  # no alias of it moves
        others = [other for other in names(root) if other != name and model in versions(root, other).values()]
        for alias, record in aliases(root, name).items():
            if record["version"] == number:
                raise Conflict(f"{name}@{alias} points at version {number}: move or delete that alias first", "in_use")
        if not others:  # before its number goes: should this die between, it can be asked again
            delete(root, ledger.redis, _all_of(model))
        path = root / "aliases" / name / "versions" / f"{number}.json"
        write_json(path.with_suffix(".gone"), read_json(path))  # its number is given to no other
        path.unlink(missing_ok=True)
        fsync_dir(path.parent)


def remove_alias(root: Path, name: str, alias: str) -> None:
    """Raises NotFound."""
    path = root / "aliases" / check_id(name, "name") / f"{check_id(alias, 'alias')}.json"
    if not path.exists():
        raise NotFound(f"{name} has no alias {alias}: it has {', '.join(aliases(root, name)) or 'none'}")
    with locked(path.with_name(".lock")):
        # A move, too: what was accepted before it does not bring the alias back.
        write_json(path.with_suffix(".gone"), {"seq": alias_seq(root, name, alias) + 1})
        path.unlink(missing_ok=True)
        fsync_dir(path.parent)


def remove_predictions(root: Path, ledger: Ledger, predictions_id: str) -> None:
    """Raises NotFound."""
    target = f"predictions/{check_id(predictions_id, 'predictions id')}"
    _check_there(root, target)
    delete(root, ledger.redis, [target])


def _trained_on(root: Path, dataset_id: str) -> list[str]:
    found = []
    for model in list_ids(root, "models"):
        with suppress(Damaged, NotFound):
            if open_artifact(root, f"models/{model}", hashes=False).get("parents", {}).get("dataset") == dataset_id:
                found.append(model)
    return found


def _all_of(model: str) -> list[str]:
    cards = [f"cards/{model}.{suffix}" for suffix in ("html", "serving.json", "json")]
    return [f"variants/{model}", *cards, f"models/{model}"]


def _check_there(root: Path, target: str) -> None:
    if not (root / target).is_dir():
        raise NotFound(f"{target} does not exist")


def _check_jobs(ledger: Ledger, what: str, ids: set[str], name: str) -> None:
    """Raise Conflict where a job that has not ended reads one of these, or may predict by this Name."""
    for request in ledger.requests():
        job = request.job
        if (ids & _reads(job) or (name and isinstance(job, PredictJob) and job.name == name)) and (
                ledger.ended(request.id) is None):
            raise Conflict(f"job {request.id} still stands on {what}: cancel it, or delete later", "in_use")


def _reads(job: Job) -> set[Any]:
    source = getattr(job, "source", "").removeprefix("dataset:").partition("/")[0]
    return {getattr(job, "dataset_id", ""), getattr(job, "model_id", ""), source}
