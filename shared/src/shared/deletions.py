"""Orders to delete what was published: given by the API, which may not write there, and carried out by the keeper.

jobs/.deletions/<hex>.json    what is to go; carried out as long as who gave the order waits for it, and holds its lock
jobs/.deletions/<hex>.begun   what a keeper has begun: that is finished, whatever dies
"""

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shared.artifacts import fsync_dir, read_json
from shared.at_work import has_keeper
from shared.errors import Unavailable
from shared.queue import nudge

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("lanner.deletions")
WAIT_S = 10.0  # for a keeper, which looks once a second or when it is nudged
BEGUN_S = 60.0  # for its renames, on a busy disk
LOOK_S = 0.01


def delete(root: Path, redis: "Redis | None", targets: list[str]) -> None:
    """Have the keeper take these away ("models/m-1", "cards/m-1.json", ...); what is not there is gone already.

    Returns when they are gone. Raises Unavailable: keeper_absent where there is no keeper, then nothing was deleted;
    RedisError where the queue does not answer, which no keeper works without.
    """
    if redis is not None and not has_keeper(redis):
        raise _absent(targets)
    order = _folder(root) / f"{uuid.uuid4().hex}.json"
    with _written(order, targets):
        if redis is not None:
            nudge(redis)
        if not _goes(order, WAIT_S):
            with suppress(FileNotFoundError):  # begun just now
                order.unlink()
                raise _absent(targets)
    if not _goes(order.with_suffix(".begun"), BEGUN_S):
        raise Unavailable(f"{', '.join(targets)} is being deleted and the keeper can't finish it yet: its log says why")


def _absent(targets: list[str]) -> Unavailable:
    return Unavailable(f"no keeper is there to delete {', '.join(targets)}, which stays as it was: start it (`docker "
                       "compose up -d keeper`, `./run up`) and ask again", "keeper_absent")


@contextmanager
def _written(order: Path, targets: list[str]) -> Iterator[None]:
    """An order that is locked as long as somebody waits for it: what nobody waits for any more is not carried out.

    Who gave it may have died, and what was to be deleted been put to use since.
    """
    order.parent.mkdir(parents=True, exist_ok=True)
    fresh = order.with_name(f".{order.name}")
    with open(fresh, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        json.dump(targets, f)
        f.flush()
        os.fsync(f.fileno())
        fresh.rename(order)
        yield


def carry_out(root: Path, told: set[str] | None = None) -> None:
    """By the keeper: what has been ordered. An order that can't be carried out now is kept, and told in the log.

    told: orders of which that was said already.
    """
    folder = _folder(root)
    for order in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            match order.suffix:
                case ".begun":
                    _carry_out(root, order)
                case ".json" if not order.name.startswith("."):
                    if _is_waited_for(order):
                        _carry_out(root, order.rename(order.with_suffix(".begun")))
                    else:
                        order.unlink()
        except FileNotFoundError:  # taken back
            continue
        except Exception:
            if told is None or order.stem not in told:
                log.exception("%s can't be carried out yet", order.name)
            if told is not None:
                told.add(order.stem)


def _is_waited_for(order: Path) -> bool:
    with open(order) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _carry_out(root: Path, begun: Path) -> None:
    targets, gone = read_json(begun), root / ".staging" / f"deleted.{begun.stem}"
    gone.mkdir(parents=True, exist_ok=True)
    for number, target in enumerate(targets):
        with suppress(FileNotFoundError):
            os.rename(root / target, gone / str(number))  # readers see it whole or not at all
            fsync_dir((root / target).parent)
    begun.unlink()
    log.info("deleted %s", ", ".join(targets))
    shutil.rmtree(gone, ignore_errors=True)  # what is left is swept with all of .staging


def _folder(root: Path) -> Path:
    return root / "jobs" / ".deletions"


def _goes(path: Path, seconds: float) -> bool:
    """Whether a file goes away within that time."""
    deadline = time.monotonic() + seconds
    while path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True
