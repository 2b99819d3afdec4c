"""The gate decides by paired outcomes and their uncertainty, then by speed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimization.gate import Z95, Candidate, choose, explain, judge, paired_interval, smallest_split


@st.composite
def pairs(draw):
    b, c = draw(st.integers(0, 200)), draw(st.integers(0, 200))
    return b, c, b + c + draw(st.integers(0 if b + c else 1, 5000))


@given(pairs())
def test_the_interval_holds_the_estimate_and_stays_within_minus_one_and_one(pair):
    b, c, n = pair
    low, high = paired_interval(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert low < high


@given(pairs())
def test_exchanging_the_two_classifiers_mirrors_the_interval(pair):
    b, c, n = pair
    low, high = paired_interval(b, c, n)
    assert paired_interval(c, b, n) == pytest.approx((-high, -low), abs=1e-8)


@given(pairs())
def test_one_more_image_lost_never_lowers_the_upper_end(pair):
    b, c, n = pair
    assert paired_interval(b + 1, c, n + 1)[1] >= paired_interval(b, c, n + 1)[1] - 1e-8


@given(st.integers(1, 10**6))
def test_no_disagreement_at_all_still_leaves_what_so_few_images_can_not_show(n):
    assert paired_interval(0, 0, n)[1] == pytest.approx(Z95**2 / (n + Z95**2), abs=1e-6)


@pytest.mark.parametrize(("b", "c", "n"), [(18, 12, 5000), (7, 3, 900), (1, 0, 200), (40, 2, 300)])
def test_at_each_end_the_score_test_by_brute_force_just_rejects(b, c, n):
    """Tango's statistic with its constrained maximum-likelihood estimate found on a grid instead of in closed form."""
    for end, sign in zip(paired_interval(b, c, n), (1, -1), strict=True):
        shares = np.linspace(max(0, -end), (1 - end) / 2, 2_000_001)[1:-1]
        likelihood = b * np.log(shares + end) + c * np.log(shares) + (n - b - c) * np.log1p(-2 * shares - end)
        share = shares[likelihood.argmax()]
        z = (b - c - n * end) / math.sqrt(n * (2 * share + end - end**2))
        assert z == pytest.approx(sign * Z95, abs=0.02)


def test_many_pairs_give_the_interval_of_the_normal_approximation():
    low, high = paired_interval(150, 86, 1600)  # Agresti's two surveys of the same 1,600 voters: 4 points, 2.1 to 5.9
    assert (low, high) == pytest.approx((0.0213, 0.0587), abs=4e-4)


def scores_of(answers: np.ndarray, sure: float = 0.9) -> np.ndarray:
    scores = np.full((len(answers), 2), 1 - sure, np.float32)
    scores[np.arange(len(answers)), answers] = sure
    return scores


def answers_with(wrong: int, n: int) -> np.ndarray:
    """Answers to n images whose labels are 0, the first `wrong` of them 1."""
    return (np.arange(n) < wrong).astype(int)


def test_a_variant_within_the_budget_passes_and_one_over_it_does_not():
    labels = np.zeros(5000, int)
    keras = scores_of(labels)
    assert judge(keras, scores_of(answers_with(5, 5000)), labels, 0.5).passes
    refused = judge(keras, scores_of(answers_with(20, 5000)), labels, 0.5)
    assert not refused.passes
    assert (refused.loss, refused.keras_only, refused.variant_only) == (0.4, 20, 0)
    assert refused.low < 0.4 < refused.high
    assert "over the budget of 0.5" in refused.reason


def test_images_lost_and_won_alike_are_no_loss_but_widen_the_interval():
    labels = np.zeros(5000, int)
    lost, won = answers_with(40, 5000), np.roll(answers_with(40, 5000), 40)
    verdict = judge(scores_of(lost), scores_of(won), labels, 0.5)
    assert (verdict.loss, verdict.keras_only, verdict.variant_only) == (0, 40, 40)
    assert verdict.high == pytest.approx(100 * Z95 * math.sqrt(80) / 5000, rel=0.03)


def test_a_variant_that_answers_as_keras_up_to_rounding_passes_however_few_the_images():
    labels = np.zeros(20, int)
    verdict = judge(scores_of(labels), scores_of(labels, 0.9001), labels, 0.5)
    assert verdict.passes
    assert (verdict.low, verdict.high) == (0, 0)


def test_few_images_prove_nothing_of_a_variant_that_answers_otherwise_and_the_reason_says_so():
    labels = np.zeros(180, int)
    verdict = judge(scores_of(labels), scores_of(labels, 0.8), labels, 0.5)
    assert not verdict.passes
    assert "180 validation images are too few to show less, 765 could" in verdict.reason


@given(st.floats(0.01, 100))
def test_the_smallest_split_is_the_first_that_can_pass(budget):
    n = smallest_split(budget)
    assert 100 * Z95**2 / (n + Z95**2) <= budget + 1e-9
    assert n == 0 or 100 * Z95**2 / (n - 1 + Z95**2) > budget - 1e-9


@given(st.dictionaries(st.sampled_from("abcde"), st.builds(Candidate, st.floats(1, 1e5), st.floats(0, 1)), min_size=1))
def test_the_winner_is_near_the_fastest_and_none_as_near_is_more_accurate(field):
    winner = field[choose(field)]
    fastest = max(c.rate for c in field.values())
    assert winner.rate >= 0.95 * fastest
    assert all(c.accuracy <= winner.accuracy for c in field.values() if c.rate >= 0.95 * fastest)


def test_within_five_percent_accuracy_wins_and_beyond_it_speed():
    near = {"onnx-fp32": Candidate(96, 0.92), "onnx-int8": Candidate(100, 0.91)}
    far = {"onnx-fp32": Candidate(94, 0.92), "onnx-int8": Candidate(100, 0.91)}
    assert (choose(near), choose(far), choose({})) == ("onnx-fp32", "onnx-int8", None)


def test_every_variant_is_told_why_it_did_or_did_not_win():
    labels = np.zeros(5000, int)
    keras = scores_of(labels)
    verdicts = {"onnx-fp32": judge(keras, keras, labels, 0.5), "litert-fp32": judge(keras, keras, labels, 0.5),
                "litert-int8": judge(keras, scores_of(answers_with(90, 5000)), labels, 0.5)}
    field = {"onnx-fp32": Candidate(50, 1.0), "litert-fp32": Candidate(100, 1.0)}
    why = explain(verdicts, field, "litert-fp32", 8)
    assert why["onnx-fp32"] == "passes, but is slower: 50 images/s at batch 8 against 100 of litert-fp32"
    assert why["litert-fp32"] == "won: passes the gate and is the fastest at batch 8, with 100 images/s"
    assert "over the budget" in why["litert-int8"]


@pytest.mark.parametrize(("int8", "wins"), [
    (Candidate(120, 0.91, 900), True),  # faster
    (Candidate(100, 0.93, 900), True),  # as fast and smaller
    (Candidate(100, 0.93, 1000), False),  # as fast, no smaller
    (Candidate(104, 0.93, 1000), False),  # faster by less than timing shows
    (Candidate(90, 0.93, 900), False),  # slower
])
def test_an_int8_engine_wins_only_if_it_is_faster_than_fp16_or_as_fast_and_smaller(int8, wins):
    field = {"tensorrt-fp16": Candidate(100, 0.92, 1000), "tensorrt-int8": int8, "onnx-int8": Candidate(50, 0.94, 10)}
    assert (choose(field) == "tensorrt-int8") is wins


def test_an_int8_engine_that_gains_nothing_is_told_so_and_hides_no_other():
    labels = np.zeros(5000, int)
    keras = scores_of(labels)
    field = {"tensorrt-fp16": Candidate(100, 0.92, 1000), "tensorrt-int8": Candidate(104, 0.93, 1000)}
    why = explain({name: judge(keras, keras, labels, 0.5) for name in field}, field, "tensorrt-fp16", 8)
    assert "neither faster than tensorrt-fp16 nor as fast and smaller" in why["tensorrt-int8"]
    assert "the fastest at batch 8" in why["tensorrt-fp16"]
