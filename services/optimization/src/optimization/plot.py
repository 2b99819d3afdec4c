"""Accuracy against throughput as inline SVG: one mark a row, its 95 % interval, and the band that the budget allows."""

import math
from collections.abc import Iterator
from html import escape
from typing import Any

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 52  # margins
LETTER, LINE = 7.2, 15  # width of a letter and height of a line of the 12 px labels


def plot(rows: list[dict[str, Any]], batch: int, budget: float) -> str:
    """The SVG element. rows: measured rows of a card, the Keras reference first; colours come from the page's CSS."""
    rates = [row["images_per_s"][str(batch)] for row in rows]
    shares = [100 * row["accuracy"] for row in rows]
    reference = shares[0]
    spans = [_span(row, reference) for row in rows]
    across = _ticks(0, 1.15 * max(rates))
    up = _ticks(min([low for low, _ in spans] + [reference - budget]), max(high for _, high in spans))

    def x(rate: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * rate / across[-1]

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (share - up[0]) / (up[-1] - up[0])

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Accuracy against throughput">']
    parts += [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
              f'<text class="tick" x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>' for t in up]
    parts += [f'<text class="tick" x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{t:,g}</text>'
              for t in across]
    parts += [f'<rect class="band" x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" y="{y(reference):.1f}" '
              f'height="{y(reference - budget) - y(reference):.1f}"/>',
              f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
              f'images/s at batch {batch}</text>',
              f'<text class="axis" text-anchor="middle" '
              f'transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">validation accuracy, %</text>']
    taken = [(x(rate) - 7, y(share) - 7, x(rate) + 7, y(share) + 7) for rate, share in zip(rates, shares, strict=True)]
    for row, rate, share, (low, high) in zip(rows, rates, shares, spans, strict=True):
        kind = kind_of(row)
        if high > low:
            parts.append(f'<line class="span {kind}" x1="{x(rate):.1f}" x2="{x(rate):.1f}" '
                         f'y1="{y(low):.1f}" y2="{y(high):.1f}"/>')
        radius = 7 if kind == "winner" else 5
        parts.append(f'<circle class="mark {kind}" cx="{x(rate):.1f}" cy="{y(share):.1f}" r="{radius}"/>')
        name = row["variant"]
        box = _free_box(x(rate), y(share), LETTER * len(name), taken)
        taken.append(box)
        parts.append(f'<text class="label {kind}" x="{box[0]:.1f}" y="{box[3] - 4:.1f}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def kind_of(row: dict[str, Any]) -> str:
    """reference, winner, passes, refused or failed: what a row is on the page."""
    if row["state"] == "failed":
        return "failed"
    if "gate" not in row:
        return "reference"
    return "winner" if row["winner"] else "passes" if row["gate"]["passes"] else "refused"


def _span(row: dict[str, Any], reference: float) -> tuple[float, float]:
    """The 95 % interval of a Variant's accuracy given Keras's: the accuracy of Keras less the interval of the loss."""
    if "gate" not in row:
        return reference, reference
    return reference - row["gate"]["high"], reference - row["gate"]["low"]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose low..high, about five of them, at least two."""
    rough = max(high - low, 1e-3) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 10) for k in range(first, max(last, first + 1) + 1)]


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _free_box(x: float, y: float, width: float, taken: list[Box]) -> Box:
    """Where a label near (x, y) covers nothing; the first place tried, where none is free."""
    places = list(_places(x, y, width))
    inside = [p for p in places if p[0] >= LEFT and p[2] <= WIDTH and p[1] >= TOP and p[3] <= HEIGHT - BOTTOM]
    return next((p for p in inside if not any(_overlap(p, t) for t in taken)), places[0])


def _places(x: float, y: float, width: float) -> Iterator[Box]:
    for down in (0, -LINE, LINE, -2 * LINE, 2 * LINE, -3 * LINE, 3 * LINE):
        for left in (x + 11, x - 11 - width):
            yield left, y + down - LINE / 2, left + width, y + down + LINE / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
