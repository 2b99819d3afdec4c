"""DELETE of what was published: `shared.removal` says what is refused."""

from flask import Blueprint

from inference.context import api
from shared import removal

bp = Blueprint("deletion", __name__)
Gone = tuple[str, int]


@bp.delete("/v1/datasets/<dataset_id>")
def dataset(dataset_id: str) -> Gone:
    context = api()
    removal.remove_dataset(context.settings.artifacts, context.ledger, dataset_id)
    return "", 204


@bp.delete("/v1/models/<name>/versions/<int:number>")
def version(name: str, number: int) -> Gone:
    context = api()
    removal.remove_version(context.settings.artifacts, context.ledger, name, number)
    return "", 204


@bp.delete("/v1/models/<name>/aliases/<alias>")
def alias(name: str, alias: str) -> Gone:
    context = api()
    removal.remove_alias(context.settings.artifacts, name, alias)
    context.loaded.wake()
    return "", 204


@bp.delete("/v1/predictions/<predictions_id>")
def predictions(predictions_id: str) -> Gone:
    context = api()
    removal.remove_predictions(context.settings.artifacts, context.ledger, predictions_id)
    return "", 204
