"""What the queue `optimization` runs."""

from typing import Any

from shared.attempt import Attempt, attempt
from shared.jobs import OptimizeJob


def run(job_id: str) -> dict[str, Any]:
    return attempt(job_id, optimize)


def optimize(job: OptimizeJob, ctx: Attempt) -> dict[str, Any]:
    """Export, measure, judge, promote, write the release card; the body of an attempt, see `release`."""
    ctx.report("export", 0, len(job.variants))  # the import below takes seconds
    # Imported in the forked child alone: a worker that has touched TensorFlow can't fork.
    from optimization.release import release

    return release(job, ctx)
