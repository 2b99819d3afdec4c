"""compose.yaml and the Dockerfile as Docker reads them: nothing is started."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.compose
ROOT = Path(__file__).parents[2]
WORKERS = {"preprocessing", "training", "optimization"}
SERVICES = WORKERS | {"init", "redis", "keeper", "inference", "tensorboard"}


def docker(*args, **env):
    return subprocess.run(["docker", *args], cwd=ROOT, env={**os.environ, **env}, check=True, timeout=60,
                          capture_output=True, text=True).stdout


def config(**env):
    """compose.yaml as Compose reads it, with these variables alone."""
    unset = dict.fromkeys(("DEVICE", "PORT", "TENSORBOARD_PORT", "MAX_ATTEMPTS"), "")
    return json.loads(docker("compose", "config", "--format", "json", **{**unset, **env}))


@pytest.fixture(scope="module")
def services():
    found = config(DEVICE="cpu")["services"]
    assert set(found) == SERVICES
    return found


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_hardened(services, name):
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [t.split(":")[0] for t in service["tmpfs"]] == ["/tmp"]
    assert {"noexec", "nosuid", "nodev"} < set(service["tmpfs"][0].split(":")[1].split(","))
    assert service["pids_limit"] > 0
    assert int(service["mem_limit"]) > 0
    assert service["init"] is True
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert not {"privileged", "container_name", "devices", "pid", "ipc"} & set(service)
    assert "docker.sock" not in json.dumps(service)
    if name == "init":
        assert (service["user"], service["restart"], service["network_mode"]) == ("0:0", "no", "none")
        assert service["cap_add"] == ["CHOWN", "SETUID", "SETGID"]
    else:
        assert (service["user"], service["restart"]) == ("10001:10001", "unless-stopped")
        assert "cap_add" not in service
        assert service["healthcheck"]["test"]
        assert service["stop_grace_period"] == ("2m0s" if name == "training" else "30s")


def test_only_the_api_and_tensorboard_are_published_and_only_to_this_host(services):
    ports = {name: s["ports"] for name, s in services.items() if "ports" in s}
    published = {name: [(p["host_ip"], p["published"]) for p in found] for name, found in ports.items()}
    assert published == {"inference": [("127.0.0.1", "8000")], "tensorboard": [("127.0.0.1", "6006")]}


def test_only_preprocessing_is_on_a_network_with_a_way_out(services):
    networks = config(DEVICE="cpu")["networks"]
    assert networks["back"]["internal"] is True
    assert networks["edge"]["driver_opts"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    assert {name for name, s in services.items() if set(s.get("networks", {})) - {"back", "edge"}} == {"preprocessing"}
    assert set(services["redis"]["networks"]) == {"back"}


def test_each_service_sees_its_own_password_alone(services):
    seen = {name: [m["volume"].get("subpath") for m in s.get("volumes", []) if m["source"] == "access"]
            for name, s in services.items()}
    assert seen == {"init": [None], "redis": ["redis"], "keeper": ["keeper"], "inference": ["api"], "tensorboard": [],
                    **{worker: ["worker"] for worker in WORKERS}}


def test_device_is_the_one_knob():
    for device in ("gpu", "cpu"):
        services = config(DEVICE=device)["services"]
        gpus = {name for name, s in services.items() if "deploy" in s}
        assert gpus == (WORKERS | {"inference"} if device == "gpu" else set())
        assert all(services[name]["environment"]["DEVICE"] == device for name in WORKERS | {"inference"})
        ours = {name: s for name, s in services.items() if name != "redis"}
        assert all(s["image"].endswith(f":{device}") and s["build"]["args"]["DEVICE"] == device for s in ours.values())
    assert "deploy" in config()["services"]["training"]


def test_every_service_that_computes_reserves_the_gpus_and_no_other_sees_one():
    services = config(DEVICE="gpu")["services"]
    for name in sorted(WORKERS | {"inference"}):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", -1, ["gpu"]), name  # -1: all
        assert services[name]["environment"]["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    for name in sorted(SERVICES - WORKERS - {"inference"}):
        assert "deploy" not in services[name], name
        assert "NVIDIA_DRIVER_CAPABILITIES" not in services[name].get("environment", {}), name


def test_tensorrt_is_in_the_images_that_use_it_and_nowhere_on_the_cpu():
    for device in ("gpu", "cpu"):
        targets = {name: s["build"]["target"] for name, s in config(DEVICE=device)["services"].items() if "build" in s}
        assert {name for name, target in targets.items() if target == device} == {
            "optimization", "inference", "init", "keeper"}  # init and keeper share the API's image
        assert set(targets.values()) == {"service", device}


def test_a_setting_of_the_user_reaches_every_process():
    services = config(DEVICE="cpu", MAX_ATTEMPTS="7")["services"]
    assert all(services[name]["environment"]["MAX_ATTEMPTS"] == "7" for name in WORKERS | {"keeper", "inference"})


def test_a_host_without_the_nvidia_runtime_says_what_the_documents_say(tmp_path):
    if "nvidia" in docker("info", "--format", "{{json .Runtimes}}"):
        pytest.skip("this host has the NVIDIA runtime")
    extends = {"file": str(ROOT / "services" / "device.yaml"), "service": "gpu"}
    service = {"image": "redis:7-bookworm", "command": "true", "extends": extends}
    (tmp_path / "compose.yaml").write_text(json.dumps({"name": "lanner-test-no-gpu", "services": {"one": service}}))
    compose = ["docker", "compose", "--file", str(tmp_path / "compose.yaml")]
    try:
        up = subprocess.run([*compose, "up"], capture_output=True, text=True, timeout=60)
    finally:
        subprocess.run([*compose, "down", "--volumes"], capture_output=True, check=True, timeout=60)
    assert up.returncode != 0
    error = 'Error response from daemon: could not select device driver "nvidia" with capabilities: [[gpu]]'
    assert error in up.stderr.splitlines()  # not always its last line: "Gracefully stopping..." may come after it
    for document in ("README.md", "docs/compose.md"):
        assert error in (ROOT / document).read_text()


def test_run_and_the_images_install_with_the_same_uv():
    (wanted,) = re.findall(r"uv==([0-9.]+)", (ROOT / "services" / "Dockerfile").read_text())
    assert f"uv_version={wanted}\n" in (ROOT / "run").read_text()


@pytest.mark.usefixtures("stack")
def test_a_code_edit_reinstalls_nothing(tmp_path):
    files = ("pyproject.toml", "uv.lock", ".dockerignore", "client", "shared", "services")
    for name in files:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, tmp_path / name)
    edited = tmp_path / "services" / "training" / "src" / "training" / "__init__.py"
    edited.write_text(edited.read_text() + "\nEDITED = True\n")
    began = time.monotonic()
    build = subprocess.run(
        ["docker", "build", "--progress", "plain", "--file", "services/Dockerfile", "--target", "service",
         "--build-arg", "SERVICE=training", "--build-arg", "DEVICE=cpu", "--tag", "lanner-test-edited", "."],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    seconds = time.monotonic() - began
    try:
        code = "import training; print(training.EDITED)"
        assert docker("run", "--rm", "lanner-test-edited", "python", "-c", code).strip() == "True"
    finally:
        docker("rmi", "lanner-test-edited")
    (step,) = re.findall(r"^#(\d+) .*uv sync .*--no-install-workspace", build.stderr, re.MULTILINE)
    assert f"#{step} CACHED" in build.stderr
    assert seconds < 30, f"{seconds:.1f} s"
