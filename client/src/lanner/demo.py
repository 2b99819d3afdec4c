"""The first thing to try: a dataset goes in, its endpoint labels an image that no training has seen."""

import argparse
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from lanner import pipeline, tables
from lanner.cli import add_training_options, training_options
from lanner.client import Client, Json
from lanner.errors import LannerError
from lanner.progress import plain_console, watch

PICK_UP_S = 30.0  # the API looks at its aliases every second and then loads


def digits(folder: Path) -> Path:
    """scikit-learn's 1,797 handwritten digits, grey 8x8, as one folder of PNGs a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for i, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        path = folder / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(path)
    return folder


def train(client: Client, console: Console, data: str, options: dict[str, Json], name: str) -> Json:
    """Run the pipeline on `data`, or on CIFAR-10; on the digits where CIFAR-10 can't be had."""
    if data:
        return _run(client, console, data, options, name)
    try:
        return _run(client, console, "cifar10", options, name)
    except LannerError as e:
        if e.code != "source_unavailable":
            raise
        console.print(f"CIFAR-10 can't be had ({e}): going on with scikit-learn's handwritten digits.",
                      soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        return _run(client, console, str(digits(Path(folder, "digits"))), options, name)


def _run(client: Client, console: Console, source: str, options: dict[str, Json], name: str) -> Json:
    """Returns what was accepted, once all of it has succeeded. Interrupted, it cancels what it started."""
    accepted = pipeline.submit(client, source, console, name=name, **options)
    try:
        watch(client, accepted["jobs"], console)
    except KeyboardInterrupt:
        for job_id in accepted["jobs"].values():
            with suppress(LannerError):  # one that has ended
                client.cancel(job_id)
        raise
    return accepted


def predict(client: Client, console: Console, done: Json, card: Json) -> None:
    """Label an image of the test split, once the API serves the version that was trained."""
    image, label = client.example(done["dataset_id"], "test", 0)
    end = time.monotonic() + PICK_UP_S
    while True:
        try:
            answer = client.predict(done["name"], image)
        except LannerError as e:
            if e.status not in (404, 503) or time.monotonic() > end:
                raise
        else:
            if answer["version"] == card["version"] or not card["alias"]["moved"] or time.monotonic() > end:
                break
        time.sleep(0.2)
    console.print(tables.predictions(answer, [f"a held-out image of {label!r}"]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run demo", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--data", default="", help="a folder, zip or tar of images; CIFAR-10 when left out")
    add_training_options(parser)
    args = parser.parse_args()
    console = plain_console()
    began = time.monotonic()
    try:
        with Client(args.url) as client:
            done = train(client, console, args.data, training_options(args), args.name)
            card = client.card(done["model_id"])
            console.print(tables.card(card))
            if not card["winner"]:
                raise LannerError("no variant passed the gate, so none is served; the card says why", "none_passed")
            predict(client, console, done, card)
        console.print(f"{time.monotonic() - began:.0f} s from data to endpoint.")
        if console.is_terminal:
            console.print(f"Ask it yourself:\n  curl --data-binary @IMAGE -H 'Content-Type: application/octet-stream' "
                          f"{args.url}/v1/models/{done['name']}/predict\nServing at {args.url} until Ctrl-C.",
                          soft_wrap=True)
            threading.Event().wait()
        else:
            console.print("Not at a terminal, so it ends here: `./run up` serves what was made, until `./run down`.",
                          soft_wrap=True)
    except LannerError as e:
        sys.exit(f"demo: {e} [{e.code}]")
    except KeyboardInterrupt:
        console.print("Stopping.")


if __name__ == "__main__":
    main()
