"""ONNX Runtime on the CPU."""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from shared.errors import Damaged
from shared.runtimes import check_batch, check_signature


class OnnxSession:
    """An ONNX file as a Session. The file is read whole: it has no external data."""

    device = "cpu"

    def __init__(self, path: Path, threads: int = 1):
        """Raises Damaged when the file is no ONNX model, or one with another signature than a Variant's."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin while they wait take the core from the HTTP threads beside them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A model may name other files for its weights: there are none to be found, whatever the working directory.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except OSError:
            raise
        except Exception as e:  # ONNX Runtime's errors share no other base class
            raise Damaged(f"{path.parent.name}/{path.name} is not an ONNX model that can be loaded: {e}") from e
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        dtypes = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
        self._size = check_signature(path, [(dtypes.get(i.type, i.type), i.shape) for i in inputs],
                                     [(dtypes.get(o.type, o.type), o.shape) for o in outputs])
        self._input, self._outputs = inputs[0].name, [outputs[0].name]

    def run(self, batch: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] -> float32 [N, classes]. Raises ValueError for another dtype or shape."""
        check_batch(batch, self._size)
        scores: np.ndarray = self._session.run(self._outputs, {self._input: batch})[0]
        return scores

    def close(self) -> None:
        """Free the model. A closed session runs nothing."""
        self.__dict__.pop("_session", None)
