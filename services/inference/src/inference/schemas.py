"""Bodies of requests as JSON Schema, made from the jobs' own fields, so that the description can't say otherwise."""

import dataclasses
from typing import Any

from shared.jobs import KINDS, RECIPES, VARIANTS

Schema = dict[str, Any]
TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", dict[str, Any]: "object"}
ALLOWED = {"recipe": [*RECIPES, "auto"], "recipes": [name for name in RECIPES if name != "speedrun"],
           "variants": list(VARIANTS), "variant": ["", *VARIANTS], "class_weights": ["", "balanced"]}
# What a client must say of a stage by itself; every other id is made, a name is that of what the stage reads.
NEEDED: dict[str, tuple[str, ...]] = {"preprocess": (), "train": ("dataset_id",), "tune": ("dataset_id",),
                                      "optimize": ("model_id",), "predict": ("name", "source")}
GIVEN = ("name", "source", "dataset_id", "model_id")  # of a pipeline's stages, by the pipeline


def job(kind: str) -> Schema:
    """Of POST /v1/jobs."""
    return _object({"kind": {"const": kind}, **_fields(kind)}, "kind", *NEEDED[kind])


def pipeline() -> Schema:
    """Of POST /v1/pipelines."""
    stages = {stage: _object({name: schema for name, schema in _fields(stage).items() if name not in GIVEN})
              for stage in ("preprocess", "train", "optimize")}
    return _object({"source": {"type": "string", "default": "cifar10"}, "name": {"type": "string"}, **stages})


def body_of(method: str, path: str) -> Schema:
    """Of a request's body as JSON; {} where anything goes."""
    match method, path:
        case "post", "/v1/jobs":
            return {"oneOf": [job(kind) for kind in KINDS]}
        case "post", "/v1/pipelines":
            return pipeline()
        case "put", "/v1/models/{name}/aliases/{alias}":
            return _object({"version": {"type": "integer", "minimum": 1}, "variant": {"enum": list(VARIANTS)}},
                           "version", "variant")
        case "post", "/v1/models/{name}/predict":
            images = {"type": "array", "items": {"type": "string", "contentEncoding": "base64"}, "minItems": 1}
            return _object({"images": images}, "images")
    return {}


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _fields(kind: str) -> Schema:
    return {spec.name: _field(spec) for spec in dataclasses.fields(KINDS[kind])}


def _field(spec: "dataclasses.Field[Any]") -> Schema:
    values: Schema = {"enum": ALLOWED[spec.name]} if spec.name in ALLOWED else {}
    if spec.type == tuple[str, ...]:
        known: Schema = {"type": "array", "items": {"type": "string", **values}}
    else:
        known = {"type": TYPES[spec.type], **values}  # type: ignore[index]
    if spec.default is not dataclasses.MISSING:
        known["default"] = list(spec.default) if isinstance(spec.default, tuple) else spec.default
    return known
