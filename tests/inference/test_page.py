"""The page and the description of the routes, held to the app."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

import inference
from shared.jobs import KINDS, RECIPES, VARIANTS

STATIC = Path(inference.__file__).parent / "static"
RAISED = ("Refused", "Conflict", "NotFound", "Unavailable")
DOCUMENTS = [Path(__file__).parents[2] / "docs" / name for name in ("api.md", "v2.md")]


def routes(app: Flask) -> set[tuple[str, str]]:
    """(method, path) as OpenAPI writes them."""
    return {(method.lower(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
            for rule in app.url_map.iter_rules() if rule.endpoint != "static"
            for method in rule.methods or () if method in ("GET", "PUT", "POST", "DELETE")}


def test_the_description_has_every_route_and_no_other(app: Flask, client: FlaskClient) -> None:
    described = client.get("/openapi.json").json
    assert {(method, path) for path, item in described["paths"].items() for method in item} == routes(app)
    for path, item in described["paths"].items():
        for method, operation in item.items():
            inside = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
            assert inside == re.findall(r"{(\w+)}", path), (method, path)


def test_the_document_names_every_route_and_every_error_code(app: Flask) -> None:
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert {path for _, path in routes(app) if f" {path}`" not in text and f" {path}?" not in text} == set()
    calls = [node for path in STATIC.parent.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") in RAISED]
    codes = {call.args[1].value for call in calls if len(call.args) == 2 and isinstance(call.args[1], ast.Constant)}
    assert len(codes) > 12
    assert {code for code in codes if f"`{code}`" not in text} == set()


def test_the_page_comes_with_all_that_it_names(client: FlaskClient) -> None:
    page = client.get("/")
    assert (page.status_code, page.mimetype) == (200, "text/html")
    named = re.findall(r'(?:href|src)="([^"]+)"', page.text)
    assert len(named) == 3
    for path in named:
        assert path.startswith("/static/")
        with client.get(path) as answer:
            assert answer.status_code == 200


def test_the_page_needs_no_other_site_and_no_inline_script(client: FlaskClient) -> None:
    text = client.get("/").text + (STATIC / "app.js").read_text() + (STATIC / "style.css").read_text()
    assert not re.findall(r"https?://|<style|<script>|\bon\w+=\"|innerHTML", text)
    assert "default-src 'self'" in client.get("/").headers["Content-Security-Policy"]


def test_the_page_asks_for_routes_that_exist(app: Flask) -> None:
    script = (STATIC / "app.js").read_text()
    asked = {re.sub(r"\$\{[^}]*\}", "{}", path).split("?")[0].removesuffix(".html")
             for path in re.findall(r"[\"`](/(?:v1/|readyz)[^\"`]*)[\"`]", script)}
    known = {re.sub(r"\{\w+\}", "{}", path) for _, path in routes(app)}
    assert len(asked) >= 7
    assert asked <= known


def test_every_element_that_the_script_looks_up_is_on_the_page(client: FlaskClient) -> None:
    looked_up = set(re.findall(r"\$\(\"(\w+)\"\)", (STATIC / "app.js").read_text()))
    assert looked_up <= set(re.findall(r'id="(\w+)"', client.get("/").text))


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_description_of_a_job_is_that_of_its_fields(client: FlaskClient, kind: str) -> None:
    body = client.get("/openapi.json").json["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    (schema,) = [one for one in body["schema"]["oneOf"] if one["properties"]["kind"]["const"] == kind]
    fields = {spec.name: spec for spec in dataclasses.fields(KINDS[kind])}
    assert set(schema["properties"]) == {"kind", *fields}
    for name, spec in fields.items():
        if spec.default is not dataclasses.MISSING:
            default = schema["properties"][name]["default"]
            assert (tuple(default) if isinstance(default, list) else default) == spec.default
    for name in schema["required"]:
        told = client.post("/v1/jobs", json={key: "x-1" for key in schema["required"] if key != name} | (
            {} if name == "kind" else {"kind": kind}))
        assert told.status_code in (404, 422), name
    for name in ("recipe", "variants", "variant", "recipes"):
        if name in schema["properties"]:
            values = schema["properties"][name].get("enum") or schema["properties"][name]["items"]["enum"]
            assert set(values) - {""} <= {*RECIPES, "auto", *VARIANTS}


def test_a_pipeline_with_all_that_is_described_is_accepted(client: FlaskClient) -> None:
    post = client.get("/openapi.json").json["paths"]["/v1/pipelines"]["post"]
    stages = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
    body = {stage: {name: field["default"] for name, field in stages[stage]["properties"].items() if "default" in field}
            for stage in ("preprocess", "train", "optimize")}
    assert client.post("/v1/pipelines", json={"source": "cifar10", "name": "x", **body}).status_code == 202
