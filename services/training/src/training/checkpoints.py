"""Checkpoints of a training: whole or absent, checked before they are believed.

<work>/ckpt-<step>/   arrays.npz, state.json, manifest.json with their sizes and SHA-256, written last
"""

import dataclasses
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from shared.artifacts import MANIFEST, fsync_dir, read_json, sha256, write_bytes, write_json
from shared.errors import LannerError
from training.recipes import Recipe

log = logging.getLogger("lanner.training")
KEPT = 2
WORDS = ("known_result", "chosen")  # of a Recipe
State = dict[str, Any]
Arrays = dict[str, np.ndarray]


def save(work: Path, step: int, state: State, arrays: Arrays) -> Path:
    """Write a checkpoint durably and drop all but the newest two. `state` is plain JSON; its floats come back exact."""
    temp, final = work / f".ckpt-{step}", work / f"ckpt-{step}"
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    write_bytes(temp / "arrays.npz", packed.getbuffer())
    write_json(temp / "state.json", state)
    write_json(temp / MANIFEST, {name: {"size": (temp / name).stat().st_size, "sha256": sha256(temp / name)}
                                 for name in ("arrays.npz", "state.json")})
    shutil.rmtree(final, ignore_errors=True)
    temp.rename(final)
    fsync_dir(work)
    for old in found(work)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def found(work: Path) -> list[Path]:
    """The checkpoints of a job, newest first."""
    return sorted((p for p in work.glob("ckpt-*") if p.name[5:].isdigit()), key=lambda p: -int(p.name[5:]))


def newest_of(work: Path, recipe: Recipe, seed: int) -> tuple[State, Arrays] | None:
    """The newest whole checkpoint, if it is of this recipe and seed; those of another one are dropped.

    They would be taken for newer than what this training writes first, and that be dropped in their place.
    """
    kept = newest(work)
    if kept is None or (_trained(kept[0].get("recipe")), kept[0].get("seed")) == (
            _trained(json.loads(json.dumps(dataclasses.asdict(recipe)))), seed):
        return kept
    for path in found(work):
        log.warning("checkpoint %s is of another recipe or seed: dropped", path.name)
        shutil.rmtree(path, ignore_errors=True)
    return None


def _trained(recipe: Any) -> Any:
    """A recipe as JSON without its words for people; what an older version did not write is as it was before."""
    if not isinstance(recipe, dict):
        return recipe
    since = {field.name: field.default for field in dataclasses.fields(Recipe)
             if field.default is not dataclasses.MISSING and field.name not in recipe}
    return {key: value for key, value in (since | recipe).items() if key not in WORDS}


def newest(work: Path) -> tuple[State, Arrays] | None:
    """The newest checkpoint that is what was written; None where there is none. Broken ones are logged, passed over."""
    for path in found(work):
        try:
            return _read(path)
        except (LannerError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            log.warning("checkpoint %s is passed over: %s: %s", path.name, type(e).__name__, e)
    return None


def _read(path: Path) -> tuple[State, Arrays]:
    for name, entry in read_json(path / MANIFEST).items():
        if sha256(path / name) != entry["sha256"]:
            raise ValueError(f"{name} has other bytes than were written")
    with np.load(path / "arrays.npz", allow_pickle=False) as packed:
        arrays = {name: packed[name] for name in packed.files}
    return json.loads((path / "state.json").read_bytes()), arrays
