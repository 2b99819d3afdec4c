"""What an alias points at, held against what would replace it, on validation images that neither was trained on."""

import logging
from contextlib import closing
from typing import Any

import numpy as np
from rq.timeouts import JobTimeoutException

from optimization.gate import judge
from shared.artifacts import open_artifact
from shared.attempt import Attempt, Cancelled, Stopped
from shared.datasets import Dataset
from shared.runtimes import open_session, run_in_chunks
from shared.settings import threads

log = logging.getLogger("lanner.optimization")


def why_it_stays(ctx: Attempt, record: dict[str, Any], model_id: str, dataset: Dataset, scores: np.ndarray,
                 budget: float) -> str:
    """Why an alias should stay where it is: what would replace it is surely worse by more than the budget; else "".

    record: the alias, as `artifacts.aliases` has it; scores: float32 [N, K] of what would replace it on the Dataset's
    validation split. Held against each other are Models of one Dataset alone: of another one's these images may have
    been among those that it was trained on. One that can't be opened is no reason to stay with.
    """
    if record["model"] == model_id:
        return ""
    try:
        if open_artifact(ctx.root, f"models/{record['model']}", hashes=False)["parents"]["dataset"] != dataset.id:
            return ""
        session, _ = open_session(ctx.root, record["model"], record["variant"], threads(ctx.settings),
                                  ctx.settings.device)
        with closing(session):
            known = run_in_chunks(session, dataset.images("validation"), 64, ctx.check)
    except (Stopped, Cancelled, JobTimeoutException):
        raise
    except Exception as e:  # whatever a runtime raises: what can't answer any more is to be replaced
        log.warning("%s of %s can't be held against this: %s", record["variant"], record["model"], e)
        return ""
    labels = np.asarray(dataset.labels("validation"))
    verdict = judge(known, scores, labels, budget)
    if verdict.low <= budget:
        return ""
    right = [100 * float((found.argmax(1) == labels).mean()) for found in (known, scores)]
    return (f"{record['variant']} of version {record['version']}, which it points at, has {right[0]:.2f} % of the same "
            f"{len(labels)} validation images right and this one {right[1]:.2f} %, surely {verdict.low:.2f} points "
            "fewer or more; `lanner promote` moves it all the same")
