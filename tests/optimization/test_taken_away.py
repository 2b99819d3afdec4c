"""What the API hands out with a Variant runs a real LiteRT file, too; tests/inference/test_bundle.py does all else."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from optimization.jobs import optimize
from shared.jobs import OptimizeJob

PREDICT = Path(__file__).parents[2] / "services/inference/src/inference/bundled/predict.py"


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_predict_py_checks_and_runs_a_litert_file(root, begin, tmp_path):
    job = OptimizeJob("m-1", "sides", variants=("litert-int8",), budget=100)
    optimize(job, begin(root, job))
    folder = Path(shutil.copytree(root / "variants/m-1/litert-int8", tmp_path / "elsewhere"))
    shutil.copy(PREDICT, folder)
    with np.load(folder / "golden.npz") as golden:
        Image.fromarray(golden["images"][1]).save(folder / "one.png")
        expected = golden["probabilities"][1]
    told = [subprocess.run([sys.executable, folder / "predict.py", arg], capture_output=True, text=True, check=True)
            for arg in ("--check", str(folder / "one.png"))]
    assert told[0].stdout.startswith("64 images, off by ")
    labels = ("faint red", "faint blue", "strong red", "strong blue")
    assert f"one.png: {labels[expected.argmax()]} {expected.max():.3f}" in told[1].stdout
