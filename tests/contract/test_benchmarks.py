"""Every figure has its command, date and versions, and what is said to have run is what was recorded."""

import importlib
import json
import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PAGES = sorted((TOP / "docs" / "benchmarks").glob("*.md"))


@pytest.fixture
def hardware(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "benchmarks")
    return importlib.import_module("hardware")


@pytest.fixture
def docs(tmp_path):
    """A copy of the documents that are rendered, to write into."""
    (tmp_path / "benchmarks").mkdir()
    for name in ("hardware.md", "benchmarks/gpu.md", "benchmarks/gpu.json", "benchmarks/images.json",
                 "benchmarks/several.json", "benchmarks/tensorrt.json"):
        (tmp_path / name).write_text((TOP / "docs" / name).read_text())
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_of_figures_names_its_command_date_and_versions(page):
    text = page.read_text()
    commands = re.findall(r"`(?:python benchmarks/|\./run bench )([\w-]+)", text)
    assert commands, f"{page.name}: no `./run bench NAME` and no `python benchmarks/NAME.py`"
    assert all((TOP / "benchmarks" / f"{name.replace('-', '_')}.py").is_file() for name in commands), commands
    assert re.search(r"\b20\d\d-[01]\d-[0-3]\d\b", text), f"{page.name}: no date"
    assert re.search(r"[A-Za-z]\w+ \d+\.\d+", text), f"{page.name}: no version"
    assert re.search(r"\bcores?\b", text), f"{page.name}: no machine"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_index_has_every_page_with_a_command_of_it(page):
    rows = [row for row in (TOP / "docs" / "benchmarks.md").read_text().splitlines()
            if f"](benchmarks/{page.name})" in row]
    assert len(rows) == 1, f"docs/benchmarks.md: one row for {page.name}, not {len(rows)}"
    command = re.findall(r"`((?:python|\./run) [^`]+)`", rows[0])[0]
    assert f"`{command}" in page.read_text(), f"{page.name} has no `{command}`"


def test_the_documents_are_what_the_recorded_run_gives(hardware, docs):
    hardware.write_docs(docs)
    for name in ("hardware.md", "benchmarks/gpu.md"):
        assert (docs / name).read_text() == (TOP / "docs" / name).read_text(), f"{name}: ./run bench gpu --docs-from"


def run(**changes):
    """A recorded run on two GPUs: everything on them succeeded."""
    measured = {"state": "measured", "accuracy": 0.8, "latency_ms": {"p50": 0.5}, "images_per_s": {"1": 2000.0}}
    card = {"rows": [{"variant": "onnx-fp32", "format": "onnx", "device": "NVIDIA H100", **measured},
                     {"variant": "tensorrt-fp16", "format": "tensorrt", "device": "NVIDIA H100", **measured},
                     {"variant": "litert-int8", "format": "litert", "state": "failed", "why": "no exporter"}]}
    rows = [{"part": part, "seconds": 1.25, "what": "fine", "failed": False}
            for part in ("preprocess on gpu", "preprocess on cpu", "the same bytes on both", "train small on gpu")]
    rows.append({"part": "optimize", "seconds": 9.0, "what": "built", "failed": False, "card": card})
    rows.append({"part": "serve beside a training", "seconds": 9.0, "what": "p99", "failed": False,
                 "serving": {"device": "NVIDIA H100", "p99_ms": 2.0, "yielded_s": 1.0}})
    return {"date": "2030-01-02", "command": "./run bench gpu --data FOLDER", "cores": 4, "rows": rows,
            "gpus": 2 * [{"name": "NVIDIA H100", "driver": "600.1"}],
            "versions": {"training": {"python": "3.12.1", "tensorflow": "2.21.0"}}, **changes}


def engines(**row):
    """A recorded run of the TensorRT benchmark on one GPU."""
    return {"when": "2030-01-03T00:00:00Z", "cores": 4, "gpus": [{"name": "NVIDIA H100", "driver": "600.1"}],
            "host": {"tensorrt": "11.0"}, "rows": [{"precision": "fp16", "checks": {"answers": "OK"}, **row}]}


def several(**changes):
    """A recorded run of the part `several`: all of it succeeded."""
    rows = [{"part": part, "seconds": 1.0, "what": "fine", "failed": False}
            for part in ("train small, 1 of 2 at once", "train small, one on 2", "HTTP_PROCESSES=2: tensors")]
    return run(command="./run bench gpu --data FOLDER --parts several", date="2030-01-04", rows=rows, **changes)


def states(page):
    return dict(re.findall(r"^\| (.*?) \| (.*) \|$", page, re.MULTILINE))


def test_what_the_run_saw_has_run_and_what_was_built_is_built(hardware):
    images = {"training": {"date": "2030-01-01", "versions": {"keras": "3.15.1"}}}
    seen = states(hardware.hardware(run(), images, engines(), several(gpus=run()["gpus"][:1])))
    where = "ran on 2 x NVIDIA H100 (driver 600.1), 4 CPU cores, 2030-01-02"
    for part in ("preprocessing on cuDF and CuPy", "ONNX Runtime on a GPU",
                 "TensorRT variants through the optimization worker", "serving on a GPU, in the API",
                 "predictions beside a training on one GPU"):
        assert seen[part] == where, part
    assert seen["TensorRT engines built, checked and run"] == (
        "ran on 1 x NVIDIA H100 (driver 600.1), 4 CPU cores, 2030-01-03: fp16 with TensorRT 11.0")
    assert seen["training on a GPU"] == f"{where}: python 3.12.1, tensorflow 2.21.0"
    assert seen["image with DEVICE=gpu: training"] == "built 2030-01-01: keras 3.15.1"
    assert seen["image with DEVICE=gpu: inference"] == "checked only"


def test_what_failed_or_computed_on_the_cpu_has_not_run_on_a_gpu(hardware):
    rows = run()["rows"]
    rows[0]["failed"] = rows[3]["failed"] = True
    for variant in rows[4]["card"]["rows"]:
        variant["device"] = "cpu"
    rows[5]["serving"]["device"] = "cpu"
    seen = states(hardware.hardware(run(rows=rows, gpus=run()["gpus"][:1]), {},
                                    engines(checks={"answers": "FAIL"}), several(gpus=[])))
    assert not [part for part, state in seen.items() if "ran on" in state]
    assert "ran on" not in hardware.hardware(run(gpus=[]), {}, engines(checks={"answers": "FAIL"}), several(gpus=[]))


def test_what_ran_on_several_gpus_is_told_part_by_part(hardware):
    found = several(versions={"training": {"keras": "3.15.1"}, "inference": {"flask": "3.1.3"}})
    found["rows"][1]["failed"] = True
    seen = states(hardware.hardware(run(), {}, engines(), found))
    where = "ran on 2 x NVIDIA H100 (driver 600.1), 4 CPU cores, 2030-01-04"
    assert seen["several GPUs: processes of the API spread over them"] == f"{where}: flask 3.1.3"
    assert seen["several GPUs: a training on each"] == f"{where}: keras 3.15.1"
    assert seen["several GPUs: one training on all"] == "checked only"


def test_a_run_on_several_gpus_becomes_the_recorded_one_of_its_kind(hardware, docs, tmp_path):
    before = (docs / "benchmarks" / "gpu.json").read_text()
    found = several(versions={"training": {"keras": "3.15.1"}, "inference": {"flask": "3.1.3"}})
    (tmp_path / "home.json").write_text(json.dumps(found))
    hardware.write_docs(docs, tmp_path / "home.json")
    (tmp_path / "home.json").write_text(json.dumps({**found, "command": "./run bench gpu --parts endpoint,several"}))
    with pytest.raises(SystemExit, match="run it alone"):
        hardware.write_docs(docs, tmp_path / "home.json")
    assert (docs / "benchmarks" / "gpu.json").read_text() == before
    assert "| HTTP_PROCESSES=2: tensors | 1.0 | fine |" in (docs / "benchmarks" / "gpu.md").read_text().splitlines()


def test_a_run_brought_home_becomes_the_recorded_one(hardware, docs, tmp_path):
    rows = run()["rows"]
    rows[3] |= {"failed": True, "what": "out of memory"}
    (tmp_path / "home.json").write_text(json.dumps(run(rows=rows)))
    hardware.write_docs(docs, tmp_path / "home.json")
    page = (docs / "benchmarks" / "gpu.md").read_text()
    for line in ("2030-01-02, 2 x NVIDIA H100 (driver 600.1), 4 CPU cores. training: python 3.12.1, tensorflow 2.21.0.",
                 "| preprocess on gpu | 1.2 | fine |", "| train small on gpu | failed | out of memory |",
                 "| tensorrt-fp16 | NVIDIA H100 | 80.00 % | 0.50 | 2,000 |", "## Preprocessing, op by op"):
        assert line in page.splitlines(), line
    assert json.loads((docs / "benchmarks" / "gpu.json").read_text())["date"] == "2030-01-02"
    assert "2030-01-02" in (docs / "hardware.md").read_text()
    hardware.write_docs(docs)
    assert (docs / "benchmarks" / "gpu.md").read_text() == page


def test_a_run_without_a_gpu_says_nothing_of_what_ran_on_one(hardware, docs, tmp_path):
    (tmp_path / "home.json").write_text(json.dumps(run(gpus=[])))
    with pytest.raises(SystemExit, match="a host without a GPU"):
        hardware.write_docs(docs, tmp_path / "home.json")


def test_of_all_versions_those_that_matter_are_kept(hardware):
    found = {"python": "3.12.1", "cudf-cu12": "26.10.2", "libcudf-cu12": "26.10.2", "cupy-cuda12x": "14.2.0", "rq": "3"}
    assert list(hardware.versions_of("preprocessing", found)) == ["python", "cudf-cu12", "cupy-cuda12x"]
    assert list(hardware.versions_of("training", {"python": "3.12.1", "tensorflow-cpu": "2.21.0"})) == [
        "python", "tensorflow-cpu"]
