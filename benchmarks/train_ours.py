"""Lanner's side of `./run bench train`: the programs of `speedrun`, run, profiled, and with one thing changed."""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf
from fit import profiled

from shared.datasets import Spec
from shared.settings import Settings
from training import device
from training.recipes import SPEEDRUN
from training.speedrun import crops, muon, network, program
from training.speedrun.network import Layout

Split = tuple[np.ndarray, np.ndarray]


class Ours:
    """Programs for these images; the first run, which compiles them, is done with it."""

    def __init__(self, args: argparse.Namespace, train: Split, held: Split, labels: list[str]):
        self.about = {"device": device.prepare(Settings(device=args.device)), "tensorflow": tf.__version__}
        scaled = [tuple((getattr(train[0][:10000], f)((0, 1, 2)) / 255).tolist()) for f in ("mean", "std")]
        spec = Spec(train[0].shape[1], tuple(labels), *scaled)
        batch = args.batch or SPEEDRUN.batch_size
        recipe = dataclasses.replace(SPEEDRUN, epochs=args.epochs or SPEEDRUN.epochs, batch_size=batch)
        for name, number in (text.split("=") for text in args.set):
            if name.isupper():
                setattr(program, name, type(getattr(program, name))(number))
            else:
                recipe = dataclasses.replace(recipe, **{name: type(getattr(recipe, name))(number)})
        steps = len(train[0]) // batch
        gpu = args.device == "gpu"
        self.plan = program.Plan(Layout.of(spec), recipe, *program.channel_scale(spec), (2, 2), True, steps,
                                 tf.float16 if gpu else tf.float32, gpu)
        if args.vary:
            patches, changes = VARIATIONS[args.vary]
            self.plan = dataclasses.replace(self.plan, **changes)
            for patch in patches:
                patch.start()
        self.images, self.labels, self.held = (tf.constant(a) for a in (*train, held[0]))
        self.truth = held[1]
        self.parts = {trains: self.part(trains) for trains in (True, False)}
        self.plain = program.new_answer(self.plan, self.held)
        self.views = program.new_answer(self.plan, self.held, program.VIEWS)
        self.first: dict[str, float] = {}
        began = time.perf_counter()
        self.first = self.laps(tell=True)
        self.compile_s = time.perf_counter() - began

    def part(self, trains: bool, plan: program.Plan | None = None) -> program.Part:
        return program.new_part(plan or self.plan, self.images, self.labels, self.plan.steps_an_epoch, trains)

    def first_layer(self) -> tf.Tensor:
        return program.first_layer(self.plan, self.images)

    def new_state(self, seed: int) -> program.State:
        state = program.begin(*network.initial(self.plan.layout, np.random.default_rng(seed)))
        state.weights.filters.numpy()
        return state

    def epoch(self, state: program.State, first_layer: tf.Tensor, seed: int, number: int) -> program.State:
        part = self.parts[number < self.plan.whitening_epochs]
        return part(state, first_layer, *map(tf.constant, (seed, number, 0)))[0]

    def run(self, seed: int) -> dict[str, float]:
        state = self.new_state(seed)
        began = time.perf_counter()
        first_layer = self.first_layer()
        for number in range(self.plan.recipe.epochs):
            state = self.epoch(state, first_layer, seed, number)
        found = self.views(state, first_layer).numpy()
        seconds = time.perf_counter() - began
        plain = self.plain(state, first_layer).numpy()
        accuracy, without = (float((f.argmax(1) == self.truth).mean()) for f in (found, plain))
        return {"seconds": seconds, "accuracy": accuracy, "plain": without}

    def laps(self, tell: bool = False) -> dict[str, float]:
        """Seconds of a run's pieces, each waited for; of the first run, with compiling."""
        taken: dict[str, float] = {}
        state = self.new_state(0)
        began = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal began
            taken[name] = time.perf_counter() - began
            if tell:
                print(f"    {name}: {taken[name]:.2f} s", flush=True)
            began = time.perf_counter()

        first_layer = self.first_layer()
        lap("first layer")
        for number in range(self.plan.recipe.epochs):
            state = self.epoch(state, first_layer, 0, number)
            state.weights.head.numpy()
            lap(f"epoch {number + 1}")
        for name, answer in (("answers", self.plain), ("answers with TTA", self.views)):
            answer(state, first_layer).numpy()
            lap(name)
        return taken

    def profile(self) -> list[str]:
        state, first_layer = self.new_state(0), self.first_layer()
        return profiled(lambda: self.epoch(state, first_layer, 0, 7).weights.head.numpy(), self.plan.steps_an_epoch)

    def explore(self, until: float) -> list[dict[str, Any]]:
        """Milliseconds a step with one thing changed, the first layer's bias not trained; programs compiled anew."""
        rows = []
        for name, (patches, changes) in VARIATIONS.items():
            if time.monotonic() > until:
                break
            try:
                rows.append({"change": name, **self.timed(patches, changes)})
            except Exception as e:  # one variation that fails is a line of the result, not its end
                rows.append({"change": name, "error": f"{type(e).__name__}: {e}"[:500]})
            print("   ", rows[-1], flush=True)
        return rows

    def timed(self, patches: list[Any], changes: dict[str, Any]) -> dict[str, float]:
        plan = dataclasses.replace(self.plan, **changes)
        part = self.part(changes.pop("trains", False), plan)
        state, first_layer = self.new_state(0), self.first_layer()
        times = []
        for patch in patches:
            patch.start()
        try:
            for number in range(4):
                began = time.perf_counter()
                state, sums = part(state, first_layer, *map(tf.constant, (0, number, 0)))
                loss = float(sums[0].numpy()) / plan.steps_an_epoch
                times.append(time.perf_counter() - began)
        finally:
            for patch in patches:
                patch.stop()
        return {"first": round(times[0], 2), "ms a step": round(1000 * min(times[1:]) / plan.steps_an_epoch, 3),
                "loss": round(loss, 4)}


def _swap(where: Any, name: str, by: Callable[..., Any]) -> Any:
    return mock.patch.object(where, name, by)


def _slices(x: tf.Tensor) -> tf.Tensor:
    rows = tf.maximum(x[:, ::2], x[:, 1::2])
    return tf.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def _halves(x: tf.Tensor) -> tf.Tensor:
    _, tall, wide, channels = x.shape
    x = tf.reshape(x, [-1, tall // 2, 2, wide // 2, 2, channels])
    x = tf.maximum(x[:, :, 0], x[:, :, 1])
    return tf.maximum(x[:, :, :, 0], x[:, :, :, 1])


def _multiplied(images: tf.Tensor, kernel: tf.Tensor, stride: int) -> tf.Tensor:
    """The first layer of kernel 2 and stride 1 as a product of matrices."""
    places, outputs = images.shape[1] - 1, kernel.shape[3]
    patches = [images[:, i:i + places, j:j + places] for i in (0, 1) for j in (0, 1)]
    flat = tf.reshape(tf.concat(patches, 3), [-1, 12])
    return tf.reshape(tf.matmul(flat, tf.reshape(kernel, [12, outputs])), [-1, places, places, outputs])


def _summed(images: tf.Tensor, kernel: tf.Tensor, stride: int) -> tf.Tensor:
    """The first layer of kernel 2 and stride 1 as sums, which XLA can make one with what comes before and behind."""
    places = images.shape[1] - 1
    found = 0.0
    for i, j, k in itertools.product((0, 1), (0, 1), (0, 1, 2)):
        patch = tf.cast(images[:, i:i + places, j:j + places, k:k + 1], tf.float32)
        found += patch * tf.cast(kernel[i, j, k], tf.float32)
    return tf.cast(found, images.dtype)


def _cropped(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    x = tf.nn.conv2d(x, kernel, 1, "SAME")
    even = x.shape[1] // 2 * 2
    return x[:, :even, :even]


def _unnormed(x: tf.Tensor, bias: tf.Tensor, known: Any) -> Any:
    one = tf.ones_like(bias)
    return x + tf.cast(bias, x.dtype), (one, one)


VARIATIONS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "nothing": ([], {}),
    "max_pool2d": ([_swap(network, "pooled", lambda x: tf.nn.max_pool2d(x, 2, 2, "VALID"))], {}),
    "pools as maxima of slices": ([_swap(network, "pooled", _slices)], {}),
    "pools as maxima of halves": ([_swap(network, "pooled", _halves)], {}),
    "odd maps convolved whole": ([_swap(network, "convolved_evenly", _cropped)], {}),
    "first layer as a product": ([_swap(network, "whitened", _multiplied)], {}),
    "first layer as sums": ([_swap(network, "whitened", _summed)], {}),
    "no orthogonal updates": ([_swap(muon, "orthogonal", lambda m, dtype: m / (muon.norms(m) + 1e-7))], {}),
    "no gathers": ([_swap(crops, "take", lambda images, rows, shifts, mirrored: images[:rows.shape[0]])], {}),
    "no normalisation": ([_swap(network, "normed", _unnormed)], {}),
    "ReLU": ([_swap(tf.nn, "silu", tf.nn.relu)], {}),
    "GELU": ([_swap(tf.nn, "silu", lambda x: tf.nn.gelu(x, approximate=False))], {}),
    "bfloat16": ([], {"dtype": tf.bfloat16}),
    "forward alone": ([_swap(program, "update", lambda plan, state, gradients, seen, number: state)], {}),
}
