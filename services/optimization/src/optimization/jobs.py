"""What the queue `optimization` runs."""

from typing import Any

from shared.attempt import Attempt, attempt
from shared.jobs import OptimizeJob, PredictJob

AHEAD = ("optimization.ahead",)  # what a process that waits for a job imports
LIGHT = ("predict",)  # kinds that need little of it


def run(job_id: str) -> dict[str, Any]:
    return attempt(job_id, work)


def work(job: OptimizeJob | PredictJob, ctx: Attempt) -> dict[str, Any]:
    match job:
        case OptimizeJob():
            return optimize(job, ctx)
        case PredictJob():
            return predict(job, ctx)


def optimize(job: OptimizeJob, ctx: Attempt) -> dict[str, Any]:
    """Export, measure, judge, promote, write the release card; the body of an attempt, see `release`."""
    ctx.report("export", 0, len(job.variants))  # the import below takes seconds
    # Imported in the forked child alone: a worker that has touched TensorFlow can't fork.
    from optimization.release import release

    return release(job, ctx)


def predict(job: PredictJob, ctx: Attempt) -> dict[str, Any]:
    """A Variant's answers for every image of a source, published as Predictions; see `predicting`."""
    ctx.report("predict", 0, 1)
    from optimization.predicting import predict_all

    return predict_all(job, ctx)
