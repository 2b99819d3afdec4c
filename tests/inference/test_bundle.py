"""What was trained, taken away: it answers elsewhere, without Lanner, as it does here."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from flask.testing import FlaskClient

from shared import artifacts

from .conftest import RED, png, publish_variant


@pytest.fixture
def unpacked(serving: FlaskClient, tmp_path: Path) -> Path:
    answer = serving.get("/v1/models/colors/versions/1/variants/onnx-fp32.zip")
    assert (answer.status_code, answer.mimetype) == (200, "application/zip")
    assert answer.headers["Content-Disposition"] == 'attachment; filename="colors-1-onnx-fp32.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.data)) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "elsewhere")
    return tmp_path / "elsewhere" / "colors-1-onnx-fp32"


def run(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, folder / "predict.py", *args], env=env, capture_output=True, text=True,
                          timeout=120, check=False)


def test_a_variant_runs_where_lanner_is_not(unpacked: Path, root: Path) -> None:
    assert {path.name for path in unpacked.iterdir()} == {
        "model.onnx", "labels.txt", "golden.npz", "manifest.json", "predict.py", "requirements.txt"}
    assert (unpacked / "model.onnx").read_bytes() == (root / "variants/m-1/onnx-fp32/model.onnx").read_bytes()
    assert (unpacked / "labels.txt").read_text() == "red\ngreen\nblue\n"
    assert [line.split("==")[0] for line in (unpacked / "requirements.txt").read_text().splitlines()] == [
        "onnxruntime", "numpy", "pillow"]
    (unpacked / "red.png").write_bytes(png(RED))
    told = run(unpacked, str(unpacked / "red.png"))
    assert (told.returncode, "red.png: red " in told.stdout) == (0, True), told.stderr
    assert "lanner" not in (unpacked / "predict.py").read_text().replace("Lanner", "")
    assert "import shared" not in (unpacked / "predict.py").read_text()


def test_what_is_deleted_while_it_is_sent_is_sent_whole(serving: FlaskClient, root: Path) -> None:
    answer = serving.get("/v1/models/colors/versions/1/variants/onnx-fp32.zip", buffered=False)
    (root / "variants/m-1").rename(root / "gone")
    data = answer.data
    assert len(data) == int(answer.headers["Content-Length"])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == 6


def test_it_checks_itself(unpacked: Path) -> None:
    told = run(unpacked, "--check")
    assert (told.returncode, told.stdout) == (0, "16 images, off by 0 at most\n")
    with np.load(unpacked / "golden.npz") as golden:
        np.savez(unpacked / "golden.npz", images=golden["images"], probabilities=golden["probabilities"][::-1])
    assert run(unpacked, "--check").returncode == 1
    assert "expected images, or --check" in run(unpacked).stderr


def test_the_keras_model_itself(serving: FlaskClient) -> None:
    answer = serving.get("/v1/models/colors/versions/1/model.keras")
    assert (answer.status_code, answer.data) == (200, b"weights")
    assert "filename=colors-1.keras" in answer.headers["Content-Disposition"]
    answer.close()


@pytest.mark.parametrize(("path", "status", "code"), [
    ("/v1/models/colors/versions/2/variants/onnx-fp32.zip", 404, "not_found"),
    ("/v1/models/nobody/versions/1/model.keras", 404, "not_found"),
    ("/v1/models/colors/versions/1/variants/onnx-int8.zip", 404, "not_found"),
    ("/v1/models/colors/versions/1/variants/..%2F..zip", 404, "not_found")])
def test_what_is_not_there_is_not_found(serving: FlaskClient, path: str, status: int, code: str) -> None:
    answer = serving.get(path)
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code)


def test_a_damaged_variant_is_not_handed_out(serving: FlaskClient, root: Path) -> None:
    publish_variant(root, "m-1", "onnx-int8")
    artifacts.write_bytes(root / "variants/m-1/onnx-int8/model.onnx", b"torn")
    answer = serving.get("/v1/models/colors/versions/1/variants/onnx-int8.zip")
    assert (answer.status_code, answer.json["error"]["code"]) == (500, "damaged")
