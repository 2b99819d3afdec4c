"""What production and candidate of a Name answered to the same images, since one of the two aliases moved."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from inference.loaded import Served
from shared.artifacts import now
from shared.intervals import wilson

RECENT = 4096  # runs of each side whose time is kept
Pair = tuple[dict[str, Any], str, dict[str, Any], str]  # alias as it was read and digest, of production, of candidate
Run = tuple[float, int]  # milliseconds, images


def pair_of(live: Served, candidate: Served) -> Pair:
    return live.record, live.loaded.digest, candidate.record, candidate.loaded.digest


def _recent() -> deque[Run]:
    return deque(maxlen=RECENT)


@dataclass
class Comparison:
    """`confusion` counts images by (production's label, candidate's). Not safe to share among threads."""

    pair: Pair | None
    since: str = field(default_factory=now)
    images: int = 0
    dropped: int = 0
    failed: int = 0
    confusion: Counter[tuple[str, str]] = field(default_factory=Counter)
    production: deque[Run] = field(default_factory=_recent)
    candidate: deque[Run] = field(default_factory=_recent)

    def add(self, pairs: Sequence[tuple[str, str]], candidate: Run) -> None:
        self.images += len(pairs)
        self.confusion.update(pairs)
        self.candidate.append(candidate)

    def add_up(self, other: "Comparison") -> None:
        """What another process found of the same pair."""
        self.since = min(self.since, other.since)
        self.images += other.images
        self.dropped += other.dropped
        self.failed += other.failed
        self.confusion.update(other.confusion)
        self.production.extend(other.production)
        self.candidate.extend(other.candidate)

    def copy(self) -> "Comparison":
        """To be told while the other one goes on."""
        return replace(self, confusion=self.confusion.copy(), production=self.production.copy(),
                       candidate=self.candidate.copy())

    def told(self) -> dict[str, Any]:
        """As JSON; the interval of the rate has 95 % and is None before the first image."""
        differ = sum(n for (a, b), n in self.confusion.items() if a != b)
        rows = sorted(self.confusion.items(), key=lambda entry: (-entry[1], entry[0]))
        return {"since": self.since, "mirrored": self.images, "dropped": self.dropped, "failed": self.failed,
                "disagreements": differ, "rate": round(differ / self.images, 6) if self.images else None,
                "interval": [round(end, 6) for end in wilson(differ, self.images)] if self.images else None,
                "confusion": [{"production": a, "candidate": b, "images": n} for (a, b), n in rows],
                "run_ms": {"production": _latency(self.production), "candidate": _latency(self.candidate)}}


def _latency(runs: Sequence[Run]) -> dict[str, Any] | None:
    if not runs:
        return None
    p50, p99 = np.percentile([ms for ms, _ in runs], (50, 99))
    return {"p50": round(float(p50), 4), "p99": round(float(p99), 4), "runs": len(runs),
            "images_per_run": round(sum(images for _, images in runs) / len(runs), 2)}
