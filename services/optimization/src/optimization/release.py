"""A Model's Variants built, measured and judged; the best one goes live, and the card says why."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import numpy as np

from optimization.build import Source, build
from optimization.card import accuracy, failed_row, judged_row, make_card, row, write_card
from optimization.export import CALIBRATION_IMAGES, stratified
from optimization.gate import Candidate, choose, explain, judge
from optimization.measure import BATCHES, measure
from optimization.reference import KerasReference, use_cpu
from shared import faults
from shared.artifacts import Manifest, aliases, open_artifact, promote, register_version
from shared.attempt import Attempt
from shared.datasets import Dataset
from shared.errors import Conflict, Damaged, Refused
from shared.jobs import OptimizeJob
from shared.runtimes import Session, compare_golden, open_session, run_in_chunks
from shared.settings import threads

REFERENCE = "keras-fp32"


def release(job: OptimizeJob, ctx: Attempt) -> dict[str, Any]:
    """The whole job; returns its summary. Whatever an earlier attempt published is taken as it is.

    A Variant that can't be built is a row of the card that says why; where none passes the gate the alias stays.

    Raises:
        NotFound, Damaged: the Model or its Dataset is not there, or not what was published.
        Refused: the Dataset has no validation images.
    """
    use_cpu(threads(ctx.settings))
    manifest = open_artifact(ctx.root, f"models/{job.model_id}")
    dataset = Dataset(ctx.root, manifest["parents"]["dataset"])
    images, labels = dataset.images("validation"), np.asarray(dataset.labels("validation"))
    if not len(images):
        raise Refused(f"dataset {dataset.id} has no validation images, on which the gate decides", "no_validation")
    with ExitStack() as stack:
        reference = KerasReference(ctx.root / "models" / job.model_id / "model.keras", manifest["spec"]["size"])
        sessions: dict[str, Session] = {REFERENCE: stack.enter_context(closing(reference))}
        source = open_source(job, ctx, manifest, dataset, reference)
        manifests, failed = build_all(job, ctx, source)
        for variant in manifests:
            session, _ = open_session(ctx.root, job.model_id, variant, threads(ctx.settings))
            sessions[variant] = stack.enter_context(closing(session))
        scores = {name: run_in_chunks(session, images, 64) for name, session in sessions.items()}
        speeds = measure(sessions, images, sorted({*BATCHES, job.rank_batch}), between=telling(ctx))
        ctx.report("gate", 0, 1)
        verdicts = {name: judge(scores[REFERENCE], scores[name], labels, job.budget) for name in manifests}
        candidates = {name: Candidate(speeds[name].images_per_s[job.rank_batch], accuracy(scores[name], labels))
                      for name, verdict in verdicts.items() if verdict.passes}
        winner = choose(candidates)
        tested = test_once(dataset, {name: sessions[name] for name in (REFERENCE, winner) if name})
    version = register_version(ctx.root, job.name, job.model_id)
    alias = move_alias(job, ctx, version, winner)
    why = explain(verdicts, candidates, winner, job.rank_batch)
    sizes = {name: m["measured"]["bytes"] for name, m in manifests.items()}
    sizes[REFERENCE] = manifest["files"]["model.keras"]["size"]
    measured = {name: row(name, sizes[name], scores[REFERENCE], scores[name], labels, speeds[name])
                for name in sessions}
    rows = [measured[REFERENCE]]
    for name in job.variants:
        rows.append(failed_row(name, failed[name]) if name in failed else judged_row(
            measured[name], manifests[name]["measured"]["golden"], verdicts[name], why[name], name == winner))
    card = make_card(job, manifest, version, rows, winner, alias, tested, len(labels), threads(ctx.settings))
    write_card(ctx.root, card)
    ctx.report("gate", 1, 1)
    keys = ("state", "accuracy", "images_per_s", "why")
    short = {r["variant"]: {key: r[key] for key in keys if key in r} for r in rows}
    return {"model_id": job.model_id, "name": job.name, "version": version, "winner": winner, "alias": alias,
            "variants": short, "card": f"cards/{job.model_id}.json"}


def open_source(job: OptimizeJob, ctx: Attempt, manifest: Manifest, dataset: Dataset,
                reference: KerasReference) -> Source:
    """What the Variants are made from. Raises Damaged when Keras answers the golden batch otherwise than it did."""
    with np.load(ctx.root / "models" / job.model_id / "golden.npz", allow_pickle=False) as golden:
        images, expected = golden["images"], golden["probabilities"]
    compare_golden(expected, run_in_chunks(reference, images), "fp32", f"model {job.model_id}")
    sample = stratified(np.asarray(dataset.labels("train")), CALIBRATION_IMAGES, job.seed)
    return Source(job.model_id, manifest, reference.model, images, expected, dataset.images("train")[sample])


def build_all(job: OptimizeJob, ctx: Attempt, source: Source) -> tuple[dict[str, Manifest], dict[str, str]]:
    """The manifests of the Variants that stand, and for each other one the sentence that says why it does not."""
    manifests, failed = {}, {}
    for done, variant in enumerate(job.variants):
        ctx.report("export", done, len(job.variants), variant=variant)
        ctx.check()
        if done:
            faults.point("mid-export")
        try:
            manifests[variant] = build(ctx.root, ctx.job_id, source, variant)
        except Damaged as e:
            failed[variant] = str(e)
    ctx.report("export", len(job.variants), len(job.variants))
    return manifests, failed


def telling(ctx: Attempt) -> Callable[[int, int], None]:
    """Between two measurements: show how far it is, and leave if asked to."""
    def between(step: int, of: int) -> None:
        ctx.report("measure", step, of)
        ctx.check()
    return between


def test_once(dataset: Dataset, sessions: dict[str, Session]) -> dict[str, Any]:
    """Accuracy on the test split, of the winner and the reference alone: what is chosen by never decides."""
    images, labels = dataset.images("test"), np.asarray(dataset.labels("test"))
    if not len(images):
        return {"images": 0, "accuracy": {}}
    return {"images": len(images),
            "accuracy": {name: accuracy(run_in_chunks(s, images, 64), labels) for name, s in sessions.items()}}


def move_alias(job: OptimizeJob, ctx: Attempt, version: int, winner: str | None) -> dict[str, Any]:
    """Point the job's alias at the winner. Left as it is without a winner, or if somebody moved it since the job came.

    An earlier attempt of this same job may have moved it: that counts as this one's.
    """
    told: dict[str, Any] = {"alias": job.alias, "moved": False, "variant": None}
    if winner is None:
        return {**told, "reason": "no variant passed the gate: the alias was not moved"}
    old = aliases(ctx.root, job.name).get(job.alias)
    ours = old is not None and old["moved_by"] == ctx.job_id
    if old and ours and (old["model"], old["variant"]) == (job.model_id, winner):
        return {**told, "moved": True, "variant": winner, "seq": old["seq"], "reason": "moved"}
    try:
        new = promote(ctx.root, job.name, job.alias, version, winner, by=ctx.job_id,
                      unless_moved_after=old["moved_at"] if old and ours else ctx.accepted_at)
    except Conflict as e:
        return {**told, "reason": str(e)}
    return {**told, "moved": True, "variant": winner, "seq": new["seq"], "reason": "moved"}
