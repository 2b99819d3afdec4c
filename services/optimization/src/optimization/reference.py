"""The trained Keras model: what every Variant is compared with. It is measured beside them and never served."""

from contextlib import suppress
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from shared.errors import Damaged
from shared.runtimes import Session, check_batch


def use_cpu(threads: int) -> None:
    """Keep TensorFlow off the GPUs, which the engines measure on, and to `threads` threads.

    A process that has run TensorFlow already keeps what it has: a worker's forked child never has.
    """
    with suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)


class KerasReference(Session):
    """A loaded model.keras as a Session, compiled into one graph."""

    device = "cpu"

    def __init__(self, path: Path, size: int):
        """Raises Damaged when the file can't be loaded as a float32 model of [size, size, 3] images."""
        try:
            self.model = keras.models.load_model(path, compile=False)
        except (ValueError, TypeError, KeyError, OSError) as e:
            raise Damaged(f"{path.parent.name}/{path.name} can't be loaded, with no code but Keras's: {e}") from e
        shape, policy = self.model.input_shape, self.model.dtype_policy.name
        if shape != (None, size, size, 3) or policy != "float32":
            raise Damaged(f"{path.parent.name}/{path.name} takes {shape} in {policy}, "
                          f"expected (None, {size}, {size}, 3) in float32; save it from a float32 rebuild")
        self._size = size
        self._graph = tf.function(lambda images: self.model(tf.cast(images, tf.float32), training=False),
                                  autograph=False, input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8)])

    def run(self, batch: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] -> float32 [N, classes]. Raises ValueError for another dtype or shape."""
        check_batch(batch, self._size)
        scores: np.ndarray = self._graph(batch).numpy()
        return scores

    def close(self) -> None:
        keras.backend.clear_session()
