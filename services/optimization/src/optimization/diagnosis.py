"""What a classifier's scores on images it did not train on tell of it and of the dataset. Pure functions of NumPy.

Everywhere scores are float32 [N, K], probabilities; labels int [N].
"""

import math
from typing import Any

import numpy as np

from shared.intervals import wilson

LEVELS = 256  # of int8
BINS = 15  # of confidence, as in Guo et al.
SHOWN = 12  # images of each kind on the card
HOTTEST, COLDEST = 20.0, 0.05  # temperatures
ENOUGH = 2_000_000  # scores that a temperature is looked for among: of 1,000 classes 2,000 images, for one number


def diagnose(scores: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Everything below, as a card keeps it."""
    return {"calibration": calibration(scores, labels), "per_class": per_class(scores, labels, names),
            "mistakes": mistakes(scores, labels, names), "label_errors": label_errors(scores, labels, names)}


def calibration(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How far confidence is from accuracy, and the temperature that would bring them together.

    ece: expected calibration error, 0..1, over 15 equally wide bins of confidence; temperature: by which logits are to
    be divided, above 1 for an overconfident classifier; ece_scaled: with each half of the images scaled by the
    temperature of the other half, so that it is no promise on the images it was fitted to. bins: of those with images,
    [images, mean confidence, accuracy]. Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    ece, bins = calibration_error(scores, labels)
    known: dict[str, Any] = {"images": len(labels), "ece": ece, "bins": bins,
                             "temperature": temperature(scores, labels)}
    if len(labels) > 1:
        scaled = np.array(scores, np.float64)
        for half, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            scaled[half] = scaled_by(scores[half], temperature(scores[other], labels[other]))
        known["ece_scaled"] = calibration_error(scaled, labels)[0]
    return known


def calibration_error(scores: np.ndarray, labels: np.ndarray) -> tuple[float, list[list[float]]]:
    """(ECE, [[images, mean confidence, accuracy]] of each bin that has images)."""
    confidence, right = scores.max(1).astype(np.float64), scores.argmax(1) == labels
    at = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # bins (low, high], as Guo et al.
    bins = [[int((at == b).sum()), float(confidence[at == b].mean()), float(right[at == b].mean())]
            for b in range(BINS) if (at == b).any()]
    return sum(n * abs(sure - share) for n, sure, share in bins) / len(labels), bins


def temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The T of least cross-entropy of `scaled_by(scores, T)`, by golden section over log T, to 0.1 %.

    Cross-entropy has one minimum in 1/T, so none is missed within 0.05..20. Of more than ENOUGH scores every second
    image, or third, ..., is taken.
    """
    step = -(-scores.size // ENOUGH)
    scores, labels = scores[::step], labels[::step]
    logs = _logs(scores)

    def loss(log_t: float) -> float:
        scaled = logs / math.exp(log_t)
        top = scaled.max(1, keepdims=True)
        sums = top[:, 0] + np.log(np.exp(scaled - top).sum(1))
        return float((sums - scaled[np.arange(len(labels)), labels]).mean())

    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(COLDEST), math.log(HOTTEST)
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    while high - low > 1e-3:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return math.exp((low + high) / 2)


def scaled_by(scores: np.ndarray, t: float) -> np.ndarray:
    """float64 [N, K]: the softmax of logits / t, from probabilities, whose logarithms are logits up to a constant."""
    logs = _logs(scores) / t
    powers = np.exp(logs - logs.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _logs(scores: np.ndarray) -> np.ndarray:
    """float64 logarithms of probabilities. Of an int8 network, which gives 256 different ones, a 0 is taken for half of
    the smallest that is none: one wrong 0 as a tiny number would outweigh all other answers.
    """
    known = scores.astype(np.float64)
    rounded = len(np.unique(known)) <= LEVELS < known.size
    return np.asarray(np.log(np.maximum(known, known[known > 0].min(initial=1.0) / 2 if rounded else 1e-30)))


def per_class(scores: np.ndarray, labels: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """Recall with its 95 % interval and precision of each class; None where there is nothing to divide by."""
    found, rows = scores.argmax(1), []
    for k, name in enumerate(names):
        images, named = int((labels == k).sum()), int((found == k).sum())
        right = int(((labels == k) & (found == k)).sum())
        low, high = wilson(right, images) if images else (None, None)
        rows.append({"label": name, "images": images, "recall": right / images if images else None, "low": low,
                     "high": high, "precision": right / named if named else None})
    return rows


def mistakes(scores: np.ndarray, labels: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """The wrong answers given with the most confidence, at most 12: image is its number in the split."""
    found = scores.argmax(1)
    wrong = np.flatnonzero(found != labels)
    chosen = wrong[np.argsort(-scores[wrong, found[wrong]], kind="stable")][:SHOWN]
    return [_named(scores, labels, names, i) for i in chosen]


def label_errors(scores: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Images whose label is probably wrong, the surest first: how many of them, and at most 12.

    By confident learning: an image labelled i is suspected when its highest score among the classes j whose threshold
    it reaches is not that of i; j's threshold is the mean score of j over the images labelled j. Ranked by the score of
    their own label, lowest first. Northcutt, Jiang, Chuang, Confident Learning: Estimating Uncertainty in Dataset
    Labels, Journal of Artificial Intelligence Research 70, 2021, sections 3.1 and 3.2. As in their cleanlab, an image
    that gets its label as the answer is never suspected.
    """
    classes = scores.shape[1]
    own = scores[np.arange(len(labels)), labels]
    threshold = np.array([own[labels == k].mean() if (labels == k).any() else np.inf for k in range(classes)])
    reached = np.where(scores >= threshold, scores, -1.0)
    suspected = np.flatnonzero((reached.max(1) >= 0) & (reached.argmax(1) != labels) & (scores.argmax(1) != labels))
    order = suspected[np.argsort(own[suspected], kind="stable")]
    return {"suspected": len(suspected), "images": [_named(scores, labels, names, i) for i in order[:SHOWN]]}


def _named(scores: np.ndarray, labels: np.ndarray, names: list[str], i: int) -> dict[str, Any]:
    found = int(scores[i].argmax())
    return {"image": int(i), "label": names[labels[i]], "found": names[found], "confidence": float(scores[i, found]),
            "of_label": float(scores[i, labels[i]])}
