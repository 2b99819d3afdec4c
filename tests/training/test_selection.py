"""Selection via proxy: which images are left, and that a training learns from these alone, a resumed one as well."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared import attempt
from shared.artifacts import open_artifact, read_json
from shared.attempt import Attempt, Stopped
from shared.datasets import Dataset
from shared.errors import Refused
from shared.jobs import TrainJob, parse
from training import selection
from training.jobs import train

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
NewAttempt = Callable[..., Attempt]


def test_those_of_highest_entropy_are_left_the_same_share_of_each_class():
    rng = np.random.default_rng(0)
    sure = rng.permutation(100)  # the surer, the higher
    top = 0.5 + 0.49 * sure / 100
    answers = np.stack([top, 1 - top], 1)
    labels = (rng.random(100) < 0.2).astype(np.int32)
    rows = selection.least_sure(answers, labels, 0.3)
    assert (np.diff(rows) > 0).all()
    for k in (0, 1):
        of_class, left = np.flatnonzero(labels == k), rows[labels[rows] == k]
        assert len(left) == len(of_class) - int(0.3 * len(of_class))
        assert sure[left].max() < sure[np.setdiff1d(of_class, left)].min()
    np.testing.assert_array_equal(selection.least_sure(answers, labels, 0.0), np.arange(100))


def test_a_share_that_leaves_too_little_is_refused():
    asked = {"model_id": "m-1", "dataset_id": "d-1", "name": "x"}
    with pytest.raises(Refused, match=r"leave_out is 0.95: expected 0 to 0.9"):
        parse("train", {**asked, "leave_out": 0.95})
    with pytest.raises(Refused, match="leave one of both out"):
        parse("train", {**asked, "leave_out": 0.5, "recipe": "auto", "budget_s": 60})


def test_what_can_t_be_is_refused_before_the_proxy_trains(
        tmp_path: Path, write_dataset: Callable[..., str], new_attempt: NewAttempt,
        monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_id = write_dataset(tmp_path, images=240)
    monkeypatch.setattr(selection, "select", lambda *args: pytest.fail("the proxy trains"))
    for number, (fields, code) in enumerate((({"batch_size": 100}, "bad_batch_size"),
                                             ({"augmentation": {"rotate": 1}}, "bad_augmentation"))):
        job = TrainJob(f"m-{number}", dataset_id, "colours", leave_out=0.5, **fields)
        with pytest.raises(Refused) as refused:
            train(job, new_attempt(tmp_path, job, f"j-{number}"))
        assert refused.value.code == code


def test_a_job_learns_from_what_is_left_and_a_resumed_one_from_the_same(
        tmp_path: Path, write_dataset: Callable[..., str], new_attempt: NewAttempt,
        monkeypatch: pytest.MonkeyPatch) -> None:
    root, dataset_id = tmp_path, write_dataset(tmp_path, images=240)
    job = TrainJob("m-selected", dataset_id, "colours", epochs=2, leave_out=0.5, batch_size=8)
    ctx, seen = new_attempt(root, job), list[np.ndarray]()
    chosen = selection.least_sure

    def noted(answers: np.ndarray, labels: np.ndarray, leave_out: float) -> np.ndarray:
        seen.append(chosen(answers, labels, leave_out))
        attempt._stop["asked"] = True  # the attempt ends where the proxy has, before its own first step
        return seen[-1]

    monkeypatch.setattr(selection, "least_sure", noted)
    monkeypatch.setitem(attempt._stop, "asked", False)
    with pytest.raises(Stopped):
        train(job, ctx)
    attempt._stop["asked"] = False
    train(job, ctx)
    assert len(seen) == 1  # the proxy was trained once
    whole = Dataset(root, dataset_id)
    left = selection.Selected(whole, seen[0], tmp_path / "selected.npy")
    assert len(left.labels("train")) == (len(whole.labels("train")) + 1) // 2
    np.testing.assert_array_equal(left.images("train"), whole.images("train")[seen[0]])
    np.testing.assert_array_equal(left.labels("validation"), whole.labels("validation"))
    assert open_artifact(root, job.target)["recipe"]["leave_out"] == 0.5
    history = read_json(root / job.target / "history.json")
    assert history[-1]["step"] == 2 * (len(seen[0]) // 8)
    assert not (ctx.work / "proxy").exists()
