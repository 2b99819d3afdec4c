"""The training loop: steps, validation, checkpoints, and a stop at any step that resumes bit for bit on a CPU."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from shared import faults
from shared.attempt import Attempt
from shared.augmentation import check_augmentation
from shared.datasets import Dataset
from shared.weights import find_weights
from training import checkpoints, device, networks, transfer, views
from training.evaluation import best_epoch, cross_entropy, new_predict, refuse_divergence, tell_epoch
from training.recipes import Recipe, learning_rate
from training.replicas import mirrored
from training.steps import Average, Run, class_weights, fed, new_optimizer, new_step, resident
from training.yielding import Yielding

log = logging.getLogger("lanner.training")
CHECKPOINT_S = 20.0
EPOCH_CHECKPOINT_S = 2.0  # an epoch's end so soon after the last checkpoint writes none
REPORT_S = 0.2
FEW_TO_CHOOSE = 1000  # validation images: one standard deviation of an accuracy from these is 1 to 1.6 points
SAVING = 0.05  # of the time that checkpoints may take; those of large networks come more rarely
SHARE_OF_GPU = 0.25  # of its memory for the images
FED_CALL = 16  # steps of a call where the images are sent to a GPU
AHEAD = 4  # batches of them that are read and sent while others are computed
FIRST_CALL = 50  # steps of a GPU's first program
CALL_S = 1.0  # about as long the steps of one program on a GPU may take, in which a job can't be stopped
POINTS = 200  # of the training curve in TensorBoard


class Training:
    """One training of a new network on a Dataset: what changes from step to step, and its checkpoints in ctx.work.

    history: per finished epoch {epoch, step, loss, accuracy, validation_loss, validation_accuracy, learning_rate,
    seconds, cpu_seconds}; loss and accuracy are of the augmented batches, loss with the recipe's label smoothing.
    model: what is validated and published, in float32 on one device. Where training computes in another `precision` or
    over the replicas of a `strategy`, by fused kernels, or publishes an average of the weights, `trained` is its twin
    with the float32 weights that the steps change.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe, seed: int, ctx: Attempt, precision: str = "float32",
                 strategy: tf.distribute.Strategy | None = None):
        self.dataset, self.recipe, self.seed, self.ctx = dataset, recipe, seed, ctx
        self.images, self.labels = dataset.images("train"), dataset.labels("train")
        self.steps_an_epoch = len(self.images) // recipe.batch_size
        self.steps = self.steps_an_epoch * recipe.epochs
        self.steps_a_call = 1
        self.one_program = False  # whether the steps of a call are one
        self.yielding = Yielding(ctx.settings)
        self.strategy = strategy or tf.distribute.get_strategy()
        weights = find_weights(ctx.root, dataset.spec.size) if recipe.network == "mobilenet-v2" else None
        replicas = self.strategy.num_replicas_in_sync
        fused = (ctx.settings.device == "cpu" and precision == "float32" and replicas == 1
                 and recipe.network in networks.FUSIBLE)
        with self.strategy.scope():
            keras.utils.set_random_seed(seed)
            self.trained = networks.build(recipe, dataset.spec, precision, replicas, fused)
            if weights is not None:
                transfer.load(self.trained, weights)
            self.optimizer = new_optimizer(recipe, self.trained)
            self.average = Average(self.trained, recipe.average) if recipe.average else None
            # Not a constant of the step, which would then be another program for each seed.
            self.seed_variable = tf.Variable(seed, trainable=False, dtype=tf.int64)
            # Of the epoch so far: summed loss, right answers.
            self.totals = tf.Variable(tf.zeros([2], tf.float64), trainable=False,
                                      synchronization=tf.VariableSynchronization.ON_READ,
                                      aggregation=tf.VariableAggregation.SUM)
        self.precision = precision
        twins = precision != "float32" or replicas > 1 or fused or self.average is not None
        self.model = networks.build(recipe, dataset.spec) if twins else self.trained
        self.predict = new_predict(self.model)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best: list[np.ndarray] = []
        self.after_epoch: Callable[[], None] = lambda: None  # what it raises leaves `fit`
        self._seconds = [0.0, 0.0]  # of the epoch so far over all attempts: wall, CPU
        self._lap = (time.monotonic(), time.process_time())
        self._saved = self._told = time.monotonic()
        self._saving_s = 0.0  # what the last checkpoint took

    @property
    def published(self) -> dict[str, Any]:
        """The history's entry of the epoch that `fit` leaves the weights of in `model`."""
        return self.history[self._chosen()]

    def _chosen(self) -> int:
        """Index of the epoch whose weights are worth keeping: of those so far the best, as validation tells.

        From few validation images the best of many epochs is the luckiest, and its accuracy no honest figure: where the
        rate falls to the end, and with it the noise in the weights, the last epoch is as good and was not picked.
        """
        few = len(self.dataset.labels("validation")) < FEW_TO_CHOOSE
        if few and not self.recipe.early_stopping and self.recipe.schedule != "constant":
            return len(self.history) - 1
        return best_epoch(self.history)

    def fit(self) -> None:
        """Train from the newest checkpoint to the end, then put the chosen epoch's weights into `model`.

        Raises:
            Stopped, Cancelled: asked to, with a checkpoint written.
            Refused: the loss is no longer a number.
        """
        self.resume()
        run, frozen = None, False
        writer = tf.summary.create_file_writer(str(self.ctx.work / "logs"))
        with writer.as_default():
            while len(self.history) < self.recipe.epochs and not self._waited_long_enough():
                if run is None or frozen != self.frozen:
                    run = None  # its images leave the device before the next one's come
                    run, frozen = self.new_run(), self.frozen
                if self.recipe.frozen and self.step == self.steps_an_epoch * self.recipe.frozen_epochs:
                    self._forget_the_optimizer()
                self._run_steps(run)
                self._end_epoch()
                writer.flush()
                self.after_epoch()
        writer.close()
        self.model.set_weights(self.best)
        if self.recipe.augmentation.get("views"):
            found = views.answers(self.predict, self.dataset.images("validation"), self._stop_or_give_way).argmax(1)
            self.published["views_accuracy"] = float((found == self.dataset.labels("validation")).mean())

    @property
    def frozen(self) -> bool:
        """Whether the last layer alone learns in this epoch."""
        return len(self.history) < self.recipe.frozen_epochs

    def _forget_the_optimizer(self) -> None:
        """As new, once all layers learn: its old count of steps would let those that it has no means of yet leap."""
        for variable in self.optimizer.variables:
            variable.assign(tf.zeros_like(variable))

    def new_run(self) -> Run:
        """On a GPU that holds the images, the steps of a call as one program; else steps fed from the host."""
        settings, several = self.ctx.settings, self.strategy.num_replicas_in_sync > 1
        on_gpu = settings.device == "gpu"
        xla = on_gpu and not several
        weights = class_weights(self.recipe, self.labels, len(self.dataset.spec.labels))
        step = new_step(self.trained, self.optimizer, self.recipe, self.dataset.spec, self.seed_variable, self.totals,
                        xla, weights, self.frozen, self.average)
        stay = on_gpu and self.images.nbytes < SHARE_OF_GPU * device.memory_bytes(settings)
        if stay:
            self.steps_a_call, self.one_program = FIRST_CALL, True
        if several:
            return mirrored(self.strategy, step, self.images, self.labels, stay)
        if stay:
            return resident(step, self.images, self.labels, self.steps_an_epoch, xla)
        if on_gpu:
            self.steps_a_call = FED_CALL
        return fed(step, self.images, self.labels, xla, AHEAD if on_gpu else 0)

    def _run_steps(self, run: Run) -> None:
        """The steps of the epoch that are left, `steps_a_call` at a time."""
        epoch, batch, every = len(self.history), self.recipe.batch_size, max(1, self.steps // POINTS)
        order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.images))
        while (at := self.step - epoch * self.steps_an_epoch) < self.steps_an_epoch:
            self._stop_or_give_way()
            count = min(self.steps_a_call, self.steps_an_epoch - at)
            if self.step <= self.steps // 2 < self.step + count:
                faults.point("mid-train")
            chosen = order[at * batch:(at + count) * batch].reshape(count, batch)
            rates = [learning_rate(self.recipe, self.step + i, self.steps) for i in range(count)]
            began = time.monotonic()
            losses = run(chosen, np.array(rates, np.float32), self.step)
            if self.one_program:
                self._fit_to_time(time.monotonic() - began)
            for step in range(-(-self.step // every) * every, self.step + count, every):
                tf.summary.scalar("train/batch_loss", losses[step - self.step], step)
            self.step += count
            self._report(at + count)
            self._save_if_older_than(CHECKPOINT_S)

    def _fit_to_time(self, seconds: float) -> None:
        """More steps for the next program, or fewer: it should take CALL_S, less while predictions are too slow."""
        call_s = self.yielding.call_s(CALL_S)
        if seconds < call_s / 2:
            self.steps_a_call = min(2 * self.steps_a_call, self.steps_an_epoch)
        elif seconds > 2 * call_s:
            self.steps_a_call = max(1, int(self.steps_a_call * call_s / seconds))

    def _end_epoch(self) -> None:
        """Validate, write the epoch into the history, keep the weights if they are those to publish so far."""
        loss, accuracy = self._means(self.steps_an_epoch)
        validation_loss, validation_accuracy = self._validate()
        self._count_time()
        entry = {"epoch": len(self.history) + 1, "step": self.step, "loss": loss, "accuracy": accuracy,
                 "validation_loss": validation_loss, "validation_accuracy": validation_accuracy,
                 "learning_rate": learning_rate(self.recipe, self.step - 1, self.steps),
                 "seconds": round(self._seconds[0], 3), "cpu_seconds": round(self._seconds[1], 3)}
        tell_epoch(entry, self.step)
        self.history.append(entry)
        if self._chosen() == len(self.history) - 1:
            self.best = self.model.get_weights()
        self.totals.assign(tf.zeros([2], tf.float64))
        self._seconds = [0.0, 0.0]
        self._save_if_older_than(EPOCH_CHECKPOINT_S)

    def _validate(self) -> tuple[float, float]:
        """Loss and accuracy on the validation split. Raises Refused when the loss or a weight is no number."""
        images, labels = self.dataset.images("validation"), self.dataset.labels("validation")
        weights = self.average.numpy() if self.average else self.trained.get_weights()
        if not all(np.isfinite(w).all() for w in weights):  # answers and their loss may be finite all the same
            self._refuse_divergence(math.nan)
        if self.model is not self.trained:
            self.model.set_weights(weights)
        found = self.predict(images, self._stop_or_give_way)
        loss = cross_entropy(found, labels)
        self._refuse_divergence(loss)
        return loss, float((found.argmax(1) == labels).mean())

    def _means(self, steps_done: int) -> tuple[float, float]:
        """Loss and accuracy of the epoch so far. Raises Refused when the loss is no number."""
        loss, accuracy = (self.totals.numpy() / (steps_done * self.recipe.batch_size)).tolist()
        self._refuse_divergence(loss)
        return loss, accuracy

    def _refuse_divergence(self, loss: float) -> None:
        refuse_divergence(loss, len(self.history) + 1, self.recipe.learning_rate)

    def _waited_long_enough(self) -> bool:
        found = [entry["validation_accuracy"] for entry in self.history]
        patience = self.recipe.early_stopping
        return bool(patience and found) and len(found) - 1 - found.index(max(found)) >= patience

    def _report(self, steps_done: int) -> None:
        """Tell progress over the whole training, with the means of the epoch so far."""
        if self.step < self.steps and time.monotonic() - self._told < REPORT_S:
            return
        self._told = time.monotonic()
        loss, accuracy = self._means(steps_done)
        metrics = {"epoch": len(self.history) + 1, "loss": round(loss, 4), "accuracy": round(accuracy, 4)}
        if self.history:
            metrics["validation_accuracy"] = round(self.history[-1]["validation_accuracy"], 4)
        if self.yielding.seconds:
            metrics["yielded_s"] = round(self.yielding.seconds, 1)
        self.ctx.report("train", self.step, self.steps, **metrics)

    # Between programs

    def _stop_or_give_way(self) -> None:
        self._stop_if_asked()
        self.yielding.give_way(self._stop_if_asked)

    # Checkpoints

    def _stop_if_asked(self) -> None:
        if self.ctx.should_stop:
            self.save()
            self.ctx.check()

    def _save_if_older_than(self, seconds: float) -> None:
        if time.monotonic() - self._saved > max(seconds, self._saving_s / SAVING):
            self.save()

    def _count_time(self) -> None:
        lap = (time.monotonic(), time.process_time())
        self._seconds = [s + now - before for s, now, before in zip(self._seconds, lap, self._lap, strict=True)]
        self._lap = lap

    def save(self) -> None:
        """Write a checkpoint of this step."""
        began = time.monotonic()
        self._count_time()
        state = {"recipe": dataclasses.asdict(self.recipe), "seed": self.seed, "step": self.step,
                 "history": self.history, "totals": self.totals.numpy().tolist(), "seconds": self._seconds}
        arrays = {f"model-{i}": v.numpy() for i, v in enumerate(self.trained.variables)}
        arrays |= {f"optimizer-{i}": v.numpy() for i, v in enumerate(self.optimizer.variables)}
        if self.average:
            arrays |= {f"average-{i}": a for i, a in enumerate(self.average.numpy())}
        arrays |= {f"best-{i}": a for i, a in enumerate(self.best)}
        checkpoints.save(self.ctx.work, self.step, state, arrays)
        self._saved = time.monotonic()
        self._saving_s = self._saved - began

    def resume(self) -> None:
        """Take up the newest whole checkpoint of this recipe and seed, if there is one."""
        kept = checkpoints.newest_of(self.ctx.work, self.recipe, self.seed)
        if kept is None:
            return
        state, arrays = kept
        for kind, variables in (("model", self.trained.variables), ("optimizer", self.optimizer.variables),
                                ("average", self.average.variables if self.average else ())):
            for i, variable in enumerate(variables):
                variable.assign(arrays[f"{kind}-{i}"])
        self.best = [arrays[f"best-{i}"] for i in range(len(self.model.weights)) if f"best-{i}" in arrays]
        self.step, self.history, self._seconds = state["step"], state["history"], state["seconds"]
        self.totals.assign(tf.constant(state["totals"], tf.float64))
        log.info("resumed at step %d of %d", self.step, self.steps)


def begin(dataset: Dataset, recipe: Recipe, seed: int, ctx: Attempt) -> Training:
    """A training on the devices that the settings name. Raises Refused for an augmentation that can't work."""
    check_augmentation(recipe.augmentation, dataset.spec.size)
    return Training(dataset, recipe, seed, ctx, device.precision(ctx.settings), device.strategy())
