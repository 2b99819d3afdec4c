"""Engines on a real GPU: built, run, refused, and on the card."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from optimization.build import PROFILE
from optimization.export import export
from optimization.jobs import optimize
from optimization.reference import KerasReference, use_cpu
from shared.artifacts import open_artifact
from shared.datasets import Dataset
from shared.errors import LannerError
from shared.jobs import OptimizeJob
from shared.runtimes import ENGINES, open_session
from shared.runtimes.plan import here

pytestmark = [pytest.mark.gpu,
              pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")]
VARIANTS = ("tensorrt-fp32", "tensorrt-fp16", "tensorrt-int8")
CHECKS = ("answers_as_its_onnx_file_does", "batches_of_every_size_answer_as_single_images_do",
          "two_batches_under_way_answer_as_one_after_the_other",
          "a_plan_for_another_gpu_or_version_or_file_is_refused", "a_truncated_or_changed_plan_is_refused",
          "an_engine_that_fails_its_golden_batch_never_stands",
          "a_refitted_engine_answers_as_its_own_onnx_file_does")


@pytest.fixture(scope="module", autouse=True)
def _host():
    use_cpu(4)
    try:
        here()
    except LannerError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def engines():
    spec = importlib.util.spec_from_file_location("engines", Path(__file__).with_name("engines.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def built(request, volume, engines, tmp_path_factory):
    """(ONNX file, plan file, precision, open session) of the test model."""
    folder = tmp_path_factory.mktemp("built")
    onnx = folder / "model.onnx"
    dataset = Dataset(volume, "d-1")
    model = KerasReference(volume / "models/m-1/model.keras", 32).model
    export(model, "tensorrt", request.param, dataset.images("train")[:96], onnx, dataset.images("validation")[:200])
    plan, _ = engines.ensure(folder / "engines", onnx, request.param, PROFILE, lambda session: None)
    session = engines.TensorRTSession(plan)
    yield onnx, plan, request.param, session
    session.close()


@pytest.mark.parametrize("check", CHECKS)
def test_an_engine(built, engines, tmp_path, check):
    getattr(engines, check)(tmp_path, *built)


def test_every_check_is_run(engines):
    assert [check.__name__ for check in engines.CHECKS] == list(CHECKS)


@pytest.fixture(scope="module")
def released(volume, tmp_path_factory, begin):
    """One whole job under DEVICE=gpu: its volume, its attempt, its summary and its card."""
    root = Path(shutil.copytree(volume, tmp_path_factory.mktemp("released") / "artifacts"))
    job = OptimizeJob("m-1", "sides")
    ctx = begin(root, job, "j-1")
    ctx.settings = dataclasses.replace(ctx.settings, device="gpu")
    summary = optimize(job, ctx)
    return root, ctx, summary, json.loads((root / summary["card"]).read_text())


def test_every_engine_is_built_published_and_on_the_card(released):
    root, _, _, card = released
    rows = {row["variant"]: row for row in card["rows"]}
    for variant in VARIANTS:
        assert rows[variant]["state"] == "measured", rows[variant]
        assert rows[variant]["device"] == here().gpu
        assert rows[variant]["why"]
        manifest = open_artifact(root, f"variants/m-1/{variant}")
        assert manifest["tools"]["tensorrt"] == here().tensorrt == card["versions"]["tensorrt"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        assert rows["onnx-fp32"]["device"] == here().gpu
    else:
        assert (rows["onnx-fp32"]["state"], "extra gpu" in rows["onnx-fp32"]["why"]) == ("failed", True)
    assert rows["litert-fp32"].get("device", "cpu") == "cpu"
    assert card["gpu"]["name"] == card["device"]
    assert here().gpu in (root / "cards/m-1.html").read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_damaged_plan_is_refused_and_the_next_job_heals_it(released, variant, tmp_path):
    root, ctx, _, _ = released
    root = Path(shutil.copytree(root, tmp_path / "artifacts"))
    session, _ = open_session(root, "m-1", variant)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    before = session.run(images)
    session.close()
    for plan in (root / ENGINES).glob("*.plan"):
        plan.write_bytes(plan.read_bytes()[:-1000])
    with pytest.raises(LannerError, match="built anew"):
        open_session(root, "m-1", variant)
    ctx.root = root
    optimize(OptimizeJob("m-1", "sides", variants=(variant,)), ctx)
    session, _ = open_session(root, "m-1", variant)
    assert np.abs(session.run(images) - before).max() < 0.05
    session.close()
