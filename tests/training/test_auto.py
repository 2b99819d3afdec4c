"""The recipe `auto`: what it picks from which facts, that it fits a budget, says why and keeps to it when resumed."""

import dataclasses
import json
import os
import re
import signal

import numpy as np
import pytest

from shared import attempt
from shared.artifacts import open_artifact
from shared.attempt import Stopped
from shared.datasets import Dataset
from shared.errors import Refused
from shared.jobs import TrainJob, parse
from training import auto
from training.auto import MOST, STRONG, Facts, Pace, choose, fitted
from training.jobs import train

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
GIB = 1 << 30
PLENTY = Facts((4000,) * 10, 10_000, 32, "cpu")


def job(**changed) -> TrainJob:
    return TrainJob("m-1", "d-1", "name", **{"recipe": "auto", **changed})


@pytest.mark.parametrize(("facts", "expected", "says"), [
    (PLENTY, {"recipe": "small", "batch_size": 64, "epochs": 8}, "as many as the recipe is known for"),
    (Facts((4000,) * 10, 10_000, 32, "gpu", memory=12 * GIB), {"recipe": "accurate", "batch_size": 512, "epochs": 80},
     "recipe accurate: a GPU of 12 GiB or more, 40000 images of 32 pixels, 10000 or more"),
    (Facts((4000,) * 10, 10_000, 64, "gpu", memory=80 * GIB), {"recipe": "small", "batch_size": 64, "epochs": 8},
     "not run at 64 pixels, only at 32"),
    (Facts((4000,) * 10, 10_000, 32, "gpu", 5, 80 * GIB), {"recipe": "small", "batch_size": 60, "epochs": 8},
     "the recipe's 64, shared evenly by 5 GPUs"),
    (Facts((60,) * 200, 10_000, 32, "gpu", memory=80 * GIB),
     {"recipe": "small", "batch_size": 64, "epochs": 8, "augmentation": STRONG},
     r"and not accurate, .*: a class has 60 images \(the median\), under 100"),
    (Facts((99,) * 10, 990, 224, "cpu"), {"recipe": "small", "batch_size": 61, "epochs": 19, "augmentation": STRONG},
     r"a class has 99 images \(the median\), under 100"),
    (Facts((100,) * 10, 1000, 64, "cpu"), {"recipe": "small", "batch_size": 62, "epochs": 19}, "100 or more"),
    (Facts((5, 5), 4, 64, "cpu"), {"recipe": "small", "batch_size": 8, "epochs": 300, "augmentation": STRONG},
     "mind that 4 validation images are few"),
    (Facts((300, 100), 1000, 32, "cpu"), {"recipe": "small", "batch_size": 25, "epochs": 19,
                                          "class_weights": "balanced"},
     "the largest has 300 images, the smallest 100"),
    (Facts((299, 100), 1000, 32, "cpu"), {"recipe": "small", "batch_size": 24, "epochs": 19}, "300 steps at least"),
    (Facts((200, 0, 190), 1000, 32, "cpu"), {"recipe": "small", "batch_size": 24, "epochs": 19}, "390 images are few"),
], ids=["plenty", "gpu", "other sizes", "five gpus", "few, gpu", "few", "not few", "very few", "uneven", "even",
        "an empty class"])
def test_what_is_picked_from_which_facts(facts: Facts, expected: dict, says: str) -> None:
    fields, why = choose(job(), facts)
    assert fields == expected
    assert any(re.search(says, sentence) for sentence in why), why


@pytest.mark.parametrize(("asked", "changed", "expected"), [
    ({}, {}, "accurate"),
    ({}, {"device": "cpu"}, "small"),
    ({}, {"counts": (1000,) * 10}, "accurate"),
    ({}, {"counts": (1000,) * 9 + (999,)}, "small"),
    ({"budget_s": 179}, {}, "small"),
    ({"budget_s": 180}, {}, "accurate"),
    ({}, {"memory": 12 * GIB - 1}, "small"),
    ({}, {"replicas": 2}, "small"),
    ({}, {"size": 48}, "small"),
])
def test_accurate_is_picked_where_it_was_measured_for_many_images_and_time(asked, changed, expected) -> None:
    gpu = dataclasses.replace(PLENTY, device="gpu", memory=12 * GIB)
    fields, why = choose(job(**asked), dataclasses.replace(gpu, **changed))
    assert fields["recipe"] == expected, why
    assert why[0].startswith(f"recipe {expected}")


def test_what_is_left_out_does_not_count(tmp_path, write_dataset, new_attempt) -> None:
    dataset, asked = Dataset(tmp_path, write_dataset(tmp_path, images=240)), job(leave_out=0.5)
    chosen, _ = auto.decide(asked, dataset, new_attempt(tmp_path, asked), 1, lambda recipe: pytest.fail("measured"), 0)
    assert (chosen.batch_size, chosen.epochs) == (8, 28)  # 90 images: 300 steps at least, of 11 an epoch


def test_what_the_job_gives_itself_is_kept_and_needs_no_reason() -> None:
    few = Facts((30, 9), 1000, 32, "cpu")
    mine = {"batch_size": 4, "epochs": 2, "augmentation": {"cutout": 4}, "class_weights": "balanced"}
    fields, why = choose(job(**mine), few)
    assert fields == {"recipe": "small"}
    assert len(why) == 1
    with pytest.raises(Refused, match="batch_size is 40"):
        choose(job(batch_size=40), few)


@pytest.mark.parametrize(("budget", "pace", "epochs", "says"), [
    (100, Pace(1, 0.01, 1), 7, r"7 epochs: 10 ms a step measured here, 11 s an epoch, 85 s left"),
    (1000, Pace(1, 0.01, 1), 8 * MOST, "though the budget has room for more"),
    (10, Pace(1, 0.01, 1), 1, "which will take longer than the budget"),
    (1, Pace(5, 0.01, 1), 1, "0 s left of the budget of 1 s"),
])
def test_the_epochs_are_what_the_budget_has_room_for(budget: float, pace: Pace, epochs: int, says: str) -> None:
    got, why = fitted(budget, 3, pace, 1000, 8)
    assert got == epochs
    assert says in why


def test_a_job_says_why_in_its_progress_its_result_and_its_model(tmp_path, write_dataset, new_attempt) -> None:
    asked = TrainJob("m-1", write_dataset(tmp_path, images=120), "colours", "auto", epochs=1)
    ctx, told = new_attempt(tmp_path, asked), []
    ctx.report = lambda stage, step, of, **metrics: told.append((stage, metrics))
    result = train(asked, ctx)
    recipe = open_artifact(tmp_path, "models/m-1")["recipe"]
    assert (recipe["name"], recipe["epochs"], recipe["augmentation"]) == ("small", 1, STRONG)
    assert result["recipe"] == "small"
    assert result["chosen"] == recipe["chosen"]
    assert any("under 100" in sentence for sentence in recipe["chosen"])
    metrics = dict(told)["choose"]
    assert metrics["why"] == "; ".join(recipe["chosen"])


def test_a_training_fits_its_budget_and_keeps_its_decision_when_resumed(tmp_path, write_dataset, new_attempt,
                                                                        monkeypatch) -> None:
    asked = TrainJob("m-1", write_dataset(tmp_path, images=240), "colours", "auto", budget_s=20)
    ctx = new_attempt(tmp_path, asked)

    def stop_in_training(stage: str, *_, **__) -> None:
        if stage == "train":
            os.kill(os.getpid(), signal.SIGUSR1)

    old = signal.signal(signal.SIGUSR1, attempt.ask_stop)
    ctx.report = stop_in_training
    with pytest.raises(Stopped):
        train(asked, ctx)
    signal.signal(signal.SIGUSR1, old)
    attempt._stop["asked"] = False
    decision = json.loads((ctx.work / auto.DECISION).read_bytes())
    monkeypatch.setattr(auto, "measure", lambda *_: pytest.fail("the pace is measured once a job"))
    train(asked, new_attempt(tmp_path, asked))
    recipe = open_artifact(tmp_path, "models/m-1")["recipe"]
    assert recipe["epochs"] == decision["fields"]["epochs"] >= 1
    assert recipe["chosen"] == decision["why"]
    assert "s left of the budget of 20 s" in recipe["chosen"][-1]


def test_the_pace_is_of_whole_steps_and_a_whole_validation(tmp_path, write_dataset, new_attempt) -> None:
    from shared.datasets import Dataset
    from training import fitting
    from training.recipes import resolve

    asked = TrainJob("m-1", write_dataset(tmp_path, images=120), "colours")
    dataset = Dataset(tmp_path, asked.dataset_id)
    training = fitting.Training(dataset, resolve(asked, 90), 0, new_attempt(tmp_path, asked))
    pace = auto.measure(training, most_s=0)
    assert min(pace.first, pace.step, pace.validation) > 0
    assert pace.first > pace.step
    assert np.isfinite([pace.first, pace.step, pace.validation]).all()


def test_a_budget_is_for_auto_alone_and_not_beside_epochs() -> None:
    ids = {"model_id": "m-1", "dataset_id": "d-1", "name": "x"}
    assert parse("train", {**ids, "recipe": "auto", "budget_s": 60}).budget_s == 60
    for fields in ({"recipe": "small"}, {"recipe": "auto", "epochs": 3}):
        with pytest.raises(Refused, match="ask for recipe auto and leave epochs out"):
            parse("train", {**ids, **fields, "budget_s": 60})
