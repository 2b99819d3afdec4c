"""A small real service under the name of the first one: it publishes a file, and does what the job's name says.

The queue, the record, the worker and the keeper are tested with it in seconds; the real rooms have their own kill test.
"""

import json
import os
import signal
import sys
import time

from shared import faults
from shared.artifacts import publish, stage
from shared.attempt import attempt

AHEAD = ("standin_ahead",)


def run(job_id: str):
    return attempt(job_id, body)


def body(job, ctx):
    done = ctx.work / "done.json"
    first = json.loads(done.read_text()) if done.exists() else 0
    steps = int(job.seed)
    for step in range(first, steps):
        ctx.report("decode", step, steps)
        if ctx.should_stop:
            done.write_text(json.dumps(step))
            ctx.check()
        if step == steps // 2:
            faults.point("mid-decode")
        time.sleep(0.05)
    match job.name:
        case "raises":
            raise RuntimeError("planted")
        case "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        case "writes":
            stage(ctx.root, ctx.job_id)
            (ctx.root / "written").write_bytes(bytes(1 << 16))
        case "deaf":
            while True:
                time.sleep(1)
    folder = stage(ctx.root, ctx.job_id)
    (folder / "data").write_text(f"resumed at {first}")
    summary = {"dataset_id": job.dataset_id, "resumed_at": first, "ahead": "standin_ahead" in sys.modules}
    return publish(ctx.root, folder, job.target, {"summary": summary})["summary"]
