"""A training that is killed again and again: `python killed.py FOLDER DATASET LOOK...`.

Each attempt is a process of its own that SIGKILL ends just before the training looks for the LOOK-th time (from 0); one
more goes on to the end and publishes models/m-killed. Before all that one is left alone and publishes models/m-alone.

A program of its own, which forks before TensorFlow does anything, as a worker does; `test_killed.py` runs it.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
from colours import AtLook, new_attempt

from shared.jobs import TrainJob
from training import fitting
from training.jobs import train

CHECKPOINT_S = 0.05  # a few steps: an attempt does the last ones of the one before it again


def kill() -> None:
    """What was being written stays as it is."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(root: Path, job: TrainJob, look: int) -> int:
    """One attempt in a child; returns its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    fitting.CHECKPOINT_S = fitting.EPOCH_CHECKPOINT_S = CHECKPOINT_S
    code = 1
    try:
        train(job, AtLook(new_attempt(root, job, f"j-{job.model_id}"), look, kill))
        code = 0
    finally:
        os._exit(code)


def main(root: Path, dataset_id: str, *looks: str) -> None:
    alone, killed = (TrainJob(model_id, dataset_id, "colours", epochs=3) for model_id in ("m-alone", "m-killed"))
    assert run(root, alone, -1) == 0
    for look in map(int, looks):
        status = run(root, killed, look)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"look {look}: wait status {status}"
        print("killed with", *sorted(p.name for p in (root / "work" / "j-m-killed").glob("*ckpt-*")))
    assert run(root, killed, -1) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
