"""The recipe `transfer`, with weights that a test writes from a network as it begins."""

import dataclasses
import signal
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

from shared import attempt, weights
from shared.artifacts import open_artifact
from shared.attempt import Stopped
from shared.datasets import Dataset, Spec
from shared.errors import Refused
from shared.jobs import TrainJob
from training import device, fitting, networks, transfer
from training.evaluation import new_predict
from training.jobs import train
from training.recipes import TRANSFER, learning_rate, resolve

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SPEC = Spec(32, ("a", "b", "c"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def weights_in(folder: Path, name: str, seed: int = 3) -> Path:
    keras.utils.set_random_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    network = keras.applications.MobileNetV2((96, 96, 3), include_top=False, weights=None)
    if name == weights.OWN:
        network.save_weights(folder / name)
    else:  # as the files of keras.applications are
        with h5py.File(folder / name, "w") as file:
            legacy_h5_format.save_weights_to_hdf5_group(file, network)
    return folder / name


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Keras keeps its own, here nothing."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".keras"


def test_without_weights_it_is_refused_at_once_with_the_file_its_source_and_its_place(
        tmp_path: Path, write_dataset, new_attempt) -> None:
    job = TrainJob("m-1", write_dataset(tmp_path, images=120), "colours", "transfer")
    with pytest.raises(Refused, match="fetch https://.*kernels_1.0_96_no_top.h5 and put it into .*weights") as refusal:
        train(job, new_attempt(tmp_path, job))
    assert refusal.value.code == "no_weights"
    assert str(tmp_path / "weights") in str(refusal.value)


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / weights.OWN
    path.write_bytes(b"<html>")
    with pytest.raises(Refused, match="holds no weights of MobileNetV2 without its top"):
        transfer.load(networks.build(TRANSFER, SPEC), path)


@pytest.mark.parametrize("side", [96, 224])
def test_the_volume_comes_before_keras_s_own_and_the_nearest_size_first(tmp_path: Path, home: Path, side: int) -> None:
    volume = tmp_path / "weights"
    for folder, sizes in ((home / "models", weights.SIDES), (volume, (160, side))):
        folder.mkdir(parents=True)
        for size in sizes:
            (folder / f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{size}_no_top.h5").touch()
    assert weights.find_weights(tmp_path, side) == volume / weights.file_names(side)[1]
    assert f"_{side}_" in weights.find_weights(tmp_path, side).name
    for path in volume.iterdir():
        path.unlink()
    assert weights.find_weights(tmp_path, side).parent == home / "models"


@pytest.mark.parametrize("name", [weights.OWN, weights.file_names(96)[1]], ids=["Keras 3", "keras.applications"])
def test_the_weights_arrive_and_raw_pixels_are_normalised_inside(tmp_path: Path, name: str) -> None:
    path = weights_in(tmp_path / "weights", name)
    spec = dataclasses.replace(SPEC, size=96)
    model = networks.build(TRANSFER, spec)
    transfer.load(model, path)
    theirs = keras.applications.MobileNetV2((96, 96, 3), include_top=False, weights=None)
    theirs.load_weights(path)
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)
    expected = theirs(keras.applications.mobilenet_v2.preprocess_input(images.astype(np.float32)), training=False)
    ours = keras.Model(model.input, model.get_layer("out_relu").output)(images.astype(np.float32), training=False)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    np.testing.assert_allclose(new_predict(model)(images).sum(1), 1, atol=1e-5)


def test_the_rate_stays_while_frozen_then_falls_from_a_tenth() -> None:
    recipe = resolve(TrainJob("m-1", "d-1", "x", "transfer", epochs=10), 3200)
    rates = [learning_rate(recipe, step, 1000) for step in range(1000)]
    assert recipe.frozen_epochs == 3
    assert set(rates[:300]) == {recipe.learning_rate}
    assert rates[300] == pytest.approx(recipe.learning_rate / 10)
    assert (np.diff(rates[300:]) < 0).all()
    assert 0 < rates[-1] < recipe.learning_rate / 1000
    once = resolve(TrainJob("m-1", "d-1", "x", "transfer", epochs=1), 3200)
    assert learning_rate(once, 99, 100) == recipe.learning_rate


def test_the_last_layer_learns_then_all_and_a_stopped_training_ends_the_same(tmp_path: Path, write_dataset,
                                                                             new_attempt) -> None:
    job = TrainJob("m-1", write_dataset(tmp_path, images=48), "colours", "transfer", epochs=2, batch_size=12)
    path = weights_in(tmp_path / "weights", weights.OWN)
    dataset = Dataset(tmp_path, job.dataset_id)
    started = networks.build(TRANSFER, dataset.spec)
    transfer.load(started, path)

    def begin(job_id: str) -> fitting.Training:
        ctx = new_attempt(tmp_path, job, job_id)
        device.prepare(ctx.settings)
        return fitting.Training(dataset, resolve(job, 36), job.seed, ctx)

    def changed(training: fitting.Training) -> set[str]:
        pairs = zip(training.trained.variables, started.variables, strict=True)
        return {a.path for a, b in pairs if "seed_generator" not in a.path and not np.array_equal(a.numpy(), b.numpy())}

    alone, found = begin("j-alone"), []
    end_epoch = alone._end_epoch
    alone._end_epoch = lambda: (found.append(changed(alone)), end_epoch())  # type: ignore[method-assign]
    alone.fit()
    assert found[0] == {"logits/kernel", "logits/bias"}
    assert {"Conv1/kernel", "block_1_expand/kernel", "logits/kernel"} < found[1]
    assert not [path for path in found[1] if "moving_" in path]

    for steps in (2, 1, 1):  # in the frozen part, just before it ends, just after
        stopped = begin("j-stopped")
        stopped.resume()
        end = stopped.step + steps

        def then_stop(done: int, training=stopped, end=end) -> None:
            if training.step == end:
                attempt.ask_stop(signal.SIGUSR1, None)

        stopped._report = then_stop  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            stopped.fit()
        attempt._stop["asked"] = False
        assert stopped.step == end
    resumed = begin("j-stopped")
    resumed.fit()
    for a, b in zip(resumed.model.variables, alone.model.variables, strict=True):
        assert np.array_equal(a.numpy(), b.numpy()), a.path


def test_a_job_publishes_a_model_with_its_recipe(tmp_path: Path, write_dataset, new_attempt) -> None:
    weights_in(tmp_path / "weights", weights.OWN)
    job = TrainJob("m-1", write_dataset(tmp_path, images=48), "colours", "transfer", epochs=1, batch_size=12)
    train(job, new_attempt(tmp_path, job))
    recipe = open_artifact(tmp_path, "models/m-1")["recipe"]
    assert (recipe["name"], recipe["network"], recipe["epochs"]) == ("transfer", "mobilenet-v2", 1)
