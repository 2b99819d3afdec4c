"""The whole way from a folder, an archive or a source word to a served model, shown while it goes."""

from pathlib import Path

from rich.console import Console

from lanner.client import Client, Json
from lanner.naming import name_of
from lanner.progress import upload_bar, watch

WORDS = ("upload:", "import:")


def run(client: Client, source: str, console: Console, *, name: str = "", preprocess: Json | None = None,
        train: Json | None = None, optimize: Json | None = None) -> Json:
    """Upload `source` if it is a path, submit a pipeline and follow it to its end.

    source: `cifar10`, `upload:<id>`, `import:<name>`, or a local folder, zip or tar.
    Returns {name, pipeline, dataset_id, model_id, jobs: stage -> job as it ended}.

    Raises:
        LannerError: a stage failed, or the server refused the upload or the pipeline.
    """
    if source != "cifar10" and not source.startswith(WORDS):
        path = Path(source)
        name = name or name_of(path)
        with upload_bar(console, path.name) as progress:
            upload = client.upload(path, progress)
        console.print(f"uploaded {path} as {upload['id']} ({upload['size'] / 1e6:.1f} MB)", highlight=False)
        source = upload["source"]
    name = name or ("cifar10" if source == "cifar10" else source.partition(":")[2])
    accepted = client.submit_pipeline(source, name=name, preprocess=preprocess, train=train, optimize=optimize)
    return {**accepted, "name": name, "jobs": watch(client, accepted["jobs"], console)}
