"""Models from the command line: which variant answers or is taken away, and jobs tried again or left."""

import pytest

from lanner import LannerError
from lanner.cli import _parser, execute, training_options
from lanner.progress import plain_console

from .test_client import client, job, server  # noqa: F401

MODEL = {"name": "flowers", "aliases": {"production": {"version": 3, "variant": "onnx-int8"}}, "versions": []}


@pytest.fixture
def run(client):  # noqa: F811
    return lambda *args: execute(_parser().parse_args(list(args)), client, plain_console())


def test_download_takes_what_production_serves_or_what_is_asked_for(server, run, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    server.answers["GET /v1/models/flowers"] = (200, MODEL)
    server.answers["*"] = (200, b"PK...")
    run("download", "flowers")
    assert (tmp_path / "flowers-3-onnx-int8.zip").read_bytes() == b"PK..."
    run("download", "flowers", "--variant", "keras")
    run("download", "flowers", "--version", "2", "--variant", "litert-fp32", "--out", "x.zip")
    assert [asked for asked, *_ in server.got if "versions" in asked] == [
        "GET /v1/models/flowers/versions/3/variants/onnx-int8.zip", "GET /v1/models/flowers/versions/3/model.keras",
        "GET /v1/models/flowers/versions/2/variants/litert-fp32.zip"]
    assert "onnx-int8 of flowers version 3: flowers-3-onnx-int8.zip" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"flowers-3-onnx-int8.zip", "flowers-3.keras", "x.zip"}
    with pytest.raises(LannerError, match="flowers has no alias candidate: say --version and --variant"):
        run("download", "flowers", "--alias", "candidate")
    with pytest.raises(LannerError, match="flowers@production is version 3, not 2"):
        run("download", "flowers", "--version", "2")


def test_predict_asks_for_a_variant_and_sends_many_images_in_several_requests(server, run, tmp_path, monkeypatch,  # noqa: F811
                                                                             capsys):
    monkeypatch.setattr("lanner.client.FORM_IMAGES", 2)
    images = [tmp_path / f"{i}.png" for i in range(5)]
    for image in images:
        image.write_bytes(b"image")

    def labelled(body):
        top = [{"label": "rose", "index": 0, "probability": 0.9}]
        rows = [{"top": top}] * body.count(b'name="image"')
        return 200, {"model": "flowers", "version": 2, "variant": "onnx-fp32", "digest": "d", "predictions": rows}

    server.answers["*"] = labelled
    run("predict", "flowers", *map(str, images), "--version", "2", "--variant", "onnx-fp32", "--top-k", "1")
    assert [asked for asked, *_ in server.got] == [
        "POST /v1/models/flowers/predict?alias=production&version=2&variant=onnx-fp32&top_k=1"] * 3
    assert capsys.readouterr().out.count("rose 90.0 %") == 5


def test_an_alias_that_moves_between_two_requests_is_told(server, client, monkeypatch):  # noqa: F811
    monkeypatch.setattr("lanner.client.FORM_IMAGES", 1)
    server.answers["*"] = [(200, {"digest": digest, "predictions": [{}]}) for digest in "ab"]
    with pytest.raises(LannerError, match="flowers was moved to another variant between two requests"):
        client.predict("flowers", [b"1", b"2"])


def test_retry_follows_what_was_accepted_again(server, run, capsys):  # noqa: F811
    server.answers["POST /v1/jobs/j-1/retry"] = (202, {**job("queued"), "jobs": {"train": "j-2", "optimize": "j-3"}})
    server.answers["*"] = (200, job("succeeded"))
    run("retry", "j-1")
    assert {asked for asked, *_ in server.got[1:]} == {"GET /v1/jobs/j-2", "GET /v1/jobs/j-3"}
    assert "optimize: 100 %" in capsys.readouterr().out


def test_cancel_takes_a_pipeline(server, run, capsys):  # noqa: F811
    server.answers["GET /v1/pipelines/p-1"] = (200, {"jobs": {"train": {"id": "j-1"}, "optimize": {"id": "j-2"}}})
    server.answers["*"] = (200, job("cancelled"))
    run("cancel", "p-1")
    assert ("POST /v1/pipelines/p-1/cancel" in [asked for asked, *_ in server.got])
    assert capsys.readouterr().out == "j-1 cancelled\nj-2 cancelled\n"


def test_who_leaves_is_told_that_it_goes_on(server, run, capsys, monkeypatch):  # noqa: F811
    server.answers["POST /v1/pipelines"] = (202, {"pipeline": "p-1", "name": "flowers", "jobs": {"train": "j-1"}})

    def leaves(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lanner.cli.watch", leaves)
    with pytest.raises(KeyboardInterrupt):
        run("train", "dataset:d-1", "--seed", "3")
    assert "`lanner job j-1` follows it, `lanner cancel j-1` ends it" in capsys.readouterr().out
    assert b'"preprocess":{}' in server.got[0][1].replace(b" ", b"")


def test_every_training_option_reaches_its_stage():
    asked = ["--recipe", "small", "--epochs", "3", "--batch-size", "64", "--learning-rate", "0.1", "--early-stopping",
             "5", "--class-weights", "balanced", "--alias", "candidate", "--loss", "2", "--size", "64"]
    assert training_options(_parser().parse_args(["train", "x", *asked])) == {
        "preprocess": {"size": 64},
        "train": {"recipe": "small", "epochs": 3, "batch_size": 64, "learning_rate": 0.1, "early_stopping": 5,
                  "class_weights": "balanced"},
        "optimize": {"alias": "candidate", "budget": 2.0}}
    assert training_options(_parser().parse_args(["train", "x", "--loss", "0"]))["optimize"] == {"budget": 0.0}
    assert training_options(_parser().parse_args(["train", "x"])) == {"preprocess": {}, "train": {}, "optimize": {}}


def test_the_log_is_printed_as_it_is(server, run, capsys):  # noqa: F811
    server.answers["GET /v1/jobs/j-1/log"] = (200, b"[bold]ERROR[/bold] a\n")
    run("log", "j-1", "--attempt", "2")
    assert capsys.readouterr().out == "[bold]ERROR[/bold] a\n"
    assert server.got[0][0] == "GET /v1/jobs/j-1/log?attempt=2"


def test_status_says_what_keeps_jobs_from_running(server, run, capsys):  # noqa: F811
    idle = {"queued": 0, "oldest_s": None, "workers": []}
    busy = {"queued": 2, "oldest_s": 75.2, "workers": [{"name": "w", "host": "h", "heard_s": 1.0, "job": "j-7"}]}
    server.answers["*"] = (200, {"redis": True, "keeper": True, "queues": {"training": busy, "optimization": idle},
                                 "disk": {"free": 5_000_000_000, "total": 9_000_000_000},
                                 "trouble": ["no optimization worker is there"]})
    run("status")
    told = capsys.readouterr().out
    assert "j-7" in told
    assert "1:15" in told
    assert "5.0 of 9.0 GB of the volume are free" in told
    assert told.endswith("no optimization worker is there\n")


def test_prune_lists_and_deletes_what_nothing_needs(server, run, capsys):  # noqa: F811
    made_of = [{"job": {"source": source}} for source in ("upload:u-1", "cifar10")]
    server.answers["GET /v1/jobs"] = (200, {"jobs": made_of})
    server.answers["GET /v1/uploads"] = (200, {"uploads": [{"id": "u-1"}, {"id": "u-2"}]})
    pointed = {"production": {"version": 3, "previous": {"version": 2}}, "candidate": {"version": 5, "previous": None}}
    versions = dict.fromkeys(("1", "2", "3", "4", "5"), "m")
    server.answers["GET /v1/models"] = (200, {"models": [{"name": "flowers", "versions": versions, "aliases": pointed},
                                                         {"name": "new", "versions": {"1": "m"}, "aliases": {}}]})
    run("prune")
    assert capsys.readouterr().out.splitlines() == [
        "uploads/u-1", "models/flowers/versions/1", "models/flowers/versions/4", "3 to delete: lanner prune --yes"]
    assert server.got[0][0] == "GET /v1/jobs?state=succeeded&kind=preprocess&limit=500"
    assert not any(asked.startswith("DELETE") for asked, *_ in server.got)
    server.answers["*"] = (204, b"")
    server.answers["DELETE /v1/models/flowers/versions/4"] = (409, {"error": {"code": "in_use", "message": "job j-9"}})
    run("prune", "--yes")
    assert [asked for asked, *_ in server.got if asked.startswith("DELETE")] == [
        "DELETE /v1/uploads/u-1", "DELETE /v1/models/flowers/versions/1", "DELETE /v1/models/flowers/versions/4"]
    told = capsys.readouterr().out
    assert "models/flowers/versions/4 stays: job j-9" in told
    assert told.endswith("2 deleted\n")
