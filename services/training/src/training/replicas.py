"""Steps over several GPUs of one host: each takes its part of every batch, gradients are summed.

They are what one device would do, up to rounding and to dropout, whose mask is the same on each. Not compiled by XLA,
which knows no sums over devices here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from training.steps import Run, Step


def mirrored(strategy: tf.distribute.Strategy, step: Step, images: np.ndarray, labels: np.ndarray, stay: bool) -> Run:
    """As `steps.fed`, over the replicas of `strategy`; `step` takes a replica's part of a batch.

    `stay`: every device holds all images, and the steps of a call are one graph; else each part is sent from the host.
    """
    count = strategy.num_replicas_in_sync

    def placed(arrays: Sequence[np.ndarray]) -> Any:
        """A tensor on each device."""
        def value(ctx: tf.distribute.ReplicaContext) -> tf.Tensor:
            number = int(ctx.replica_id_in_sync_group)
            with tf.device(strategy.extended.worker_devices[number]):
                return tf.constant(arrays[number])

        return strategy.experimental_distribute_values_from_function(value)

    def one(pixels: tf.Tensor, classes: tf.Tensor, rows: tf.Tensor, rate: tf.Tensor, first: tf.Tensor,
            i: tf.Tensor) -> tf.Tensor:
        return step(tf.gather(pixels, rows[i]), tf.gather(classes, rows[i]), rate, first + i)

    @tf.function(reduce_retracing=True)
    def program(pixels: Any, classes: Any, rows: Any, rates: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        losses = tf.TensorArray(tf.float32, tf.shape(rates)[0], element_shape=[])
        for i in tf.range(tf.shape(rates)[0]):
            parts = strategy.run(one, (pixels, classes, rows, rates[i], first, i))
            losses = losses.write(i, strategy.reduce(tf.distribute.ReduceOp.SUM, parts, axis=None))
        return losses.stack()

    def resident(chosen: np.ndarray, rates: np.ndarray, first: int) -> np.ndarray:
        rows = placed(np.split(chosen.astype(np.int32), count, 1))
        return program(pixels, classes, rows, tf.constant(rates), tf.constant(first)).numpy()

    def fed(chosen: np.ndarray, rates: np.ndarray, first: int) -> Sequence[tf.Tensor]:
        every = placed([np.arange(chosen.shape[1] // count, dtype=np.int32)[None]] * count)
        losses = []
        for i, rows in enumerate(chosen):
            parts = np.split(rows, count)
            loss = program(placed([images[part] for part in parts]), placed([labels[part] for part in parts]), every,
                           tf.constant(rates[i:i + 1]), tf.constant(first + i))
            losses.append(loss[0])
        return losses

    if not stay:
        return fed
    pixels, classes = placed([images] * count), placed([labels] * count)
    return resident
