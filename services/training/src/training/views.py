"""Answers from several views of each image: for a figure beside the Model's own, which sees one."""

from collections.abc import Callable

import numpy as np

from training.evaluation import Predict

CHUNK = 2048  # images at a time: there are as many copies of them as views
VIEWS = ((0, 0, 0.5), (-1, -1, 0.25), (1, 1, 0.25))  # pixels down, pixels right, weight; each as it is and mirrored


def answers(predict: Predict, images: np.ndarray, between: Callable[[], None] = lambda: None) -> np.ndarray:
    """The geometric mean over six views, not normalised: images uint8 [N, S, S, 3] -> float32 [N, K].

    airbench's views: the image and two moved by a pixel, its edge reflected, half of the weight mirrored. The geometric
    mean of probabilities is what the mean of the logits gives. between: called now and then.
    """
    return np.concatenate([_answers(predict, images[at:at + CHUNK], between) for at in range(0, len(images), CHUNK)])


def _answers(predict: Predict, images: np.ndarray, between: Callable[[], None]) -> np.ndarray:
    size, total = images.shape[1], np.float32(0)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    for down, right, weight in VIEWS:
        moved = padded[:, 1 + down:1 + down + size, 1 + right:1 + right + size]
        for view in (moved, moved[:, :, ::-1]):
            total = total + np.float32(weight / 2) * np.log(np.maximum(predict(view, between), 1e-30))
    return np.exp(total)
