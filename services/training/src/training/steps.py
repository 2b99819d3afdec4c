"""Optimizer steps as TensorFlow graphs: augmentation, forward, backward, update."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from shared.datasets import Spec
from training import augmentation, networks
from training.recipes import Recipe

Step = Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
Run = Callable[[np.ndarray, np.ndarray, int], Sequence[tf.Tensor] | np.ndarray]


def new_optimizer(recipe: Recipe, model: keras.Model) -> keras.Optimizer:
    """The recipe's optimizer, its state made for `model`. Weight decay spares biases and normalisation."""
    decay = recipe.weight_decay or None
    match recipe.optimizer:
        case "adam":
            optimizer = keras.optimizers.Adam(recipe.learning_rate, weight_decay=decay)
        case "sgd":
            optimizer = keras.optimizers.SGD(recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=decay)
        case other:
            raise ValueError(f"optimizer {other!r} of recipe {recipe.name} is unknown: expected adam or sgd")
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    optimizer.build(model.trainable_variables)
    return optimizer


class Average:
    """A running mean of all weights of `model`, the statistics of its normalisation among them; `replicas` share it.

    A step leaves `keep` of it, less in the first steps: by step t it reaches back over t / 9 steps or so, at most over
    1 / (1 - keep).
    """

    def __init__(self, model: keras.Model, keep: float):
        self.keep, self._of = keep, model.weights
        self.variables = [tf.Variable(w.numpy(), trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
                          for w in self._of]

    def update(self, number: tf.Tensor) -> None:
        """Take in the weights as they are after step `number`, int32, from 0."""
        done = tf.cast(number, tf.float32)
        share = 1 - tf.minimum(self.keep, (1 + done) / (10 + done))
        for mean, weight in zip(self.variables, self._of, strict=True):
            mean.assign_add(share * (tf.convert_to_tensor(weight) - mean))

    def numpy(self) -> list[np.ndarray]:
        """In the order of `model.get_weights()`."""
        return [mean.numpy() for mean in self.variables]


def new_step(model: keras.Model, optimizer: keras.Optimizer, recipe: Recipe, spec: Spec,
             seed: tf.Variable | int, totals: tf.Variable, xla: bool = False, weights_of: np.ndarray | None = None,
             frozen: bool = False, average: Average | None = None) -> Step:
    """step(images, labels, rate, number) -> loss, to be traced into a graph of fixed shapes.

    images uint8 [B, S, S, 3], labels int32 [B], rate float32, number int32: the step's, which with `seed` decides the
    augmentation. A variable of int64 makes trainings with other seeds the same program, which XLA's cache then holds.
    Adds to `totals`, float64 [2]: the summed loss and the right answers. `xla`: it will be compiled by XLA.
    `weights_of`: float32 [classes], what an image of each class counts in the loss. `frozen`: the last layer alone
    learns. `average`: takes in the weights after each step. Run by several replicas each takes its part of the batch
    and returns its part of the loss.
    """
    logits_of = networks.logits_of(model)
    weights = (model.get_layer("logits") if frozen else model).trainable_variables
    classes, blank = len(spec.labels), tuple(255 * m for m in spec.mean)
    other = recipe.label_smoothing / classes

    def step(images: tf.Tensor, labels: tf.Tensor, rate: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        ctx = tf.distribute.get_replica_context()
        replicas = ctx.num_replicas_in_sync
        draws = augmentation.draw(recipe.augmentation, spec.size, recipe.batch_size,
                                  tf.stack([tf.cast(seed, tf.int32), number]))
        if replicas > 1:
            part = recipe.batch_size // replicas
            at = ctx.replica_id_in_sync_group * part
            draws = {name: values[at:at + part] for name, values in draws.items()}
        images = augmentation.apply(images, recipe.augmentation, draws, blank, xla)
        targets = tf.one_hot(labels, classes, 1 - recipe.label_smoothing + other, other)
        optimizer.learning_rate.assign(rate)
        with tf.GradientTape() as tape:
            logits = logits_of(images, training=True)
            losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
            if weights_of is not None:
                losses *= tf.gather(tf.constant(weights_of), labels)
            loss = tf.reduce_mean(losses) / replicas
        optimizer.apply(tape.gradient(loss, weights), weights)
        if average is not None:
            average.update(number)
        right = tf.reduce_sum(tf.cast(tf.argmax(logits, 1, tf.int32) == labels, tf.float64))
        totals.assign_add(tf.stack([tf.cast(loss, tf.float64) * recipe.batch_size, right]))
        return loss

    return step


def class_weights(recipe: Recipe, labels: np.ndarray, classes: int) -> np.ndarray | None:
    """What an image of each class counts in the loss, float32 [classes]; None where all count the same.

    balanced: N / (classes * images of the class), so that each class counts as much as any other and the mean over the
    images is 1, as scikit-learn's compute_class_weight has it. A class without images counts nothing.
    """
    match recipe.class_weights:
        case "":
            return None
        case "balanced":
            counts = np.bincount(labels, minlength=classes)
            return np.where(counts, len(labels) / (classes * np.maximum(counts, 1)), 0).astype(np.float32)
        case other:
            raise ValueError(f"class_weights {other!r} of recipe {recipe.name} is unknown: expected balanced or none")


def fed(step: Step, images: np.ndarray, labels: np.ndarray, xla: bool = False, ahead: int = 0) -> Run:
    """run(chosen, rates, first) -> the losses: a step for each row of `chosen`, its images sent from the host.

    chosen int [n, B], indices into images uint8 [N, S, S, 3] and labels int32 [N]; rates float32 [n]; first: the number
    of the first step. `xla` compiles a step, which pays on GPUs alone. `ahead`: so many batches of a call are read, and
    sent as bytes, by a thread of its own while earlier steps go on.
    """
    graph = tf.function(step, jit_compile=xla, autograph=False)
    place = "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"

    def sent(rows: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.device(place):
            return tf.identity(images[rows]), tf.identity(labels[rows])

    def batches(chosen: np.ndarray) -> Iterator[tuple[Any, Any]]:
        if not ahead:
            yield from ((images[rows], labels[rows]) for rows in chosen)
            return
        with ThreadPoolExecutor(1) as reader:
            waiting = deque(reader.submit(sent, rows) for rows in chosen[:ahead])
            for rows in [*chosen[ahead:], *[None] * len(waiting)]:
                batch = waiting.popleft().result()
                if rows is not None:
                    waiting.append(reader.submit(sent, rows))
                yield batch

    def run(chosen: np.ndarray, rates: np.ndarray, first: int) -> Sequence[tf.Tensor]:
        return [graph(*batch, tf.constant(rate), tf.constant(first + i))
                for i, (batch, rate) in enumerate(zip(batches(chosen), rates, strict=True))]

    return run


def resident(step: Step, images: np.ndarray, labels: np.ndarray, capacity: int, xla: bool = False) -> Run:
    """As `fed`, with all images on the device and the n steps, at most `capacity`, as one program.

    Between two steps the host does nothing: at a batch of 64 it would take longer than a GPU takes for the step. How
    many steps to do is the program's argument, so that `xla` compiles it once.
    """
    pixels, classes = tf.constant(images), tf.constant(labels)

    @tf.function(jit_compile=xla, autograph=False)
    def program(chosen: tf.Tensor, rates: tf.Tensor, first: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        def body(i: tf.Tensor, losses: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            rows = chosen[i]
            loss = step(tf.gather(pixels, rows), tf.gather(classes, rows), rates[i], first + i)
            return i + 1, losses.write(i, loss)

        none = tf.TensorArray(tf.float32, capacity, element_shape=[])
        return tf.while_loop(lambda i, _: i < count, body, (tf.constant(0), none))[1].stack()

    def run(chosen: np.ndarray, rates: np.ndarray, first: int) -> np.ndarray:
        count = len(chosen)
        all_chosen = np.zeros((capacity, chosen.shape[1]), np.int32)
        all_rates = np.zeros(capacity, np.float32)
        all_chosen[:count], all_rates[:count] = chosen, rates
        losses = program(tf.constant(all_chosen), tf.constant(all_rates), tf.constant(first), tf.constant(count))
        return losses.numpy()[:count]

    return run
