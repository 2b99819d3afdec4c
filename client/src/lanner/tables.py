"""Answers of the API as tables for people."""

from collections.abc import Sequence

from rich.table import Table

from lanner.client import Json
from lanner.progress import describe


def jobs(rows: Sequence[Json]) -> Table:
    table = Table("job", "kind", "state", "name", "accepted", "doing", box=None)
    for job in rows:
        percent, left, doing = describe({"progress": None, **job})
        doing = f"{percent:.0f} %  {left}  {doing}" if job["state"] == "running" else ""
        table.add_row(job["id"], job["kind"], job["state"], job["job"]["name"], job["accepted_at"][:19],
                      job["error"]["message"] if job.get("error") else doing)
    return table


def models(rows: Sequence[Json]) -> Table:
    """One row per alias, and one for a Name without any."""
    table = Table("name", "versions", "alias", "version", "variant", box=None)
    for model in rows:
        versions = str(len(model["versions"]))
        for alias, at in (model["aliases"] or {"": None}).items():
            table.add_row(model["name"], versions, alias, str(at["version"]) if at else "", at["variant"] if at else "")
    return table


def predictions(answer: Json, names: Sequence[str], shown: int = 3) -> Table:
    table = Table("image", "label", *["then"] * (shown - 1), box=None,
                  caption=f"{answer['model']} version {answer['version']}, {answer['variant']}", caption_justify="left")
    for name, row in zip(names, answer["predictions"], strict=True):
        table.add_row(name, *(f"{t['label']} {100 * t['probability']:.1f} %" for t in row["top"][:shown]))
    return table
