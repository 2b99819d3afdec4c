"""Few photographs of mixed sizes through the real stack: upload, preprocess, train by `auto`, optimize, predict.

    ./run bench photographs --data FOLDER [--counts 5 37 200] [--classes 5] [--held 40] [--recipe auto]

FOLDER holds one folder of images a class. Images of under 100 pixels a side are made into what a folder of photographs
is like: a random part of each, 80 to 400 pixels wide, of any shape between 2:3 and 3:2, enlarged, as JPEG of some
quality or as PNG, every tenth grey. They are no photographs: they show no detail finer than they came with. Larger
ones are taken as they are. Of each class COUNT images are uploaded; --held others never are: they are what the endpoint
is asked about, and the interval of the validation accuracy, which the Model's manifest has, should hold the accuracy
found there.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from lanner.client import Client
from shared.intervals import wilson
from shared.stack import free_port

SMALL = 100  # pixels a side, under which an image is enlarged
ASK = 20  # images a request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 37, 200])
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--held", type=int, default=40, help="images a class that are kept for the endpoint")
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("photographs.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, stack(Path(scratch, "state")) as client:
        rows = []
        for count in args.counts:
            rows.append(once(args, client, Path(scratch), count))
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(rows[-1], indent=1), flush=True)
    print(HEAD)
    for row in rows:
        print(line(row))


HEAD = (f"{'a class':>7} {'validation':>10} {'accuracy':>8} {'95 %':>11} {'held':>5} {'accuracy':>8} {'in it':>5} "
        f"{'train s':>7} {'whole s':>7}")


def line(row: dict[str, Any]) -> str:
    """A row of the table under HEAD."""
    low, high = row["interval"]
    found = row["held"]["right"] / row["held"]["images"]
    between = f"{100 * low:.0f} to {100 * high:.0f}"
    return (f"{row['count']:7} {row['dataset']['images']['validation']:10} "
            f"{100 * row['train']['validation_accuracy']:8.1f} {between:>11} {row['held']['images']:5} "
            f"{100 * found:8.1f} {'yes' if low <= found <= high else 'NO':>5} {row['train']['seconds']:7.1f} "
            f"{max(row['seconds'].values()):7.1f}")


@contextmanager
def stack(state: Path) -> Iterator[Client]:
    """The stack as `./run up` starts it, on a port and in a folder of its own."""
    port = free_port()
    environment = {**os.environ, "PORT": str(port), "DEVICE": os.environ.get("DEVICE", "cpu")}
    supervisor = [sys.executable, "-m", "shared.supervisor"]
    subprocess.run([*supervisor, "up", "--state", state, "--owner", str(os.getpid())], env=environment, check=True)
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        subprocess.run([*supervisor, "down", "--state", state], env=environment, check=True)


def once(args: argparse.Namespace, client: Client, scratch: Path, count: int) -> dict[str, Any]:
    """One dataset of `count` images a class to its endpoint's answers about images that it has never seen."""
    kept, held = photographs(args, scratch / str(count), count)
    began = time.monotonic()
    upload = client.upload(kept)
    accepted = client.submit_pipeline(upload["source"], name=f"photographs-{count}", train={"recipe": args.recipe})
    seconds: dict[str, float] = {}
    for stage, job in client.follow_all(accepted["jobs"]):
        if job["state"] in ("failed", "cancelled"):
            raise SystemExit(f"{stage} of {count} images a class {job['state']}: {job.get('error')}")
        seconds[stage] = round(time.monotonic() - began, 1)
    results = {stage: client.job(job_id)["result"] for stage, job_id in accepted["jobs"].items()}
    right = asked = 0
    for label, images in held.items():
        for at in range(0, len(images), ASK):
            answer = client.predict(accepted["name"], images[at:at + ASK])
            right += sum(found["top"][0]["label"] == label for found in answer["predictions"])
            asked += len(images[at:at + ASK])
    images = results["preprocess"]["images"]["validation"]
    return {"count": count, "dataset": results["preprocess"], "train": results["train"], "seconds": seconds,
            "interval": list(wilson(round(results["train"]["validation_accuracy"] * images), images)),
            "held": {"right": right, "images": asked, "interval": list(wilson(right, asked))}}


def photographs(args: argparse.Namespace, folder: Path, count: int) -> tuple[Path, dict[str, list[bytes]]]:
    """A folder of `count` images a class, and of each class the bytes of --held others."""
    draw = random.Random(args.seed)
    held: dict[str, list[bytes]] = {}
    for source in sorted(path for path in args.data.iterdir() if path.is_dir())[:args.classes]:
        paths = sorted(source.iterdir())
        chosen = draw.sample(paths, count + args.held)
        made = [photograph(path, draw) for path in chosen]
        (folder / source.name).mkdir(parents=True)
        for number, (content, suffix) in enumerate(made[:count]):
            (folder / source.name / f"{number}.{suffix}").write_bytes(content)
        held[source.name] = [content for content, _ in made[count:]]
    return folder, held


def photograph(path: Path, draw: random.Random) -> tuple[bytes, str]:
    """An image's bytes and suffix, made larger if it is small."""
    with Image.open(path) as opened:
        if min(opened.size) >= SMALL:
            return path.read_bytes(), path.suffix.lstrip(".")
        image = opened.convert("RGB")
    wide, tall = image.size
    part = draw.uniform(0.8, 1.0)
    shape = draw.uniform(2 / 3, 1.5)  # height by width
    width, height = part * wide * min(1.0, 1 / shape), part * tall * min(1.0, shape)
    left, top = draw.uniform(0, wide - width), draw.uniform(0, tall - height)
    across = round(draw.uniform(80, 400))
    size = across, max(80, round(across * shape))
    image = image.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    if draw.random() < 0.1:
        image = image.convert("L")
    suffix = "png" if draw.random() < 0.1 else "jpg"
    into = io.BytesIO()
    image.save(into, "PNG" if suffix == "png" else "JPEG", quality=draw.randint(70, 95))
    return into.getvalue(), suffix


if __name__ == "__main__":
    main()
