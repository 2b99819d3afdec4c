"""The servers that are compared: how each is installed, started and asked. Their apps are beside this file."""

import base64
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
COMMON = ("onnxruntime==1.32.0", "pillow==13.0.0")
NUMPY = "numpy==2.4.6"  # as ours; PyTriton needs an older one
BATCH = 64  # the most images that servers which batch may put together, as ours does
V2 = "/v2/models/bench-tiny/infer"


@dataclass(frozen=True)
class Peer:
    """command: of its venv. body: jpeg, the request's only part; or json, v2-json, v2 around it.

    pauses: it may be stopped (SIGSTOP) while others have their turn, and goes on afterwards.
    """

    name: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    path: str
    body: str
    python: str = ""
    env: dict[str, str] = field(default_factory=dict)
    pauses: bool = True


PEERS = {
    "flask": Peer("Flask + gunicorn gthread", ("flask==3.1.3", "gunicorn==27.0.1", NUMPY),
                  ("bin/python", "-m", "gunicorn", "-k", "gthread", "-w", "1", "--threads", "4",
                   "-b", "127.0.0.1:{port}", "flask_app:app"), "/predict", "jpeg"),
    "litserve": Peer("LitServe", ("litserve==0.2.19", NUMPY), ("bin/python", "litserve_app.py"), "/predict", "json"),
    "bentoml": Peer("BentoML", ("bentoml==1.4.40", NUMPY),
                    ("bin/bentoml", "serve", "bentoml_app:Classifier", "--host", "127.0.0.1", "--port", "{port}"),
                    "/predict", "jpeg", env={"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": "{work}"}),
    "mlserver": Peer("MLServer", ("mlserver==1.7.1", NUMPY), ("bin/mlserver", "start", "{work}"), V2, "v2-json",
                     env={"PYTHONPATH": str(HERE)}),
    "pytriton": Peer("Triton (PyTriton)", ("nvidia-pytriton==0.7.0", "numpy==1.26.4"),
                     ("bin/python", "pytriton_app.py"), V2, "v2", "python3.12",
                     pauses=False),
    "floor": Peer("uvloop, no work", (NUMPY, "uvloop==0.23.0"), ("bin/python", "floor_app.py"), "/predict", "jpeg"),
}
OURS = {"lanner": ("Lanner, JPEG as the body", "/v1/models/bench-tiny/predict", "jpeg"),
        "lanner-v2": ("Lanner, /v2 binary", V2, "v2"),
        "lanner-v2-json": ("Lanner, /v2 JSON", V2, "v2-json")}


def install(peer: Peer, folder: Path) -> str:
    """Its venv in `folder`, made if it isn't there; returns "", or why that can't be."""
    python = peer.python or sys.executable
    if not shutil.which(python) or subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
        return f"there is no {python}, under which alone it runs"
    wanted, stamp = "\n".join((*peer.packages, *COMMON)), folder / "installed"
    if stamp.is_file() and stamp.read_text() == wanted:
        return ""
    for command in ([python, "-m", "venv", "--clear", folder], [folder / "bin/python", "-m", "pip", "install",
                    "--quiet", "--disable-pip-version-check", *peer.packages, *COMMON]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
    stamp.write_text(wanted)
    return ""


def versions(peer: Peer, folder: Path) -> dict[str, str]:
    names = [package.split("==")[0] for package in (*peer.packages, "onnxruntime")]
    code = ("import json, sys; from importlib.metadata import version; "
            "print(json.dumps({'python': sys.version.split()[0], **{n: version(n) for n in sys.argv[1:]}}))")
    found: dict[str, str] = json.loads(subprocess.check_output([folder / "bin/python", "-c", code, *names]))
    return found


def start(peer: Peer, folder: Path, port: int, model: Path, work: Path, log: Path,
          core: int) -> subprocess.Popen[bytes]:
    """The server in a process group of its own, on one core."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "settings.json").write_text(json.dumps({  # of MLServer
        "host": "127.0.0.1", "http_port": port, "grpc_port": port + 1, "metrics_port": port + 2,
        "parallel_workers": 0, "debug": False}))
    (work / "model-settings.json").write_text(json.dumps({
        "name": "bench-tiny", "implementation": "mlserver_app.Classifier", "max_batch_size": BATCH,
        "max_batch_time": 0.001}))
    python = folder / "bin/python"
    libraries = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
                                        text=True).strip()  # Triton's Python backend links against libpython
    filled = {key: text.format(port=port, work=work) for key, text in peer.env.items()}
    env = {**os.environ, **filled, "MODEL": str(model), "SIZE": "32", "PORT": str(port), "BATCH": str(BATCH),
           "OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": libraries}
    program, *rest = (part.format(port=port, work=work) for part in peer.command)
    with open(log, "wb") as out:
        return subprocess.Popen(["taskset", "-c", str(core), str(folder / program), *rest], env=env, cwd=HERE,
                                stdout=out, stderr=out, start_new_session=True)


def body(form: str, image: bytes) -> tuple[bytes, dict[str, str]]:
    """A request's body and headers."""
    text = base64.b64encode(image).decode()
    tensor = {"name": "images", "datatype": "BYTES", "shape": [1, 1]}
    match form:
        case "jpeg":
            return image, {"Content-Type": "image/jpeg"}
        case "json":
            return json.dumps({"image": text}).encode(), {"Content-Type": "application/json"}
        case "v2-json":
            return (json.dumps({"inputs": [{**tensor, "data": [text]}]}).encode(),
                    {"Content-Type": "application/json"})
        case _:
            return binary({**tensor, "parameters": {"binary_data_size": len(image) + 4}},
                          len(image).to_bytes(4, "little") + image)


def binary(tensor: dict[str, object], data: bytes) -> tuple[bytes, dict[str, str]]:
    """An infer request of /v2 whose input and output are binary."""
    head = json.dumps({"inputs": [tensor],
                       "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}]}).encode()
    return head + data, {"Content-Type": "application/octet-stream",
                         "Inference-Header-Content-Length": str(len(head))}
