"""The Variants in memory: opened once, verified and warmed, closed when nothing needs them."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from inference.codec import entries
from inference.metrics import Meters
from inference.pace import Pace
from inference.predictor import INLINE_S, Predictor
from shared import artifacts
from shared.datasets import Spec
from shared.fitted import read_fit
from shared.runtimes import MAX_BATCH, Begun, Session, open_session

log = logging.getLogger("lanner.memory")
INLINE_ON_ONE_CORE_S = 0.005  # there a thread that runs what takes a few milliseconds only takes turns with the others
INLINE_ON_A_GPU_S = 0.0003  # which computes beside a thread that waits for it; handing over takes about a third of this
QUIET_S = 0.02  # clients that ask without a pause are between two runs most of the time
KEPT = 4  # Variants kept beside the pinned ones, the latest asked for, where no budget is set
Key = tuple[str, str]  # model id, variant


@dataclass(frozen=True)
class Loaded:
    """A Variant that answers. `digest` is the SHA-256 of its manifest.

    size: bytes of its files. threads, batch: of its runtime, and images of several requests that run together; `fitted`
    if measured on this host.
    """

    model: str
    variant: str
    digest: str
    spec: Spec
    device: str
    predictor: Predictor
    size: int
    threads: int
    batch: int
    fitted: bool

    @cached_property
    def entries(self) -> list[bytes]:
        """Of its labels, for `codec.top`."""
        return entries(self.spec.labels)


class Memory:
    """Safe to share among threads. `loading` is held while one loads (loading is the peak of memory) or retires; who
    asks for what is in memory does not wait for it.
    """

    def __init__(self, root: Path, meters: Meters, cores: int, device: str = "cpu", budget: int = 0,
                 processes: int = 1):
        """cores: of the host, which so many processes share.

        budget: bytes of the files of all; beyond it what was asked for least recently goes, never what is pinned.

        0: the last KEPT stay beside the pinned ones.
        """
        self._budget = budget
        self._root, self._meters, self._device = root, meters, device
        self._cores, self._processes, self._threads = cores, processes, max(1, cores // processes)
        self._loaded: dict[Key, Loaded] = {}
        self._asked: OrderedDict[Key, None] = OrderedDict()
        self._pinned: frozenset[Key] = frozenset()
        self.loading = threading.RLock()
        self._touching = threading.Lock()  # guards _asked

    def get(self, key: Key) -> Loaded:
        """The Variant, loaded now if it is not in memory.

        Raises:
            NotFound: it is not published.
            Refused: DEVICE is gpu and ONNX Runtime can't compute on one here.
            Damaged: its bytes, or its answers to the golden batch, are not those that were published.
        """
        loaded = self._loaded.get(key)
        if loaded is None:
            with self.loading:
                loaded = self._loaded.get(key)
                if loaded is None:
                    loaded = self._loaded[key] = self._open(*key)
                self._touch(key)
                self._retire()
        elif key not in self._pinned:
            self._touch(key)
        return loaded

    def pin(self, keys: Iterable[Key]) -> None:
        """Keep these until the next call; one that was pinned before is drained and closed."""
        with self.loading:
            now = frozenset(keys)
            with self._touching:
                for key in now | self._pinned:
                    self._asked.pop(key, None)
            self._pinned = now
            self._retire()

    def peek(self, key: Key) -> Loaded | None:
        """The Variant if it is in memory."""
        return self._loaded.get(key)

    def holds(self, model: str) -> bool:
        """Whether a Variant of this Model is in memory."""
        return any(key[0] == model for key in list(self._loaded))

    def busy(self, besides: Loaded | None = None) -> bool:
        """Whether an image waits, runs, or ran a moment ago; of `besides` only those that wait or run count."""
        since = time.monotonic() - QUIET_S
        return any(loaded.predictor.images or (loaded is not besides and loaded.predictor.ran_at > since)
                   for loaded in list(self._loaded.values()))

    def forget(self, models: Collection[str], pinned: Iterable[Key] | None = None) -> list[Loaded]:
        """Drop what is not pinned of these Models; `pinned` replaces what is. Returns what will be closed."""
        with self.loading:
            mine = {key: loaded for key, loaded in self._loaded.items() if key[0] in models}
            self.pin(self._pinned if pinned is None else pinned)
            with self._touching:
                for key in mine:
                    self._asked.pop(key, None)
            self._retire()
            return [loaded for key, loaded in mine.items() if key not in self._loaded]

    def close(self) -> None:
        """Answer what is waiting, then close every Session."""
        with self.loading:
            for loaded in self._loaded.values():
                loaded.predictor.close(wait=True)

    def _touch(self, key: Key) -> None:
        with self._touching:
            self._asked[key] = None
            self._asked.move_to_end(key)

    def _retire(self) -> None:
        with self._touching:
            asked = [key for key in self._asked if key not in self._pinned and key in self._loaded]
            keep = self._pinned | set(asked[-KEPT:] if not self._budget else self._within_budget(asked))
            gone = [self._loaded.pop(key) for key in [key for key in self._loaded if key not in keep]]
            for key in [key for key in self._asked if key not in keep]:
                self._asked.pop(key)
        for loaded in gone:
            loaded.predictor.close()
        self._meters.loaded.set(len(self._loaded))
        self._meters.loaded_bytes.set(sum(loaded.size for loaded in self._loaded.values()))

    def _within_budget(self, asked: list[Key]) -> list[Key]:
        """Of these, the latest last, those that may stay: the latest does, whatever its size, or nobody could ask."""
        room = self._budget - sum(self._loaded[key].size for key in self._pinned if key in self._loaded)
        kept: list[Key] = []
        for key in reversed(asked):
            room -= self._loaded[key].size
            if kept and room < 0:
                break
            kept.append(key)
        return kept

    def _open(self, model: str, variant: str) -> Loaded:
        pace = Pace(self.busy)  # what is loaded while others answer takes a processor from them at most half the time
        fit = read_fit(self._root, model, variant, self._cores, self._processes)
        threads = fit.threads if fit else self._threads
        session, manifest = open_session(self._root, model, variant, threads, self._device, pace.rest)
        try:
            digest = artifacts.manifest_digest(self._root, f"variants/{model}/{variant}")
            spec = Spec.of(manifest)
            for size in session.batches:  # warm: the first run of a shape is the slow one
                _warm(session, np.zeros((size, spec.size, spec.size, 3), np.uint8))
                pace.rest()
        except BaseException:
            session.close()
            raise
        fitted = fit is not None and fit.device == session.device
        batch = session.batches[-1]
        if fit and fitted and (fit.bounded or fit.batch < MAX_BATCH):  # else the largest that was tried served most
            batch = min(fit.batch, batch)
        predictor = Predictor(session, self._meters, f"{model} {variant}", batch, self._inline_s(session))
        size = sum(entry["size"] for entry in manifest["files"].values())
        return Loaded(model, variant, digest, spec, session.device, predictor, size, threads, batch, fitted)

    def _inline_s(self, session: Session) -> float:
        if session.device != "cpu":
            return INLINE_ON_A_GPU_S
        return INLINE_S if self._threads > 1 else INLINE_ON_ONE_CORE_S


def _warm(session: Session, images: np.ndarray) -> None:
    """As many batches as may be under way; where there is no memory for more than one, that many."""
    begun: list[Begun] = []
    try:
        for _ in range(session.ahead):
            begun.append(session.begin([images]))
    except Exception as e:  # whatever the runtime raises
        if not begun:
            raise
        log.warning("one batch at a time: there is no room for more (%s)", e)
        session.ahead = len(begun)
    for one in begun:
        one.scores()
