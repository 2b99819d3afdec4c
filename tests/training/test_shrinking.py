"""A training that needs more memory than there is goes on with half the batch."""

from pathlib import Path

import pytest
import tensorflow as tf

from shared.artifacts import open_artifact
from shared.errors import LannerError, Refused
from shared.jobs import TrainJob
from training import fitting
from training.jobs import train
from training.recipes import resolve
from training.shrinking import LEFT, halving, shrunk

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("raised", [tf.errors.ResourceExhaustedError(None, None, "OOM when allocating"), MemoryError()])
def test_the_next_attempt_takes_half_the_batch_and_says_so(tmp_path: Path, write_dataset, new_attempt,
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           raised: Exception) -> None:
    job = TrainJob("m-1", write_dataset(tmp_path), "colours", epochs=1, batch_size=32)
    fit = fitting.Training.fit

    def fits(training: fitting.Training) -> None:
        if training.recipe.batch_size > 8:
            raise raised
        fit(training)

    monkeypatch.setattr(fitting.Training, "fit", fits)
    for left in (16, 8):
        with pytest.raises(LannerError, match=f"a batch of {2 * left} images .*: the next attempt takes {left}") as e:
            train(job, new_attempt(tmp_path, job))
        assert (e.value.code, isinstance(e.value, Refused)) == ("out_of_memory", False)
    train(job, new_attempt(tmp_path, job))
    recipe = open_artifact(tmp_path, "models/m-1")["recipe"]
    assert (recipe["batch_size"], recipe["chosen"]) == (
        8, ["batch 8: 32 images at once need more memory than there was"])
    assert recipe["learning_rate"] == pytest.approx(resolve(job, 240).learning_rate / 4)  # SGD: as the batch


def test_a_batch_that_can_not_be_made_smaller_is_refused(tmp_path: Path) -> None:
    for job, replicas in ((TrainJob("m-1", "d-1", "x", batch_size=15), 1), (TrainJob("m-1", "d-1", "x", "speedrun"), 1),
                          (TrainJob("m-1", "d-1", "x", batch_size=24), 16)):
        recipe = resolve(job, 5000, replicas)
        (tmp_path / LEFT).unlink(missing_ok=True)
        with pytest.raises(LannerError, match="there was just now") as first, halving(recipe, tmp_path, replicas):
            raise MemoryError  # others may have had it
        assert not isinstance(first.value, Refused)
        assert shrunk(recipe, tmp_path) == recipe
        with pytest.raises(Refused, match="takes no smaller one") as e, halving(recipe, tmp_path, replicas):
            raise MemoryError
        assert e.value.code == first.value.code == "out_of_memory"


def test_the_rate_falls_with_the_batch_and_replicas_share_it_evenly(tmp_path: Path) -> None:
    recipe = resolve(TrainJob("m-1", "d-1", "x", "transfer", batch_size=36), 5000)
    with pytest.raises(LannerError, match="takes 16"), halving(recipe, tmp_path, 4):
        raise MemoryError
    found = shrunk(recipe, tmp_path)
    share = found.batch_size / recipe.batch_size
    expected = share**0.5 if recipe.optimizer == "adam" or recipe.root_rate else share
    assert (found.batch_size, found.learning_rate) == (16, pytest.approx(recipe.learning_rate * expected))


def test_a_full_disk_is_no_lack_of_memory(tmp_path: Path) -> None:
    recipe = resolve(TrainJob("m-1", "d-1", "x"), 5000)
    with pytest.raises(tf.errors.ResourceExhaustedError), halving(recipe, tmp_path, 1):
        raise tf.errors.ResourceExhaustedError(None, None, "model.keras; No space left on device")
    assert shrunk(recipe, tmp_path) == recipe
