"""What can't work is refused at once with a sentence, before any training."""

from pathlib import Path

import pytest

from shared.errors import NotFound, Refused
from shared.jobs import TrainJob
from training.jobs import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_dataset) -> Path:
    root = tmp_path_factory.mktemp("refusals")
    write_dataset(root, images=120)
    return root


@pytest.mark.parametrize(("changed", "code", "said"), [
    ({"recipe": "resnet"}, "unknown_recipe", "seed-cnn, small"),
    ({"augmentation": {"vertical_flip": True}}, "bad_augmentation", "horizontal_flip, width_shift_range"),
    ({"augmentation": {"rotation_range": 200}}, "bad_augmentation", "degrees, 0 to 180"),
    ({"batch_size": 91}, "bad_batch_size", "90 images"),
    ({"learning_rate": 100.0, "batch_size": 8}, "diverged", "learning_rate below 100"),
], ids=["recipe", "augmentation option", "augmentation value", "batch size", "learning rate"])
def test_a_job_that_can_not_work_is_refused(root: Path, new_attempt, changed: dict, code: str, said: str) -> None:
    job = TrainJob("m-1", "d-120-32-0", "colours", **{"epochs": 1, **changed})
    with pytest.raises(Refused, match=said) as refusal:
        train(job, new_attempt(root, job, f"j-{code}-{len(said)}"))
    assert refusal.value.code == code
    assert not (root / "models").exists()


def test_without_a_gpu_device_gpu_is_refused_with_the_remedy(root: Path, new_attempt) -> None:
    job = TrainJob("m-1", "d-120-32-0", "colours")
    with pytest.raises(Refused, match="DEVICE=cpu") as refusal:
        train(job, new_attempt(root, job, "j-gpu", device="gpu"))
    assert refusal.value.code == "gpu_missing"


def test_an_unknown_dataset_is_not_found(root: Path, new_attempt) -> None:
    job = TrainJob("m-1", "d-other", "colours")
    with pytest.raises(NotFound):
        train(job, new_attempt(root, job, "j-dataset"))
