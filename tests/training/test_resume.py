"""A training that was stopped, or finds broken checkpoints, ends bit for bit as one that was left alone."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared import attempt
from shared.attempt import Attempt, Cancelled, Stopped
from shared.datasets import Dataset
from shared.jobs import TrainJob
from shared.ledger import Ledger
from training import checkpoints, device, fitting
from training.jobs import train
from training.recipes import SMALL, resolve

STEPS_AN_EPOCH = 11  # of 90 training images in batches of 8; then validation looks once
JOB = TrainJob("m-1", "d-120-32-0", "colours", epochs=2)
NewAttempt = Callable[..., Attempt]


@pytest.fixture(autouse=True)
def _nobody_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attempt._stop, "asked", False)


def begin(ctx: Attempt, job: TrainJob) -> fitting.Training:
    device.prepare(ctx.settings)
    dataset = Dataset(ctx.root, job.dataset_id)
    return fitting.Training(dataset, resolve(job, len(dataset.labels("train"))), job.seed, ctx)


def fit(ctx: Attempt, job: TrainJob) -> fitting.Training:
    training = begin(ctx, job)
    training.fit()
    return training


@pytest.fixture
def stop_at(stopped_at_look: NewAttempt) -> Callable[[int, Attempt, TrainJob], None]:
    def stop(look: int, ctx: Attempt, job: TrainJob) -> None:
        with pytest.raises(Stopped):
            fit(stopped_at_look(ctx, look), job)
        attempt._stop["asked"] = False

    return stop


def assert_equal(resumed: fitting.Training, alone: fitting.Training) -> None:
    times = ("seconds", "cpu_seconds")
    histories = [[{k: v for k, v in entry.items() if k not in times} for entry in t.history] for t in (resumed, alone)]
    assert histories[0] == histories[1]
    for a, b in zip(resumed.model.variables, alone.model.variables, strict=True):
        assert np.array_equal(a.numpy(), b.numpy()), a.path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_dataset) -> Path:
    root = tmp_path_factory.mktemp("resume")
    write_dataset(root, images=120)
    return root


@pytest.fixture(scope="module")
def alone(root: Path, new_attempt: NewAttempt) -> fitting.Training:
    return fit(new_attempt(root, JOB, "j-alone"), JOB)


def test_stopped_in_an_epoch_before_and_after_validation_equals_uninterrupted(
        root: Path, new_attempt: NewAttempt, stop_at, alone: fitting.Training) -> None:
    for look, step, epochs in ((4, 4, 0), (STEPS_AN_EPOCH - 4, STEPS_AN_EPOCH, 0), (1, STEPS_AN_EPOCH, 1)):
        ctx = new_attempt(root, JOB, "j-stopped")
        stop_at(look, ctx, JOB)
        state, _ = checkpoints.newest(ctx.work)
        assert (state["step"], len(state["history"])) == (step, epochs)
    assert_equal(fit(new_attempt(root, JOB, "j-stopped"), JOB), alone)


def test_dropout_goes_on_where_it_was(root: Path, new_attempt: NewAttempt, stop_at) -> None:
    job = dataclasses.replace(JOB, recipe="seed-cnn", epochs=1)
    stop_at(6, new_attempt(root, job, "j-dropout"), job)
    assert_equal(fit(new_attempt(root, job, "j-dropout"), job), fit(new_attempt(root, job, "j-dropout-alone"), job))


def test_a_gpu_s_programs_of_many_steps_stop_and_resume(tmp_path: Path, write_dataset, new_attempt: NewAttempt,
                                                        stopped_at_look: NewAttempt,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, by XLA, here on the CPU: of a side of 6, which leaves one convolution, slow under XLA there."""
    monkeypatch.setattr(fitting, "FIRST_CALL", 4)
    job = TrainJob("m-1", write_dataset(tmp_path, images=120, size=6), "colours", epochs=4)

    def begun(job_id: str, look: int = -1) -> fitting.Training:
        ctx = stopped_at_look(new_attempt(tmp_path, job, job_id, "gpu", gpu_memory_mib=1000), look)
        dataset = Dataset(tmp_path, job.dataset_id)
        return fitting.Training(dataset, resolve(job, len(dataset.labels("train"))), job.seed, ctx)

    alone, stopped, resumed = begun("j-alone"), begun("j-stopped", look=1), begun("j-stopped")
    alone.fit()
    assert [entry["step"] for entry in alone.history] == [STEPS_AN_EPOCH * n for n in (1, 2, 3, 4)]
    assert max(entry["validation_accuracy"] for entry in alone.history) > 0.8
    assert alone.steps_a_call <= STEPS_AN_EPOCH
    with pytest.raises(Stopped):
        stopped.fit()
    attempt._stop["asked"] = False
    assert checkpoints.newest(stopped.ctx.work)[0]["step"] == 4
    resumed.fit()
    for a, b in zip(resumed.model.get_weights(), alone.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_truncated_checkpoint_is_passed_over_for_the_older_one(root: Path, new_attempt: NewAttempt, stop_at,
                                                                 alone: fitting.Training) -> None:
    ctx = new_attempt(root, JOB, "j-truncated")
    stop_at(2, ctx, JOB)
    stop_at(4, ctx, JOB)
    assert [p.name for p in checkpoints.found(ctx.work)] == ["ckpt-6", "ckpt-2"]
    (ctx.work / "ckpt-6" / "arrays.npz").write_bytes((ctx.work / "ckpt-6" / "arrays.npz").read_bytes()[:1000])
    assert checkpoints.newest(ctx.work)[0]["step"] == 2
    assert_equal(fit(ctx, JOB), alone)


@pytest.mark.parametrize("name", ["arrays.npz", "state.json", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"null", None], ids=["empty", "cut off", "null", "absent"])
def test_nothing_in_a_checkpoint_folder_can_fail_a_job(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = checkpoints.save(tmp_path, 5, {"step": 5}, {"a": np.zeros(3)})
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    assert checkpoints.newest(tmp_path) is None


def test_a_checkpoint_comes_back_exact_and_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoints.save(tmp_path, step, {"loss": 0.1 + 0.2}, {"a": np.float32([step, 1 / 3])})
    shutil.copytree(tmp_path / "ckpt-10", tmp_path / ".ckpt-200")  # what a kill while writing leaves
    state, arrays = checkpoints.newest(tmp_path)
    assert state == {"loss": 0.1 + 0.2}
    assert np.array_equal(arrays["a"], np.float32([100, 1 / 3]))
    assert [p.name for p in checkpoints.found(tmp_path)] == ["ckpt-100", "ckpt-10"]


def test_a_checkpoint_of_another_seed_is_not_taken_up(root: Path, new_attempt: NewAttempt, stop_at) -> None:
    ctx = new_attempt(root, JOB, "j-seeds")
    stop_at(4, ctx, JOB)
    for seed, step in ((JOB.seed, 4), (JOB.seed + 1, 0)):
        training = begin(ctx, dataclasses.replace(JOB, seed=seed))
        training.resume()
        assert training.step == step


def test_a_cancelled_job_saves_and_publishes_nothing(root: Path, new_attempt: NewAttempt) -> None:
    ctx = new_attempt(root, JOB, "j-cancelled")
    Ledger(root, ctx._ledger.redis).ask_cancel("j-cancelled")
    with pytest.raises(Cancelled):
        train(JOB, ctx)
    assert checkpoints.newest(ctx.work)[0]["step"] == 0
    assert not (root / "models").exists()


def test_checkpoints_of_another_recipe_do_not_push_out_the_new_ones(root: Path, new_attempt: NewAttempt,
                                                                    stop_at) -> None:
    ctx = new_attempt(root, JOB, "j-other-recipe")
    stop_at(4, ctx, JOB)
    other = dataclasses.replace(JOB, learning_rate=0.01)
    stop_at(2, ctx, other)
    assert [p.name for p in checkpoints.found(ctx.work)] == ["ckpt-2"]
    training = begin(ctx, other)
    training.resume()
    assert training.step == 2


def test_a_recipe_s_words_for_people_are_no_part_of_it(root: Path, new_attempt: NewAttempt, stop_at) -> None:
    ctx = new_attempt(root, JOB, "j-words")
    stop_at(4, ctx, JOB)
    training = begin(ctx, JOB)
    training.recipe = dataclasses.replace(training.recipe, known_result="another sentence")
    training.resume()
    assert training.step == 4


def test_what_an_older_version_did_not_write_is_as_it_was(tmp_path: Path) -> None:
    recipe = dataclasses.asdict(SMALL)
    del recipe["leave_out"]
    checkpoints.save(tmp_path, 5, {"recipe": recipe, "seed": 0}, {})
    assert checkpoints.newest_of(tmp_path, dataclasses.replace(SMALL, leave_out=0.5), 0) is None
    checkpoints.save(tmp_path, 5, {"recipe": recipe, "seed": 0}, {})
    assert checkpoints.newest_of(tmp_path, SMALL, 0) is not None
