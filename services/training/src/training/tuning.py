"""Search for a recipe: trials of the ordinary training by Optuna, poor ones ended early, the best one published.

A trial is a training like any other, in a folder of its own in ctx.work, and goes on where it was after a stop or a
kill. What Optuna has suggested and seen lies in a journal beside them. The draws of a trial depend on the job's seed,
its number and the trials before it alone, so that a search resumed is the search unbroken.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import optuna
import tensorflow as tf
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from shared.artifacts import read_json, write_bytes, write_json
from shared.attempt import Attempt
from shared.datasets import Dataset
from shared.errors import Refused
from shared.jobs import TrainJob, TuneJob
from training.auto import STRONG
from training.fitting import Training
from training.recipes import RECIPES, Recipe, resolve

log = logging.getLogger("lanner.training")
WHOLE = 1000  # a whole training, in the pruner's unit: what counts is the share done, whatever the epochs of a recipe
FIRST_RUNG = 100  # of it, before which no trial is ended
REDUCTION = 3  # of the trials that reach a rung about one in three goes on
JOURNAL, RESULT, BEGUN = "study.journal", "result.json", "begun"
DEATHS = 2
Begin = Callable[[Recipe, Attempt], Training]


class Ended(Exception):
    """The trial is not worth its time, or the budget is spent."""


class OfTrial(Attempt):
    """An attempt at a job as one of its trials sees it: a folder of its own, progress as a part of the search's."""

    def __init__(self, ctx: Attempt, number: int, trials: int, best: float | None):
        self.__dict__.update(ctx.__dict__)
        self._outer, self._number, self._trials, self._best = ctx, number, trials, best
        self.work = folder(ctx, number)
        self.work.mkdir(parents=True, exist_ok=True)

    def report(self, stage: str, step: float, of: float, **metrics: float | str) -> None:
        known = {} if self._best is None else {"best": round(self._best, 4)}
        self._outer.report("trials", round(self._number + step / of, 3), self._trials, trial=self._number + 1, **known,
                           **metrics)


def folder(ctx: Attempt, number: int) -> Path:
    return ctx.work / f"trial-{number}"


class Search:
    """The trials of one job. `run` makes them; then `best` is the one to publish, `rows` what became of each."""

    def __init__(self, job: TuneJob, dataset: Dataset, ctx: Attempt, replicas: int, begin: Begin):
        self.job, self.ctx, self._begin, self._replicas = job, ctx, begin, replicas
        self.images = len(dataset.labels("train"))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.HyperbandPruner(FIRST_RUNG, WHOLE, REDUCTION)
        self.study = optuna.create_study(storage=_journal(ctx.work), pruner=pruner, study_name="tune",
                                         direction="maximize", load_if_exists=True)
        for name in job.recipes:  # each as it is known first: a search is never worse than those
            self.study.enqueue_trial(self._known(name), skip_if_exists=True)

    @property
    def _begun(self) -> list[optuna.trial.FrozenTrial]:
        return [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]

    @property
    def best(self) -> optuna.trial.FrozenTrial | None:
        """The first of those whole trials that have the highest validation accuracy."""
        whole = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return max(whole, key=lambda t: (t.value, -t.number), default=None)

    @property
    def spent_s(self) -> float:
        return sum(row["seconds"] for row in self.rows())

    def run(self) -> None:
        """All trials that the job asks for and its budget has room for, beginning with one that was interrupted."""
        for cut_off in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._try(optuna.trial.Trial(self.study, cut_off._trial_id))
        while len(self._begun) < self.job.trials and not (self._over_budget() and self.best):
            self.ctx.check()
            self.study.sampler = optuna.samplers.TPESampler(seed=(self.job.seed + 7919 * len(self._begun)) % 2**32)
            self._try(self.study.ask())
        if self.best is None:
            why = "; ".join(sorted({row["why"] for row in self.rows() if row["why"]}))
            raise Refused(f"none of {len(self._begun)} trials came to its end: {why}", "no_trial")

    def _over_budget(self) -> bool:
        return bool(self.job.budget_s) and self.spent_s >= self.job.budget_s

    def _try(self, trial: optuna.trial.Trial) -> None:
        best = self.best
        ctx = OfTrial(self.ctx, trial.number, self.job.trials, best.value if best else None)
        result = {"state": "running", "why": "", "epochs": 0, "validation_accuracy": None, "seconds": 0.0}
        recipe = self.recipe(trial)
        keras.backend.clear_session()

        def record() -> None:
            history = training.history
            result.update(epochs=len(history), seconds=round(sum(entry["seconds"] for entry in history), 3),
                          validation_accuracy=training.published["validation_accuracy"])
            write_json(ctx.work / RESULT, result)
            told = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
            for entry in history:
                share = WHOLE * entry["epoch"] // recipe.epochs
                if share not in told:
                    trial.report(entry["validation_accuracy"], share)

        def look() -> None:
            record()
            if len(training.history) == recipe.epochs:
                return
            if trial.should_prune():
                raise Ended("others were better after as much of their training")
            if self._over_budget() and best:
                raise Ended("the budget was spent")

        try:
            with self._counted(ctx.work / BEGUN):
                training = self._begin(recipe, ctx)
                training.after_epoch = look
                training.fit()
        except Ended as e:
            self._end(trial, ctx, {**result, "state": "ended early", "why": str(e)}, TrialState.PRUNED)
        except Refused as e:
            if e.code != "diverged":
                raise
            self._end(trial, ctx, {**result, "state": "failed", "why": str(e)}, TrialState.FAIL)
        except (tf.errors.ResourceExhaustedError, MemoryError):
            self._end(trial, ctx, {**result, "state": "failed", "why": "it needs more memory than there is"},
                      TrialState.FAIL)
        else:
            record()  # a killed attempt may have had the last epoch, and not come to this
            training.save()  # what is published is read from it
            self._end(trial, ctx, {**result, "state": "whole"}, TrialState.COMPLETE)

    @contextmanager
    def _counted(self, path: Path) -> Iterator[None]:
        """Count how often the process died in a trial: at the third time it fails instead.

        Without this a trial that kills its process would take the search, and those before it, with it.
        """
        begun = int(path.read_text()) if path.exists() else 0
        if begun == DEATHS:
            raise Refused(f"its process died in it {begun} times (out of memory?)", "diverged")
        write_bytes(path, str(begun + 1).encode())
        try:
            yield
        except Exception:  # whatever it is, the process lives
            write_bytes(path, str(begun).encode())
            raise

    def _end(self, trial: optuna.trial.Trial, ctx: Attempt, result: dict[str, Any], state: TrialState) -> None:
        """Write down how a trial ended, and give back the disk of all that are not the best."""
        write_json(ctx.work / RESULT, result)
        self.study.tell(trial, result["validation_accuracy"] if state == TrialState.COMPLETE else None, state)
        best = self.best
        for other in self._begun:
            if best is None or other.number != best.number:
                for path in folder(self.ctx, other.number).glob("*"):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
        log.info("trial %d: %s, %s", trial.number + 1, result["state"], result["validation_accuracy"])

    def training(self) -> Training:
        """The best trial's, to publish: `fit` only fills its model, since its checkpoint is of the end."""
        assert self.best is not None
        ctx = OfTrial(self.ctx, self.best.number, self.job.trials, self.best.value)
        keras.backend.clear_session()
        return self._begin(self.recipe(optuna.trial.FixedTrial(self.best.params)), ctx)

    def rows(self) -> list[dict[str, Any]]:
        """[{number, from 1, state, why, epochs, validation_accuracy, seconds, parameters}] of the trials begun."""
        return [{"number": t.number + 1, **read_json(path), "parameters": t.params} for t in self._begun
                if (path := folder(self.ctx, t.number) / RESULT).exists()]

    # What is searched

    def _usual(self, name: str) -> Recipe:
        return resolve(TrainJob("m-0", "d-0", "x", name), self.images, self._replicas)

    def _known(self, name: str) -> dict[str, Any]:
        usual = self._usual(name)
        known = {"recipe": name, "augmentation": "the recipe's", "label_smoothing": 0.1 * (usual.label_smoothing > 0),
                 f"{name}.batch_size": usual.batch_size, f"{name}.learning_rate": usual.learning_rate}
        return known | ({f"{name}.weight_decay": usual.weight_decay} if usual.weight_decay else {})

    def recipe(self, trial: optuna.trial.BaseTrial) -> Recipe:
        """The recipe that a trial's parameters make; which of them there are depends on the recipe."""
        name = trial.suggest_categorical("recipe", list(self.job.recipes))
        usual = self._usual(name)
        sizes = sorted({max(1, usual.batch_size // 2), usual.batch_size, min(2 * usual.batch_size, self.images)})
        batch = trial.suggest_categorical(f"{name}.batch_size", [b for b in sizes if b >= self._replicas])
        rate = usual.learning_rate
        rate = trial.suggest_float(f"{name}.learning_rate", rate / 4, 4 * rate, log=True)
        decay = usual.weight_decay
        if decay:
            decay = trial.suggest_float(f"{name}.weight_decay", decay / 4, 4 * decay, log=True)
        strong = trial.suggest_categorical("augmentation", ["the recipe's", "strong"]) == "strong"
        smoothing = trial.suggest_categorical("label_smoothing", [0.0, 0.1])
        asked = TrainJob("m-0", "d-0", "x", name, batch_size=batch, epochs=self.job.epochs, learning_rate=rate,
                         augmentation=STRONG if strong else {})
        recipe = resolve(asked, self.images, self._replicas)
        return dataclasses.replace(recipe, weight_decay=decay, label_smoothing=smoothing)


def check(job: TuneJob) -> None:
    """Raises Refused for a recipe that is unknown or can't be tried."""
    able = [name for name, recipe in RECIPES.items() if recipe.network != "speedrun"]
    for name in job.recipes:
        if name not in able:
            raise Refused(f"recipe {name!r} can't be tried by tune: expected some of {', '.join(able)}",
                          "unknown_recipe")


def _journal(work: Path) -> JournalStorage:
    """Optuna's record. This process alone writes it, under the job's run lock: what a kill has left is cleared away."""
    path = work / JOURNAL
    for lock in work.glob(f"{JOURNAL}.*"):
        lock.unlink()
    if path.exists():
        whole = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)
    return JournalStorage(JournalFileBackend(str(path)))
