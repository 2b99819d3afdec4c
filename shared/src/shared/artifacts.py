"""Artifacts: published once, whole or absent, immutable after. Paths, manifests, publish, open, aliases.

The protocol (write to staging, fsync, manifest last, read back, one rename) is the one that Orbax uses for checkpoints:
on one file system a rename is atomic, and a second publisher finds the first one's directory.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shared import faults
from shared.errors import Conflict, Damaged, NotFound
from shared.jobs import ID, check_id

MANIFEST = "manifest.json"
KINDS = {"datasets": "dataset", "models": "model", "variants": "variant", "predictions": "predictions"}
Manifest = dict[str, Any]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all: temporary file, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    fsync_dir(path.parent)


def write_json(path: Path, value: object) -> None:
    write_bytes(path, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> Any:
    """Raises NotFound when it is absent, Damaged when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{path.parent.name}/{path.name} does not exist") from None
    except ValueError as e:
        raise Damaged(f"{path.parent.name}/{path.name} is not valid JSON ({e})") from None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on `path`; freed by the kernel when the holder dies. Local file systems only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def stage(root: Path, job_id: str) -> Path:
    """A fresh folder on the volume to write an artifact into; seen by nobody until `publish`."""
    path = root / ".staging" / f"{job_id}.{uuid.uuid4().hex[:8]}"
    path.mkdir(parents=True)
    return path


def publish(root: Path, staging: Path, target: str, manifest: Manifest,
            digests: Mapping[str, str] = MappingProxyType({})) -> Manifest:
    """Turn a staging folder into the artifact `target` ("datasets/<id>", ...). The first publisher wins.

    digests: the SHA-256 of files, by their path in the folder, that the caller has hashed as they now are. Adds to the
    manifest: schema, id, kind, created_at, and size and SHA-256 of every file. Returns the manifest that stands at the
    target, this one or the winner's.
    """
    final = root / target
    files = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        name = str(path.relative_to(staging))
        files[name] = {"size": path.stat().st_size, "sha256": digests.get(name) or sha256(path)}
    folder, _, artifact_id = target.partition("/")
    whole = {"schema": 1, "kind": KINDS[folder], "id": artifact_id, "created_at": now(),
             "python": platform.python_version(), **manifest, "files": files}
    write_json(staging / MANIFEST, whole)
    for inner in {p.parent for p in staging.rglob("*")}:
        fsync_dir(inner)
    _verify(staging, read_json(staging / MANIFEST), hashes=False)
    final.parent.mkdir(parents=True, exist_ok=True)
    faults.point("before-rename")
    try:
        os.rename(staging, final)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(staging)
    fsync_dir(final.parent)
    faults.point("after-rename")
    return open_artifact(root, target, hashes=False)


def _verify(path: Path, manifest: Manifest, hashes: bool) -> None:
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{path.name}: {name} is missing")
        if file.stat().st_size != entry["size"]:
            raise Damaged(f"{path.name}: {name} has {file.stat().st_size} bytes, expected {entry['size']}")
        if hashes and sha256(file) != entry["sha256"]:
            raise Damaged(f"{path.name}: {name} has other bytes than its manifest says; do not use it, publish it anew")


def open_artifact(root: Path, target: str, hashes: bool = True) -> Manifest:
    """The manifest of a published artifact, checked: every file there, of its size and, with `hashes`, of its SHA-256.

    Raises:
        NotFound: nothing is published there.
        Damaged: the manifest or a file is not what was published.
    """
    path = root / target
    if not path.is_dir():
        raise NotFound(f"{target} does not exist")
    try:
        manifest: Manifest = read_json(path / MANIFEST)
    except NotFound:
        raise Damaged(f"{target} has no {MANIFEST}") from None
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise Damaged(f"{target}/{MANIFEST} lists no files")
    _verify(path, manifest, hashes)
    return manifest


def manifest_digest(root: Path, target: str) -> str:
    """SHA-256 of the manifest: it names every file's hash, so it stands for the artifact."""
    return sha256(root / target / MANIFEST)


def list_ids(root: Path, kind: str) -> list[str]:
    folder = root / kind
    if not folder.is_dir():
        return []
    return sorted((p.name for p in folder.iterdir() if ID.fullmatch(p.name)), reverse=True)


# Names, versions, aliases


def versions(root: Path, name: str) -> dict[int, str]:
    """Version number -> model id of a Name."""
    folder = root / "aliases" / check_id(name, "name") / "versions"
    if not folder.is_dir():
        return {}
    return {int(p.stem): read_json(p)["model"] for p in sorted(folder.glob("*.json"), key=lambda p: int(p.stem))}


def model_of(root: Path, name: str, version: int) -> str:
    """The model id of a version. Raises NotFound."""
    known = versions(root, name)
    if version not in known:
        raise NotFound(f"{name} has no version {version}: it has {sorted(known)}")
    return known[version]


def register_version(root: Path, name: str, model_id: str) -> int:
    """The version of a model under a Name: the one it has, or the next."""
    with locked(root / "aliases" / check_id(name, "name") / ".lock"):
        known = versions(root, name)
        for version, model in known.items():
            if model == model_id:
                return version
        given = [int(path.stem) for path in (root / "aliases" / name / "versions").glob("*.gone")]  # to deleted ones
        version = max([*known, *given], default=0) + 1
        write_json(root / "aliases" / name / "versions" / f"{version}.json", {"model": model_id, "created_at": now()})
        return version


def aliases(root: Path, name: str) -> dict[str, dict[str, Any]]:
    """Alias -> {seq, version, model, variant, manifest_sha256, moved_at, moved_by, previous} of a Name.

    previous: {version, variant} that it pointed at before these, None at first.
    """
    folder = root / "aliases" / check_id(name, "name")
    return {p.stem: read_json(p) for p in sorted(folder.glob("*.json"))} if folder.is_dir() else {}


def alias_seq(root: Path, name: str, alias: str) -> int:
    """The number of an alias's last move; deleting it was one. 0 where there never was any."""
    path = root / "aliases" / check_id(name, "name") / f"{check_id(alias, 'alias')}.json"
    known = next((p for p in (path, path.with_suffix(".gone")) if p.exists()), None)
    return int(read_json(known)["seq"]) if known else 0


def names(root: Path) -> list[str]:
    folder = root / "aliases"
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and ID.fullmatch(p.name)) if folder.is_dir() else []


def promote(root: Path, name: str, alias: str, version: int, variant: str, *, by: str,
            seq: int | None = None) -> dict[str, Any]:
    """Point an alias at a Variant of a version. The only way an alias moves; flock, compare, replace.

    Raises:
        NotFound: no such version, or no such published Variant.
        Damaged: the Variant is not what was published.
        Conflict: `seq` is not the number of its last move, 0 for none: somebody moved it who knew better.
    """
    check_id(alias, "alias")
    model = model_of(root, name, version)
    target = f"variants/{model}/{check_id(variant, 'variant')}"
    gone = NotFound(f"version {version} of {name} was deleted just now")
    try:
        open_artifact(root, target)
    except FileNotFoundError:  # in the midst of it
        raise gone from None
    path = root / "aliases" / name / f"{alias}.json"
    with locked(root / "aliases" / name / ".lock"):
        if versions(root, name).get(version) != model or not (root / target / MANIFEST).exists():
            raise gone
        old = read_json(path) if path.exists() else None
        last = alias_seq(root, name, alias)
        if seq not in (None, last):
            how = f"was moved by {old['moved_by']} just now: look where it points" if old else "was deleted just now"
            raise Conflict(f"{name}@{alias} {how}", "alias_moved")
        place = {"version": version, "variant": variant}
        before = {key: old[key] for key in place} if old else None
        if old and before == place:  # the same again, as after an engine's rebuild
            before = old.get("previous")
        new = {"seq": last + 1, "version": version, "model": model, "variant": variant,
               "manifest_sha256": manifest_digest(root, target), "moved_at": now(), "moved_by": by,
               "previous": before}
        faults.point("before-alias")
        write_json(path, new)
        return new


def roll_back(root: Path, name: str, alias: str, *, by: str) -> dict[str, Any]:
    """Point an alias at what it pointed at before; once more, and it is where it was.

    Raises as `promote`, and:
        NotFound: the Name has no such alias.
        Conflict: the alias has pointed at one Variant alone.
    """
    found = aliases(root, name)
    if check_id(alias, "alias") not in found:
        raise NotFound(f"{name} has no alias {alias}: it has {', '.join(found) or 'none'}")
    record = found[alias]
    before = record.get("previous")
    if before is None:
        raise Conflict(f"{name}@{alias} has always pointed at {record['variant']} of version {record['version']}: "
                       "there is nothing to go back to", "no_previous")
    return promote(root, name, alias, before["version"], before["variant"], by=by, seq=record["seq"])
