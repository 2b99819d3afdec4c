"""Many steps as one program, and the answers to many images as another; compiled by XLA on a GPU.

Loops and branches are TensorFlow's own here: AutoGraph, which would rewrite Python's, has nothing to do, and takes two
thirds of the time of tracing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from shared.datasets import Spec
from training.networks import SMALLEST_STD
from training.recipes import Recipe
from training.speedrun import crops, muon, whitening
from training.speedrun.network import Layout, Statistics, Weights, forward

BATCH = 2000  # that the rates are for
MUON_MOMENTUM = 0.6
BIAS_RATE, HEAD_RATE, MOMENTUM = 0.053, 0.67, 0.85  # of Nesterov's SGD, where the filters' rate is the recipe's
FILTER_RATE = 0.24
DECAY = 2e-6  # an image, of biases and head
WHITENING_SHARE = 3 / 8  # of the epochs in which the first layer's bias is trained
STATISTICS_MOMENTUM, SLOWEST_STATISTICS = 0.6, 0.9
ANSWERED = 2000 * 32**2  # pixels at once
VIEWS = ((0, 0, 0.5), (-1, -1, 0.25), (1, 1, 0.25))  # rows and columns to move, and weight, shared by both sides


class State(NamedTuple):
    """What changes from step to step."""

    weights: Weights
    momenta: Weights
    running: Statistics


Part = Callable[[State, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tuple[State, tf.Tensor]]
Answer = Callable[[State, tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class Plan:
    """A training of `recipe`. dtype: what is computed in; xla: compile the programs."""

    layout: Layout
    recipe: Recipe
    mean: tuple[float, ...]
    std: tuple[float, ...]
    reach: tuple[int, int]  # rows and columns that images are moved by, at most
    mirror: bool
    steps_an_epoch: int
    dtype: tf.DType = tf.float32
    xla: bool = False

    @property
    def steps(self) -> int:
        return self.steps_an_epoch * self.recipe.epochs

    @property
    def whitening_epochs(self) -> int:
        """Epochs at the beginning in which the first layer's bias is trained."""
        return math.ceil(WHITENING_SHARE * self.recipe.epochs)


def channel_scale(spec: Spec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in grey levels, 0..255."""
    return tuple(255 * m for m in spec.mean), tuple(255 * max(s, SMALLEST_STD) for s in spec.std)


def begin(weights: Weights, running: Statistics) -> State:
    """The state before the first step, on the device."""
    return tf.nest.map_structure(tf.constant, State(weights, Weights(*map(np.zeros_like, weights)), running))


def first_layer(plan: Plan, images: tf.Tensor) -> tf.Tensor:
    """The kernel of the first layer for images uint8 [N, S, S, 3] on the device."""
    layout = plan.layout
    return tf.constant(whitening.whitening(images, plan.mean, plan.std, layout.kernel, layout.stride,
                                           layout.directions))


def normalised(plan: Plan, images: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """uint8 [N, S, S, 3] -> `dtype`: mean 0 and standard deviation 1."""
    return tf.cast((tf.cast(images, tf.float32) - plan.mean) * [1 / s for s in plan.std], dtype)


def new_part(plan: Plan, images: tf.Tensor, labels: tf.Tensor, steps: int, train_whitening: bool,
             class_weights: np.ndarray | None = None) -> Part:
    """part(state, kernel, seed, epoch, first): `steps` steps from step `first` of an epoch; kernel: the first layer's.

    Images uint8 [N, S, S, 3] and labels int32 [N] on the device; seed, epoch and first int32 scalars. Returns the state
    behind the steps and float32 [2]: the sums over the steps of mean loss and of the share of right answers.

    `train_whitening`: whether the first layer's bias is trained; where not, nothing is carried back through the first
    convolution. `class_weights`: float32 [K], what an image of each class counts in the loss.

    How many steps is compiled in: where it was an argument, the GPU would have to ask the host after each.
    """
    recipe, batch = plan.recipe, plan.recipe.batch_size
    smoothing, classes = recipe.label_smoothing, plan.layout.classes
    other = smoothing / classes

    def part(state: State, kernel: tf.Tensor, seed: tf.Tensor, epoch: tf.Tensor,
             first: tf.Tensor) -> tuple[State, tf.Tensor]:
        order, shifts, mirrored = crops.draw(len(images), plan.reach, plan.mirror, seed, epoch)

        def body(i: tf.Tensor, state: State, sums: tf.Tensor) -> tuple[tf.Tensor, State, tf.Tensor]:
            rows = tf.slice(order, [(first + i) * batch], [batch])
            taken = crops.take(images, rows, tf.gather(shifts, rows), tf.gather(mirrored, rows))
            pixels, truth = normalised(plan, taken, plan.dtype), tf.gather(labels, rows)
            weights = state.weights
            wanted = [w for w in weights if train_whitening or w is not weights.whitening_bias]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(wanted)
                logits, seen = forward(plan.layout, weights, kernel, pixels)
                targets = tf.one_hot(truth, classes, 1 - smoothing + other, other)
                # A sum, not a mean: gradients in float16 neither vanish nor overflow, so no loss is scaled.
                losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
                if class_weights is not None:
                    losses *= tf.gather(tf.constant(class_weights), truth)
                loss = tf.reduce_sum(losses)
            found = tape.gradient(loss, wanted)
            gradients = Weights(*found) if train_whitening else Weights(found[0], None, *found[1:])
            right = tf.reduce_mean(tf.cast(tf.argmax(logits, 1, tf.int32) == truth, tf.float32))
            number = tf.cast(epoch * plan.steps_an_epoch + first + i, tf.float32)
            return i + 1, update(plan, state, gradients, seen, number), sums + tf.stack([loss / batch, right])

        return tf.while_loop(lambda i, *_: i < steps, body, (tf.constant(0), state, tf.zeros([2])))[1:]

    return tf.function(part, jit_compile=plan.xla, autograph=False)


def update(plan: Plan, state: State, gradients: Weights, seen: Statistics, number: tf.Tensor) -> State:
    """The state behind step `number` (float32, from 0) with these gradients of the summed loss."""
    batch, weights, momenta = plan.recipe.batch_size, state.weights, state.momenta
    left = 1 - number / plan.steps
    scale = plan.recipe.learning_rate / FILTER_RATE
    # A gradient of fewer images is noisier, and Muon makes every step equally long.
    filter_rate = plan.recipe.learning_rate * min(1.0, math.sqrt(batch / BATCH))
    outputs = tf.constant([[[o]] for _, o in plan.layout.convolutions], tf.float32)
    half = tf.bfloat16 if plan.xla else tf.float32  # off a GPU bfloat16 is emulated
    filters, filter_momenta = muon.step(weights.filters, gradients.filters, momenta.filters, outputs,
                                        filter_rate * left, MUON_MOMENTUM, half)

    def sgd(value: tf.Tensor, gradient: tf.Tensor | None, momentum: tf.Tensor, highest: float,
            left: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if gradient is None:
            return value, momentum
        gradient = gradient + DECAY * batch / highest * value
        momentum = MOMENTUM * momentum + gradient
        return value - scale * highest * left * (gradient + MOMENTUM * momentum), momentum

    whitening_left = 1 - number / (plan.steps_an_epoch * plan.whitening_epochs)
    first = sgd(weights.whitening_bias, gradients.whitening_bias, momenta.whitening_bias, BIAS_RATE, whitening_left)
    biases = sgd(weights.biases, gradients.biases, momenta.biases, BIAS_RATE, left)
    head = sgd(weights.head, gradients.head, momenta.head, HEAD_RATE, left)
    keep = min(SLOWEST_STATISTICS, STATISTICS_MOMENTUM ** (batch / BATCH))
    running = Statistics(*(keep * old + (1 - keep) * new for old, new in zip(state.running, seen, strict=True)))
    return State(Weights(filters, first[0], biases[0], head[0]),
                 Weights(filter_momenta, first[1], biases[1], head[1]), running)


def parts_of(count: int, size: int) -> tuple[int, int]:
    """In how many parts of how many images each `count` images of `size` pixels a side are answered; the last part has
    the rest, at least one.
    """
    batch = -(-count // -(-count * size**2 // ANSWERED))
    return -(-count // batch), batch


def new_answer(plan: Plan, images: tf.Tensor, views: Sequence[tuple[int, int, float]] = ()) -> Answer:
    """answer(state, kernel) -> logits float32 [N, K] of images uint8 [N, S, S, 3] on the device.

    `views`: VIEWS, for the weighted mean over moved and mirrored copies of each image; none, to look at it as it is.
    """
    count = len(images)
    parts, batch = parts_of(count, plan.layout.size)

    def logits_of(state: State, kernel: tf.Tensor, taken: tf.Tensor) -> tf.Tensor:
        seen = [taken]
        if views:
            moved = [crops.shifted(taken, down, right) if down or right else taken for down, right, _ in views]
            seen = [side for m in moved for side in (m, m[:, :, ::-1])]
        pixels = normalised(plan, tf.concat(seen, 0), plan.dtype)
        logits, _ = forward(plan.layout, state.weights, kernel, pixels, state.running)
        if not views:
            return logits
        shares = tf.constant([weight / 2 for *_, weight in views for _ in "lr"])
        return tf.einsum("v,vbk->bk", shares, tf.reshape(logits, [len(seen), -1, plan.layout.classes]))

    def answer(state: State, kernel: tf.Tensor) -> tf.Tensor:
        def body(i: tf.Tensor, found: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            at = tf.minimum(i * batch, count - batch)  # the last part begins early, to be as large as the others
            taken = tf.slice(images, [at, 0, 0, 0], [batch, *images.shape[1:]])
            return i + 1, found.write(i, logits_of(state, kernel, taken))

        none = tf.TensorArray(tf.float32, parts, element_shape=[batch, plan.layout.classes])
        found = tf.while_loop(lambda i, _: i < parts, body, (tf.constant(0), none))[1].stack()
        rest = count - (parts - 1) * batch
        return tf.concat([tf.reshape(found[:-1], [-1, plan.layout.classes]), found[-1, batch - rest:]], 0)

    return tf.function(answer, jit_compile=plan.xla, autograph=False)
