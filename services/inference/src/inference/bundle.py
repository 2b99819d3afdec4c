"""What was trained, to take away: a Variant with all that it needs to run elsewhere, or the Keras model itself."""

import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flask import Blueprint, Response, send_file

from inference.context import api
from shared.artifacts import model_of, open_artifact
from shared.jobs import check_id
from shared.runtimes import FILES

bp = Blueprint("bundle", __name__)
PREDICT = Path(__file__).parent / "bundled" / "predict.py"
RUNTIMES = {"onnx": "onnxruntime", "tensorrt": "onnxruntime", "litert": "ai-edge-litert"}
ALSO = ("numpy", "pillow")
PIECE = 1 << 20  # bytes


@bp.get("/v1/models/<name>/versions/<int:number>/variants/<variant>.zip")
def variant(name: str, number: int, variant: str) -> Response:
    """The model file, labels.txt, a golden batch, the manifest, and predict.py with its requirements."""
    root = api().settings.artifacts
    target = f"variants/{model_of(root, name, number)}/{check_id(variant, 'variant')}"
    manifest = open_artifact(root, target)
    folder, format = f"{name}-{number}-{variant}", manifest["format"]
    written = {
        "labels.txt": "".join(f"{label}\n" for label in manifest["spec"]["labels"]).encode(),
        "requirements.txt": "".join(f"{_pinned(package)}\n" for package in (RUNTIMES[format], *ALSO)).encode(),
        "predict.py": PREDICT.read_bytes(),
    }
    parts = [Part(name, len(data), [data]) for name, data in written.items()]
    # Opened before the first byte is sent: what is deleted meanwhile is sent all the same.
    parts += [_file(root / target / file) for file in (FILES[format], "golden.npz", "manifest.json")]
    length = sum(map(len, _zipped(folder, [Part(part.name, part.size, _zeros(part.size)) for part in parts])))
    return Response(_zipped(folder, parts), mimetype="application/zip", headers={
        "Content-Disposition": f'attachment; filename="{folder}.zip"', "Content-Length": str(length)})


@bp.get("/v1/models/<name>/versions/<int:number>/model.keras")
def keras(name: str, number: int) -> Response:
    """What was trained, before any export."""
    root = api().settings.artifacts
    target = f"models/{model_of(root, name, number)}"
    open_artifact(root, target)
    return send_file(root / target / "model.keras", mimetype="application/octet-stream",
                     as_attachment=True, download_name=f"{name}-{number}.keras")


def _pinned(package: str) -> str:
    """With the version that answers here; a GPU's has another name, and needs no GPU elsewhere."""
    for name in (package, f"{package}-gpu"):
        try:
            return f"{package}=={version(name)}"
        except PackageNotFoundError:
            continue
    return package


class _Taken(io.RawIOBase):
    """A file that can't be gone back in: what is written to it is taken away at once."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


@dataclass(frozen=True)
class Part:
    """A member of the zip: its name, its size, and its bytes in pieces."""

    name: str
    size: int
    pieces: Iterable[bytes]


def _file(path: Path) -> Part:
    f = open(path, "rb")  # noqa: SIM115  closed with its last piece, or when nobody refers to it any more

    def pieces() -> Iterator[bytes]:
        with f:
            while piece := f.read(PIECE):
                yield piece

    return Part(path.name, os.fstat(f.fileno()).st_size, pieces())


def _zeros(size: int) -> Iterator[bytes]:
    for start in range(0, size, PIECE):
        yield bytes(min(PIECE, size - start))


def _zipped(folder: str, parts: list[Part]) -> Iterator[bytes]:
    """A zip as it is made, a piece at a time. Weights do not pack: its length follows from the sizes."""
    out = _Taken()
    with zipfile.ZipFile(out, "w") as archive:
        for part in parts:
            with archive.open(f"{folder}/{part.name}", "w", force_zip64=True) as member:
                for piece in part.pieces:
                    member.write(piece)
                    yield out.take()
    yield out.take()
