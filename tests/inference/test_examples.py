import io

import numpy as np
import pytest
from PIL import Image

from shared import artifacts


@pytest.fixture
def dataset(root):
    """Two test images, the second of the label 'rosé 1'."""
    staging = artifacts.stage(root, "j-test")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.save(staging / "test.npy", images)
    np.save(staging / "test.labels.npy", np.array([0, 1], np.int32))
    spec = {"size": 32, "labels": ["iris", "rosé 1"], "mean": [0.5] * 3, "std": [0.25] * 3}
    artifacts.publish(root, staging, "datasets/d-1", {"spec": spec, "summary": {}})
    return images


def test_an_image_of_a_split_comes_as_a_png_with_its_label(client, dataset):
    answer = client.get("/v1/datasets/d-1/images/test/1")
    assert (answer.status_code, answer.mimetype, answer.headers["X-Label"]) == (200, "image/png", "ros%C3%A9%201")
    with Image.open(io.BytesIO(answer.data)) as image:
        assert np.array_equal(np.asarray(image), dataset[1])


@pytest.mark.parametrize("path", ["d-1/images/test/2", "d-1/images/holdout/0", "d-2/images/test/0"])
def test_an_image_that_is_not_there_is_404(client, dataset, path):
    answer = client.get(f"/v1/datasets/{path}")
    assert (answer.status_code, answer.json["error"]["code"]) == (404, "not_found")
