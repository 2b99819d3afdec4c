"""What a job is: a typed payload of ids, names and numbers, never paths.

New fields get defaults, since old jobs may be queued.
"""

import dataclasses
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, ClassVar

from shared.errors import Refused

ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
SPLITS = ("train", "validation", "test")
RECIPES = ("seed-cnn", "small", "speedrun", "accurate", "transfer")
VARIANTS = ("onnx-fp32", "onnx-int8", "litert-fp32", "litert-fp16", "litert-int8",
            "tensorrt-fp32", "tensorrt-fp16", "tensorrt-int8")


@dataclass(frozen=True)
class PreprocessJob:
    """Raw images -> Dataset. `source` is `cifar10`, `upload:<id>` or `import:<name>`; fractions are of all images."""

    SERVICE: ClassVar[str] = "preprocessing"
    TIMEOUT_S: ClassVar[int] = 12 * 3600
    dataset_id: str
    name: str
    source: str = "cifar10"
    size: int = 0  # pixels a side, 32..256; 0: 32 for CIFAR-10, else the nearest of 32, 64, 128, 224 to the median
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0

    @property
    def target(self) -> str:
        return f"datasets/{self.dataset_id}"


@dataclass(frozen=True)
class TrainJob:
    """Dataset -> Model. Zero or empty means: as the recipe says."""

    SERVICE: ClassVar[str] = "training"
    TIMEOUT_S: ClassVar[int] = 72 * 3600
    model_id: str
    dataset_id: str
    name: str
    recipe: str = "small"  # auto: chosen from the dataset, the device and budget_s
    epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    augmentation: dict[str, Any] = field(default_factory=dict)
    early_stopping: int = 0  # epochs without a better validation accuracy before training stops; 0 as the recipe says
    class_weights: str = ""  # balanced: every class counts the same in the loss, however many images it has
    leave_out: float = 0.0  # of the training images, 0..0.9: those that a small network, trained first, finds easy
    budget_s: float = 0.0  # of recipe auto: seconds that the training may take, 0 for no limit
    seed: int = 0

    @property
    def target(self) -> str:
        return f"models/{self.model_id}"


@dataclass(frozen=True)
class TuneJob:
    """Dataset -> Model, the best of several trainings that are tried within a budget."""

    SERVICE: ClassVar[str] = "training"
    TIMEOUT_S: ClassVar[int] = 72 * 3600
    model_id: str
    dataset_id: str
    name: str
    trials: int = 20
    budget_s: float = 0.0  # seconds of training in all trials, 0 for no limit; one trial always comes to its end
    recipes: tuple[str, ...] = ("small", "seed-cnn")
    epochs: int = 0  # of a whole trial; 0 as the recipe says
    seed: int = 0

    @property
    def target(self) -> str:
        return f"models/{self.model_id}"


@dataclass(frozen=True)
class OptimizeJob:
    """Model -> Variants, card and, if one passes the gate, the alias."""

    SERVICE: ClassVar[str] = "optimization"
    TIMEOUT_S: ClassVar[int] = 12 * 3600
    model_id: str
    name: str
    variants: tuple[str, ...] = VARIANTS
    budget: float = 0.5  # points of validation accuracy a variant may lose against Keras, upper end of the interval
    rank_batch: int = 8  # batch size whose images/s decides among those that pass
    alias: str = "production"
    seed: int = 0

    @property
    def target(self) -> str:
        return ""  # publishes several artifacts, each by itself


@dataclass(frozen=True)
class PredictJob:
    """A Variant's answers for every image of a source -> Predictions.

    `source` is `upload:<id>`, `import:<name>`, `dataset:<id>` or `dataset:<id>/<split>`. The Variant is the one that
    `alias` of the Name points at when the job begins, or that of `version`, or `variant` by its own name.
    """

    SERVICE: ClassVar[str] = "optimization"  # it has every runtime, and the GPU alone while it works
    TIMEOUT_S: ClassVar[int] = 24 * 3600
    predictions_id: str
    name: str
    source: str
    alias: str = "production"
    version: int = 0
    variant: str = ""
    embedding: bool = False  # with what the network's last layer sees of each image

    @property
    def target(self) -> str:
        return f"predictions/{self.predictions_id}"


Job = PreprocessJob | TrainJob | TuneJob | OptimizeJob | PredictJob
KINDS: dict[str, type[Job]] = {"preprocess": PreprocessJob, "train": TrainJob, "tune": TuneJob,
                               "optimize": OptimizeJob, "predict": PredictJob}


SERVICES = sorted({cls.SERVICE for cls in KINDS.values()})


def kind_of(job: Job) -> str:
    return next(kind for kind, cls in KINDS.items() if isinstance(job, cls))


def new_id(letter: str) -> str:
    """`<letter>-<UTC yyyymmdd>-<8 hex>`: j job, p pipeline, d dataset, m model, u upload, r predictions."""
    return f"{letter}-{datetime.now(timezone.utc):%Y%m%d}-{secrets.token_hex(4)}"


def check_id(text: object, what: str = "id") -> str:
    """A name that may become a folder.

    Raises:
        Refused: it is not 1..63 of a-z, 0-9, `_` and `-`, beginning with a letter or digit.
    """
    if not isinstance(text, str) or not ID.fullmatch(text):
        raise Refused(f"{what} {text!r} is not valid: expected 1 to 63 of a-z, 0-9, '_' and '-', "
                      "beginning with a letter or digit", "bad_name")
    return text


def check_import(name: str) -> None:
    """Raises Refused for what is no path below the imports folder."""
    if not name or any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise Refused(f"import {name!r} is not valid: expected a folder's or archive's path below the imports folder",
                      "bad_name")


def parse(kind: str, payload: dict[str, Any]) -> Job:
    """A job from plain JSON, checked field by field.

    Raises:
        Refused: an unknown kind or field, a missing one, a wrong type, or a value out of range.
    """
    if kind not in KINDS:
        raise Refused(f"job kind {kind!r} is unknown: expected one of {', '.join(KINDS)}", "bad_job")
    cls = KINDS[kind]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(payload) - set(fields))
    if unknown:
        raise Refused(f"{kind} job has no field {unknown[0]!r}: expected some of {', '.join(fields)}", "bad_job")
    values = dict(payload)
    for name, value in payload.items():
        values[name] = _typed(kind, name, value, fields[name])
    missing = [n for n, f in fields.items()
               if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        raise Refused(f"{kind} job lacks {missing[0]!r}", "bad_job")
    job = cls(**values)
    _check(job)
    return job


def _typed(kind: str, name: str, value: Any, spec: "dataclasses.Field[Any]") -> Any:
    words = {"int": "an integer", "float": "a number", "str": "a string", "bool": "true or false"}
    wanted = words.get(getattr(spec.type, "__name__", ""))
    if spec.type is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise Refused(f"{kind} job: {name} has {len(str(value))} digits, expected a number", "bad_job") from None
    if name in ("variants", "recipes"):
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise Refused(f"{kind} job: {name} is {value!r}, expected a list of names", "bad_job")
        return tuple(value)
    if name == "augmentation":
        if not isinstance(value, dict):
            raise Refused(f"{kind} job: augmentation is {value!r}, expected an object of options", "bad_job")
        return value
    if type(value) is not spec.type:
        raise Refused(f"{kind} job: {name} is {value!r}, expected {wanted}", "bad_job")
    return value


def _check(job: Job) -> None:
    def within(name: str, low: float, high: float) -> None:
        value = getattr(job, name)
        if not low <= value <= high:
            raise Refused(f"{name} is {value}: expected {low:.12g} to {high:.12g}", "bad_job")

    check_id(job.name, "name")
    if not isinstance(job, PredictJob):
        within("seed", 0, 2**31 - 1)
    match job:
        case PreprocessJob():
            check_id(job.dataset_id, "dataset_id")
            if job.size:
                within("size", 32, 256)
            within("validation", 0.01, 0.5)
            within("test", 0.01, 0.5)
            word, _, rest = job.source.partition(":")
            if not (job.source == "cifar10" or (word in ("upload", "import") and rest)):
                raise Refused(f"source {job.source!r} is unknown: expected cifar10, upload:<id> or import:<name>",
                              "bad_job")
            if word == "upload":
                check_id(rest, "upload id")
        case TrainJob():
            check_id(job.model_id, "model_id")
            check_id(job.dataset_id, "dataset_id")
            check_id(job.recipe, "recipe")
            within("epochs", 0, 10_000)
            within("batch_size", 0, 65_536)
            within("learning_rate", 0, 100)
            within("early_stopping", 0, 10_000)
            if job.class_weights not in ("", "balanced"):
                raise Refused(f"class_weights is {job.class_weights!r}: expected balanced, or '' for none", "bad_job")
            within("leave_out", 0, 0.9)
            within("budget_s", 0, job.TIMEOUT_S)
            if job.budget_s and job.leave_out:
                raise Refused("budget_s says nothing of the training that leave_out takes first: leave one of both out",
                              "bad_job")
            if job.budget_s and (job.recipe != "auto" or job.epochs):
                raise Refused(f"budget_s is {job.budget_s:g}, by which recipe auto chooses the epochs: ask for recipe "
                              "auto and leave epochs out, or leave budget_s out", "bad_job")
        case TuneJob():
            check_id(job.model_id, "model_id")
            check_id(job.dataset_id, "dataset_id")
            within("trials", 1, 1000)
            within("budget_s", 0, job.TIMEOUT_S)
            within("epochs", 0, 10_000)
            if not job.recipes or len(set(job.recipes)) < len(job.recipes):
                raise Refused(f"recipes is {list(job.recipes)}: expected some, each once", "bad_job")
            for recipe in job.recipes:
                check_id(recipe, "recipe")
        case OptimizeJob():
            check_id(job.model_id, "model_id")
            check_id(job.alias, "alias")
            within("budget", 0, 100)
            within("rank_batch", 1, 1024)
            bad = [v for v in job.variants if v not in VARIANTS]
            if bad or not job.variants:
                raise Refused(f"variants are {list(job.variants)}: expected some of {', '.join(VARIANTS)}", "bad_job")
        case PredictJob():
            check_id(job.predictions_id, "predictions_id")
            check_id(job.alias, "alias")
            within("version", 0, 10**8)
            if job.variant and job.variant not in VARIANTS:
                raise Refused(f"variant is {job.variant!r}: expected one of {', '.join(VARIANTS)}", "bad_job")
            word, _, rest = job.source.partition(":")
            dataset, slash, split = rest.partition("/")
            if not rest or word not in ("upload", "import", "dataset") or (
                    slash and (word == "upload" or (word == "dataset" and split not in SPLITS))):
                raise Refused(f"source {job.source!r} is unknown: expected upload:<id>, import:<name>, dataset:<id>, "
                              f"or dataset:<id>/<split> with one of {', '.join(SPLITS)}", "bad_job")
            if word != "import":
                check_id(dataset, f"{word} id")


def payload(job: Job) -> dict[str, Any]:
    """The job as plain JSON values; `parse(kind_of(job), payload(job))` gives it back."""
    values = dataclasses.asdict(job)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
