"""Answers of the API as tables for people."""

from collections.abc import Sequence

from rich.box import ROUNDED
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


def card(body: Json) -> Table:
    """A release card: a row per Variant and one for Keras, which they are held against."""
    batch = str(body["gate"]["rank_batch"])
    table = Table("variant", "accuracy", "loss, points", "p50", f"images/s at {batch}", "size", "verdict", box=ROUNDED,
                  title=f"{body['name']} version {body['version']} on {body['device']}, {body['threads']} threads",
                  caption=_tested(body), caption_justify="left")
    for row in body["rows"]:
        if row["state"] != "measured":
            table.add_row(row["variant"], "", "", "", "", "", row["why"])
            continue
        gate = row.get("gate")
        loss = f"{gate['low']:+.2f} to {gate['high']:+.2f}" if gate else ""
        table.add_row(row["variant"], f"{100 * row['accuracy']:.2f} %", loss, f"{row['latency_ms']['p50']:.2f} ms",
                      f"{row['images_per_s'][batch]:,.0f}", f"{row['bytes'] / 1e6:.2f} MB", row.get("why", ""),
                      style="bold" if row.get("winner") else None)
    return table


def _tested(body: Json) -> str:
    parts = [f"{name} {100 * value:.2f} %" for name, value in body["test"]["accuracy"].items()]
    budget = f"Losses: 95 % intervals on {body['gate']['validation_images']} validation images, " \
             f"budget {body['gate']['budget']:g} points."
    return f"Test split, {body['test']['images']} images: {', '.join(parts)}. {budget}" if parts else budget
