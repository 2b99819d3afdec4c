"""What answers for a Name: a watcher follows the aliases, requests read where they point."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import RedisError

from inference.memory import Key, Loaded, Memory
from inference.metrics import Meters
from shared import artifacts
from shared.datasets import Spec
from shared.errors import Damaged, LannerError, NotFound, Refused, Unavailable
from shared.runtimes import MAX_BATCH
from shared.runtimes.plan import Unfit

log = logging.getLogger("lanner.loaded")
RETRY_S, RETRY_MOST_S = 10.0, 600.0  # a refused Variant is tried again after these, doubling
LOAD_S = 600.0  # that a call of `load` waits
FIRST_LOAD_S = 5.0  # that a request waits for the first Variant of an alias
STAND_IN = "onnx-fp32"  # answers for a Variant of the same Model that can't be loaded
Place = tuple[str, str]  # Name, alias
Rebuild = Callable[[str, str, str], str]  # (Name, model id, alias) -> the id of the job that builds engines anew


@dataclass(frozen=True)
class Served:
    """An alias as it was read, or an explicit version, with the Variant in memory.

    instead_of: the Variant that the alias names, where another one answers for it: the Model's ONNX, or what the alias
    pointed at before.
    """

    version: int
    loaded: Loaded
    record: dict[str, Any]
    instead_of: str = ""


@dataclass(frozen=True)
class Found:
    """A Variant as it is published. `device` is what computes it, "" while it is not in memory; `batch` how many images
    run at once.
    """

    version: int
    model: str
    variant: str
    spec: Spec
    device: str
    batch: int = MAX_BATCH


@dataclass(frozen=True)
class Refusal:
    record: dict[str, Any]
    reason: str
    tries: int
    retry_at: float


class LoadedModels:
    """Safe to share among threads. Requests read without a lock; a move swaps one reference."""

    def __init__(self, root: Path, meters: Meters, cores: int, refresh_s: float, rebuild: Rebuild | None = None,
                 device: str = "cpu", budget: int = 0, processes: int = 1):
        """rebuild: queues the job that builds a TensorRT engine anew, where there is a GPU to build it on.

        device: what DEVICE says, cpu or gpu. cores, budget, processes: as Memory's.
        """
        self._root, self._refresh_s, self._rebuild = root, refresh_s, rebuild
        self._memory = Memory(root, meters, cores, device, budget, processes)
        self._aliases: dict[Place, Served] = {}  # replaced whole, never changed
        self._refused: dict[Place, Refusal] = {}  # likewise; both by the watcher alone
        self._rebuilds: dict[Place, tuple[dict[str, Any], str]] = {}  # alias as it was read, job; one a record
        self._unloaded: set[str] = set()  # Names that do not answer until somebody loads them
        self._asked_to_load: set[str] = set()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="alias watcher", daemon=True)
        self._watcher.start()

    def resolve(self, name: str, alias: str, version: int | None = None, variant: str | None = None) -> Served:
        """What answers for a Name: where the alias points, or an explicit version, variant or both.

        Raises:
            NotFound: no such Name, alias, version or Variant.
            Refused: `version` alone, which lacks the Variant that the alias names.
            Unavailable: the alias's Variant is not loaded yet, or was refused and there was none before it.
            Damaged: the Variant asked for is not what was published.
        """
        pointed = self._pointed(name, alias, version)
        if pointed and version is None and variant is None:
            return pointed
        version, key = self._locate(name, pointed, version, variant)
        served = Served(version, self._memory.get(key), {})
        if name in self._unloaded:  # while this loaded
            self._memory.forget([key[0]])
            raise self._no_longer(name)
        return served

    def find(self, name: str, alias: str, version: int | None = None) -> Found:
        """What would answer, without loading it. Raises as `resolve`."""
        pointed = self._pointed(name, alias, version)
        if pointed and version in (None, pointed.version):
            loaded = pointed.loaded
            return Found(pointed.version, loaded.model, loaded.variant, loaded.spec, loaded.device,
                         loaded.predictor.at_once)
        version, key = self._locate(name, pointed, version, None)
        held = self._memory.peek(key)
        if held:
            return Found(version, *key, held.spec, held.device, held.predictor.at_once)
        return Found(version, *key, Spec.of(artifacts.open_artifact(self._root, f"variants/{'/'.join(key)}",
                                                                    hashes=False)), "")

    def is_at_hand(self, name: str, alias: str, version: int | None = None, variant: str | None = None) -> bool:
        """Whether `resolve` loads nothing, and waits for nothing that does.

        Of a version or a variant that is read from the volume.
        """
        pointed = self._aliases.get((name, alias))
        if name in self._unloaded:
            return True  # which is said at once
        if version is None and (pointed is None or variant is None):
            return pointed is not None
        try:
            return self._memory.peek(self._locate(name, pointed, version, variant)[1]) is not None
        except LannerError:
            return True

    def is_ready(self, name: str, alias: str, version: int | None = None) -> bool:
        """Whether a request is answered without loading anything first."""
        pointed = self._aliases.get((name, alias))
        if name in self._unloaded or version is None or (pointed and pointed.version == version):
            return pointed is not None
        return self._memory.holds(artifacts.versions(self._root, name).get(version, ""))

    def unloaded(self) -> list[str]:
        """Names that do not answer until somebody loads them."""
        return sorted(self._unloaded)

    def holds(self, model: str) -> bool:
        """Whether a Variant of this Model, by its id, is in memory."""
        return self._memory.holds(model)

    def unload(self, name: str) -> None:
        """Close a Name's Variants once they have answered what waits; it answers no more until `load`, or a restart.

        A Variant that another Name's alias points at stays. Raises NotFound.
        """
        models = set(artifacts.versions(self._root, name).values())
        if not models:
            raise self._absent(name, "")
        with self._memory.loading:
            self._unloaded.add(name)
            self._aliases = {place: served for place, served in self._aliases.items() if place[0] != name}
            gone = self._memory.forget(models, self._pins())
        for loaded in gone:
            loaded.predictor.close(wait=True)
        log.info("%s is unloaded", name)

    def load(self, name: str) -> None:
        """Let a Name answer again: returns when each of its aliases answers.

        Raises:
            NotFound: it has no alias.
            Refused: an alias's Variant can't be loaded.
            Unavailable: it takes longer than LOAD_S.
        """
        if not artifacts.aliases(self._root, name):
            raise self._absent(name, "production")
        self._unloaded.discard(name)
        self._asked_to_load.add(name)
        end = time.monotonic() + LOAD_S
        while name in self._asked_to_load:
            if self._stop.is_set() or time.monotonic() > end:
                raise Unavailable(f"{name} is still being loaded", "loading")
            self.wake()
            time.sleep(0.02)
        for place, refusal in self._refused.items():
            if place[0] == name and place not in self._aliases:
                raise Refused(f"failed to load '{name}@{place[1]}': {refusal.reason}", "model_refused")

    def pointed(self, name: str, alias: str) -> Served | None:
        """What an alias points at, if that is in memory; nothing is loaded or waited for."""
        return self._aliases.get((name, alias))

    def busy(self, besides: Loaded | None = None) -> bool:
        """Whether live images keep this process busy; `besides`: a Variant whose past runs do not count."""
        return self._memory.busy(besides)

    def state(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(serving, refused): what /readyz lists."""
        serving = [{"name": name, "alias": alias, "version": s.version, "model_id": s.loaded.model,
                    "variant": s.loaded.variant, "digest": s.loaded.digest, "device": s.loaded.device,
                    "threads": s.loaded.threads, "batch": s.loaded.batch, "fitted": s.loaded.fitted,
                    **({"instead_of": s.instead_of} if s.instead_of else {})}
                   for (name, alias), s in sorted(self._aliases.items())]
        refused = [{"name": name, "alias": alias, "version": r.record.get("version"),
                    "variant": r.record.get("variant"), "reason": r.reason,
                    **({"rebuild": self._rebuilds[name, alias][1]} if (name, alias) in self._rebuilds else {})}
                   for (name, alias), r in sorted(self._refused.items())]
        return serving, refused

    def wake(self) -> None:
        """Look at the aliases now instead of at the next turn."""
        self._wake.set()

    def close(self) -> None:
        """Stop following, answer what is waiting, close every Session."""
        self._stop.set()
        self._wake.set()
        self._watcher.join()
        self._memory.close()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self._look()
            except Exception:  # the watcher outlives whatever a file system or a runtime raises
                log.exception("looking at the aliases failed")
            self._wake.wait(self._refresh_s)

    def _look(self) -> None:
        """Load what is new beside what serves, swap, drain the old."""
        for name in artifacts.names(self._root):
            asked = name in self._asked_to_load
            self._look_at(name, asked)
            if asked:
                self._asked_to_load.discard(name)

    def _look_at(self, name: str, asked: bool) -> None:
        if name in self._unloaded:
            self._refused = {place: r for place, r in self._refused.items() if place[0] != name}
            return
        try:
            found = artifacts.aliases(self._root, name)
        except LannerError as e:
            self._refuse((name, ""), {}, e)
            return
        self._refused = {place: r for place, r in self._refused.items() if place != (name, "")}
        self._drop({place for place in {*self._aliases, *self._refused} if place[0] == name and place[1] not in found})
        for alias, record in found.items():
            if self._is_news((name, alias), record, asked):
                self._follow((name, alias), record)

    def _drop(self, gone: set[Place]) -> None:
        """Aliases that were deleted: what they pointed at answers what waits, and closes."""
        if not gone:
            return
        with self._memory.loading:
            self._aliases = {place: served for place, served in self._aliases.items() if place not in gone}
            self._refused = {place: r for place, r in self._refused.items() if place not in gone}
            self._memory.pin(self._pins())
        log.info("%s: no longer there", ", ".join(f"{name}@{alias}" for name, alias in sorted(gone)))

    def _is_news(self, place: Place, record: dict[str, Any], asked: bool) -> bool:
        """asked: somebody waits for it, so that a refused Variant is tried again before its time."""
        pointed, refusal = self._aliases.get(place), self._refused.get(place)
        if pointed and pointed.record == record and not pointed.instead_of:
            return False
        return asked or not (refusal and refusal.record == record and time.monotonic() < refusal.retry_at)

    def _follow(self, place: Place, record: dict[str, Any]) -> None:
        try:
            self._swap(place, record, record["version"], record["model"], record["variant"])
        except Exception as e:  # the boundary: whatever is wrong with the new one, the old one goes on
            self._refuse(place, record, e)
            self._stand_in(place, record)
            if record["variant"].startswith("tensorrt-"):
                self._heal(place, record, e)
            return
        self._refused = {other: r for other, r in self._refused.items() if other != place}
        self._rebuilds = {other: r for other, r in self._rebuilds.items() if other != place}

    def _swap(self, place: Place, record: dict[str, Any], version: int, model: str, variant: str) -> None:
        """Load a Variant and let it answer for the alias from now on."""
        with self._memory.loading:
            if place[0] in self._unloaded:
                return
            loaded = self._memory.get((model, variant))
            named = (version, variant) == (record["version"], record["variant"])
            if named and loaded.digest != record["manifest_sha256"]:
                raise Damaged(f"{record['variant']} of {record['model']} has manifest {loaded.digest}, "
                              f"the alias was given to {record['manifest_sha256']}")
            served = Served(version, loaded, record, "" if named else record["variant"])
            self._aliases = {**self._aliases, place: served}
            self._memory.pin(self._pins())
        log.info("%s@%s is version %s, %s on %s", *place, version, loaded.variant, loaded.device)

    def _stand_in(self, place: Place, record: dict[str, Any]) -> None:
        """Let the ONNX Variant of the same Model answer, for an engine also where an older version does; where nothing
        does, as after a restart, at last what the alias pointed at before.
        """
        pointed, others = self._aliases.get(place), []
        if pointed is None or (pointed.record != record and record["variant"].startswith("tensorrt-")):
            others.append((record["version"], record["model"], STAND_IN))
        if pointed is None and (before := record.get("previous")):
            model = artifacts.versions(self._root, place[0]).get(before["version"], "")
            others.append((before["version"], model, before["variant"]))
        for version, model, variant in others:
            if (version, variant) == (record["version"], record["variant"]):
                continue
            try:
                self._swap(place, record, version, model, variant)
                return
            except Exception as e:  # the boundary: then what served before goes on
                log.error("%s@%s: %s of version %s can't stand in for %s: %s", *place, variant, version,
                          record["variant"], e)

    def _heal(self, place: Place, record: dict[str, Any], error: Exception) -> None:
        """Have an engine built anew, once for each record."""
        asked = place in self._rebuilds and self._rebuilds[place][0] == record
        mendable = isinstance(error, (Unfit, Damaged)) and error.code not in ("no_tensorrt", "no_gpu")
        if self._rebuild is None or asked or not mendable:
            return
        try:
            job = self._rebuild(place[0], record["model"], place[1])
        except (LannerError, RedisError) as e:  # the next try asks again
            log.error("%s@%s: the engine's rebuild can't be queued: %s", *place, e)
            return
        self._rebuilds = {**self._rebuilds, place: (record, job)}
        log.info("%s@%s: %s is built anew by job %s", *place, record["variant"], job)

    def _refuse(self, place: Place, record: dict[str, Any], error: Exception) -> None:
        reason = str(error) if isinstance(error, LannerError) else f"{type(error).__name__}: {error}"
        before = self._refused.get(place)
        tries = before.tries + 1 if before and before.record == record else 1
        pause = min(RETRY_S * 2 ** (tries - 1), RETRY_MOST_S)
        self._refused = {**self._refused, place: Refusal(record, reason, tries, time.monotonic() + pause)}
        if tries == 1:
            log.error("%s@%s is refused: %s", *place, reason)

    def _pins(self) -> set[Key]:
        return {(s.loaded.model, s.loaded.variant) for s in self._aliases.values()}

    def _pointed(self, name: str, alias: str, version: int | None) -> Served | None:
        if name in self._unloaded:
            raise self._no_longer(name)
        pointed = self._aliases.get((name, alias))
        return self._first_load(name, alias) if pointed is None and version is None else pointed

    def _locate(self, name: str, pointed: Served | None, version: int | None, variant: str | None) -> tuple[int, Key]:
        """The version and Variant that a request means, with what its alias points at."""
        known = artifacts.versions(self._root, name)
        version = version if version is not None else pointed.version if pointed else 0
        if version not in known:
            raise NotFound(f"{name} has no version {version}: it has {sorted(known) or 'none'}")
        published = artifacts.list_ids(self._root, f"variants/{known[version]}")
        if variant is None and pointed and pointed.loaded.variant in published:
            variant = pointed.loaded.variant
        if variant is None:
            raise Refused(f"version {version} of {name} needs a variant, one of {', '.join(published)}", "no_variant")
        if variant not in published:
            raise NotFound(f"version {version} of {name} has no {variant}: it has {', '.join(published) or 'none'}")
        return version, (known[version], variant)

    def _no_longer(self, name: str) -> NotFound:
        return NotFound(f"{name} is unloaded: POST /v2/repository/models/{name}/load loads it", "unloaded")

    def _first_load(self, name: str, alias: str) -> Served:
        """Wait for an alias that points to a Variant for the first time: its pipeline may have ended just now."""
        end = time.monotonic() + FIRST_LOAD_S
        while True:
            error = self._absent(name, alias)
            if error.code != "loading" or time.monotonic() > end:
                raise error
            time.sleep(0.02)
            if pointed := self._aliases.get((name, alias)):
                return pointed

    def _absent(self, name: str, alias: str) -> LannerError:
        refusal = self._refused.get((name, alias)) or self._refused.get((name, ""))
        if refusal:
            return Unavailable(f"{name}@{alias} is refused: {refusal.reason}", "model_refused")
        known = artifacts.aliases(self._root, name)
        if alias in known:
            self.wake()
            return Unavailable(f"{name}@{alias} is being loaded", "loading")
        if artifacts.versions(self._root, name):
            return NotFound(f"{name} has no alias {alias}: it has {', '.join(known) or 'none yet'}")
        return NotFound(f"model {name} does not exist: GET /v1/models lists those that do")
