"""The recipe `accurate`, its network made narrow: its average is what is published, resumes and exports."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from shared import attempt
from shared.artifacts import open_artifact, read_json
from shared.attempt import Attempt, Stopped
from shared.datasets import Dataset, Spec
from shared.jobs import TrainJob
from training import checkpoints, device, fitting, networks, residual, views
from training.jobs import train
from training.recipes import ACCURATE, resolve
from training.steps import Average, fed, new_optimizer, new_step, resident

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning"),
]
SPEC = Spec(32, ("a", "b", "c"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
JOB = TrainJob("m-1", "d-120-32-0", "colours", "accurate", epochs=3,
               augmentation={**ACCURATE.augmentation, "views": True})
STEPS_AN_EPOCH = 11


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "WIDTHS", (8, 16, 16))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_dataset) -> Path:
    root = tmp_path_factory.mktemp("accurate")
    write_dataset(root, images=120)
    return root


def begin(ctx: Attempt, job: TrainJob = JOB, precision: str = "float32") -> fitting.Training:
    device.prepare(ctx.settings)
    dataset = Dataset(ctx.root, job.dataset_id)
    return fitting.Training(dataset, resolve(job, len(dataset.labels("train"))), job.seed, ctx, precision)


class Steps:
    """Steps of eight images, a call each, and what the weights and their average are after each."""

    def __init__(self, make):
        rng = np.random.default_rng(0)
        images, labels = rng.integers(0, 256, (64, 32, 32, 3), np.uint8), rng.integers(0, 3, 64).astype(np.int32)
        recipe = dataclasses.replace(ACCURATE, batch_size=8)
        keras.utils.set_random_seed(1)
        model = networks.build(recipe, SPEC)
        average, totals = Average(model, recipe.average), tf.Variable(tf.zeros([2], tf.float64))
        step = new_step(model, new_optimizer(recipe, model), recipe, SPEC, 1, totals, average=average)
        run = make(step, images, labels)
        self.weights, self.means = [model.get_weights()], []
        for number in range(4):
            run(rng.permutation(64)[None, :8], np.array([0.002], np.float32), number)
            self.weights.append(model.get_weights())
            self.means.append(average.numpy())


@pytest.mark.parametrize("make", [fed, lambda *args: resident(*args, capacity=3)], ids=["fed", "resident"])
def test_the_average_is_the_plain_running_mean_of_all_weights(make) -> None:
    steps = Steps(make)
    expected = steps.weights[0]
    for done, weights in enumerate(steps.weights[1:], 1):
        keep = min(ACCURATE.average, done / (9 + done))
        expected = [keep * mean + (1 - keep) * weight for mean, weight in zip(expected, weights, strict=True)]
        for got, mean in zip(steps.means[done - 1], expected, strict=True):
            np.testing.assert_allclose(got, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [STEPS_AN_EPOCH - 3, STEPS_AN_EPOCH, 2 * STEPS_AN_EPOCH + 5])
def test_a_stopped_training_publishes_the_same_average_bit_for_bit(root: Path, new_attempt, stopped_at_step,
                                                                   step: int) -> None:
    alone = begin(new_attempt(root, JOB, f"j-alone-{step}"))
    alone.fit()
    ctx = stopped_at_step(new_attempt(root, JOB, f"j-{step}"), step)
    ctx.training = begin(ctx)
    with pytest.raises(Stopped):
        ctx.training.fit()
    attempt._stop["asked"] = False
    assert checkpoints.newest(ctx.work)[0]["step"] == step
    resumed = begin(new_attempt(root, JOB, f"j-{step}"))
    resumed.fit()
    times = ("seconds", "cpu_seconds")
    told = [[{k: v for k, v in e.items() if k not in times} for e in t.history] for t in (resumed, alone)]
    assert told[0] == told[1]
    for a, b in zip([*resumed.model.get_weights(), *resumed.average.numpy()],
                    [*alone.model.get_weights(), *alone.average.numpy()], strict=True):
        assert np.array_equal(a, b)


def test_what_is_validated_and_published_is_the_average_in_float32(root: Path, tmp_path: Path, new_attempt) -> None:
    training = begin(new_attempt(root, JOB, "j-average"), dataclasses.replace(JOB, epochs=1), "mixed_bfloat16")
    training.fit()
    for published, mean, last in zip(training.model.get_weights(), training.average.numpy(),
                                     training.trained.get_weights(), strict=True):
        assert np.array_equal(published, mean)
        assert published.dtype == np.float32
        assert not np.array_equal(published, last)
    dataset = training.dataset
    found = training.predict(dataset.images("validation")).argmax(1)
    assert training.published["validation_accuracy"] == (found == dataset.labels("validation")).mean()


def test_a_job_learns_says_what_views_give_and_its_model_goes_to_onnx_folded(root: Path, tmp_path: Path,
                                                                             new_attempt) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    job = dataclasses.replace(JOB, model_id="m-learnt", epochs=15, learning_rate=0.1)
    train(job, new_attempt(root, job, "j-learnt"))
    folder, manifest = root / job.target, open_artifact(root, job.target)
    assert manifest["metrics"]["validation_accuracy"] > 0.8, read_json(folder / "history.json")
    assert manifest["metrics"]["views_accuracy"] > 0.8
    assert manifest["recipe"]["average"] == ACCURATE.average
    model, golden = keras.models.load_model(folder / "model.keras", compile=False), np.load(folder / "golden.npz")
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    images = golden["images"].astype(np.float32)
    np.testing.assert_allclose(model(images), golden["probabilities"], atol=1e-5)
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("Conv") == 10
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: images})[0]
    np.testing.assert_allclose(got, golden["probabilities"], atol=1e-4)


@pytest.mark.parametrize(("size", "begins"), [(32, 32), (63, 63), (64, 32), (100, 50), (224, 56), (256, 32)])
def test_the_stem_makes_larger_images_small(size: int, begins: int) -> None:
    model = networks.build(ACCURATE, dataclasses.replace(SPEC, size=size))
    pools = [layer for layer in model.layers if isinstance(layer, keras.layers.MaxPooling2D)]
    assert pools[0].input.shape[1] == begins


def test_a_batch_of_another_size_learns_at_a_rate_that_goes_with_its_root() -> None:
    assert resolve(JOB, 40_000).learning_rate == ACCURATE.learning_rate
    assert resolve(dataclasses.replace(JOB, batch_size=128), 40_000).learning_rate == ACCURATE.learning_rate / 2
    assert resolve(dataclasses.replace(JOB, batch_size=128, learning_rate=0.3), 40_000).learning_rate == 0.3


def test_views_are_the_weighted_geometric_mean_of_moved_and_mirrored_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    seen = []

    def predict(view: np.ndarray, between: Callable[[], None]) -> np.ndarray:
        seen.append(view)
        return np.full((3, 2), [0.25, 0.75], np.float32) if len(seen) > 1 else np.full((3, 2), [0.75, 0.25], np.float32)

    got = views.answers(predict, images)
    assert np.array_equal(seen[0], images)
    assert np.array_equal(seen[1], images[:, :, ::-1])
    assert np.array_equal(seen[4][:, :-1, :-1], images[:, 1:, 1:])
    assert np.array_equal(seen[2][:, 1:, 1:], images[:, :-1, :-1])
    assert np.array_equal(seen[2][:, 0, 1:], images[:, 1, :-1])
    np.testing.assert_allclose(got, np.full((3, 2), [0.25 * 3**0.25, 0.75 / 3**0.25]), rtol=1e-5)
