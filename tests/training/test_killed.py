"""SIGKILL at random steps: what is published in the end is, bit for bit, what a training left alone publishes."""

import json
import random
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np

EPOCHS, STEPS, LOOKS = 3, 11, 12  # 90 training images in batches of 8; an attempt looks before each and at validation
TIMES = ("seconds", "cpu_seconds")


def published(root: Path, model_id: str) -> tuple[list[dict], list[np.ndarray], np.ndarray]:
    folder = root / "models" / model_id
    history = [{k: v for k, v in entry.items() if k not in TIMES}
               for entry in json.loads((folder / "history.json").read_bytes())]
    return (history, keras.models.load_model(folder / "model.keras", compile=False).get_weights(),
            np.load(folder / "golden.npz")["probabilities"])


def test_killed_at_random_steps_equals_uninterrupted(tmp_path: Path, write_dataset) -> None:
    dataset_id, draw = write_dataset(tmp_path, images=120), random.Random(5)
    # Each attempt goes on from what the ones before it had saved.
    looks = [draw.randrange(1, LOOKS) for _ in range(3)]
    program = Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, program, tmp_path, dataset_id, *map(str, looks)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("killed with ckpt-") >= len(looks) - 1  # the first may have had no time for a checkpoint
    (history, weights, golden), again = (published(tmp_path, model_id) for model_id in ("m-alone", "m-killed"))
    assert [entry["step"] for entry in history] == [STEPS * n for n in range(1, EPOCHS + 1)]
    assert again[0] == history
    assert all(np.array_equal(a, b) for a, b in zip(again[1], weights, strict=True))
    assert np.array_equal(again[2], golden)
