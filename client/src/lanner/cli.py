"""The command `lanner`."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from lanner import pipeline, prune, tables
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
    parser.add_argument("--batch-size", type=int, default=0, help="0: as the recipe says")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="0: as the recipe says")
    parser.add_argument("--early-stopping", type=int, default=0, metavar="EPOCHS",
                        help="without a better validation accuracy, after which training stops; 0: as the recipe says")
    parser.add_argument("--class-weights", default="", choices=("", "balanced"), help="balanced: classes count alike")
    parser.add_argument("--alias", default="", help="what the best variant is to be made; production when left out")
    parser.add_argument("--loss", type=float, metavar="POINTS",
                        help="of accuracy that a variant may lose against Keras; the server's default when left out")
    parser.add_argument("--size", type=int, default=0, help="pixels a side, 32 to 256; 0: chosen from the images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=[], metavar="VARIANT", help="all when left out")


def training_options(args: argparse.Namespace) -> dict[str, Json]:
    """What `add_training_options` read, as the stages of a pipeline; what was left out stays with the server."""
    train = {"recipe": args.recipe, "epochs": args.epochs, "budget_s": args.budget, "seed": args.seed,
             "batch_size": args.batch_size, "learning_rate": args.learning_rate,
             "early_stopping": args.early_stopping, "class_weights": args.class_weights}
    preprocess = {"size": args.size, "seed": args.seed}
    optimize = {"variants": args.variants, "seed": args.seed, "alias": args.alias}
    if args.loss is not None:  # 0 is a choice
        optimize["budget"] = args.loss
    return {stage: {k: v for k, v in fields.items() if v or k == "budget"}
            for stage, fields in (("preprocess", preprocess), ("train", train), ("optimize", optimize))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lanner", description="From a folder of images to a fast endpoint.")
    parser.add_argument("--url", default=os.environ.get("LANNER_URL", "http://127.0.0.1:8000"),
                        help="where Lanner answers (LANNER_URL)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    upload = commands.add_parser("upload", help="send a folder, zip or tar")
    upload.add_argument("path", type=Path)
    train = commands.add_parser("train", help="prepare, train, optimize and serve a dataset")
    train.add_argument("source", help="a folder, zip or tar, or cifar10, upload:ID, import:NAME, dataset:ID")
    add_training_options(train)
    tune = commands.add_parser("tune", help="try recipes on a dataset, optimize and serve the best")
    tune.add_argument("dataset", help="a dataset id")
    tune.add_argument("--name", default="", help="what clients call the model; by default what the dataset is called")
    tune.add_argument("--trials", type=int, default=0, help="how many; the server's default when left out")
    tune.add_argument("--budget", type=float, default=0.0, metavar="SECONDS", help="of training in all; 0: no limit")
    tune.add_argument("--recipes", nargs="+", default=[], metavar="RECIPE", help="small and seed-cnn when left out")
    tune.add_argument("--epochs", type=int, default=0, help="of a whole trial; 0: as the recipe says")
    tune.add_argument("--seed", type=int, default=0)
    commands.add_parser("status", help="who works, what waits, how full the volume is")
    commands.add_parser("jobs", help="the latest jobs")
    for name, text in (("job", "follow a job, or a pipeline, to its end"), ("cancel", "cancel a job, or a pipeline"),
                       ("retry", "try again a job that failed, and what failed with it")):
        commands.add_parser(name, help=text).add_argument("id", help="j-..." if name == "retry" else "j-... or p-...")
    log = commands.add_parser("log", help="what a job's last attempt logged")
    log.add_argument("id")
    log.add_argument("--attempt", type=int, default=0, help="another attempt's")
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
    prune_ = commands.add_parser("prune", help="uploads that datasets were made of, versions that no alias names")
    prune_.add_argument("--yes", action="store_true", help="delete them; without it they are listed")
    download = commands.add_parser("download", help="take a variant away, with what runs it elsewhere")
    download.add_argument("name")
    _add_place(download)
    download.add_argument("--out", type=Path, help="a file; by default NAME-VERSION-VARIANT.zip, of keras .keras")
    commands.add_parser("shadow", help="how the candidate answers live images beside production").add_argument("name")
    predict = commands.add_parser("predict", help="label images")
    predict.add_argument("name")
    predict.add_argument("image", nargs="+", type=Path)
    _add_place(predict)
    predict.add_argument("--top-k", type=int, default=0, metavar="K", help="labels of each image; 0: the server's five")
    batch = commands.add_parser("batch", help="label every image of a folder, archive or dataset, into a Parquet file")
    batch.add_argument("name")
    batch.add_argument("source", help="a folder, zip or tar, or upload:ID, import:NAME, dataset:ID, dataset:ID/test")
    batch.add_argument("--out", type=Path, default=Path("predictions.parquet"))
    _add_place(batch)
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
            ended = _watched(client, accepted["jobs"], console)
            if "preprocess" in ended:
                console.print(tables.prepared(ended["preprocess"]["result"], client.dataset(accepted["dataset_id"])),
                              soft_wrap=True)
            console.print(tables.card(client.card(accepted["model_id"])))
        case "tune":
            made = client.submit_tune(args.dataset, name=args.name, trials=args.trials, budget_s=args.budget,
                                      recipes=args.recipes, epochs=args.epochs, seed=args.seed)
            ended = _watched(client, {stage: job["id"] for stage, job in made.items()}, console)
            console.print(tables.tuned(ended["tune"]["result"]), soft_wrap=True)
            console.print(tables.card(client.card(made["tune"]["job"]["model_id"])))
        case "retry":
            made = client.retry(args.id)
            _watched(client, made["jobs"], console)
        case "status":
            console.print(tables.status(client.system()))
        case "jobs":
            console.print(tables.jobs(client.jobs()))
        case "job":
            watch(client, _jobs_of(client, args.id), console)
        case "cancel":
            jobs = _jobs_of(client, args.id)
            client.cancel_pipeline(args.id) if args.id.startswith("p-") else client.cancel(args.id)
            for job_id in jobs.values():
                watch_until_cancelled(client, job_id, console)
        case "log":
            console.print(client.log(args.id, args.attempt), markup=False, highlight=False, soft_wrap=True, end="")
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
        case "prune":
            found = prune.unneeded(client)
            kept = prune.prune(client, found) if args.yes else {}
            for path in found:
                console.print(f"{path} stays: {kept[path]}" if path in kept else path, soft_wrap=True)
            told = f"{len(found) - len(kept)} deleted" if args.yes else f"{len(found)} to delete: lanner prune --yes"
            console.print(told)
        case "shadow":
            console.print(tables.shadow(client.shadow(args.name)), soft_wrap=True)
        case "predict":
            answer = client.predict(args.name, args.image, alias=args.alias, version=args.version,
                                    variant=args.variant, top_k=args.top_k)
            console.print(tables.predictions(answer, [str(i) for i in args.image], args.top_k or 3))
        case "download":
            version, variant = _place(client, args)
            out = args.out or Path(f"{args.name}-{version}" + (".keras" if variant == "keras" else f"-{variant}.zip"))
            size = client.download(args.name, out, version=version, variant=variant)
            console.print(f"{variant} of {args.name} version {version}: {out} ({size / 1e6:.1f} MB)", soft_wrap=True)
        case "batch":
            source = args.source
            _check_writable(args.out)  # known before hours of work, not after them
            if not source.startswith(pipeline.WORDS):
                source = pipeline.send(client, Path(source), console)
            job = client.submit_predict(args.name, source, alias=args.alias, version=args.version,
                                        variant=args.variant, embedding=args.embedding)
            done = _watched(client, {"predict": job["id"]}, console)["predict"]["result"]
            try:
                size = client.download_predictions(done["predictions_id"], args.out)
            except (OSError, LannerError) as e:
                where = f"{client.url}/v1/predictions/{done['predictions_id']}/predictions.parquet"
                raise LannerError(f"{args.out} could not be written ({e}); the table is there: {where}",
                                  "not_written") from e
            console.print(tables.batch(done, str(args.out), size), soft_wrap=True)


def _add_place(parser: argparse.ArgumentParser) -> None:
    """Which of a name's variants."""
    parser.add_argument("--alias", default="production")
    parser.add_argument("--version", type=int, default=0, help="0: the one that the alias points at")
    parser.add_argument("--variant", default="", help="such as onnx-int8; by default the alias's")


def _place(client: Client, args: argparse.Namespace) -> tuple[int, str]:
    """Version and variant that were asked for, or that the alias points at. Raises LannerError."""
    if args.version and args.variant:
        return args.version, args.variant
    at = client.model(args.name)["aliases"].get(args.alias)
    if at is None or args.version not in (0, at["version"]):
        which = f"{args.name} has no alias {args.alias}" if at is None else \
            f"{args.name}@{args.alias} is version {at['version']}, not {args.version}"
        raise LannerError(f"{which}: say --version and --variant", "no_variant")
    return at["version"], args.variant or at["variant"]


def _jobs_of(client: Client, any_id: str) -> dict[str, str]:
    """Kind -> id of a job, or of all jobs of a pipeline."""
    if any_id.startswith("p-"):
        return {kind: job["id"] for kind, job in client.pipeline(any_id)["jobs"].items()}
    return {client.job(any_id)["kind"]: any_id}


def _watched(client: Client, jobs: dict[str, str], console: Console) -> dict[str, Json]:
    """`watch` of what this command began: who leaves is told that it goes on."""
    try:
        return watch(client, jobs, console)
    except KeyboardInterrupt:
        first = next(iter(jobs.values()))
        console.print(f"It goes on: `lanner job {first}` follows it, `lanner cancel {first}` ends it.", soft_wrap=True)
        raise


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
