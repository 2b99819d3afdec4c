"""Environment -> one frozen Settings: the only reader of os.environ. Every field is an upper-case variable."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


class SettingsError(SystemExit):
    """A variable that can't be used: the process stops and names it."""


@dataclass(frozen=True)
class Settings:
    device: str = "gpu"
    host: str = "127.0.0.1"
    port: int = 8000
    artifacts: Path = Path("/artifacts")
    imports: Path = Path("/imports")
    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_user: str = ""
    redis_password_file: str = ""
    cifar10_url: str = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    upload_limit_mib: int = 51200
    request_limit_mib: int = 64
    http_processes: int = 1
    allowed_hosts: str = ""
    queue_ms: int = 0
    loaded_mib: int = 0
    system_shared_memory: str = "off"
    max_attempts: int = 3
    silence_s: float = 20.0
    stall_s: float = 7200.0
    scrub_s: float = 86400.0
    import_ahead: str = "on"
    tensorrt_refit: str = "off"
    refresh_s: float = 1.0
    worker_ttl_s: int = 30
    heartbeat_s: int = 10
    maintenance_s: int = 15
    cpu_threads: int = 0
    gpus_per_training: int = 1
    gpu_memory_mib: int = 0
    mixed_precision: str = "auto"
    engine_batches: str = "1,64,1024"
    serving_p99_ms: int = 0
    shadow_share: float = 0.0
    otel_exporter_otlp_endpoint: str = ""
    log_level: str = "INFO"
    fault: str = ""


DESCRIPTIONS = {
    "device": "gpu or cpu: the one knob",
    "host": "address the API listens on",
    "port": "port the API listens on",
    "artifacts": "root of the shared volume",
    "imports": "read-only folder that import:<name> reads from",
    "redis_url": "the Redis-protocol server that carries the jobs",
    "redis_user": "ACL user of this service, empty for none",
    "redis_password_file": "file with that user's password, empty for none",
    "cifar10_url": "the official CIFAR-10 archive, binary edition",
    "upload_limit_mib": "largest dataset upload",
    "request_limit_mib": "largest body of a prediction request",
    "http_processes": "processes that answer, each with the models in its memory, and in that of its GPU; 0 for as "
                      "many as what is promoted was fitted to when the API starts",
    "allowed_hosts": "names with a dot by which the API may be asked for, separated by commas; * for any",
    "queue_ms": "milliseconds that a prediction may wait for its turn before it is turned away, 0 for 10 s",
    "loaded_mib": "files of variants in memory, beyond which those asked for least recently go; 0 for the last four",
    "system_shared_memory": "on or off: whether clients of this host may hand over tensors in its shared memory",
    "max_attempts": "attempts of a job that died or failed for a passing reason",
    "silence_s": "seconds a delivered job may show no running process before it is delivered again",
    "stall_s": "seconds a running job may show no progress before it is killed and tried again, 0 for any",
    "scrub_s": "seconds between two checks of every published file against its hash, 0 for none",
    "import_ahead": "on or off: whether a process with TensorFlow imported, 0.65 GB, waits for a worker's next job",
    "tensorrt_refit": "on or off: whether a network trained again takes its last engine with new weights: 0.2 s, not "
                      "15; 15 % fewer images/s",
    "refresh_s": "seconds between two looks at the aliases",
    "worker_ttl_s": "seconds a worker counts as alive after its last heartbeat",
    "heartbeat_s": "seconds between heartbeats while a job runs",
    "maintenance_s": "seconds between clean-ups of what dead workers left",
    "cpu_threads": "threads for decoding, training and measuring, 0 for one a core",
    "gpus_per_training": "GPUs that one training takes, all at once",
    "gpu_memory_mib": "most memory a training takes of each GPU, 0 for as much as it needs",
    "mixed_precision": "auto or off: whether trainings compute in bfloat16 on GPUs that have it",
    "engine_batches": "images at once that a TensorRT engine takes: least (1), usual, most",
    "serving_p99_ms":
        "milliseconds a prediction may take (p99), 0 for any: slower, trainings pause; variants are fitted to it",
    "shadow_share": "share of live images, 0 to 1, that a name's candidate answers too, to be compared",
    "otel_exporter_otlp_endpoint": "OpenTelemetry collector (OTLP over HTTP) that traces go to, empty for none",
    "log_level": "DEBUG, INFO, WARNING or ERROR",
    "fault": "for tests: a named point at which the process kills itself",
}


WORDS = {"device": ("gpu", "cpu"), "mixed_precision": ("auto", "off"), "system_shared_memory": ("on", "off"),
         "import_ahead": ("on", "off"), "tensorrt_refit": ("on", "off"),
         "log_level": ("DEBUG", "INFO", "WARNING", "ERROR")}
MANY = 2**31
RANGES = {"port": (1, 65535), "upload_limit_mib": (1, MANY), "request_limit_mib": (1, MANY), "http_processes": (0, 256),
          "queue_ms": (0, MANY), "loaded_mib": (0, MANY), "max_attempts": (1, 1000), "silence_s": (0.1, MANY),
          "stall_s": (0, MANY), "scrub_s": (0, MANY),
          "refresh_s": (0.001, 3600), "worker_ttl_s": (1, MANY), "heartbeat_s": (1, MANY), "maintenance_s": (1, MANY),
          "cpu_threads": (0, 4096), "gpus_per_training": (1, MANY), "gpu_memory_mib": (0, MANY),
          "serving_p99_ms": (0, MANY), "shadow_share": (0, 1)}


def load(env: Mapping[str, str] | None = None) -> Settings:
    """Read the settings; an unset or empty variable keeps its default.

    Raises:
        SettingsError: a value can't be read as its type, or is not among those expected.
    """
    env = os.environ if env is None else env
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        text = env.get(field.name.upper(), "")
        if text == "":
            continue
        kind = field.type
        try:
            values[field.name] = kind(text) if callable(kind) else text
        except ValueError:
            name = getattr(kind, "__name__", kind)
            raise SettingsError(f"{field.name.upper()}={text!r} is not a valid {name}: "
                                f"{DESCRIPTIONS[field.name]}") from None
    settings = Settings(**values)
    settings = replace(settings, artifacts=settings.artifacts.absolute(), imports=settings.imports.absolute())
    for name, words in WORDS.items():
        if (value := getattr(settings, name)) not in words:
            raise SettingsError(f"{name.upper()}={value!r} is unknown: expected {' or '.join(words)}")
    for name, (low, high) in RANGES.items():
        if not low <= (value := getattr(settings, name)) <= high:
            least = f"{low:g} or more" if high == MANY else f"{low:g} to {high:g}"
            raise SettingsError(f"{name.upper()}={value} can't be: expected {least}")
    batches(settings)
    return settings


def batches(settings: Settings) -> tuple[int, int, int]:
    """The least, the usual and the largest batch of a TensorRT engine. Raises SettingsError for what can't be one."""
    try:
        least, usual, most = (int(part) for part in settings.engine_batches.split(","))
    except ValueError:
        least, usual, most = 0, 0, 0
    if not 1 == least <= usual <= most:
        raise SettingsError(f"ENGINE_BATCHES={settings.engine_batches!r} can't be: expected three numbers that don't "
                            "fall, the first of them 1, as 1,64,1024")
    return least, usual, most


def threads(settings: Settings) -> int:
    """How many CPU threads a job may use: CPU_THREADS, or the cores this process may run on."""
    return settings.cpu_threads or len(os.sched_getaffinity(0))
