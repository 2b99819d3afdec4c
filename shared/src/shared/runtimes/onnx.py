"""ONNX Runtime, on the CPU or with CUDA."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from shared import gpu
from shared.errors import Damaged, Refused
from shared.runtimes import Session, check_batch, check_signature

CPU: list[Any] = ["CPUExecutionProvider"]
# float32 stays float32: TF32 alone may move a probability by more than fp32's tolerance. HEURISTIC: a batch may have
# any size, and the default searches anew at each. What CUDA has no kernel for runs on the CPU, in the same session.
CUDA: list[Any] = [("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}), *CPU]


class OnnxSession(Session):
    """An ONNX file as a Session. The file is read whole: it has no external data."""

    def __init__(self, path: Path, threads: int = 1, device: str = "cpu"):
        """`device` is what DEVICE says: cpu, or gpu for the first GPU that this process may use.

        Raises:
            Damaged: the file is no ONNX model, or one with another signature than a Variant's.
            Refused: `device` is gpu and ONNX Runtime can't compute there; it never goes to the CPU instead.
        """
        self._session = _open(path, threads, device)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        dtypes = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
        self._size = check_signature(path, [(dtypes.get(i.type, i.type), i.shape) for i in inputs],
                                     [(dtypes.get(o.type, o.type), o.shape) for o in outputs])
        self._input, self._outputs = inputs[0].name, [outputs[0].name]
        self.device = gpu.find()[0].name if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self.own_thread = self.device != "cpu"  # CUDA's provider sets memory aside for each thread that it meets

    def run(self, batch: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] -> float32 [N, classes]. Raises ValueError for another dtype or shape."""
        check_batch(batch, self._size)
        scores: np.ndarray = self._session.run(self._outputs, {self._input: batch})[0]
        return scores

    def close(self) -> None:
        """Free the model. A closed session runs nothing."""
        self.__dict__.pop("_session", None)


def _open(path: Path, threads: int, device: str) -> Any:
    if device == "cpu":
        return _create(path, threads, CPU)
    if "CUDAExecutionProvider" not in ort.get_available_providers() or not gpu.find():
        raise Refused(f"DEVICE=gpu, but ONNX Runtime {ort.__version__} has {ort.get_available_providers()} and "
                      f"nvidia-smi shows {len(gpu.find())} GPUs: install the package's extra gpu, which brings "
                      "onnxruntime-gpu, and give this process a GPU, or set DEVICE=cpu", "gpu_missing")
    ort.preload_dlls(directory="")  # from the nvidia-*-cu12 packages, which no linker path names
    try:
        session = _create(path, threads, CUDA)
    except Damaged as e:
        _create(path, threads, CPU)  # the file is damaged if the CPU can't load it either
        raise Refused(f"ONNX Runtime can't load {path.parent.name}/{path.name} on the GPU, and can on the CPU: {e}",
                      "gpu_failed") from e
    if "CUDAExecutionProvider" not in session.get_providers():
        raise Refused(f"DEVICE=gpu, but ONNX Runtime {ort.__version__} could not start CUDA and offers "
                      f"{session.get_providers()}: its reason is in this process's log. Install the package's extra "
                      "gpu, which brings CUDA 12 and cuDNN 9, and a driver for them, or set DEVICE=cpu", "gpu_failed")
    return session


def _create(path: Path, threads: int, providers: list[Any]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin while they wait take the core from the HTTP threads beside them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A model may name other files for its weights: there are none to be found, whatever the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path.read_bytes(), options, providers=providers)
    except OSError:
        raise
    except Exception as e:  # ONNX Runtime's errors share no other base class
        raise Damaged(f"{path.parent.name}/{path.name} is not an ONNX model that can be loaded: {e}") from e
