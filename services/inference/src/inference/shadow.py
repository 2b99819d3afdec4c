"""A share of the live images is answered by the Name's `candidate` too, and the two are compared.

No live request waits for any of it: it puts its picked images on a bounded queue, or drops them. One thread takes them
off, gives way to live requests, and has the candidate answer. The candidate is loaded by the watcher of the aliases,
as every Variant that an alias points at.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from inference.batch import Answer
from inference.comparison import Comparison, pair_of
from inference.loaded import LoadedModels, Served
from inference.metrics import Meters
from inference.pace import give_way
from inference.predictor import LAST, Closed
from shared.errors import LannerError

log = logging.getLogger("lanner.shadow")
LIVE, CANDIDATE = "production", "candidate"
MOST_WAITING = 256  # images
MOST_TOGETHER = 8  # images of a run: a live request that comes meanwhile soon has the processor again
SHARE_OF_TIME = 0.05  # that the candidate computes at most where live images never cease to run
PATIENCE_S = 10.0  # with one run
BatchOf = Callable[[int], np.ndarray]  # a request's images at a size


@dataclass(frozen=True)
class Sample:
    """Picked images of one live request, and how production answered them.

    batch: uint8 [N, size, size, 3]; or, where the candidate takes another size, what makes all images of the request,
    of which those of `chosen` were picked.
    """

    name: str
    live: Served
    batch: np.ndarray | BatchOf
    chosen: Sequence[int]
    labels: Sequence[int]
    run_ms: float
    run_images: int

    def images(self, size: int) -> np.ndarray:
        return self.batch if isinstance(self.batch, np.ndarray) else self.batch(size)[self.chosen]


class Shadow:
    """Safe to share among threads. With a share of 0 it has no thread, and `mirror` does nothing."""

    def __init__(self, loaded: LoadedModels, meters: Meters, share: float):
        """share: of the live images of every Name that has a candidate, 0 to 1."""
        self.share = share
        self._loaded, self._meters = loaded, meters
        self._lock = threading.Lock()  # guards the three below
        self._comparisons: dict[str, Comparison] = {}
        self._waiting = 0  # images
        self._body_waits = False  # one at most: a Sample whose images must be made anew holds its request's body
        self._samples: SimpleQueue[Sample] = SimpleQueue()
        self._ended_at, self._took_s = 0.0, 0.0  # of the last run; the thread's own
        if share > 0:
            threading.Thread(target=self._work, name="shadow", daemon=True).start()

    def mirror(self, name: str, live: Served, batch: np.ndarray, answer: Answer, batch_of: BatchOf) -> None:
        """Pick among the images that `live` has answered. What it did not answer as production is left alone.

        batch: uint8 [N, size, size, 3] at production's size. batch_of: makes it at another one.
        """
        if not self.share:
            return
        candidate = self._loaded.pointed(name, CANDIDATE)
        if candidate is None or candidate.loaded is live.loaded or self._loaded.pointed(name, LIVE) is not live:
            return
        chosen = [i for i in range(len(batch)) if random.random() < self.share]
        if not chosen or answer.scores is None or answer.run is None:
            return
        anew = candidate.loaded.spec.size != live.loaded.spec.size
        with self._lock:
            full = self._waiting + len(chosen) > MOST_WAITING or (anew and self._body_waits)
            if full:
                self._of(name, live, candidate).dropped += len(chosen)
            else:
                self._waiting += len(chosen)
                self._body_waits = self._body_waits or anew
        if full:
            self._meters.shadowed(name, "dropped", len(chosen))
            return
        pieces = answer.run.pieces
        self._samples.put(Sample(name, live, batch_of if anew else batch[chosen], chosen,
                                 answer.scores[chosen].argmax(1).tolist(), sum(ns for _, ns in pieces) / 1e6,
                                 sum(images for images, _ in pieces)))

    def found(self, name: str) -> Comparison:
        """How the Variants that the two aliases name now compare; without one of them there is nothing to tell."""
        live, candidate = self._loaded.pointed(name, LIVE), self._loaded.pointed(name, CANDIDATE)
        pair = pair_of(live, candidate) if live and candidate else None
        with self._lock:
            found = self._comparisons.get(name)
            return found.copy() if found is not None and found.pair == pair else Comparison(pair)

    def report(self, name: str, others: Iterable[Comparison] = ()) -> dict[str, Any]:
        """As JSON, with what other processes of this API `found`."""
        all_of_it = self.found(name)
        for other in others:
            if other.pair == all_of_it.pair:  # else it has not seen an alias move yet, or has before this one
                all_of_it.add_up(other)
        return {"name": name, "share": self.share, LIVE: _told(self._loaded.pointed(name, LIVE)),
                CANDIDATE: _told(self._loaded.pointed(name, CANDIDATE)), **all_of_it.told()}

    def _of(self, name: str, live: Served, candidate: Served) -> Comparison:
        """The comparison of these two, begun anew where an alias has moved. The lock is held."""
        pair, found = pair_of(live, candidate), self._comparisons.get(name)
        if found is None or found.pair != pair:
            found = self._comparisons[name] = Comparison(pair)
        return found

    def _work(self) -> None:
        while True:
            sample = self._samples.get()
            try:
                self._compare(sample)
            except Closed:  # the candidate was replaced: of the one before nothing more is told
                pass
            except Exception:  # the boundary: the thread outlives whatever happens to one sample
                log.exception("%s: comparing with its candidate failed", sample.name)
            with self._lock:
                self._waiting -= len(sample.chosen)
                if not isinstance(sample.batch, np.ndarray):
                    self._body_waits = False

    def _compare(self, sample: Sample) -> None:
        """Raises Closed."""
        candidate = self._loaded.pointed(sample.name, CANDIDATE)
        if candidate is None or self._loaded.pointed(sample.name, LIVE) is not sample.live:
            return
        try:
            images = sample.images(candidate.loaded.spec.size)
        except Exception as e:  # the boundary: a tensor of production's size has no other one
            self._failed(sample, candidate, len(sample.chosen), e)
            return
        with self._lock:
            self._of(sample.name, sample.live, candidate).production.append((sample.run_ms, sample.run_images))
        self._meters.shadow_seconds[LIVE].observe(sample.run_ms / 1000)
        for start in range(0, len(images), MOST_TOGETHER):
            part = slice(start, start + MOST_TOGETHER)
            self._give_way(candidate)
            self._ask(sample, candidate, images[part], sample.labels[part])

    def _ask(self, sample: Sample, candidate: Served, images: np.ndarray, labels: Sequence[int]) -> None:
        began = time.monotonic()
        try:
            answer = candidate.loaded.predictor.answer(images, began + PATIENCE_S, LAST + 1)
        except Closed:
            raise
        except Exception as e:  # the boundary: whatever the candidate raises is counted
            self._failed(sample, candidate, len(images), e)
            return
        finally:
            self._ended_at = time.monotonic()
            self._took_s = self._ended_at - began
        assert answer.scores is not None
        assert answer.run is not None
        ours, theirs = sample.live.loaded.spec.labels, candidate.loaded.spec.labels
        pairs = [(ours[a], theirs[b]) for a, b in zip(labels, answer.scores.argmax(1).tolist(), strict=True)]
        ms = sum(ns for _, ns in answer.run.pieces) / 1e6
        with self._lock:
            self._of(sample.name, sample.live, candidate).add(pairs, (ms, sum(n for n, _ in answer.run.pieces)))
        self._meters.shadowed(sample.name, "compared", len(pairs), sum(a != b for a, b in pairs))
        self._meters.shadow_seconds[CANDIDATE].observe(ms / 1000)

    def _failed(self, sample: Sample, candidate: Served, images: int, error: Exception) -> None:
        if not isinstance(error, LannerError):
            log.warning("%s@%s: %s: %s", sample.name, CANDIDATE, type(error).__name__, error)
        with self._lock:
            self._of(sample.name, sample.live, candidate).failed += images
        self._meters.shadowed(sample.name, "failed", images)

    def _give_way(self, candidate: Served) -> None:
        """Until live images have ceased to run; where they never do, until SHARE_OF_TIME allows another run."""
        give_way(lambda: self._loaded.busy(candidate.loaded), self._ended_at + self._took_s * (1 / SHARE_OF_TIME - 1))


def _told(served: Served | None) -> dict[str, Any] | None:
    return None if served is None else {"version": served.version, "variant": served.loaded.variant,
                                        "digest": served.loaded.digest, "device": served.loaded.device}
