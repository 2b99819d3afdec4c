"""The release card: everything measured of a Model's Variants, as JSON and as a page."""

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from optimization.build import agreement, tools
from optimization.findings import thumbnail
from optimization.gate import METHOD, NEAR
from optimization.measure import Speed
from optimization.page import render
from shared import gpu
from shared.artifacts import Manifest, now, write_bytes, write_json
from shared.fitted import cpu_name
from shared.jobs import OptimizeJob

REFERENCE = "keras-fp32"  # the row that every other one is held against
Card = dict[str, Any]
Row = dict[str, Any]


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of right argmaxes, 0..1, of float32 [N, K] against int [N]."""
    return float((scores.argmax(1) == labels).mean())


def new_row(name: str, state: str, **known: object) -> Row:
    """A row of the card: state is `measured`, or `failed` for a Variant that could not be built."""
    format, precision = name.split("-")
    return {"variant": name, "format": format, "precision": precision, "state": state, **known}


def figures(reference: np.ndarray, scores: np.ndarray, labels: np.ndarray, speed: Speed) -> Row:
    """What was measured of a Session on the validation split: accuracy, nearness to Keras, milliseconds, images/s."""
    return {"accuracy": accuracy(scores, labels), "against_keras": agreement(reference, scores),
            "latency_ms": {"p50": speed.p50_ms, "p99": speed.p99_ms, "calls": speed.calls},
            "images_per_s": {str(batch): rate for batch, rate in speed.images_per_s.items()}}


def make_card(job: OptimizeJob, manifest: Manifest, version: int, rows: dict[str, Row], winner: str | None,
              alias: dict[str, Any], tested: dict[str, Any], diagnosis: dict[str, Any], threads: int) -> Card:
    device = next((row["device"] for row in rows.values() if row.get("device", "cpu") != "cpu"), "cpu")
    return {"schema": 1, "name": job.name, "version": version, "model": job.model_id,
            "dataset": manifest["parents"]["dataset"], "recipe": manifest.get("recipe"),
            "size": manifest["spec"]["size"], "classes": len(manifest["spec"]["labels"]), "created_at": now(),
            "device": device, "gpu": asdict(gpu.find()[0]) if device != "cpu" else None,
            "cpu": cpu_name(), "threads": threads,
            "versions": {"python": platform.python_version(), "numpy": np.__version__, **tools()},
            "gate": {"budget": job.budget, "rank_batch": job.rank_batch, "near": NEAR, "method": METHOD,
                     "validation_images": diagnosis["calibration"]["images"]},
            "rows": list(rows.values()), "winner": winner, "alias": alias, "test": tested, "diagnosis": diagnosis}


def write_card(root: Path, card: Card, images: np.ndarray) -> None:
    """cards/<model>.json and .html, each whole or not at all; images: the validation split, uint8 [N, S, S, 3]."""
    diagnosis = card["diagnosis"]
    shown = {entry["image"] for entry in diagnosis["mistakes"] + diagnosis["label_errors"]["images"]}
    pictures = {number: thumbnail(images[number]) for number in shown}
    write_json(root / "cards" / f"{card['model']}.json", card)
    write_bytes(root / "cards" / f"{card['model']}.html", render(card, pictures).encode())


def summary(card: Card) -> dict[str, Any]:
    """What the job's record keeps of a card."""
    short = {row["variant"]: {key: row[key] for key in ("state", "accuracy", "images_per_s", "why") if key in row}
             for row in card["rows"]}
    return {"model_id": card["model"], "name": card["name"], "version": card["version"], "winner": card["winner"],
            "alias": card["alias"], "variants": short, "card": f"cards/{card['model']}.json"}
