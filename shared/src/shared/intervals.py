"""Intervals of shares: what few images can tell."""

import math

Z95 = 1.959963984540054  # two-sided 95 %


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of n >= 1 images (Wilson, Journal of the American Statistical Association 22, 1927)."""
    centre, spread = right + Z95**2 / 2, Z95 * math.sqrt(right * (n - right) / n + Z95**2 / 4)
    return max(0.0, (centre - spread) / (n + Z95**2)), min(1.0, (centre + spread) / (n + Z95**2))
