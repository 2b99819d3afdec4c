"""Answers of the API as tables for people."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from lanner.client import Json
from lanner.progress import describe, eta


def status(body: Json) -> Group:
    """A row per queue, the volume's free bytes, and what keeps jobs from running."""
    table = Table("queue", "workers", "running", "queued", "oldest", box=None)
    for service, queue in body["queues"].items():
        workers, oldest = queue["workers"], queue["oldest_s"]
        running = [worker["job"] for worker in workers or () if worker["job"]]
        table.add_row(service, "?" if workers is None else str(len(workers)), " ".join(running), str(queue["queued"]),
                      eta(oldest))
    free, total = (body["disk"][name] / 1e9 for name in ("free", "total"))
    return Group(table, f"{free:,.1f} of {total:,.1f} GB of the volume are free", *body["trouble"])


def jobs(rows: Sequence[Json]) -> Table:
    table = Table(box=None)
    for heading in ("job", "kind", "state", "name", "accepted"):
        table.add_column(heading, no_wrap=True)
    table.add_column("doing", max_width=60)
    for job in rows:
        percent, left, doing = describe({"progress": None, **job})
        doing = f"{percent:.0f} %  {left}  {doing}" if job["state"] == "running" else ""
        accepted = job["accepted_at"][5:16].replace("T", " ")
        table.add_row(job["id"], job["kind"], job["state"], job["job"]["name"], accepted,
                      job["error"]["message"] if job.get("error") else doing)
    return table


def datasets(rows: Sequence[Json]) -> Table:
    table = Table("dataset", "name", "images", "classes", "size", "skipped", box=None)
    for row in rows:
        known = row["summary"]
        table.add_row(row["id"], row["name"], f"{sum(known['images'].values()):,}", str(known["classes"]),
                      str(known["size"]), str(known["skipped"]))
    return table


def prepared(done: Json, dataset: Json, shown: int = 5) -> str:
    """A sentence on a Dataset that was prepared, and which files could not be used."""
    says = f"dataset {done['dataset_id']}: {sum(done['images'].values()):,} images of {done['classes']} classes"
    if not done["skipped"]:
        return says
    named = [f"  {entry['path']}: {entry['reason']}" for entry in dataset["stats"]["skipped"]["examples"][:shown]]
    return "\n".join([f"{says}; {done['skipped']:,} files can't be used, such as", *named])


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


def card(body: Json) -> Group:
    """A release card: a row per Variant and one for Keras, which they are held against; below it the reasons."""
    batch = str(body["gate"]["rank_batch"])
    table = Table(title=f"{body['name']} version {body['version']} on {body['device']}, {body['threads']} threads; "
                        f"images/s at batch {batch}", box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for heading in ("variant", "accuracy", "loss, points", "p50 ms", "images/s", "MB", "verdict"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("variant", "verdict") else "right")
    for row in body["rows"]:
        if row["state"] != "measured":
            table.add_row(row["variant"], *[""] * 5, "not built")
            continue
        gate = row.get("gate")
        loss = f"{gate['low']:.2f} to {gate['high']:.2f}" if gate else ""
        table.add_row(row["variant"], f"{100 * row['accuracy']:.2f} %", loss, f"{row['latency_ms']['p50']:.2f}",
                      f"{row['images_per_s'][batch]:,.0f}", f"{row['bytes'] / 1e6:.2f}", _verdict(row, body),
                      style="bold" if row.get("winner") else None)
    reasons = [f"{row['variant']}: {row['why']}" for row in body["rows"] if row.get("why")]
    return Group(table, *reasons, *_fitted(body), *_chosen(body), *_left(body), _tested(body))


def _fitted(body: Json) -> list[str]:
    """How the winner is run where it was measured."""
    return [f"{row['variant']} serves most with HTTP_PROCESSES={at.get('processes', 1)} on {at['threads']} thread(s) "
            f"each, at most {at['batch']} images together: "
            f"{at['images_per_s']:,.0f} images/s, p99 {at['p99_ms']:.1f} ms"
            for row in body["rows"] if row.get("winner") and (at := row.get("serving"))]


def _chosen(body: Json) -> list[str]:
    """Why the training was as it was, where the recipe `auto` chose it."""
    return [f"auto chose {sentence}" for sentence in (body.get("recipe") or {}).get("chosen") or ()]


def _left(body: Json) -> list[str]:
    """Why the alias is where it was, though there is a winner."""
    if not body.get("winner") or body["alias"]["moved"]:
        return []
    return [f"{body['alias']['alias']} was not moved: {body['alias']['reason']}"]


def _verdict(row: Json, body: Json) -> str:
    if "gate" not in row:
        return "reference"
    if row["winner"]:
        return f"made {body['alias']['alias']}" if body["alias"]["moved"] else "best"
    return "passes" if row["gate"]["passes"] else "refused"


def _tested(body: Json) -> str:
    """The test split, and what the losses above are."""
    parts = [f"{name} {100 * value:.2f} %" for name, value in body["test"]["accuracy"].items()]
    tested = f"Test split, {body['test']['images']} images: {', '.join(parts)}. " if parts else ""
    return (f"{tested}Losses are 95 % intervals on {body['gate']['validation_images']} validation images, "
            f"the budget is {body['gate']['budget']:g} points.")


def shadow(body: Json) -> Group:
    """What a candidate answers beside production: a sentence, both latencies, a row per pair of labels that differ."""
    sides = {alias: body[alias] for alias in ("production", "candidate")}
    missing = [alias for alias, at in sides.items() if at is None]
    if missing:
        return Group(f"{body['name']} has no {missing[0]} in memory: lanner promote --alias {missing[0]} points one")
    says = f"of {body['mirrored']:,} live images, {body['dropped']:,} dropped, {body['failed']:,} failed"
    if not body["mirrored"]:
        why = "" if body["share"] else ": SHADOW_SHARE is 0, so that none are mirrored"
        return Group(f"{body['name']}: nothing is known yet {says}{why}")
    low, high = body["interval"]
    says = (f"{body['name']}: the candidate disagrees on {100 * body['rate']:.2f} % ({100 * low:.2f} to "
            f"{100 * high:.2f}) {says}")
    runs = Table("alias", "version", "variant", "p50 ms", "p99 ms", "images a run", box=None)
    for alias, at in sides.items():
        ms = body["run_ms"][alias]
        figures = [f"{ms['p50']:.2f}", f"{ms['p99']:.2f}", f"{ms['images_per_run']:.1f}"] if ms else [""] * 3
        runs.add_row(alias, str(at["version"]), at["variant"], *figures)
    pairs = Table("production says", "candidate says", "images", box=None)
    for row in body["confusion"]:
        if row["production"] != row["candidate"]:
            pairs.add_row(row["production"], row["candidate"], f"{row['images']:,}")
    return Group(says, runs, *([pairs] if pairs.row_count else []))


def tuned(done: Json) -> str:
    """A sentence on a TuneJob's result."""
    return (f"{done['trials']} trials; the best, of recipe {done['recipe']}, has "
            f"{100 * done['validation_accuracy']:.2f} % of the validation images right: {done['model_id']}")


def batch(done: Json, path: str, size: int) -> str:
    """A sentence on a PredictJob's result, and where its table is."""
    right = f", {100 * done['accuracy']:.2f} % as labelled" if done["accuracy"] is not None else ""
    failed = f", {done['failed']:,} not readable" if done["failed"] else ""
    return (f"{done['images']:,} images by {done['variant']} of version {done['version']} in {done['seconds']:.1f} s"
            f"{right}{failed}: {path} ({size / 1e6:.1f} MB)")
