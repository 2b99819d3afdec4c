"""TensorRT plans as files: a header that says what a plan was built from and for, then the plan.

A plan is a cache of an ONNX file, good for one GPU model and one TensorRT version alone. It is refused by its header,
before TensorRT reads a byte of it, and built anew.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.artifacts import sha256, write_bytes
from shared.errors import Damaged, LannerError

MAGIC = b"lanner plan 1\n"
MOST_HEADER = 1 << 16


class Unfit(LannerError):
    """A plan is missing, damaged, or built for another GPU, TensorRT version or ONNX file: build it anew."""

    code = "plan_unfit"


@dataclass(frozen=True)
class Host:
    """What a plan depends on: the TensorRT version, the GPU's name and compute capability, "9.0" say."""

    tensorrt: str
    gpu: str
    capability: str


@dataclass(frozen=True)
class Header:
    """batches: the least, the usual and the largest of the profile; driver: NVIDIA's, told and not compared; refit:
    whether it can be refitted.
    """

    onnx_sha256: str
    precision: str
    host: Host
    driver: str
    batches: tuple[int, int, int]
    refit: bool = False


def here() -> Host:
    """This process's TensorRT and its GPU.

    Raises:
        Unfit: TensorRT or cuda-bindings is not installed, or CUDA finds no GPU.
    """
    try:
        import tensorrt

        from shared.runtimes.cuda import device_name
    except (ImportError, OSError) as e:
        raise Unfit(f"TensorRT can't run here ({e}): install the extra `gpu` of the service", "no_tensorrt") from e
    try:
        return Host(tensorrt.__version__, *device_name())
    except LannerError as e:
        raise Unfit(f"TensorRT can't run here: no GPU answers ({e})", "no_gpu") from e


def path_of(engines: Path, onnx: Path, host: Host) -> Path:
    """Where the plan of an ONNX file for a host is kept."""
    return engines / f"{sha256(onnx)[:24]}.{slug(host)}.plan"


def slug(host: Host) -> str:
    """A host as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", f"{host.gpu}-sm{host.capability}-trt{host.tensorrt}".lower())


def save(path: Path, header: Header, plan: bytes) -> None:
    """Write a plan, whole or not at all."""
    text = json.dumps({**asdict(header), "bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}).encode()
    write_bytes(path, MAGIC + len(text).to_bytes(4, "little") + text + plan)


def read(path: Path, host: Host, onnx_sha256: str | None = None) -> tuple[Header, bytes]:
    """A plan's header and the plan, fit for `host` and, where it is given, built from that very ONNX file.

    Raises:
        Unfit: there is none, or it was built for another host or from another file.
        Damaged: it is no plan file, or its bytes are not those that were written.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Unfit(f"{path.name} is not there: no engine was built for {host.gpu} with TensorRT {host.tensorrt}",
                    "plan_missing") from None
    start = len(MAGIC) + 4
    size = int.from_bytes(data[len(MAGIC):start], "little")
    if not data.startswith(MAGIC) or size > MOST_HEADER or len(data) < start + size:
        raise Damaged(f"{path.name} is no plan file, or only the beginning of one; it is built anew from its ONNX file")
    header, length, digest = _parse(path, data[start:start + size])
    plan = data[start + size:]
    _same(path, "GPU", header.host.gpu, host.gpu)
    _same(path, "compute capability", header.host.capability, host.capability)
    _same(path, "TensorRT", header.host.tensorrt, host.tensorrt)
    if onnx_sha256 is not None:
        _same(path, "ONNX file", header.onnx_sha256, onnx_sha256)
    if len(plan) != length or hashlib.sha256(plan).hexdigest() != digest:
        raise Damaged(f"{path.name} has {len(plan)} bytes of plan, expected {length} with SHA-256 {digest[:12]}...; "
                      "it is built anew from its ONNX file")
    return header, plan


def _parse(path: Path, text: bytes) -> tuple[Header, int, str]:
    try:
        found = json.loads(text)
        length, digest = int(found.pop("bytes")), str(found.pop("sha256"))
        least, usual, most = found.pop("batches")
        return Header(host=Host(**found.pop("host")), batches=(least, usual, most), **found), length, digest
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise Damaged(f"{path.name} has a header that can't be read ({e}); it is built anew from its ONNX file") from e


def _same(path: Path, what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise Unfit(f"{path.name} was built for {what} {found}, here it is {wanted}: it is built anew")
