"""LiteRT (TensorFlow Lite) on the CPU, with XNNPACK."""

from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from shared.errors import Damaged
from shared.runtimes import Session, check_batch, check_signature


class LiteRTSession(Session):
    """A TFLite file as a Session. Its batch is dynamic: another N than the last one re-plans the tensors.

    Re-planning takes 25 to 80 microseconds on a 32x32 network of three convolutions, so nothing is padded.
    """

    device = "cpu"

    def __init__(self, path: Path, threads: int = 1):
        """Raises Damaged when the file is no TFLite model, or one with another signature than a Variant's."""
        try:
            self._interpreter = Interpreter(model_content=path.read_bytes(), num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as e:
            raise Damaged(f"{path.parent.name}/{path.name} is not a TFLite model that can be loaded: {e}") from e
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._size = check_signature(path, *([(np.dtype(t["dtype"]).name, t["shape_signature"].tolist()) for t in side]
                                             for side in (inputs, outputs)))
        self._input, self._output = inputs[0]["index"], outputs[0]["index"]
        scale, zero_point = inputs[0]["quantization"]
        # A full-integer model reads its input as (pixel - zero point) * scale: pixels go in as they are.
        if scale and (not np.isclose(scale, 1.0, atol=1e-3) or zero_point != 0):
            raise Damaged(f"{path.parent.name}/{path.name} reads pixels with scale {scale:g} and zero point "
                          f"{zero_point}, expected 1 and 0; calibrate it on images with pixels of 0 and of 255")
        self._n = 1

    def run(self, batch: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] -> float32 [N, classes]. Raises ValueError for another dtype or shape."""
        check_batch(batch, self._size)
        if len(batch) != self._n:
            self._n = 0  # until the tensors are planned: should that fail, the next call plans them anew
            self._interpreter.resize_tensor_input(self._input, batch.shape)
            self._interpreter.allocate_tensors()
            self._n = len(batch)
        self._interpreter.set_tensor(self._input, batch)
        self._interpreter.invoke()
        scores: np.ndarray = self._interpreter.get_tensor(self._output)
        return scores

    def close(self) -> None:
        """Free the model. A closed session runs nothing."""
        self.__dict__.pop("_interpreter", None)
