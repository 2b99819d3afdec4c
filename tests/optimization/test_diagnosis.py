"""What is diagnosed of a classifier's scores, against plain counting and known truths."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimization.diagnosis import (
    calibration,
    calibration_error,
    diagnose,
    label_errors,
    mistakes,
    per_class,
    scaled_by,
    temperature,
)
from shared.intervals import wilson

NAMES = ["a", "b", "c"]


def drawn(count, sharpness=1.0, seed=0):
    """Scores of a calibrated classifier (labels are drawn from them), made `sharpness` times as sure of itself."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, 3))
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(3, p=p) for p in true])
    powers = np.exp(sharpness * logits)
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32), labels


def test_the_calibration_error_is_the_mean_distance_of_confidence_and_accuracy_over_bins():
    scores, labels = drawn(500, 2.0)
    expected, bins = 0.0, []
    for low in range(15):
        inside = [i for i in range(500) if low / 15 < scores[i].max() <= (low + 1) / 15]
        if inside:
            confidence = sum(float(scores[i].max()) for i in inside) / len(inside)
            right = sum(int(scores[i].argmax()) == labels[i] for i in inside) / len(inside)
            expected += len(inside) / 500 * abs(confidence - right)
            bins.append([len(inside), confidence, right])
    ece, found = calibration_error(scores, labels)
    assert ece == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(found, bins, atol=1e-9)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 2.5])
def test_the_temperature_undoes_what_made_the_scores_too_sure_or_too_unsure(sharpness):
    scores, labels = drawn(20_000, sharpness)
    assert temperature(scores, labels) == pytest.approx(sharpness, rel=0.05)
    found = calibration(scores, labels)
    assert found["ece_scaled"] < 0.02
    if sharpness != 1.0:
        assert found["ece"] > 0.05


def test_the_temperature_is_where_the_cross_entropy_is_least():
    scores, labels = drawn(300, 1.7, seed=4)
    best = temperature(scores, labels)

    def loss(t):
        return -np.log(scaled_by(scores, t)[np.arange(300), labels]).mean()

    assert all(loss(best) <= loss(best * factor) for factor in (0.9, 0.99, 1.01, 1.1))


def test_scaling_by_one_changes_nothing_and_a_certain_answer_stays_finite():
    scores = np.array([[1, 0, 0], [0.2, 0.3, 0.5]], np.float32)
    np.testing.assert_allclose(scaled_by(scores, 1.0), scores, atol=1e-7)
    found = diagnose(scores, np.array([1, 2]), NAMES)
    assert math.isfinite(found["calibration"]["ece"])
    assert math.isfinite(found["calibration"]["temperature"])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_s_ends_are_the_shares_that_the_score_test_just_accepts(pair):
    right, n = pair
    for end in wilson(right, n):
        if 0 < end < 1:
            assert abs(right / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959964, rel=1e-5)
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1


def test_recall_and_precision_are_those_of_counting_and_an_empty_class_has_none():
    labels, found = np.array([0, 0, 0, 1, 1]), [0, 0, 1, 1, 0]
    rows = per_class(np.eye(3, dtype=np.float32)[found], labels, NAMES)
    assert [(r["label"], r["images"], r["recall"], r["precision"]) for r in rows] == [
        ("a", 3, 2 / 3, 2 / 3), ("b", 2, 1 / 2, 1 / 2), ("c", 0, None, None)]
    assert rows[2]["low"] is None


def test_the_most_confident_mistakes_come_first_and_right_answers_never():
    scores, labels = drawn(400, 2.0, seed=1)
    listed = mistakes(scores, labels, NAMES)
    wrong = sorted((float(scores[i].max()) for i in range(400) if scores[i].argmax() != labels[i]), reverse=True)
    assert [e["confidence"] for e in listed] == wrong[:12]
    for entry in listed:
        i = entry["image"]
        assert (entry["label"], entry["found"]) == (NAMES[labels[i]], NAMES[scores[i].argmax()])
        assert entry["of_label"] == float(scores[i, labels[i]])


def test_planted_wrong_labels_are_found_and_hardly_any_right_one():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 600)
    scores = np.full((600, 3), 0.05, np.float32)
    scores[np.arange(600), truth] = 0.9
    labels, planted = truth.copy(), rng.permutation(600)[:30]
    labels[planted] = (truth[planted] + 1) % 3
    found = label_errors(scores, labels, NAMES)
    assert found["suspected"] == 30
    assert {e["image"] for e in found["images"]} <= set(planted.tolist())
    assert label_errors(scores, truth, NAMES) == {"suspected": 0, "images": []}


def test_an_unsure_classifier_does_not_accuse_its_labels():
    scores, labels = drawn(2000)
    found = label_errors(scores, labels, NAMES)
    assert found["suspected"] < int((scores.argmax(1) != labels).sum())


def test_scores_of_an_int8_network_give_the_temperature_of_those_they_were_rounded_from():
    scores, labels = drawn(4000, sharpness=2.0)
    rounded = np.round(scores * 256).clip(0, 255).astype(np.float32) / 256
    assert (rounded == 0).mean() > 0.2
    assert temperature(rounded, labels) == pytest.approx(temperature(scores, labels), rel=0.25)
