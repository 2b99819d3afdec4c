"""A Model's Variants built, measured and judged; the best one goes live, and the card says why."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from optimization.build import Source, build
from optimization.card import REFERENCE, Row, accuracy, figures, make_card, new_row, summary, write_card
from optimization.diagnosis import diagnose
from optimization.export import CALIBRATION_IMAGES, stratified
from optimization.gate import Candidate, choose, explain, judge
from optimization.incumbent import why_it_stays
from optimization.measure import BATCHES, measure
from optimization.reference import KerasReference, use_cpu
from optimization.sweep import SweepFailed, fit, fit_processes, process_counts
from shared import faults, gpu
from shared.artifacts import Manifest, aliases, open_artifact, promote, register_version
from shared.attempt import Attempt
from shared.datasets import Dataset
from shared.errors import Conflict, Damaged, Refused
from shared.fitted import write_fits
from shared.jobs import OptimizeJob
from shared.runtimes import ENGINES, Session, compare_golden, load, open_session, run_in_chunks
from shared.runtimes.plan import Unfit
from shared.settings import batches, threads

log = logging.getLogger("lanner.optimization")
MIB_EACH = 4096  # of the GPU, for each process that is tried: it takes about 900 (docs/benchmarks/gpu.md)
CHOOSING_IMAGES = 1024  # validation images by which tensorrt-int8 chooses among its calibrations


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
        reference = stack.enter_context(closing(KerasReference(ctx.root / "models" / job.model_id / "model.keras",
                                                               manifest["spec"]["size"])))
        source = open_source(job, ctx, manifest, dataset, reference)
        of_keras = scored_beside(reference, (images, dataset.images("test")), stack)
        rows, variants = open_all(job, ctx, source, stack)
        rows = {REFERENCE: new_row(REFERENCE, "measured", device=reference.device,
                                   bytes=manifest["files"]["model.keras"]["size"])} | rows
        sessions: dict[str, Session] = {REFERENCE: reference} | variants
        while not of_keras.done():
            wait([of_keras], 0.2)
            ctx.check()
        validation, test = of_keras.result()
        scores = {REFERENCE: validation} | {name: run_in_chunks(session, images, 64, ctx.check)
                                            for name, session in variants.items()}
        speeds = measure(sessions, images, sorted({*BATCHES, job.rank_batch}), between=telling(ctx))
        for name in sessions:
            rows[name] |= figures(scores[REFERENCE], scores[name], labels, speeds[name])
        ctx.report("gate", 0, 1)
        winner = decide(job, rows, scores, labels)
        tested = accuracy_on_test(dataset, test, {winner: sessions[winner]} if winner else {}, ctx.check)
        judged = winner or REFERENCE
        diagnosis = {"of": judged, **diagnose(scores[judged], labels, manifest["spec"]["labels"])}
        fit_all(job, ctx, rows, images)
    version = register_version(ctx.root, job.name, job.model_id)
    alias = move_alias(job, ctx, version, winner, lambda old: why_it_stays(ctx, old, job.model_id, dataset,
                                                                           scores[judged], job.budget))
    def written() -> dict[str, Any]:
        card = make_card(job, manifest, version, rows, winner, alias, tested, diagnosis, threads(ctx.settings))
        write_card(ctx.root, card, images)
        return card

    card = written()
    if winner and alias["moved"] and rows[winner]["device"] != "cpu" and ctx.settings.http_processes == 0:
        fit_on_gpu(job, ctx, rows, winner, images)
        card = written()
    ctx.report("gate", 1, 1)
    return summary(card)


def scored_beside(reference: Session, splits: Sequence[np.ndarray], stack: ExitStack) -> Future[list[np.ndarray]]:
    """The answers for each split, uint8 [N, S, S, 3], by a thread: Keras takes seconds for what engines do at once, and
    meanwhile the Variants are made. It ends with the stack, in which the Session must lie already.
    """
    over = threading.Event()

    def go_on() -> None:
        if over.is_set():
            raise CancelledError

    def work() -> list[np.ndarray]:
        return [run_in_chunks(reference, images, 64, go_on) if len(images) else np.empty(0) for images in splits]

    pool = stack.enter_context(ThreadPoolExecutor(1))
    stack.callback(over.set)
    return pool.submit(work)


def open_all(job: OptimizeJob, ctx: Attempt, source: Source,
             stack: ExitStack) -> tuple[dict[str, Row], dict[str, Session]]:
    """Build what is not published yet and load it all: a row for each Variant, and a Session where it stands."""
    rows: dict[str, Row] = {}
    sessions: dict[str, Session] = {}
    for done, variant in enumerate(job.variants):
        ctx.report("export", done, len(job.variants), variant=variant)
        ctx.check()
        if done:
            faults.point("mid-export")
        try:
            if variant.startswith("tensorrt-") and ctx.settings.device != "gpu":
                raise Unfit("not built: TensorRT needs a GPU, and this ran with DEVICE=cpu")
            build(ctx.root, ctx.job_id, source, variant, batches(ctx.settings), building(ctx, variant),
                  ctx.settings.tensorrt_refit == "on")
            session, found = open_session(ctx.root, job.model_id, variant, threads(ctx.settings), ctx.settings.device)
        except (Damaged, Refused, Unfit) as e:
            rows[variant] = new_row(variant, "failed", winner=False, why=str(e))
        else:
            rows[variant] = new_row(variant, "measured", device=session.device, **found["measured"])
            sessions[variant] = stack.enter_context(closing(session))
    ctx.report("export", len(job.variants), len(job.variants))
    return rows, sessions


def open_source(job: OptimizeJob, ctx: Attempt, manifest: Manifest, dataset: Dataset,
                reference: KerasReference) -> Source:
    """What the Variants are made from. Raises Damaged when Keras answers the golden batch otherwise than it did."""
    with np.load(ctx.root / "models" / job.model_id / "golden.npz", allow_pickle=False) as golden:
        images, expected = golden["images"], golden["probabilities"]
    compare_golden(expected, run_in_chunks(reference, images), "fp32", f"model {job.model_id}")
    sample = stratified(np.asarray(dataset.labels("train")), CALIBRATION_IMAGES, job.seed)
    chosen = stratified(np.asarray(dataset.labels("validation")), CHOOSING_IMAGES, job.seed)
    return Source(job.model_id, manifest, reference.model, images, expected, dataset.images("train")[sample],
                  dataset.images("validation")[chosen])


def building(ctx: Attempt, variant: str) -> Callable[[str, int, int], None]:
    """While an engine is built: show the phase, and leave if asked to."""
    def progress(phase: str, step: int, of: int) -> None:
        ctx.report("build engine", step, of, variant=variant, phase=phase)
        ctx.check()
    return progress


def telling(ctx: Attempt) -> Callable[[int, int], None]:
    """Between two measurements: show how far it is, and leave if asked to."""
    def between(step: int, of: int) -> None:
        ctx.report("measure", step, of)
        ctx.check()
    return between


def decide(job: OptimizeJob, rows: dict[str, Row], scores: dict[str, np.ndarray], labels: np.ndarray) -> str | None:
    """Write the gate's verdict on each Variant, and the reason, into its row; returns the winner."""
    reference = scores[REFERENCE]
    verdicts = {name: judge(reference, scores[name], labels, job.budget) for name in scores if name != REFERENCE}
    candidates = {name: Candidate(rows[name]["images_per_s"][str(job.rank_batch)], rows[name]["accuracy"],
                                  rows[name]["bytes"])
                  for name, verdict in verdicts.items() if verdict.passes}
    winner = choose(candidates)
    for name, why in explain(verdicts, candidates, winner, job.rank_batch).items():
        rows[name] |= {"gate": asdict(verdicts[name]), "winner": name == winner, "why": why}
    return winner


def fit_all(job: OptimizeJob, ctx: Attempt, rows: dict[str, Row], images: np.ndarray) -> None:
    """Find for each Variant that passes how it serves most images here; written before an alias can name one of them.

    An API that loads a Variant reads it; the card shows it in the Variant's row, as `serving`. Several processes are
    tried for the winner alone: each takes its time to start.
    """
    passing = [name for name, row in rows.items() if row.get("gate", {}).get("passes")]
    cores, target_ms = threads(ctx.settings), ctx.settings.serving_p99_ms
    for done, name in enumerate(passing):
        ctx.report("fit", done, len(passing), variant=name)
        processes = process_counts(cores) if rows[name]["winner"] else (1,)
        rows[name]["serving"] = fit(opener(job, ctx, rows, name), rows[name]["device"], cores, images, target_ms,
                                    ctx.check, processes)
    write_found(job, ctx, rows)


def fit_on_gpu(job: OptimizeJob, ctx: Attempt, rows: dict[str, Row], winner: str, images: np.ndarray) -> None:
    """Try processes that share the GPU, each with an engine of its own, as many as leave most of its memory to others.

    Only where HTTP_PROCESSES=0 asks for it, and once the winner serves: they take seconds to start, and the GPU
    meanwhile. Where one fails, what was found before stays.
    """
    cores, target_ms = threads(ctx.settings), ctx.settings.serving_p99_ms
    memory_mib = max((found.memory_mib for found in gpu.find()), default=0)  # of the one that this job has
    counts = [n for n in process_counts(cores) if n * MIB_EACH <= memory_mib]
    if counts[1:]:
        ctx.report("fit processes", 0, 1, variant=winner)
        try:
            rows[winner]["serving"] = fit_processes(opener(job, ctx, rows, winner), rows[winner]["serving"], cores,
                                                    images, target_ms, counts, ctx.check)
        except SweepFailed as e:
            log.warning("%s is served by one process: %s", winner, e)
        write_found(job, ctx, rows)


def opener(job: OptimizeJob, ctx: Attempt, rows: dict[str, Row], variant: str) -> Callable[[int], Session]:
    """Opens a published Variant with so many threads, in this process or another."""
    return partial(load, ctx.root / "variants" / job.model_id / variant, rows[variant]["format"],
                   engines=ctx.root / ENGINES, device=ctx.settings.device)


def write_found(job: OptimizeJob, ctx: Attempt, rows: dict[str, Row]) -> None:
    """For the API, what was found of each Variant that passes."""
    write_fits(ctx.root, job.model_id, threads(ctx.settings), ctx.settings.serving_p99_ms,
               {name: row["serving"] for name, row in rows.items() if "serving" in row})


def accuracy_on_test(dataset: Dataset, of_keras: np.ndarray, sessions: dict[str, Session],
                     check: Callable[[], None]) -> dict[str, Any]:
    """On the test split, of Keras, whose scores are given, and the winner alone: what is chosen by never decides."""
    images, labels = dataset.images("test"), np.asarray(dataset.labels("test"))
    if not len(images):
        return {"images": 0, "accuracy": {}}
    scores = {REFERENCE: of_keras} | {name: run_in_chunks(s, images, 64, check) for name, s in sessions.items()}
    return {"images": len(images), "accuracy": {name: accuracy(found, labels) for name, found in scores.items()}}


def move_alias(job: OptimizeJob, ctx: Attempt, version: int, winner: str | None,
               stays: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Point the job's alias at the winner. Left as it is without a winner, if somebody moved it since the job came, or
    if `stays` knows a reason, of the alias as it is.

    An earlier attempt of this same job may have moved it: that counts as this one's.
    """
    told: dict[str, Any] = {"alias": job.alias, "moved": False, "variant": None}
    if winner is None:
        return {**told, "reason": "no variant passed the gate: the alias was not moved"}
    old = aliases(ctx.root, job.name).get(job.alias)
    ours = old is not None and old["moved_by"] == ctx.job_id
    if old and ours and (old["model"], old["variant"]) == (job.model_id, winner):
        return {**told, "moved": True, "variant": winner, "seq": old["seq"], "reason": "moved"}
    if old and not ours and (why := stays(old)):
        return {**told, "reason": why}
    before = old and (ours or ctx.came_after(old["moved_by"]))  # of two jobs the later one has the last word
    try:
        new = promote(ctx.root, job.name, job.alias, version, winner, by=ctx.job_id,
                      seq=old["seq"] if old and before else ctx.request.alias_seq)
    except Conflict:
        moved = aliases(ctx.root, job.name).get(job.alias)
        how = f"was moved at {moved['moved_at']} by {moved['moved_by']}" if moved else "was deleted"
        return {**told, "reason": f"{job.name}@{job.alias} {how}, after this was accepted at "
                                  f"{ctx.request.accepted_at}: left as it is"}
    return {**told, "moved": True, "variant": winner, "seq": new["seq"], "reason": "moved"}
