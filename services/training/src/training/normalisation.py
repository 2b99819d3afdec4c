"""Batch normalisation for steps on a CPU: TensorFlow's one kernel, where Keras takes a dozen.

0.85 of the time of a step of `small` on two cores (docs/benchmarks/small.md). Under XLA, which fuses the dozen itself,
and over several replicas, which share statistics, Keras' own stays. What is published is made of Keras' own.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

Norm = Callable[..., keras.layers.BatchNormalization]


class FusedNormalization(keras.layers.BatchNormalization):
    """The same weights, and the same results up to rounding, of float32 [N, H, W, C]."""

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        if not training:
            return super().call(inputs, training=training, mask=mask)
        gamma, beta = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(inputs, gamma, beta, epsilon=self.epsilon)
        # The kernel tells the variance of a sample; what Keras keeps is that of the batch itself.
        count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:3]), tf.float32)
        variance *= (count - 1) / count
        for kept, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
            kept.assign(self.momentum * kept + (1 - self.momentum) * now)
        return outputs
