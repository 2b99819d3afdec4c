"""uv.lock: what DEVICE=gpu installs is all for CUDA 12."""

import re
from pathlib import Path

import pytest
import tomllib

LOCK = tomllib.loads((Path(__file__).parents[2] / "uv.lock").read_text())
PACKAGES = {package["name"]: package for package in LOCK["package"]}
EXPECTED = {
    "preprocessing": {"cudf-cu12", "cupy-cuda12x"},
    "training": {"tensorflow", "nvidia-cudnn-cu12"},
    "optimization": {"tensorflow", "onnxruntime-gpu", "cuda-bindings", "nvidia-cudnn-cu12", "nvidia-cublas-cu12"},
    "inference": {"onnxruntime-gpu", "cuda-bindings", "nvidia-cudnn-cu12", "nvidia-cublas-cu12"},
}


def closure(name: str, extras: list[str]) -> set[str]:
    """Names of all packages that one needs with its extras, markers of other services aside."""
    found: set[str] = set()
    asked: set[tuple[str, str]] = set()
    todo = [(name, extra) for extra in ("", *extras)]
    while todo:
        here, extra = todo.pop()
        if (here, extra) in asked:
            continue
        asked.add((here, extra))
        found.add(here)
        package = PACKAGES[here]
        needs = package.get("optional-dependencies", {}).get(extra, []) if extra else package.get("dependencies", [])
        todo += [(need["name"], more) for need in needs for more in ("", *need.get("extra", []))]
    return found


@pytest.mark.parametrize("service", EXPECTED)
def test_a_gpu_image_installs_cuda_12_alone(service):
    names = closure(service, ["gpu"])
    assert EXPECTED[service] <= names
    cuda = {name for name in names if name.startswith(("nvidia-", "cuda-", "cudf", "cupy", "tensorrt"))}
    assert not [name for name in cuda if re.search(r"cu(da)?1[13]", name)]
    assert all("cu12" in name for name in cuda if name.startswith("nvidia-"))
    assert "tensorflow-cpu" not in names
    assert "onnxruntime" not in names


def test_tensorrt_is_for_cuda_12_and_in_no_service_s_own_packages():
    group = PACKAGES["lanner-workspace"]["dev-dependencies"]["tensorrt"]
    assert [need["name"] for need in group] == ["tensorrt-cu12"]
    assert closure("tensorrt-cu12", []) == {"tensorrt-cu12", "tensorrt-cu12-libs", "tensorrt-cu12-bindings"}
    assert not [name for service in EXPECTED for name in closure(service, ["gpu"]) if name.startswith("tensorrt")]


def test_cuda_s_bindings_are_those_of_cuda_12():
    assert PACKAGES["cuda-bindings"]["version"].startswith("12.")
    assert PACKAGES["onnxruntime-gpu"]["version"].startswith("1.26."), "1.27 is built for CUDA 13"


@pytest.mark.parametrize("name", ["tensorflow", "cudf-cu12", "cupy-cuda12x", "onnxruntime-gpu", "cuda-bindings",
                                  "tensorrt-cu12-bindings"])
def test_every_gpu_package_has_a_wheel_for_python_3_12(name):
    files = [wheel["url"].rpartition("/")[2] for wheel in PACKAGES[name]["wheels"]]
    assert [file for file in files if re.search(r"-(cp312-|cp3\d+-abi3-|py3-).*(x86_64|any)", file)]
