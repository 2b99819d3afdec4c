"""A search for a recipe: what it records, what it publishes, that it ends in its budget and goes on after a kill."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from shared import attempt
from shared.artifacts import open_artifact
from shared.attempt import Attempt, Stopped
from shared.errors import Refused
from shared.jobs import TuneJob
from training import tuning
from training.jobs import body, tune
from training.recipes import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def trials_of(root: Path, model_id: str = "m-1") -> list[dict]:
    return json.loads((root / "models" / model_id / "trials.json").read_bytes())


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


class Told(Attempt):
    """An attempt that says its progress to a function."""

    def __init__(self, ctx: Attempt, hear: Callable[[str, float, float, dict], None]):
        self.__dict__.update(ctx.__dict__)
        self._hear = hear

    def report(self, stage: str, step: float, of: float, **metrics: float | str) -> None:
        self._hear(stage, step, of, metrics)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, write_dataset) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("tune")
    return root, write_dataset(root, images=120)


@pytest.fixture(scope="module")
def searched(dataset, new_attempt) -> tuple[TuneJob, dict, list]:
    root, dataset_id = dataset
    job = TuneJob("m-1", dataset_id, "colours", trials=4, recipes=("small",), epochs=3, seed=1)
    told: list = []
    return job, body(job, Told(new_attempt(root, job, "j-alone"), lambda *said: told.append(said))), told


def test_each_trial_is_recorded_and_the_best_is_published_with_its_recipe(dataset, searched) -> None:
    root, result = dataset[0], searched[1]
    rows = trials_of(root)
    assert [row["number"] for row in rows] == [1, 2, 3, 4]
    whole = [row for row in rows if row["state"] == "whole"]
    best = max(whole, key=lambda row: row["validation_accuracy"])
    assert {row["state"] for row in rows} <= {"whole", "ended early"}
    assert all(row["seconds"] > 0 and row["epochs"] >= 1 for row in rows)
    assert all(row["epochs"] == 3 for row in whole)
    manifest = open_artifact(root, "models/m-1")
    assert result["validation_accuracy"] == manifest["metrics"]["validation_accuracy"] == best["validation_accuracy"]
    assert (result["recipe"], result["trials"]) == ("small", 4)
    recipe = manifest["recipe"]
    assert recipe["learning_rate"] == pytest.approx(best["parameters"]["small.learning_rate"])
    assert recipe["batch_size"] == best["parameters"]["small.batch_size"]
    assert any(name.startswith("logs/") for name in manifest["files"])
    assert np.load(root / "models" / "m-1" / "golden.npz")["probabilities"].shape == (30, 3)
    assert [p.name for p in (root / "work" / "j-alone").glob("trial-*/ckpt-*")]
    assert len({p.parent.name for p in (root / "work" / "j-alone").glob("trial-*/ckpt-*")}) == 1


def test_the_first_trial_is_the_recipe_as_it_is_known_and_the_others_differ(dataset, searched) -> None:
    first, *others = (row["parameters"] for row in trials_of(dataset[0]))
    assert first["small.learning_rate"] == SMALL.learning_rate
    assert first["small.weight_decay"] == SMALL.weight_decay
    assert first["augmentation"] == "the recipe's"
    assert len({row["small.learning_rate"] for row in others} | {SMALL.learning_rate}) == 4


def test_progress_is_over_all_trials_and_never_falls(searched) -> None:
    told = [(step, of, metrics) for stage, step, of, metrics in searched[2] if stage == "trials"]
    assert [step for step, _, _ in told] == sorted(step for step, _, _ in told)
    assert {of for _, of, _ in told} == {4}
    assert {metrics["trial"] for _, _, metrics in told} == {1, 2, 3, 4}
    assert "best" in told[-1][2]


def test_stopped_in_a_trial_it_goes_on_to_the_same_end(dataset, searched, new_attempt) -> None:
    root, (job, _, _) = dataset[0], searched
    again = dataclasses.replace(job, model_id="m-2")
    for place in (1.2, 3.2):

        def stop(stage: str, step: float, of: float, metrics: dict, place: float = place) -> None:
            if stage == "trials" and step > place:
                attempt.ask_stop(signal.SIGUSR1, None)

        ctx = Told(new_attempt(root, again, "j-stopped"), stop)
        with pytest.raises(Stopped):
            tune(again, ctx)
        attempt._stop["asked"] = False
    # What a kill leaves: a lock that nobody holds, and half a line.
    (ctx.work / f"{tuning.JOURNAL}.lock").touch()
    with open(ctx.work / tuning.JOURNAL, "ab") as file:
        file.write(b'{"op_code": 4, "wor')
    tune(again, new_attempt(root, again, "j-stopped"))
    assert without_times(trials_of(root, "m-2")) == without_times(trials_of(root))
    golden = [np.load(root / "models" / name / "golden.npz")["probabilities"] for name in ("m-1", "m-2")]
    assert np.array_equal(*golden)


def test_killed_in_a_trial_it_goes_on_to_the_same_end(dataset, searched) -> None:
    root, job = dataset[0], dataclasses.replace(searched[0], model_id="m-6")
    program = ("import sys; from pathlib import Path; from colours import new_attempt; from training.jobs import body; "
               "from shared.jobs import TuneJob; root = Path(sys.argv[1]); job = TuneJob(**eval(sys.argv[2])); "
               "body(job, new_attempt(root, job, 'j-killed'))")
    command = [sys.executable, "-c", program, root, repr(dataclasses.asdict(job))]
    for expected in (-signal.SIGKILL, 0):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
                              env={**os.environ, "FAULT": "mid-train", "ARTIFACTS": str(root)})
        assert done.returncode == expected, done.stderr[-3000:]
    assert without_times(trials_of(root, "m-6")) == without_times(trials_of(root))


def test_a_spent_budget_ends_the_search_after_one_whole_trial(dataset, new_attempt) -> None:
    root, dataset_id = dataset
    job = TuneJob("m-3", dataset_id, "colours", trials=50, budget_s=0.1, recipes=("small",), epochs=1)
    tune(job, new_attempt(root, job, "j-budget"))
    assert [row["state"] for row in trials_of(root, "m-3")] == ["whole"]


def test_trials_that_all_diverge_publish_nothing(dataset, new_attempt, monkeypatch) -> None:
    root, dataset_id = dataset
    usual = tuning.Search._usual
    monkeypatch.setattr(tuning.Search, "_usual", lambda *of: dataclasses.replace(usual(*of), learning_rate=100.0))
    job = TuneJob("m-4", dataset_id, "colours", trials=1, recipes=("small",), epochs=1)
    with pytest.raises(Refused, match="none of 1 trials came to its end: training diverged") as refusal:
        tune(job, new_attempt(root, job, "j-diverged"))
    assert refusal.value.code == "no_trial"
    assert not (root / "models" / "m-4").exists()


@pytest.mark.parametrize("recipe", ["speedrun", "resnet", "auto"])
def test_a_recipe_that_can_not_be_tried_is_refused(dataset, new_attempt, recipe: str) -> None:
    job = TuneJob("m-5", dataset[1], "colours", recipes=("small", recipe))
    ctx: Attempt = new_attempt(dataset[0], job, f"j-{recipe}")
    with pytest.raises(Refused, match=f"recipe '{recipe}' can't be tried by tune: expected some of seed-cnn, small"):
        tune(job, ctx)


def test_a_trial_that_needs_too_much_memory_fails_alone(dataset, new_attempt, monkeypatch) -> None:
    root, dataset_id = dataset
    job = TuneJob("m-7", dataset_id, "colours", trials=2, recipes=("small",), epochs=1, seed=1)
    fit = tuning.Training.fit

    def full_at_first(training: tuning.Training) -> None:
        if "trial-0" in str(training.ctx.work):
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        fit(training)

    monkeypatch.setattr(tuning.Training, "fit", full_at_first)
    tune(job, new_attempt(root, job, "j-oom"))
    assert [(row["state"], row["why"]) for row in trials_of(root, "m-7")] == [
        ("failed", "it needs more memory than there is"), ("whole", "")]


def test_a_trial_that_kills_its_process_twice_fails_and_the_search_goes_on(dataset, new_attempt, monkeypatch) -> None:
    root, dataset_id = dataset
    job = TuneJob("m-8", dataset_id, "colours", trials=2, recipes=("small",), epochs=1, seed=1)
    fit = tuning.Training.fit

    class Died(BaseException):
        """As if the kernel had ended the process: nothing catches it."""

    def deadly_at_first(training: tuning.Training) -> None:
        if "trial-0" in str(training.ctx.work):
            raise Died
        fit(training)

    monkeypatch.setattr(tuning.Training, "fit", deadly_at_first)
    for _ in range(2):
        with pytest.raises(Died):
            tune(job, new_attempt(root, job, "j-deadly"))
    tune(job, new_attempt(root, job, "j-deadly"))
    first, second = trials_of(root, "m-8")
    assert (first["state"], second["state"]) == ("failed", "whole")
    assert "its process died in it 2 times" in first["why"]


def test_what_a_process_outlives_is_no_death_of_its_trial(dataset, new_attempt, monkeypatch) -> None:
    root, dataset_id = dataset
    job = TuneJob("m-9", dataset_id, "colours", trials=1, recipes=("small",), epochs=1, seed=1)
    fit, times = tuning.Training.fit, []

    def full_disk(training: tuning.Training) -> None:
        times.append(1)
        if len(times) < 4:
            raise OSError(28, "No space left on device")
        fit(training)

    monkeypatch.setattr(tuning.Training, "fit", full_disk)
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            tune(job, new_attempt(root, job, "j-full"))
    tune(job, new_attempt(root, job, "j-full"))
    assert [row["state"] for row in trials_of(root, "m-9")] == ["whole"]
