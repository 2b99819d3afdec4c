"""/v1/datasets/<id>/images/<split>/<number>: one image of a Dataset as its model sees it, to look at or to try."""

from io import BytesIO
from urllib.parse import quote

from flask import Blueprint, Response
from PIL import Image

from inference.context import api
from shared.datasets import SPLITS, Dataset
from shared.errors import NotFound
from shared.jobs import check_id

bp = Blueprint("examples", __name__)


@bp.get("/v1/datasets/<dataset_id>/images/<split>/<int:number>")
def image(dataset_id: str, split: str, number: int) -> Response:
    """A PNG; the header X-Label holds its label, percent-encoded."""
    dataset = Dataset(api().settings.artifacts, check_id(dataset_id, "dataset id"))
    if split not in SPLITS:
        raise NotFound(f"a dataset has no split {split!r}: expected one of {', '.join(SPLITS)}")
    images = dataset.images(split)
    if number >= len(images):
        raise NotFound(f"{split} of dataset {dataset_id} has {len(images)} images, 0 is the first: no image {number}")
    png = BytesIO()
    Image.fromarray(images[number]).save(png, "png")
    label = dataset.spec.labels[dataset.labels(split)[number]]
    response = Response(png.getvalue(), mimetype="image/png")
    response.headers["X-Label"] = quote(label)
    response.headers["Cache-Control"] = "private, max-age=86400, immutable"
    return response
