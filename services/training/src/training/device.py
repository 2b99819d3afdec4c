"""What TensorFlow may use of this machine. Called once, before TensorFlow does anything."""

import tensorflow as tf

from shared import gpu
from shared.errors import Refused
from shared.settings import Settings, threads


def prepare(settings: Settings) -> str:
    """Make TensorFlow use the setting's device, repeatably; returns the device's name.

    Raises:
        Refused: DEVICE=gpu and TensorFlow sees no GPU.
    """
    tf.config.threading.set_intra_op_parallelism_threads(threads(settings))
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if settings.device == "cpu":
        tf.config.set_visible_devices([], "GPU")
        tf.config.experimental.enable_op_determinism()
        return "cpu"
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        raise Refused("DEVICE=gpu, but TensorFlow sees no GPU: give this process a GPU and its driver and install the "
                      "training package's extra gpu, or set DEVICE=cpu", "gpu_missing")
    for card in gpus:
        tf.config.experimental.set_memory_growth(card, True)
    return "gpu"


def memory_bytes() -> int:
    """Memory of this process's GPU, from its driver."""
    return gpu.find()[0].memory_mib << 20
