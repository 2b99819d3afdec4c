"""The bare engine loop: a Session on ready tensors, nothing around it. `python engine.py FOLDER`.

For each line "NAME BATCH SECONDS" on stdin: images/s, and the seconds that a run takes, as JSON.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

from shared.runtimes import open_session

root, sessions = Path(sys.argv[1]), {}
for line in sys.stdin:
    name, batch, seconds = line.split()
    if name not in sessions:
        sessions[name] = open_session(root, f"m-{name}", "onnx-fp32")
    session, manifest = sessions[name]
    images = np.random.default_rng(0).integers(0, 256, (int(batch), *[manifest["spec"]["size"]] * 2, 3), np.uint8)
    session.run(images)
    took, end = [], time.perf_counter() + float(seconds)
    while (began := time.perf_counter()) < end:
        session.run(images)
        took.append(time.perf_counter() - began)
    print(json.dumps({"per_s": len(took) * int(batch) / sum(took), "run_s": median(took)}), flush=True)
