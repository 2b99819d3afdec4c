"""A training by `speedrun` as a job: progress, validation, stop and resume, and the Model's network in the end.

The host only says what comes next: it reads what a program has found while the GPU is at the next one.
"""

import dataclasses
import logging
import time
from collections import deque
from typing import Any

import numpy as np
import tensorflow as tf

from shared import faults
from shared.attempt import Attempt
from shared.augmentation import check_augmentation
from shared.datasets import Dataset
from shared.errors import Refused
from training import augmentation, checkpoints, device, networks
from training.evaluation import cross_entropy, new_predict, refuse_divergence, tell_epoch
from training.recipes import Recipe, learning_rate
from training.speedrun import network, program, twin
from training.speedrun.network import Layout
from training.speedrun.program import Part, Plan, State
from training.steps import class_weights
from training.yielding import Yielding

log = logging.getLogger("lanner.training")
SHARE_OF_GPU = 0.5  # of its memory for the images; a step at a batch of 2000 takes about 3 GiB
PLACES_A_PART = 10**8  # of the first layer's maps: a program of one epoch of CIFAR-10 has 5 * 10^7
CHECKPOINT_S = 20.0


class Speedrun:
    """One training of a new network on a Dataset, as `training.fitting.Training`, by the programs of this package.

    history: as Training's; validation of all epochs but the last is in what the training computes in, `precision`.
    model: what is published, in float32, filled by `fit` with the last epoch's weights.
    With the augmentation's option `views` its last entry has views_accuracy too: on the validation split, of the mean
    over six views of each image, moved and mirrored; the Model itself takes one.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe, seed: int, ctx: Attempt):
        self.dataset, self.recipe, self.seed, self.ctx = dataset, recipe, seed, ctx
        images = dataset.images("train")
        reach, mirror = _moves(recipe, dataset.spec.size)
        _check(recipe, images.nbytes + dataset.images("validation").nbytes, ctx)
        layout, batch, on_gpu = Layout.of(dataset.spec), recipe.batch_size, ctx.settings.device == "gpu"
        steps = len(images) // batch
        parts = -(-steps * batch * layout.places**2 // PLACES_A_PART) if on_gpu else steps
        self.steps_a_part = max(1, steps // parts)
        half = on_gpu and ctx.settings.mixed_precision != "off"
        self.precision = "mixed_float16" if half else "float32"
        self.plan = Plan(layout, recipe, *program.channel_scale(dataset.spec), reach, mirror,
                         steps // self.steps_a_part * self.steps_a_part, tf.float16 if half else tf.float32, on_gpu)
        self.images, self.labels = tf.constant(images), tf.constant(dataset.labels("train"))
        self.class_weights = class_weights(recipe, dataset.labels("train"), layout.classes)
        self.answer = program.new_answer(self.plan, tf.constant(dataset.images("validation")))
        self.model = networks.build(recipe, dataset.spec)
        self.predict = new_predict(self.model)
        self.yielding = Yielding(ctx.settings)
        self.state = program.begin(*network.initial(layout, np.random.default_rng(seed)))
        self.first_layer = tf.zeros([0])
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._parts: dict[tuple[int, bool], Part] = {}
        self._waiting: deque[tuple[int, tf.Tensor, tf.Tensor | None]] = deque()  # what the GPU is at
        self._sums = np.zeros(2)  # of the epoch so far: loss, share of right answers
        self._seconds = [0.0, 0.0]
        self._lap = (time.monotonic(), time.process_time())
        self._saved = time.monotonic()

    @property
    def published(self) -> dict[str, Any]:
        """The history's entry of the epoch that `model` has the weights of."""
        return self.history[-1]

    def fit(self) -> None:
        """Train from the newest checkpoint to the end, then fill `model`.

        Raises:
            Stopped, Cancelled: asked to, with a checkpoint written.
            Refused: the loss is no longer a number.
        """
        self.resume()
        if self.step == 0:
            self.first_layer = program.first_layer(self.plan, self.images)
        writer = tf.summary.create_file_writer(str(self.ctx.work / "logs"))
        with writer.as_default():
            while self.step < self.plan.steps:
                self._stop_if_asked()
                if self.yielding.is_wanted:
                    self._read()  # else the GPU would be at what is left while this pauses
                self.yielding.give_way(self._stop_if_asked)
                self._begin_part()
                self._read(all_but=1)
                if time.monotonic() - self._saved > CHECKPOINT_S:
                    self._save()
            self._read()
            self._finish()
        writer.close()

    def _begin_part(self) -> None:
        """Tell the GPU the next steps: a part's, or a single one where a resumed part was of another size."""
        epoch, at = divmod(self.step, self.plan.steps_an_epoch)
        count = 1 if at % self.steps_a_part else self.steps_a_part
        if self.step <= self.plan.steps // 2 < self.step + count:
            faults.point("mid-train")
        kind = count, epoch < self.plan.whitening_epochs
        if kind not in self._parts:
            self._parts[kind] = program.new_part(self.plan, self.images, self.labels, *kind, self.class_weights)
        self.state, sums = self._parts[kind](self.state, self.first_layer, *map(tf.constant, (self.seed, epoch, at)))
        self.step += count
        ended = self.step % self.plan.steps_an_epoch == 0
        self._waiting.append((self.step, sums, self.answer(self.state, self.first_layer) if ended else None))

    def _read(self, all_but: int = 0) -> None:
        """Wait for what the GPU was told, the last `all_but` programs aside, and tell progress."""
        while len(self._waiting) > all_but:
            step, sums, logits = self._waiting.popleft()
            self._sums += sums.numpy()
            loss, accuracy = self._sums / ((step - 1) % self.plan.steps_an_epoch + 1)
            refuse_divergence(loss, len(self.history) + 1, self.recipe.learning_rate)
            if logits is not None:
                self._end_epoch(step, loss, accuracy, tf.nn.softmax(logits).numpy())
            metrics = {"epoch": -(-step // self.plan.steps_an_epoch), "loss": round(loss, 4),
                       "accuracy": round(accuracy, 4)}
            if self.history:
                metrics["validation_accuracy"] = round(self.history[-1]["validation_accuracy"], 4)
            if self.yielding.seconds:
                metrics["yielded_s"] = round(self.yielding.seconds, 1)
            self.ctx.report("train", step, self.plan.steps, **metrics)

    def _end_epoch(self, step: int, loss: float, accuracy: float, found: np.ndarray) -> None:
        self._count_time()
        entry = {"epoch": len(self.history) + 1, "step": step, "loss": float(loss), "accuracy": float(accuracy),
                 **self._validation(found), "learning_rate": learning_rate(self.recipe, step - 1, self.plan.steps),
                 "seconds": round(self._seconds[0], 3), "cpu_seconds": round(self._seconds[1], 3)}
        tell_epoch(entry, step)
        self.history.append(entry)
        self._sums, self._seconds = np.zeros(2), [0.0, 0.0]

    def _validation(self, found: np.ndarray) -> dict[str, float]:
        labels = self.dataset.labels("validation")
        return {"validation_loss": cross_entropy(found, labels),
                "validation_accuracy": float((found.argmax(1) == labels).mean())}

    def _finish(self) -> None:
        """Fill `model`, and put what it itself is worth into the last epoch's entry."""
        state = tf.nest.map_structure(lambda t: t.numpy(), self.state)
        twin.fill(self.model, self.plan.layout, state.weights, self.first_layer.numpy(), state.running)
        images, labels = self.dataset.images("validation"), self.dataset.labels("validation")
        self.history[-1] |= self._validation(self.predict(images))
        if self.recipe.augmentation.get("views"):
            answer = program.new_answer(self.plan, tf.constant(images), program.VIEWS)
            found = answer(self.state, self.first_layer).numpy().argmax(1)
            self.history[-1]["views_accuracy"] = float((found == labels).mean())

    # Checkpoints

    def _stop_if_asked(self) -> None:
        if self.ctx.should_stop:
            self._read()
            self._save()
            self.ctx.check()

    def _count_time(self) -> None:
        lap = (time.monotonic(), time.process_time())
        self._seconds = [s + now - before for s, now, before in zip(self._seconds, lap, self._lap, strict=True)]
        self._lap = lap

    def _save(self) -> None:
        self._read()
        self._count_time()
        state = {"recipe": dataclasses.asdict(self.recipe), "seed": self.seed, "step": self.step,
                 "history": self.history, "sums": self._sums.tolist(), "seconds": self._seconds}
        arrays = {f"state-{i}": t.numpy() for i, t in enumerate(tf.nest.flatten(self.state))}
        checkpoints.save(self.ctx.work, self.step, state, {"first_layer": self.first_layer.numpy(), **arrays})
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Take up the newest whole checkpoint of this recipe and seed, if there is one."""
        kept = checkpoints.newest_of(self.ctx.work, self.recipe, self.seed)
        if kept is None:
            return
        state, arrays = kept
        flat = [tf.constant(arrays[f"state-{i}"]) for i in range(len(tf.nest.flatten(self.state)))]
        self.state: State = tf.nest.pack_sequence_as(self.state, flat)
        self.first_layer = tf.constant(arrays["first_layer"])
        self.step, self.history, self._seconds = state["step"], state["history"], state["seconds"]
        self._sums = np.array(state["sums"])
        log.info("resumed at step %d of %d", self.step, self.plan.steps)


def _moves(recipe: Recipe, size: int) -> tuple[tuple[int, int], bool]:
    """How far images are moved, rows and columns, and whether they are mirrored. Raises Refused for anything else."""
    options = recipe.augmentation
    check_augmentation(options, size, "speedrun")
    down, right = (round(augmentation.pixels(options.get(name, 0), size))
                   for name in ("height_shift_range", "width_shift_range"))
    if max(down, right) >= size:
        raise Refused(f"augmentation moves images of {size} pixels a side by {max(down, right)}: expected less",
                      "bad_augmentation")
    return (down, right), bool(options.get("horizontal_flip"))


def _check(recipe: Recipe, image_bytes: int, ctx: Attempt) -> None:
    """Raises Refused for what this recipe can't do."""
    if recipe.early_stopping:
        raise Refused("recipe speedrun is best at the end of its schedule and publishes that: leave early_stopping "
                      "out, ask for fewer epochs, or take another recipe", "bad_recipe")
    if ctx.settings.device != "gpu":
        return
    room = SHARE_OF_GPU * device.memory_bytes(ctx.settings)
    if image_bytes > room:
        raise Refused(f"recipe speedrun keeps the training and validation images on the GPU, {image_bytes >> 20} MiB, "
                      f"and may take {int(room) >> 20} MiB for them: take another recipe, or prepare smaller images",
                      "too_large")
    if ctx.settings.gpus_per_training > 1:
        log.info("recipe speedrun trains on one GPU; the others of this training stay idle")
