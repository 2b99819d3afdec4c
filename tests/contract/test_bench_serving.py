"""The page of the serving benchmark is what its recorded run gives, and every request's answer is read."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

TOP = Path(__file__).parents[2]
RECORDED = TOP / "docs" / "benchmarks" / "serving.json"


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "benchmarks")
    monkeypatch.syspath_prepend(TOP / "benchmarks" / "serving")
    return importlib.import_module("serving")


def test_the_page_is_what_the_recorded_run_gives(serving, tmp_path):
    serving.page.write(tmp_path, json.loads(RECORDED.read_text()))
    for name in ("serving.md", "serving.json"):
        assert (tmp_path / name).read_text() == (RECORDED.parent / name).read_text(), "./run bench serving --docs-from"


def test_a_missed_aim_is_bold_and_what_was_not_measured_is_a_row(serving):
    run = json.loads(RECORDED.read_text())
    for row in run["rows"]:
        row["per_s"] = [100.0, 100.0, 100.0]
    run["missing"]["pytriton"] = "it can't be installed: no such version"
    run["rows"] = [row for row in run["rows"] if row["server"] != "pytriton"]
    page = serving.page.render(run)
    assert "| requests/s of Flask + gunicorn gthread, c = 1: at least 10 times | 1.00 | **missed** |" in page
    assert "| Triton (PyTriton) | /v2 binary | not measured: it can't be installed: no such version |" in page
    assert "requests/s of Triton" not in page


def test_the_likeliest_class_is_read_from_every_form_of_answer(serving):
    scores = np.full(10, 0.05, np.float32)
    scores[7] = 0.55
    top = [{"index": 7, "probability": 0.55}]
    for answer in (b'{"outputs": []}' + scores.tobytes(), json.dumps({"top": top}).encode() + b"\n",
                   json.dumps({"predictions": [{"top": top}]}).encode(),
                   json.dumps({"outputs": [{"data": scores.tolist()}]}).encode()):
        assert serving.likeliest(answer) == 7
