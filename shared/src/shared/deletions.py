"""Orders to delete what was published: given by the API, which may not write there, and carried out by the keeper.

jobs/.deletions/<hex>.json    what is to go; while no keeper has begun it, who gave the order may take it back
jobs/.deletions/<hex>.begun   what a keeper has begun: that is finished, whatever dies
"""

import logging
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shared.artifacts import fsync_dir, read_json, stage, write_json
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

    Returns when they are gone. Raises Unavailable: keeper_absent where no keeper came, then nothing was deleted.
    """
    order = _folder(root) / f"{uuid.uuid4().hex}.json"
    write_json(order, targets)
    if redis is not None:
        nudge(redis)
    if not _goes(order, WAIT_S):
        with suppress(FileNotFoundError):  # begun just now
            order.unlink()
            raise Unavailable(f"no keeper came within {WAIT_S:g} s, and {', '.join(targets)} stays as it was: start "
                              "the keeper (`docker compose up -d keeper`, `./run up`) and ask again", "keeper_absent")
    if not _goes(order.with_suffix(".begun"), BEGUN_S):
        raise Unavailable(f"{', '.join(targets)} is being deleted and the keeper can't finish it yet: its log says why")


def carry_out(root: Path) -> None:
    """By the keeper: what has been ordered. An order that can't be carried out now is kept, and told in the log."""
    folder = _folder(root)
    for order in sorted(folder.iterdir()) if folder.is_dir() else []:
        if order.suffix not in (".json", ".begun") or order.name.startswith("."):
            continue
        try:
            _carry_out(root, order)
        except FileNotFoundError:  # taken back
            continue
        except Exception:
            log.exception("%s can't be carried out yet", order.name)


def _carry_out(root: Path, order: Path) -> None:
    begun = order.rename(order.with_suffix(".begun"))
    targets, gone = read_json(begun), stage(root, "deleted")
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
