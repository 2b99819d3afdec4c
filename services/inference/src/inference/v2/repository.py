"""What the server has and what of it answers, as the repository extension lists it."""

from pathlib import Path

from inference.loaded import LoadedModels
from inference.scores import model_called
from inference.v2.messages import Object
from shared import artifacts


def index(root: Path, loaded: LoadedModels) -> list[Object]:
    """An entry for what each alias points at (production is NAME, others NAME@ALIAS) and for every other version."""
    (serving, refused), unloaded = loaded.state(), loaded.unloaded()
    versions_of = {(s["name"], s["alias"]): s["version"] for s in serving}
    reason_of = {(r["name"], r["alias"]): r["reason"] for r in refused}
    found: list[Object] = []
    for name in artifacts.names(root):
        for alias, record in artifacts.aliases(root, name).items():
            version, reason = versions_of.get((name, alias)), reason_of.get((name, alias), "")
            state = "READY" if version else "UNAVAILABLE" if reason or name in unloaded else "LOADING"
            found.append(_entry(model_called(name, alias), version or record["version"], state,
                                reason or ("unloaded" if state == "UNAVAILABLE" else "")))
        told = {entry["version"] for entry in found if entry["name"] == name}
        for version, model in artifacts.versions(root, name).items():
            if str(version) not in told:
                held = loaded.holds(model)
                idle = "unloaded" if name in unloaded else "not in memory: a request for it loads it"
                found.append(_entry(name, version, "READY" if held else "UNAVAILABLE", "" if held else idle))
    return sorted(found, key=lambda entry: (entry["name"], int(entry["version"])))


def _entry(name: str, version: int, state: str, reason: str) -> Object:
    return {"name": name, "version": str(version), "state": state, "reason": reason}
