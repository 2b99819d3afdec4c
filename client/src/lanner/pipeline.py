"""From a folder, an archive or a source word to an accepted pipeline."""

from pathlib import Path

from rich.console import Console

from lanner.client import Client, Json
from lanner.naming import name_of
from lanner.progress import upload_bar

WORDS = ("upload:", "import:", "dataset:")


def submit(client: Client, source: str, console: Console, *, name: str = "", preprocess: Json | None = None,
           train: Json | None = None, optimize: Json | None = None) -> Json:
    """Upload `source` if it is a path, then submit the whole pipeline; `progress.watch` follows its jobs.

    source: `cifar10`, `upload:<id>`, `import:<name>`, `dataset:<id>`, or a local folder, zip or tar.
    Returns {name, pipeline, dataset_id, model_id, jobs: {preprocess, train, optimize}}; of a Dataset the last two.
    """
    if source.startswith("dataset:") and preprocess:  # its seed is of the splits, which are made already
        preprocess = {key: value for key, value in preprocess.items() if key != "seed"}
    if source != "cifar10" and not source.startswith(WORDS):
        name = name or name_of(Path(source))
        source = send(client, Path(source), console)
    return client.submit_pipeline(source, name=name, preprocess=preprocess, train=train, optimize=optimize)


def send(client: Client, path: Path, console: Console) -> str:
    """Upload a folder, zip or tar with a bar; returns its source word."""
    with upload_bar(console, path.name) as progress:
        upload = client.upload(path, progress)
    console.print(f"uploaded {path} ({upload['size'] / 1e6:.1f} MB) as {upload['id']}", soft_wrap=True)
    return str(upload["source"])
