"""What each model was asked since the process started, and where the time went; of every route that predicts.

Counters are in the memory of each process of the API; who tells them adds them up.
"""

import copy
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import takewhile
from typing import Any

from inference.batch import Answer, Run

RECENT = 20_000  # requests whose time is kept
Model = tuple[str, int]  # what clients call it, NAME or NAME@ALIAS; the version that answers


@dataclass
class Sum:
    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


@dataclass
class Batches:
    """Runs of one size; input and output are what the requests in them took to decode and to encode."""

    input: Sum = field(default_factory=Sum)
    infer: Sum = field(default_factory=Sum)
    output: Sum = field(default_factory=Sum)


@dataclass
class Figures:
    """Of one Model. `executions` are runs of the Session: a run that serves several Models counts for one of them.

    A request that ran in a batch adds the whole batch's time to `infer`.
    """

    last_ms: int = 0
    images: int = 0
    executions: int = 0
    pending: int = 0
    success: Sum = field(default_factory=Sum)
    fail: Sum = field(default_factory=Sum)
    queue: Sum = field(default_factory=Sum)
    input: Sum = field(default_factory=Sum)
    infer: Sum = field(default_factory=Sum)
    output: Sum = field(default_factory=Sum)
    batches: dict[int, Batches] = field(default_factory=dict)

    def of_size(self, size: int) -> Batches:
        found = self.batches.get(size)
        if found is None:
            found = self.batches[size] = Batches()
        return found


def added_up(parts: Iterable[dict[Model, Figures]]) -> dict[Model, Figures]:
    """What several processes counted."""
    total: dict[Model, Figures] = {}
    for part in parts:
        for model, figures in part.items():
            before = total.get(model, Figures())
            total[model] = replace(_plus(before, figures), last_ms=max(before.last_ms, figures.last_ms))
    return total


def _plus(a: Any, b: Any) -> Any:
    """Of two numbers, dictionaries or dataclasses of them."""
    match a:
        case int():
            return a + b
        case dict():
            return {**a, **b, **{key: _plus(a[key], b[key]) for key in a.keys() & b.keys()}}
        case _:
            return type(a)(**{f.name: _plus(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)})


class Timing:
    """One request as it goes on: who works on it tells here what it found. It failed if an exception leaves it."""

    def __init__(self, statistics: "Statistics", model: str, traceparent: str):
        self._statistics, self.model, self.traceparent = statistics, model, traceparent
        self.began = time.monotonic_ns()
        self.figures: Figures | None = None
        self.input_ns, self.images = 0, 0
        self.answer: Answer | None = None
        self.answered = 0

    def __enter__(self) -> "Timing":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._statistics.end(self, failed=kind is not None)
        if self._statistics.ended is not None:
            self._statistics.ended(self, error)

    def found(self, version: int) -> None:
        """The version that answers; another one if it was replaced meanwhile. What does not exist is not counted."""
        self.figures = self._statistics.start((self.model, version), self.figures)

    def computed(self, answer: Answer, images: int) -> None:
        self.answer, self.images, self.answered = answer, images, time.monotonic_ns()

    def encoding_s(self) -> float:
        """Since `computed`."""
        return (time.monotonic_ns() - self.answered) / 1e9


class Statistics:
    """Safe to share among threads. `ended`, if set, is called with each request that is over, and its error."""

    def __init__(self) -> None:
        self.ended: Callable[[Timing, BaseException | None], None] | None = None
        self._lock = threading.Lock()
        self._models: dict[Model, Figures] = {}
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT)  # (when it ended, how long it took), ns

    def request(self, model: str, traceparent: str = "") -> Timing:
        """To time a request, from here to its answer, in a `with` statement. traceparent: as it came."""
        return Timing(self, model, traceparent)

    def start(self, model: Model, before: Figures | None = None) -> Figures:
        """Count a request as one that waits for this Model, and no longer for the one before."""
        with self._lock:
            figures = self._models.get(model)
            if figures is None:
                figures = self._models[model] = Figures()
            figures.pending += 1
            if before is not None:
                before.pending -= 1
            return figures

    def refused(self, model: Model, requests: int = 1) -> None:
        """Count requests that were turned away at the door."""
        with self._lock:
            self._models.setdefault(model, Figures()).fail.add(0, requests)

    def failed(self, model: Model, began: Sequence[int]) -> None:
        """Count requests that are over without an answer, by when each began: ns of time.monotonic_ns()."""
        now = time.monotonic_ns()
        with self._lock:
            self._models.setdefault(model, Figures()).fail.add(len(began) * now - sum(began), len(began))
            self._recent.extend((now, now - one) for one in began)

    def waiting(self, model: Model, more: int) -> None:
        """So many more requests, or fewer, wait for this Model."""
        with self._lock:
            self._models.setdefault(model, Figures()).pending += more

    def snapshot(self) -> dict[Model, Figures]:
        """A copy, of one moment."""
        with self._lock:
            return copy.deepcopy(self._models)

    def p99_ms(self, seconds: float) -> float | None:
        """Of the requests that ended in the last `seconds`, failed ones too; None where there were none."""
        since = time.monotonic_ns() - int(1e9 * seconds)
        with self._lock:
            took = [ns for _, ns in takewhile(lambda ended: ended[0] >= since, reversed(self._recent))]
        took.sort()
        return took[math.ceil(0.99 * len(took)) - 1] / 1e6 if took else None

    def together(self, model: Model, began: Sequence[int], input_ns: Sequence[int], answer: Answer,
                 answered: int, now: int) -> None:
        """Count requests of one image each that ran as one Answer and are answered now; as `end`, once for all.

        began: of each, ns of time.monotonic_ns(); input_ns: what its decoding took; answered: when the Answer came;
        now: when its text was written.
        """
        run, count = answer.run, len(began)
        assert run is not None
        took, decoding = count * now - sum(began), sum(input_ns)
        queued = count * (int(1e9 * answer.since) + answer.waited_ns) - sum(began) - decoding
        with self._lock:
            figures = self._models.setdefault(model, Figures())
            self._recent.extend((now, now - one) for one in began)
            figures.last_ms = int(time.time() * 1000)
            figures.images += count
            figures.success.add(took, count)
            figures.queue.add(queued, count)
            figures.input.add(decoding, count)
            figures.infer.add(count * sum(ns for _, ns in run.pieces), count)
            figures.output.add(now - answered, count)
            _count_run(figures, run, decoding, now - answered)

    def end(self, timing: Timing, failed: bool) -> None:
        figures, answer, now = timing.figures, timing.answer, time.monotonic_ns()
        if figures is None:
            return
        with self._lock:
            figures.pending -= 1
            self._recent.append((now, now - timing.began))
            if failed or answer is None or answer.run is None:
                figures.fail.add(now - timing.began)
                return
            run, output_ns = answer.run, now - timing.answered
            figures.last_ms = int(time.time() * 1000)
            figures.images += timing.images
            figures.success.add(now - timing.began)
            figures.queue.add(answer.waited_ns)
            figures.input.add(timing.input_ns)
            figures.infer.add(sum(ns for _, ns in run.pieces))
            figures.output.add(output_ns)
            _count_run(figures, run, timing.input_ns, output_ns)


def _count_run(figures: Figures, run: Run, input_ns: int, output_ns: int) -> None:
    """Add what requests took to decode and to encode to their run, and the run itself if nobody has."""
    first = figures.of_size(run.pieces[0][0])
    first.input.add(input_ns, 0)
    first.output.add(output_ns, 0)
    for size, ns in run.pieces if not run.counted else ():
        figures.executions += 1
        batches = figures.of_size(size)
        batches.infer.add(ns)
        batches.input.count += 1
        batches.output.count += 1
    run.counted = True
