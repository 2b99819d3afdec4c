"""Which device measured a Variant is on the card, and DEVICE=gpu is never answered by the CPU unasked."""

import dataclasses
import json

import onnxruntime
import pytest

from optimization.jobs import optimize
from shared import gpu
from shared.jobs import OptimizeJob

CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and bool(gpu.find())
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def rows_on(device, root, begin):
    """Rows of the card of a whole job under this DEVICE, by variant."""
    job = OptimizeJob("m-1", "sides", variants=("onnx-fp32", "litert-fp32"), budget=100)
    ctx = begin(root, job, "j-1")
    ctx.settings = dataclasses.replace(ctx.settings, device=device)
    card = json.loads((root / optimize(job, ctx)["card"]).read_text())
    return {row["variant"]: row for row in card["rows"]}


@pytest.mark.skipif(CUDA, reason="this host computes on a GPU")
def test_without_cuda_the_card_says_why_onnx_was_not_measured_and_litert_goes_on(root, begin):
    rows = rows_on("gpu", root, begin)
    assert rows["onnx-fp32"]["state"] == "failed"
    assert "install the package's extra gpu" in rows["onnx-fp32"]["why"]
    assert (rows["litert-fp32"]["state"], rows["litert-fp32"]["device"]) == ("measured", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU and onnxruntime-gpu")
def test_onnx_is_measured_on_the_gpu_that_the_card_names(root, begin):
    rows = rows_on("gpu", root, begin)
    assert (rows["onnx-fp32"]["state"], rows["onnx-fp32"]["device"]) == ("measured", gpu.find()[0].name)
    assert rows["keras-fp32"]["device"] == rows["litert-fp32"]["device"] == "cpu"
