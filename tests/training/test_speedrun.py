"""`speedrun` end to end on the CPU, slowly: the job, its Model, stop and resume, what it refuses."""

import dataclasses
import json
import math
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from shared import attempt
from shared.artifacts import open_artifact
from shared.attempt import Attempt, Stopped
from shared.datasets import Dataset, Spec
from shared.errors import Refused
from shared.jobs import TrainJob
from training import checkpoints, device
from training.jobs import train
from training.recipes import SPEEDRUN, resolve
from training.speedrun import network, program
from training.speedrun.fitting import Speedrun
from training.speedrun.network import Layout
from training.yielding import Yielding

pytestmark = [
    # Keras 3.15 saves variables through an __array__ without NumPy 2's copy keyword, and asks NumPy for `np.object`.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning"),
]
MOVED = {"width_shift_range": 2, "height_shift_range": 2, "horizontal_flip": True}
JOB = TrainJob("m-1", "d-120-32-0", "colours", "speedrun", 2, 10, augmentation=MOVED | {"views": True})
STEPS = 9  # an epoch: 90 training images


@pytest.fixture(autouse=True)
def _nobody_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attempt._stop, "asked", False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_dataset) -> Path:
    root = tmp_path_factory.mktemp("speedrun")
    write_dataset(root, images=120)
    return root


@pytest.fixture(scope="module")
def published(root: Path, new_attempt) -> Path:
    train(JOB, new_attempt(root, JOB))
    return root / "models" / "m-1"


def begin(ctx: Attempt, job: TrainJob) -> Speedrun:
    device.prepare(ctx.settings)
    dataset = Dataset(ctx.root, job.dataset_id)
    return Speedrun(dataset, resolve(job, len(dataset.labels("train"))), job.seed, ctx)


def test_a_job_publishes_a_whole_model_that_has_learnt(published: Path) -> None:
    manifest = open_artifact(published.parents[1], "models/m-1")
    history = json.loads((published / "history.json").read_bytes())
    assert [(entry["epoch"], entry["step"]) for entry in history] == [(1, STEPS), (2, 2 * STEPS)]
    assert history[0]["learning_rate"] > history[-1]["learning_rate"] > 0
    assert history[0]["loss"] > history[-1]["loss"]
    assert manifest["metrics"]["validation_accuracy"] == history[-1]["validation_accuracy"] > 0.9
    assert manifest["metrics"]["views_accuracy"] > 0.9
    assert (manifest["precision"], manifest["recipe"]["name"]) == ("float32", "speedrun")
    cells = np.array(json.loads((published / "confusion.json").read_bytes())["cells"])
    assert cells[cells[:, 0] == cells[:, 1], 2].sum() / cells[:, 2].sum() == history[-1]["validation_accuracy"]
    assert any(name.startswith("logs/events.out.tfevents") for name in manifest["files"])


def test_the_model_is_plain_keras_and_goes_to_onnx_with_its_normalisation_folded(published: Path,
                                                                                 tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = keras.models.load_model(published / "model.keras")
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    golden = np.load(published / "golden.npz")
    images = golden["images"].astype(np.float32)
    np.testing.assert_allclose(model(images), golden["probabilities"], atol=1e-5)
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "BatchNormalization" not in kinds
    assert (kinds.count("Conv"), kinds.count("Transpose")) == (7, 1)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: images})[0]
    np.testing.assert_allclose(got, golden["probabilities"], atol=1e-5)


@pytest.mark.parametrize("step", [0, STEPS + 2])
def test_stopped_and_resumed_equals_uninterrupted(root: Path, published: Path, new_attempt, stopped_at_step,
                                                 step: int) -> None:
    stopping = stopped_at_step(new_attempt(root, JOB, f"j-{step}"), step)
    stopped = stopping.training = begin(stopping, JOB)
    with pytest.raises(Stopped):
        stopped.fit()
    attempt._stop["asked"] = False
    assert checkpoints.newest(stopping.work)[0]["step"] == step
    resumed = begin(new_attempt(root, JOB, f"j-{step}"), JOB)
    resumed.fit()
    history = json.loads((published / "history.json").read_bytes())
    for entry, alone in zip(resumed.history, history, strict=True):
        times = ("seconds", "cpu_seconds")
        assert {k: v for k, v in entry.items() if k not in times} == {k: v for k, v in alone.items() if k not in times}
    alone = keras.models.load_model(published / "model.keras")
    for a, b in zip(resumed.model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("changed", "sentence"), [
    ({"augmentation": {"rotation_range": 15}}, "no augmentation 'rotation_range'"),
    ({"augmentation": {"width_shift_range": "far"}}, "width_shift_range is 'far'"),
    ({"augmentation": {"width_shift_range": 32}}, "by 32: expected less"),
    ({"augmentation": {"views": 6}}, "views is 6: expected true or false"),
    ({"early_stopping": 2}, "leave early_stopping out"),
])
def test_what_it_can_t_do_is_refused_with_a_way_out(root: Path, new_attempt, changed, sentence: str) -> None:
    job = dataclasses.replace(JOB, **changed)
    with pytest.raises(Refused, match=sentence):
        begin(new_attempt(root, job, f"j-{'-'.join(changed)}-{len(sentence)}"), job)


def test_images_that_fill_the_gpu_are_refused(tmp_path: Path, write_dataset, new_attempt) -> None:
    job = dataclasses.replace(JOB, dataset_id=write_dataset(tmp_path, images=600))
    ctx = new_attempt(tmp_path, job, device="gpu", gpu_memory_mib=2)
    dataset = Dataset(tmp_path, job.dataset_id)
    with pytest.raises(Refused, match="1 MiB, and may take 1 MiB for them: take another recipe, or prepare smaller"):
        Speedrun(dataset, resolve(job, 450), 0, ctx)


def small_part(changes: dict[str, object], *args: object) -> list[np.ndarray]:
    """What one step of 4 images of two classes tells, how far it moves each weight, the statistics behind it."""
    spec = Spec(32, ("a", "b"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    plan = program.Plan(Layout.of(spec), dataclasses.replace(SPEEDRUN, batch_size=4, epochs=2),
                        *program.channel_scale(spec), (2, 2), True, 2, **changes)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (8, 32, 32, 3), np.uint8), np.array([0, 1] * 4, np.int32)
    state = program.begin(*network.initial(plan.layout, rng))
    first_layer = tf.constant(rng.normal(0, 0.3, (2, 2, 3, 24)), tf.float32)
    part = program.new_part(plan, tf.constant(images), tf.constant(labels), 1, True, *args)
    after, sums = part(state, first_layer, *map(tf.constant, (0, 0, 1)))
    moved = tf.nest.map_structure(lambda a, b: (a - b).numpy(), after.weights, state.weights)
    return [sums.numpy(), *moved, *(s.numpy() for s in after.running)]


def test_an_image_counts_in_the_loss_what_its_class_does() -> None:
    weights = [None, np.array([1, 0], np.float32), np.array([0, 3], np.float32)]
    alike, first, second = (small_part({}, w)[0][0] for w in weights)
    assert 0 < first < alike
    assert first + second / 3 == pytest.approx(alike, rel=1e-5)


def test_under_xla_a_part_is_what_it_is_without() -> None:
    """In float32; of 4 images, since XLA computes convolutions slowly on a CPU. In float16 nearly the same."""
    plain = small_part({})
    for tolerance, changes in ((0.02, {"xla": True}), (0.1, {"xla": True, "dtype": tf.float16})):
        for a, b in zip(plain, small_part(changes), strict=True):
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)


class Looked(Yielding):
    """That predictions are too slow it has been told for good; looks at what is on the device when it pauses."""

    def __init__(self, training: Speedrun):
        super().__init__(training.ctx.settings)
        self._p99_ms, self._slow_until, self._training, self.waiting = 21.0, math.inf, training, []

    def give_way(self, check) -> None:
        self.waiting.append(len(self._training._waiting))
        super().give_way(check)


def test_it_pauses_for_predictions_with_nothing_left_on_the_device(root: Path, new_attempt, monkeypatch) -> None:
    training = begin(new_attempt(root, JOB, "j-yields"), JOB)
    training.yielding = yielding = Looked(training)
    told: list[dict] = []
    monkeypatch.setattr(training.ctx, "report", lambda *args, **metrics: told.append(metrics))
    training.fit()
    assert yielding.waiting == [0] * 2 * STEPS
    assert told[-1]["yielded_s"] > 0
