"""What no client may do, on every route."""

import re
import urllib.parse
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from .conftest import RED, png

EVIL = ["..", "../../etc/passwd", "a/../b", "%2e%2e", "..%2f..", "a\x00b", "a\nb", "A", ".hidden", "-x", "a" * 64, "ä",
        "a;b", "/etc/passwd"]


def rules(app: Flask) -> list[tuple[str, str, list[str]]]:
    """(method, rule, arguments) of every route with text in its path."""
    return [(method, rule.rule, sorted(rule.arguments)) for rule in app.url_map.iter_rules() if rule.arguments
            for method in sorted(rule.methods or ()) if method in ("GET", "PUT", "POST", "DELETE")]


def test_a_name_that_is_no_id_reaches_no_file_on_any_route(app: Flask, client: FlaskClient, root: Path) -> None:
    tried = 0
    for method, rule, arguments in rules(app):
        for evil in EVIL:
            for argument in arguments:
                path = re.sub(r"<\w+:", "<", rule)
                for other in arguments:
                    value = urllib.parse.quote(evil, safe="") if other == argument else "1"
                    path = path.replace(f"<{other}>", value)
                body = {"json": {"version": 1, "variant": "onnx-fp32"}} if method in ("PUT", "POST") else {}
                answer = client.open(path, method=method, **body)
                assert 400 <= answer.status_code < 500, (method, path, answer.status_code)
                assert isinstance(answer.json["error"], str if path.startswith("/v2") else dict), (method, path)
                tried += 1
    assert tried > 200
    assert sorted(p.name for p in root.iterdir() if p.name != "raw") == []


def test_errors_are_json_with_a_code(client: FlaskClient) -> None:
    for method, path, status, code in (("GET", "/nowhere", 404, "not_found"),
                                       ("GET", "/v1//jobs", 404, "not_found"),
                                       ("POST", "/livez", 405, "method_not_allowed"),
                                       ("DELETE", "/v1/jobs", 405, "method_not_allowed")):
        answer = client.open(path, method=method)
        assert (answer.status_code, answer.json["error"]["code"]) == (status, code)
    assert "POST" in client.get("/v1/jobs/j-1/cancel").headers["Allow"]


def test_a_failure_of_the_api_is_logged_and_not_told(app: Flask, client: FlaskClient, root: Path,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    (root / "raw").write_text("a file where a folder belongs")
    answer = client.put("/v1/uploads/u-1", data=b"zip")
    assert (answer.status_code, answer.json["error"]["code"]) == (500, "internal")
    assert str(root) not in answer.text
    assert "NotADirectoryError" in caplog.text or "FileExistsError" in caplog.text


def test_answers_carry_safe_headers(client: FlaskClient) -> None:
    for path in ("/", "/livez", "/nowhere", "/v1/models"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_a_page_of_another_site_can_not_use_the_api(serving: FlaskClient) -> None:
    headers = {"Sec-Fetch-Site": "cross-site"}
    answer = serving.post("/v1/models/colors/predict", data=png(RED), content_type="image/png", headers=headers)
    assert (answer.status_code, answer.json["error"]["code"]) == (403, "cross_site")
    assert serving.get("/v1/models", headers=headers).status_code == 200
