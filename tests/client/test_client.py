"""The client against a small real HTTP server that answers what a test tells it to."""

import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from lanner import Client, LannerError, tables
from lanner.cli import _parser, execute, main, training_options
from lanner.demo import digits, train
from lanner.progress import describe, eta, plain_console, watch


class Answering(ThreadingHTTPServer):
    """`answers` maps "METHOD /path" or "*" to (status, JSON), a list of them or a function of the body."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.got = {}, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.got.append((f"{self.command} {self.path}", body, self.headers))
        planned = self.server.answers.get(f"{self.command} {self.path.partition('?')[0]}") or self.server.answers["*"]
        if isinstance(planned, list):
            planned = planned.pop(0) if len(planned) > 1 else planned[0]
        status, value = planned(body) if callable(planned) else planned
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = Answering()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def client(server):
    with Client(server.url) as made:
        yield made


def job(state, kind="train", **fields):
    return {"id": "j-1", "kind": kind, "state": state, "progress": None, "error": None, **fields}


def test_an_upload_tells_its_progress_and_gives_the_word_for_a_pipeline(server, client, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"x" * 3000)
    server.answers["*"] = lambda body: (201, {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body)})
    told = []
    answer = client.upload(tmp_path / "a", lambda sent, total: told.append((sent, total)))
    path, body, headers = server.got[0]
    assert path == f"PUT /v1/uploads/{answer['id']}?filename=a"
    assert answer["source"] == f"upload:{answer['id']}"
    assert told[-1] == (len(body), len(body))
    assert headers["Content-Type"] == "application/x-tar"


def test_an_upload_that_arrives_with_other_bytes_is_an_error(server, client, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"zip")
    server.answers["*"] = (201, {"sha256": "0" * 64, "size": 3})
    with pytest.raises(LannerError, match="other bytes"):
        client.upload(tmp_path / "a.zip")


def test_an_error_of_the_server_keeps_its_code_message_and_status(server, client):
    server.answers["GET /v1/jobs/j-9"] = (404, {"error": {"code": "not_found", "message": "job j-9 does not exist"}})
    with pytest.raises(LannerError, match="job j-9 does not exist") as e:
        client.job("j-9")
    assert (e.value.code, e.value.status) == ("not_found", 404)


def test_another_server_and_none_are_told_apart(server, client):
    server.answers["GET /v1/models"] = (200, b"<html>")
    with pytest.raises(LannerError, match="is .* Lanner") as e:
        client.models()
    assert e.value.code == "not_lanner"
    with Client("http://127.0.0.1:9") as nobody, pytest.raises(LannerError, match="is Lanner up") as e:
        nobody.models()
    assert e.value.code == "no_answer"


def test_follow_gives_every_change_once_and_looks_past_a_restart(server, client):
    server.answers["GET /v1/jobs/j-1"] = [
        (200, job("queued")), (200, job("queued")), (503, {"error": {"code": "busy", "message": "later"}}),
        (200, job("running")), (200, job("succeeded"))]
    assert [j["state"] for j in client.follow("j-1", every_s=0.01)] == ["queued", "running", "succeeded"]


def test_follow_ends_at_once_at_a_job_that_does_not_exist(server, client):
    server.answers["GET /v1/jobs/j-1"] = (404, {"error": {"code": "not_found", "message": "no"}})
    with pytest.raises(LannerError, match="no"):
        list(client.follow("j-1", every_s=0.01))


def test_a_prediction_sends_paths_and_bytes_as_a_form(server, client, tmp_path):
    (tmp_path / "a.png").write_bytes(b"A!")
    server.answers["POST /v1/models/flowers/predict"] = (200, {"predictions": []})
    client.predict("flowers", [tmp_path / "a.png", b"B!"], alias="candidate", top_k=2)
    path, body, headers = server.got[0]
    assert path == "POST /v1/models/flowers/predict?alias=candidate&top_k=2"
    assert headers["Content-Type"].startswith("multipart/form-data")
    assert b'filename="a.png"' in body
    assert b"A!" in body
    assert b"B!" in body


def test_a_budget_goes_along_and_the_card_says_what_auto_chose(server, client):
    args = _parser().parse_args(["train", "cifar10", "--recipe", "auto", "--budget", "90"])
    assert training_options(args)["train"] == {"recipe": "auto", "budget_s": 90}
    body = {"name": "x", "version": 1, "device": "cpu", "threads": 2, "rows": [], "test": {"accuracy": {}},
            "gate": {"rank_batch": 8, "validation_images": 9, "budget": 0.5}}
    out = io.StringIO()
    for recipe in (None, {"name": "small"}, {"name": "small", "chosen": ["8 epochs: the budget has room for them"]}):
        Console(file=out, width=200).print(tables.card({**body, "recipe": recipe}))
    assert out.getvalue().count("auto chose") == 1
    serving = {"threads": 2, "batch": 32, "images_per_s": 11583.1, "p99_ms": 8.123}
    row = {"variant": "onnx-fp32", "state": "measured", "accuracy": 1, "latency_ms": {"p50": 1}, "bytes": 9,
           "winner": True, "images_per_s": {"8": 9}, "gate": {"low": 0, "high": 0, "passes": True}, "serving": serving}
    body |= {"rows": [row], "alias": {"alias": "production", "moved": True}}
    Console(file=out, width=200).print(tables.card(body))
    assert ("onnx-fp32 serves most with HTTP_PROCESSES=1 on 2 thread(s) each, at most 32 images together: "
            "11,583 images/s") in out.getvalue()
    assert "auto chose 8 epochs: the budget has room for them" in out.getvalue()


def test_tune_submits_the_search_and_what_follows_and_says_what_came(server, client):
    done = {"trials": 3, "recipe": "small", "validation_accuracy": 0.8125, "model_id": "m-1"}
    accepted = [(202, {"id": "j-1", "job": {"model_id": "m-1"}}), (202, {"id": "j-2", "job": {"model_id": "m-1"}})]
    card = {"name": "x", "version": 1, "device": "cpu", "threads": 2, "rows": [], "test": {"accuracy": {}},
            "gate": {"rank_batch": 8, "validation_images": 9, "budget": 0.5}}
    server.answers = {"POST /v1/jobs": accepted, "GET /v1/jobs/j-1": (200, job("succeeded", "tune", result=done)),
                      "GET /v1/jobs/j-2": (200, job("succeeded", "optimize")), "GET /v1/cards/m-1": (200, card)}
    args = _parser().parse_args(["tune", "d-1", "--trials", "3", "--budget", "60", "--recipes", "small"])
    text = io.StringIO()
    execute(args, client, Console(file=text, width=200))
    bodies = [json.loads(body) for path, body, _ in server.got if path == "POST /v1/jobs"]
    assert bodies == [{"kind": "tune", "dataset_id": "d-1", "trials": 3, "budget_s": 60, "recipes": ["small"]},
                      {"kind": "optimize", "model_id": "m-1"}]
    assert "3 trials; the best, of recipe small, has 81.25 %" in text.getvalue()


def test_batch_submits_follows_and_downloads_the_table(server, client, tmp_path):
    done = {"predictions_id": "r-1", "images": 3, "failed": 1, "variant": "onnx-fp32", "version": 1, "seconds": 0.5,
            "accuracy": None}
    server.answers = {"POST /v1/jobs": (202, {"id": "j-1"}),
                      "GET /v1/jobs/j-1": (200, job("succeeded", "predict", result=done)),
                      "GET /v1/predictions/r-1/predictions.parquet": (200, b"PAR1 PAR1")}
    out = tmp_path / "table.parquet"
    args = _parser().parse_args(["batch", "flowers", "dataset:d-1/test", "--out", str(out), "--variant", "onnx-fp32"])
    text = io.StringIO()
    execute(args, client, Console(file=text, width=200))
    assert json.loads(server.got[0][1]) == {"kind": "predict", "name": "flowers", "source": "dataset:d-1/test",
                                            "alias": "production", "variant": "onnx-fp32"}
    assert out.read_bytes() == b"PAR1 PAR1"
    assert "3 images by onnx-fp32 of version 1 in 0.5 s, 1 not readable" in text.getvalue()


def test_shadow_tells_how_often_which_labels_differ(server, client):
    side = {"version": 1, "variant": "onnx-fp32"}
    told = {"name": "flowers", "share": 0.1, "production": side, "candidate": {**side, "version": 2}, "mirrored": 200,
            "dropped": 3, "failed": 0, "rate": 0.01, "interval": [0.002749, 0.035733],
            "confusion": [{"production": "rose", "candidate": "rose", "images": 198},
                          {"production": "rose", "candidate": "tulip", "images": 2}],
            "run_ms": {"production": {"p50": 0.31, "p99": 0.9, "images_per_run": 1.4}, "candidate": None}}
    nothing = {**told, "mirrored": 0, "share": 0.0}
    server.answers["GET /v1/models/flowers/shadow"] = [(200, told), (200, nothing), (200, {**told, "candidate": None})]
    text = io.StringIO()
    for _ in range(3):
        execute(_parser().parse_args(["shadow", "flowers"]), client, Console(file=text, width=200))
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert lines[0] == ("flowers: the candidate disagrees on 1.00 % (0.27 to 3.57) of 200 live images, 3 dropped, "
                        "0 failed")
    assert lines[2:6] == ["production 1 onnx-fp32 0.31 0.90 1.4", "candidate 2 onnx-fp32",
                          "production says candidate says images", "rose tulip 2"]
    assert "SHADOW_SHARE is 0" in lines[6]
    assert "flowers has no candidate in memory" in lines[7]


def test_a_table_that_does_not_exist_leaves_no_file(server, client, tmp_path):
    server.answers = {"*": (404, {"error": {"code": "not_found", "message": "predictions/r-9 does not exist"}})}
    with pytest.raises(LannerError, match="r-9 does not exist") as caught:
        client.download_predictions("r-9", tmp_path / "x.parquet")
    assert (caught.value.code, list(tmp_path.iterdir())) == ("not_found", [])


def test_watch_prints_plain_lines_without_a_terminal(server, client):
    progress = {"stage": "epoch", "step": 3, "of": 12, "percent": 25.0, "eta_s": 75.2,
                "metrics": {"val_accuracy": 0.51234}}
    server.answers["GET /v1/jobs/j-1"] = [(200, job("running", progress=progress)), (200, job("succeeded"))]
    out = io.StringIO()
    assert watch(client, {"train": "j-1"}, Console(file=out, width=120))["train"]["state"] == "succeeded"
    assert out.getvalue() == ("train: 25 %  epoch 3/12  val_accuracy 0.5123  ETA 1:15\ntrain: 100 %  succeeded\n")


def test_watch_draws_bars_on_a_terminal(server, client):
    progress = {"stage": "epoch", "step": 3, "of": 12, "percent": 25.0, "eta_s": 75.2, "metrics": {}}
    server.answers["GET /v1/jobs/j-1"] = [(200, job("running", progress=progress)), (200, job("succeeded"))]
    out = io.StringIO()
    watch(client, {"train": "j-1"}, Console(file=out, width=120, force_terminal=True))
    assert "epoch 3/12" in out.getvalue()
    assert "━" in out.getvalue()


def test_watch_raises_the_error_of_a_failed_job(server, client):
    error = {"code": "too_few_classes", "message": "found one class, expected at least two"}
    server.answers["GET /v1/jobs/j-1"] = (200, job("failed", error=error))
    with pytest.raises(LannerError, match="preprocess failed: found one class") as e:
        watch(client, {"preprocess": "j-1"}, Console(file=io.StringIO()))
    assert e.value.code == "too_few_classes"


@pytest.mark.parametrize(("seconds", "text"), [(None, ""), (0, "0:00"), (75.4, "1:15"), (3725, "1:02:05")])
def test_eta_is_written_as_a_clock_would(seconds, text):
    assert eta(seconds) == text


def test_a_job_without_progress_is_described_by_its_state():
    assert describe(job("waiting")) == (0.0, "", "waiting")
    assert describe(job("queued", progress={"stage": "waiting for a GPU"})) == (0.0, "", "waiting for a GPU")
    assert describe(job("running", progress={"stage": "waiting for a GPU"})) == (0.0, "", "waiting for a GPU")
    assert describe(job("succeeded")) == (100.0, "", "succeeded")


def test_without_cifar10_the_demo_says_so_and_takes_the_digits(server, client):
    no_network = {"code": "source_unavailable", "message": "www.cs.toronto.edu does not answer"}
    accepted = {"pipeline": "p", "name": "n", "dataset_id": "d", "model_id": "m"}
    server.answers = {
        "POST /v1/pipelines": [(202, {**accepted, "jobs": {"preprocess": "j-1"}}),
                               (202, {**accepted, "jobs": {"preprocess": "j-2"}})],
        "GET /v1/jobs/j-1": (200, job("failed", error=no_network)), "GET /v1/jobs/j-2": (200, job("succeeded")),
        "*": lambda body: (201, {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body)})}
    out = io.StringIO()
    train(client, Console(file=out, width=200), "", {}, "")
    assert "CIFAR-10 can't be had (preprocess failed: www.cs.toronto.edu does not answer)" in out.getvalue()
    asked = [json.loads(body) for path, body, _ in server.got if path.startswith("POST")]
    assert [a["source"].partition(":")[0] for a in asked] == ["cifar10", "upload"]
    assert asked[1]["name"] == "digits"


def test_the_digits_are_ten_folders_of_grey_images(tmp_path):
    from PIL import Image

    digits(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == list("0123456789")
    images = list(tmp_path.glob("*/*.png"))
    assert len(images) == 1797
    with Image.open(images[0]) as image:
        assert (image.mode, image.size) == ("L", (8, 8))


def test_labels_and_messages_are_printed_as_they_are(server, capsys):
    console = plain_console()
    answer = {"model": "pets", "version": 1, "variant": "onnx-fp32", "predictions": [
        {"top": [{"label": label, "probability": 0.5} for label in ("cat [tabby]", "cat [/old]", ":cat:")]}]}
    console.print(tables.predictions(answer, ["[b]a.jpg"]))
    told = capsys.readouterr().out
    assert all(text in told for text in ("cat [tabby]", "cat [/old]", ":cat:", "[b]a.jpg"))


@pytest.mark.parametrize("arguments", [["predict", "pets", "/nowhere/a.jpg"], ["predict", "pets", "/"],
                                       ["batch", "pets", "dataset:d-1", "--out", "/nowhere/b.parquet"]])
def test_a_file_that_can_not_be_read_or_written_is_one_line_before_any_work(server, monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["lanner", "--url", server.url, *arguments])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code.startswith("lanner: /")
    assert "\n" not in e.value.code
    assert server.got == []


def test_datasets_are_listed_and_what_could_not_be_used_is_named(server, capsys):
    summary = {"dataset_id": "d-1", "name": "pets", "images": {"train": 8, "validation": 1, "test": 1}, "classes": 2,
               "size": 32, "skipped": 1}
    server.answers["GET /v1/datasets"] = (200, {"datasets": [{"id": "d-1", "name": "pets", "summary": summary}]})
    with Client(server.url) as client:
        execute(_parser().parse_args(["datasets"]), client, plain_console())
        assert "d-1" in capsys.readouterr().out
    skipped = {"stats": {"skipped": {"images": 1, "examples": [{"path": "cat/a.jpg", "reason": "it is empty"}]}}}
    assert tables.prepared(summary, skipped).splitlines() == [
        "dataset d-1: 10 images of 2 classes; 1 files can't be used, such as", "  cat/a.jpg: it is empty"]


def test_delete_asks_for_what_it_is_told(server, capsys):
    server.answers["DELETE /v1/models/pets/versions/1"] = (204, b"")
    with Client(server.url) as client:
        execute(_parser().parse_args(["delete", "models/pets/versions/1"]), client, plain_console())
        assert capsys.readouterr().out == "models/pets/versions/1 is deleted\n"
        server.answers["*"] = (409, {"error": {"code": "in_use", "message": "model m-1 was trained on it"}})
        with pytest.raises(LannerError, match="was trained on it"):
            client.delete("/datasets/d-1/")
    assert [asked for asked, _, _ in server.got][-1] == "DELETE /v1/datasets/d-1"


def test_an_address_or_a_name_that_can_not_be_is_an_error(client):
    with pytest.raises(LannerError, match="http://host:port is no address .*expected http://HOST:PORT"):
        Client("http://host:port")
    with pytest.raises(LannerError, match="is nothing that could be asked for"):
        client.card("a\nb")


def test_a_table_that_could_not_be_written_is_known_before_the_work_or_says_where_it_lies(server, client, tmp_path):
    def batch(out):
        execute(_parser().parse_args(["batch", "flowers", "dataset:d-1", "--out", str(out)]), client, plain_console())

    with pytest.raises(LannerError, match="is a folder: expected the name of a file"):
        batch(tmp_path)
    with pytest.raises(LannerError, match="none is no folder"):
        batch(tmp_path / "none" / "table.parquet")
    assert server.got == []
    ended = job("succeeded", "predict", result={"predictions_id": "r-1", "images": 3})
    server.answers["POST /v1/jobs"] = [(202, job("queued", "predict"))]
    server.answers["GET /v1/jobs/j-1"] = [(200, ended)]
    server.answers["*"] = (503, {"error": {"code": "busy", "message": "ask again"}})
    with pytest.raises(LannerError, match=r"could not be written .*the table is there: http.*/v1/predictions/r-1/"):
        batch(tmp_path / "table.parquet")
