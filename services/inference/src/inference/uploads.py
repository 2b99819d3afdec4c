"""/v1/uploads: archives of images, streamed to the volume for preprocessing."""

import base64
import binascii
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from flask import Blueprint, Response, jsonify, request
from werkzeug.exceptions import LengthRequired

from inference.body import pieces
from inference.context import api
from inference.receive import Upload, receive, same, sweep
from shared.artifacts import list_ids, read_json
from shared.errors import Conflict, NotFound, Refused
from shared.jobs import PredictJob, PreprocessJob, check_id
from shared.ledger import Ledger

bp = Blueprint("uploads", __name__)


def find_upload(root: Path, upload_id: str) -> Upload:
    """{id, size, sha256, filename, created_at}. Raises NotFound."""
    try:
        upload: Upload = read_json(root / "raw" / check_id(upload_id, "upload id") / "upload.json")
    except NotFound:
        raise NotFound(f"upload {upload_id} does not exist: send it with PUT /v1/uploads/{upload_id}") from None
    return upload


@bp.put("/v1/uploads/<upload_id>")
def put(upload_id: str) -> tuple[Response, int]:
    context = api()
    raw = context.settings.artifacts / "raw"
    check_id(upload_id, "upload id")
    expected = _expected_sha256()
    if request.content_length is None and not expected:
        raise LengthRequired("an upload without Content-Length needs X-Content-SHA256 or Content-Digest: "
                             "nothing else tells a whole one from one that was cut off")
    if expected and (raw / upload_id).exists():
        return jsonify(same(find_upload(context.settings.artifacts, upload_id), expected)), 200
    sweep(raw)
    upload, new = receive(raw, upload_id, pieces(context.intake, context.settings.upload_limit_mib << 20),
                          filename=_filename(), size=request.content_length, expected=expected)
    return jsonify(upload), 201 if new else 200


@bp.get("/v1/uploads")
def index() -> Response:
    root = api().settings.artifacts
    found = []
    for upload_id in list_ids(root, "raw"):
        with suppress(NotFound):  # deleted meanwhile, or a folder of somebody else
            found.append(find_upload(root, upload_id))
    return jsonify(uploads=found)


@bp.get("/v1/uploads/<upload_id>")
def get(upload_id: str) -> Response:
    return jsonify(find_upload(api().settings.artifacts, upload_id))


@bp.delete("/v1/uploads/<upload_id>")
def delete(upload_id: str) -> tuple[str, int]:
    context = api()
    raw = context.settings.artifacts / "raw"
    find_upload(context.settings.artifacts, upload_id)
    user = _reader(context.ledger, upload_id)
    if user:
        raise Conflict(f"job {user} still reads upload {upload_id}: cancel it, or delete later", "in_use")
    gone = raw / f".{upload_id}.{uuid.uuid4().hex[:8]}"
    (raw / upload_id).rename(gone)
    shutil.rmtree(gone)
    return "", 204


def _reader(ledger: Ledger, upload_id: str) -> str:
    """The id of a job that may still read the upload, or ''."""
    for known in ledger.requests():
        job = known.job
        if (isinstance(job, PreprocessJob | PredictJob) and job.source == f"upload:{upload_id}"
                and ledger.ended(known.id) is None):
            return known.id
    return ""


def _filename() -> str:
    """What the client calls the file; shown to people and never used as a path."""
    name = request.args.get("filename", "").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c for c in name if c.isprintable())[:255]


def _expected_sha256() -> str:
    """The SHA-256 that the request says its bytes have, as hex, or ''."""
    value = request.headers.get("X-Content-SHA256", "").lower()
    if value and not re.fullmatch(r"[0-9a-f]{64}", value):
        raise Refused("X-Content-SHA256 is not 64 hexadecimal digits", "malformed")
    field = request.headers.get("Content-Digest", "")
    match = re.search(r"sha-256=:([^:]*):", field)
    if field and not match and not value:
        raise Refused(f"Content-Digest {field!r} names no sha-256: expected sha-256=:<base64>:", "malformed")
    if not match:
        return value
    try:
        digest = base64.b64decode(match[1], validate=True).hex()
    except binascii.Error:
        digest = ""
    if len(digest) != 64 or (value and value != digest):
        raise Refused(f"Content-Digest {field!r} is not a SHA-256 in base64, or not the other", "malformed")
    return digest
