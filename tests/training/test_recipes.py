"""What a recipe becomes for a job and a Dataset: hyper-parameters, rates, network."""

import keras
import numpy as np
import pytest

from shared import jobs
from shared.datasets import Spec
from shared.jobs import TrainJob
from training import networks
from training.evaluation import new_predict
from training.recipes import RECIPES, SEED_CNN, learning_rate, resolve


def job(**changed: object) -> TrainJob:
    return TrainJob("m-1", "d-1", "name", **changed)


def test_a_large_dataset_takes_the_recipe_as_it_stands() -> None:
    for name, recipe in RECIPES.items():
        assert resolve(job(recipe=name), 40_000) == recipe


def test_a_job_overrides_the_recipe() -> None:
    recipe = resolve(job(recipe="seed-cnn", epochs=2, batch_size=7, learning_rate=0.5, augmentation={"cutout": 8},
                         early_stopping=3), 40_000)
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.early_stopping) == (2, 7, 0.5, 3)
    assert recipe.augmentation == {"cutout": 8}
    assert recipe.optimizer == SEED_CNN.optimizer


@pytest.mark.parametrize("images", [1, 5, 160, 1000, 2048])
def test_a_small_dataset_gets_small_batches_and_a_few_hundred_steps(images: int) -> None:
    recipe = resolve(job(), images)
    assert recipe.batch_size <= images
    assert 300 <= images // recipe.batch_size * recipe.epochs <= 600


def test_the_rate_rises_to_the_recipes_and_falls_to_zero() -> None:
    recipe = RECIPES["small"]
    rates = [learning_rate(recipe, step, 1000) for step in range(1000)]
    top = int(np.flatnonzero(np.array(rates) == max(rates))[-1])
    assert max(rates) == pytest.approx(recipe.learning_rate, rel=0.01)
    assert top == pytest.approx(1000 * recipe.warmup, abs=2)
    assert (np.diff(rates[:top]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    assert 0 < rates[-1] < recipe.learning_rate / 500
    assert learning_rate(recipe, 0, 1) > 0
    assert {learning_rate(SEED_CNN, step, 10) for step in range(10)} == {SEED_CNN.learning_rate}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("size", "classes"), [(32, 10), (33, 2), (64, 3), (100, 5), (224, 200), (256, 3)])
def test_a_network_builds_at_any_size_and_answers_probabilities(recipe: str, size: int, classes: int) -> None:
    spec = Spec(size, tuple(map(str, range(classes))), (0.5, 0.4, 0.3), (0.2, 0.2, 0.0))
    model = networks.build(RECIPES[recipe], spec)
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    probabilities = new_predict(model)(images)
    assert probabilities.shape == (2, classes)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert model.count_params() < 20_000_000


def test_normalisation_is_the_specs_and_inside_the_network() -> None:
    spec = Spec(32, ("a", "b"), (0.5, 0.25, 0.75), (0.25, 0.5, 0.125))
    model = networks.build(RECIPES["small"], spec)
    inside = keras.Model(model.input, model.get_layer("normalise").output)
    got = inside(np.full((1, 32, 32, 3), 255, np.float32)).numpy()[0, 0, 0]
    np.testing.assert_allclose(got, [2, 1.5, 2], rtol=1e-5)


def test_the_names_that_the_api_knows_are_the_recipes() -> None:
    assert tuple(RECIPES) == jobs.RECIPES
