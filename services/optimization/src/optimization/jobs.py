"""What the queue `optimization` runs."""

from typing import Any

from shared.attempt import Attempt, attempt
from shared.jobs import OptimizeJob, PredictJob

# What a job imports, for a process that waits for one: none of it touches a GPU. The last is Keras's, when it exports.
AHEAD = ("optimization.release", "tf2onnx.convert")
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
