"""Which Variant may serve: the loss of accuracy against Keras, paired per image, and then the speed. Pure functions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared.intervals import Z95

SAME_FUNCTION = 1e-3  # probabilities this near are rounding apart: the tolerance of an fp32 export
NEAR = 0.05  # rates within 5 % of the fastest count as equally fast
METHOD = "Tango's score interval for the difference of paired proportions, 95 % (Statistics in Medicine 17, 1998)"


@dataclass(frozen=True)
class Verdict:
    """Loss of validation accuracy against Keras in points, with its 95 % interval, and what the gate says of it."""

    passes: bool
    loss: float
    low: float
    high: float
    keras_only: int  # images that Keras alone has right
    variant_only: int
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A Variant that passed: images/s at the batch size that ranks, validation accuracy 0..1, and its size in bytes."""

    rate: float
    accuracy: float
    bytes: int = 0


def paired_interval(b: int, c: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference (b - c) / n of two paired proportions, by inverting Tango's score test.

    b and c count the pairs in which only the first, only the second, is right, of n >= 1 pairs. Without any such pair
    it is [-z^2 / (n + z^2), z^2 / (n + z^2)], not a point: few images prove little.
    """
    return -_upper(c, b, n), _upper(b, c, n)


def _upper(b: int, c: int, n: int) -> float:
    """Largest difference that the score test does not reject, by bisection to 1e-9."""
    low, high = (b - c) / n, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _score(b, c, n, middle) > -Z95:
            low = middle
        else:
            high = middle
    return high


def _score(b: int, c: int, n: int, difference: float) -> float:
    """Tango's statistic: its variance takes the maximum-likelihood share of c-pairs under the tested difference."""
    quadratic = -b - c + (2 * n - b + c) * difference
    share = (math.sqrt(quadratic**2 + 8 * n * c * difference * (1 - difference)) - quadratic) / (4 * n)
    variance = n * (2 * share + difference * (1 - difference))
    distance = b - c - n * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def judge(reference: np.ndarray, scores: np.ndarray, labels: np.ndarray, budget: float) -> Verdict:
    """Whether a Variant's loss is within the budget.

    reference, scores: float32 [N, K] probabilities of Keras and of the Variant on the validation split, in the same
    order; labels: int [N]; budget in points. A Variant that gives every label that Keras gives, with probabilities
    that rounding explains, is the same classifier: its loss is 0 however few the images.
    """
    keras, variant = reference.argmax(1) == labels, scores.argmax(1) == labels
    n, b, c = len(labels), int((keras & ~variant).sum()), int((variant & ~keras).sum())
    near = float(np.abs(reference - scores).max()) <= SAME_FUNCTION
    same = near and bool((reference.argmax(1) == scores.argmax(1)).all())
    low, high = (0.0, 0.0) if same else (100 * end for end in paired_interval(b, c, n))
    passes = high <= budget
    if same:
        reason = f"answers as Keras does on all {n} validation images, to within rounding"
    elif passes:
        reason = f"loses at most {high:.2f} points (95 % interval), within the budget of {budget:g}"
    else:
        reason = f"may lose {high:.2f} points (upper end of the 95 % interval), over the budget of {budget:g}"
        least = smallest_split(budget)
        if least is None or n < least:
            reason += f"; {n} validation images are too few to show less" + (f", {least} could" if least else "")
    return Verdict(passes, 100 * (b - c) / n, low, high, b, c, reason)


def smallest_split(budget: float) -> int | None:
    """Images needed before an interval without any disagreement fits the budget (points); None where none suffices."""
    return math.ceil(Z95**2 * (100 / budget - 1)) if budget > 0 else None


def choose(candidates: Mapping[str, Candidate]) -> str | None:
    """The fastest that passed; among those within 5 % of it the most accurate, then the faster; None of none.

    A tensorrt-int8 that `gains_nothing` over the fp16 engine is left out.
    """
    field = {name: c for name, c in candidates.items() if not gains_nothing(name, candidates)}
    if not field:
        return None
    fastest = max(c.rate for c in field.values())
    near = [name for name, c in field.items() if c.rate >= (1 - NEAR) * fastest]
    return max(near, key=lambda name: (field[name].accuracy, field[name].rate, name))


def gains_nothing(name: str, candidates: Mapping[str, Candidate]) -> bool:
    """Whether this is the int8 engine, and the fp16 one passed and is as fast (within 5 %) and no larger, or faster."""
    half = candidates.get("tensorrt-fp16")
    if name != "tensorrt-int8" or half is None:
        return False
    mine = candidates[name]
    faster = mine.rate * (1 - NEAR) > half.rate
    as_fast = mine.rate >= (1 - NEAR) * half.rate
    return not (faster or (as_fast and mine.bytes < half.bytes))


def explain(verdicts: Mapping[str, Verdict], candidates: Mapping[str, Candidate], winner: str | None,
            batch: int) -> dict[str, str]:
    """A sentence for each judged Variant: why it won, or why it did not."""
    return {name: _why(name, candidates, winner, batch) if verdict.passes and winner else verdict.reason
            for name, verdict in verdicts.items()}


def _why(name: str, candidates: Mapping[str, Candidate], winner: str, batch: int) -> str:
    mine, best = candidates[name], candidates[winner]
    fastest = max(c.rate for other, c in candidates.items() if not gains_nothing(other, candidates))
    if name == winner:
        rank = "the fastest" if mine.rate == fastest else "within 5 % of the fastest and the most accurate of those"
        return f"won: passes the gate and is {rank} at batch {batch}, with {mine.rate:,.0f} images/s"
    rates = f"{mine.rate:,.0f} images/s at batch {batch} against {best.rate:,.0f} of {winner}"
    if gains_nothing(name, candidates):
        half = candidates["tensorrt-fp16"]
        return (f"passes, but is neither faster than tensorrt-fp16 nor as fast and smaller: {mine.rate:,.0f} images/s "
                f"at batch {batch} and {mine.bytes:,} bytes against {half.rate:,.0f} and {half.bytes:,}")
    if mine.rate < (1 - NEAR) * fastest:
        return f"passes, but is slower: {rates}"
    if mine.accuracy < best.accuracy:
        return f"passes, but is less accurate than {winner} at about the same speed: {rates}"
    return f"passes, but is a little slower than {winner} at the same accuracy: {rates}"
