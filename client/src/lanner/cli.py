"""The command `lanner`."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from lanner import pipeline, tables
from lanner.client import Client, Json
from lanner.errors import LannerError
from lanner.progress import plain_console, upload_bar, watch


def add_training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="", help="what clients call the model; by default what the dataset is called")
    parser.add_argument("--recipe", default="",
                        help="small, seed-cnn, ..., or auto: chosen from the data; the server's default when left out")
    parser.add_argument("--epochs", type=int, default=0, help="0: as the recipe says")
    parser.add_argument("--budget", type=float, default=0.0, metavar="SECONDS",
                        help="of recipe auto: how long the training may take; 0: no limit")
    parser.add_argument("--size", type=int, default=0, help="pixels a side, 32 to 256; 0: chosen from the images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=[], metavar="VARIANT", help="all when left out")


def training_options(args: argparse.Namespace) -> dict[str, Json]:
    """What `add_training_options` read, as the stages of a pipeline; what was left out stays with the server."""
    train = {"recipe": args.recipe, "epochs": args.epochs, "budget_s": args.budget, "seed": args.seed}
    preprocess = {"size": args.size, "seed": args.seed}
    optimize = {"variants": args.variants, "seed": args.seed}
    return {stage: {k: v for k, v in fields.items() if v}
            for stage, fields in (("preprocess", preprocess), ("train", train), ("optimize", optimize))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lanner", description="From a folder of images to a fast endpoint.")
    parser.add_argument("--url", default=os.environ.get("LANNER_URL", "http://127.0.0.1:8000"),
                        help="where Lanner answers (LANNER_URL)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    upload = commands.add_parser("upload", help="send a folder, zip or tar")
    upload.add_argument("path", type=Path)
    train = commands.add_parser("train", help="prepare, train, optimize and serve a dataset")
    train.add_argument("source", help="a folder, zip or tar, or cifar10, upload:ID, import:NAME")
    add_training_options(train)
    tune = commands.add_parser("tune", help="try recipes on a dataset, optimize and serve the best")
    tune.add_argument("dataset", help="a dataset id")
    tune.add_argument("--name", default="", help="what clients call the model; by default what the dataset is called")
    tune.add_argument("--trials", type=int, default=0, help="how many; the server's default when left out")
    tune.add_argument("--budget", type=float, default=0.0, metavar="SECONDS", help="of training in all; 0: no limit")
    tune.add_argument("--recipes", nargs="+", default=[], metavar="RECIPE", help="small and seed-cnn when left out")
    tune.add_argument("--epochs", type=int, default=0, help="of a whole trial; 0: as the recipe says")
    tune.add_argument("--seed", type=int, default=0)
    commands.add_parser("jobs", help="the latest jobs")
    for name, text in (("job", "follow a job to its end"), ("cancel", "cancel a job")):
        commands.add_parser(name, help=text).add_argument("id")
    commands.add_parser("datasets", help="ids, sizes and classes")
    commands.add_parser("models", help="names, versions and aliases")
    commands.add_parser("card", help="the release card of a model").add_argument("model", help="a model id, or a name")
    promote = commands.add_parser("promote", help="point an alias at a variant of a version")
    promote.add_argument("name")
    promote.add_argument("version", type=int)
    promote.add_argument("variant")
    promote.add_argument("--alias", default="production")
    rollback = commands.add_parser("rollback", help="point an alias at what it pointed at before")
    rollback.add_argument("name")
    rollback.add_argument("--alias", default="production")
    delete = commands.add_parser("delete", help="delete what nothing stands on any more")
    delete.add_argument("path", help="datasets/ID, models/NAME/versions/N, models/NAME/aliases/ALIAS, predictions/ID "
                                     "or uploads/ID")
    commands.add_parser("shadow", help="how the candidate answers live images beside production").add_argument("name")
    predict = commands.add_parser("predict", help="label images")
    predict.add_argument("name")
    predict.add_argument("image", nargs="+", type=Path)
    batch = commands.add_parser("batch", help="label every image of a folder, archive or dataset, into a Parquet file")
    batch.add_argument("name")
    batch.add_argument("source", help="a folder, zip or tar, or upload:ID, dataset:ID, dataset:ID/test")
    batch.add_argument("--out", type=Path, default=Path("predictions.parquet"))
    batch.add_argument("--alias", default="production")
    batch.add_argument("--version", type=int, default=0)
    batch.add_argument("--variant", default="")
    batch.add_argument("--embedding", action="store_true", help="with what the network's last layer sees")
    return parser


def execute(args: argparse.Namespace, client: Client, console: Console) -> None:
    match args.command:
        case "upload":
            with upload_bar(console, args.path.name) as progress:
                console.print(client.upload(args.path, progress)["source"])
        case "train":
            accepted = pipeline.submit(client, args.source, console, name=args.name, **training_options(args))
            console.print(f"pipeline {accepted['pipeline']} makes {accepted['name']}")
            ended = watch(client, accepted["jobs"], console)
            console.print(tables.prepared(ended["preprocess"]["result"], client.dataset(accepted["dataset_id"])),
                          soft_wrap=True)
            console.print(tables.card(client.card(accepted["model_id"])))
        case "tune":
            made = client.submit_tune(args.dataset, name=args.name, trials=args.trials, budget_s=args.budget,
                                      recipes=args.recipes, epochs=args.epochs, seed=args.seed)
            ended = watch(client, {stage: job["id"] for stage, job in made.items()}, console)
            console.print(tables.tuned(ended["tune"]["result"]), soft_wrap=True)
            console.print(tables.card(client.card(made["tune"]["job"]["model_id"])))
        case "jobs":
            console.print(tables.jobs(client.jobs()))
        case "job":
            watch(client, {client.job(args.id)["kind"]: args.id}, console)
        case "cancel":
            client.cancel(args.id)
            watch_until_cancelled(client, args.id, console)
        case "datasets":
            console.print(tables.datasets(client.datasets()))
        case "models":
            console.print(tables.models(client.models()))
        case "card":
            console.print(tables.card(client.card(model_id(client, args.model))))
        case "promote":
            moved = client.promote(args.name, args.version, args.variant, args.alias)
            console.print(f"{args.name}@{args.alias} is {moved['variant']} of version {moved['version']}")
        case "rollback":
            moved = client.roll_back(args.name, args.alias)
            console.print(f"{args.name}@{args.alias} is {moved['variant']} of version {moved['version']} again")
        case "delete":
            client.delete(args.path)
            console.print(f"{args.path} is deleted")
        case "shadow":
            console.print(tables.shadow(client.shadow(args.name)), soft_wrap=True)
        case "predict":
            answer = client.predict(args.name, args.image)
            console.print(tables.predictions(answer, [str(i) for i in args.image]))
        case "batch":
            source = args.source
            _check_writable(args.out)  # known before hours of work, not after them
            if not source.startswith(("upload:", "dataset:")):
                source = pipeline.send(client, Path(source), console)
            job = client.submit_predict(args.name, source, alias=args.alias, version=args.version,
                                        variant=args.variant, embedding=args.embedding)
            done = watch(client, {"predict": job["id"]}, console)["predict"]["result"]
            try:
                size = client.download_predictions(done["predictions_id"], args.out)
            except (OSError, LannerError) as e:
                where = f"{client.url}/v1/predictions/{done['predictions_id']}/predictions.parquet"
                raise LannerError(f"{args.out} could not be written ({e}); the table is there: {where}",
                                  "not_written") from e
            console.print(tables.batch(done, str(args.out), size), soft_wrap=True)


def _check_writable(out: Path) -> None:
    if out.is_dir():
        raise LannerError(f"{out} is a folder: expected the name of a file to write", "bad_path")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        why = "can't be written to" if out.parent.is_dir() else "is no folder"
        raise LannerError(f"{out} can't be written: {out.parent} {why}", "bad_path")


def watch_until_cancelled(client: Client, job_id: str, console: Console) -> None:
    *_, last = client.follow(job_id)
    console.print(f"{job_id} {last['state']}")


def model_id(client: Client, text: str) -> str:
    """The model that a Name's production alias points at, or the id itself."""
    try:
        return str(client.model(text)["aliases"]["production"]["model"])
    except (KeyError, LannerError):
        return text


def main() -> None:
    args = _parser().parse_args()
    try:
        with Client(args.url) as client:
            execute(args, client, plain_console())
    except LannerError as e:
        sys.exit(f"lanner: {e} [{e.code}]")
    except OSError as e:  # of this machine's files: the API's failures are LannerErrors
        sys.exit(f"lanner: {e.filename or 'a file'}: {e.strerror or e}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
