"""What TensorFlow may use of this machine. `prepare` is called once, before TensorFlow does anything."""

import os

import tensorflow as tf

from shared import gpu
from shared.errors import Refused
from shared.settings import Settings, threads

BFLOAT16_SINCE = (8, 0)  # compute capability: Ampere


def prepare(settings: Settings) -> str:
    """Make TensorFlow use the settings' device, on a CPU repeatably; returns the device's name.

    float32 is float32: by TensorFlow's default GPUs from Ampere on multiply it with 10 bits of fraction (TF32), and a
    published Model's answers then differed from the CPU's by more than its release allows. bfloat16 and float16, in
    which trainings compute there, are as fast as before.

    Raises:
        Refused: DEVICE=gpu and TensorFlow sees no GPU.
    """
    tf.config.threading.set_intra_op_parallelism_threads(threads(settings))
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    if settings.device == "cpu":
        tf.config.set_visible_devices([], "GPU")
        tf.config.experimental.enable_op_determinism()
        return "cpu"
    gpus = tf.config.list_physical_devices("GPU")[:settings.gpus_per_training]
    if not gpus:
        raise Refused("DEVICE=gpu, but TensorFlow sees no GPU: give this process a GPU and its driver and install the "
                      "training package's extra gpu, or set DEVICE=cpu", "gpu_missing")
    tf.config.set_visible_devices(gpus, "GPU")
    for card in gpus:
        if settings.gpu_memory_mib:
            limit = tf.config.LogicalDeviceConfiguration(memory_limit=settings.gpu_memory_mib)
            tf.config.set_logical_device_configuration(card, [limit])
        else:
            tf.config.experimental.set_memory_growth(card, True)
    return "gpu"


def precision(settings: Settings) -> str:
    """What a training computes in: mixed_bfloat16 on GPUs that have bfloat16, unless MIXED_PRECISION=off; float32 else.

    bfloat16 because it has float32's range: no loss has to be scaled.
    """
    if settings.device == "cpu" or settings.mixed_precision == "off":
        return "float32"
    details = [tf.config.experimental.get_device_details(card) for card in tf.config.get_visible_devices("GPU")]
    able = all(d.get("compute_capability", (0, 0)) >= BFLOAT16_SINCE for d in details)
    return "mixed_bfloat16" if able else "float32"


def strategy() -> tf.distribute.Strategy:
    """How a training is spread over the visible GPUs: not at all, where there is one or none."""
    if len(tf.config.list_logical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def memory_bytes(settings: Settings) -> int:
    """Memory that a training may use of each GPU: as set, as the driver says, or half of the host's that it shares."""
    known = settings.gpu_memory_mib or max((card.memory_mib for card in gpu.find()), default=0)
    return known << 20 if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
