"""OptimizeJob from end to end: Variants published, measured, judged; the card; the alias."""

import base64
import copy
import dataclasses
import json
import os
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import keras
import numpy as np
import pytest
from PIL import Image
from redis import Redis

from optimization.card import REFERENCE, write_card
from optimization.jobs import optimize
from optimization.page import render
from optimization.release import MIB_EACH, fit_on_gpu
from shared.artifacts import aliases, open_artifact, promote, publish, register_version, sha256, stage, versions
from shared.attempt import Cancelled
from shared.datasets import Dataset
from shared.errors import Damaged, NotFound
from shared.fitted import Fit, processes, read_fit
from shared.jobs import VARIANTS, OptimizeJob
from shared.ledger import Ledger
from shared.runtimes import FILES, TOLERANCE, open_session, run_in_chunks

# TensorFlow's variables do not know NumPy 2's copy argument yet; Keras reads them all the same.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
ONE = OptimizeJob("m-1", "sides", variants=("onnx-fp32",))
ENGINES = tuple(v for v in VARIANTS if v.startswith("tensorrt-"))  # need a GPU: test_tensorrt.py
PORTABLE = tuple(v for v in VARIANTS if v not in ENGINES)


@pytest.fixture(scope="module")
def released(volume, tmp_path_factory, begin):
    """One whole job: its volume, its summary and its card."""
    root = Path(shutil.copytree(volume, tmp_path_factory.mktemp("released") / "artifacts"))
    job = OptimizeJob("m-1", "sides")
    summary = optimize(job, begin(root, job))
    return root, summary, json.loads((root / summary["card"]).read_text())


def rows(card):
    return {row["variant"]: row for row in card["rows"]}


def test_every_variant_is_published_with_what_made_it(released):
    root, _, _ = released
    for variant in PORTABLE:
        manifest = open_artifact(root, f"variants/m-1/{variant}")
        assert f"{manifest['format']}-{manifest['precision']}" == variant
        assert manifest["parents"] == {"model": "m-1", "dataset": "d-1"}
        assert manifest["spec"] == open_artifact(root, "models/m-1")["spec"]
        assert manifest["tolerance"] == TOLERANCE[manifest["precision"]]
        assert manifest["measured"]["bytes"] == manifest["files"][FILES[manifest["format"]]]["size"]
        assert {"keras", "tensorflow", "onnxruntime", "ai-edge-litert"} <= manifest["tools"].keys()
    assert list((root / ".staging").iterdir()) == []


@pytest.mark.parametrize("variant", PORTABLE)
def test_a_published_variant_answers_as_keras_does(released, volume, variant):
    root, _, card = released
    session, manifest = open_session(root, "m-1", variant)
    with np.load(volume / "models/m-1/golden.npz") as golden:
        got = session.run(golden["images"])
        assert np.abs(got - golden["probabilities"]).max() <= TOLERANCE[manifest["precision"]]
    session.close()
    assert np.allclose(got.sum(1), 1, atol=0.02)
    assert rows(card)[variant]["accuracy"] > 0.99


def test_the_card_tells_of_each_row_how_right_how_fast_and_how_large_it_is(released):
    _, _, card = released
    assert [row["variant"] for row in card["rows"]] == [REFERENCE, *VARIANTS]
    for row in card["rows"][:1 + len(PORTABLE)]:
        assert row["device"] == "cpu"
        assert list(row["images_per_s"]) == ["1", "8", "64"]
        assert min(row["images_per_s"].values()) > 0
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
        assert row["latency_ms"]["calls"] >= 210
        assert row["bytes"] > 1000
        assert row["against_keras"]["images"] == card["gate"]["validation_images"] == 900
    assert rows(card)["onnx-fp32"]["against_keras"]["max_difference"] <= 1e-3
    assert rows(card)["litert-int8"]["bytes"] < rows(card)["litert-fp32"]["bytes"]


def test_without_a_gpu_the_card_says_why_there_are_no_engines_and_none_is_published(released):
    root, _, card = released
    for variant in ENGINES:
        row = rows(card)[variant]
        assert (row["state"], row["winner"]) == ("failed", False)
        assert row["why"] == "not built: TensorRT needs a GPU, and this ran with DEVICE=cpu"
        assert row["why"] in (root / "cards/m-1.html").read_text()
        assert not (root / "variants/m-1" / variant).exists()


def test_every_variant_that_passes_is_fitted_to_this_host(released):
    root, summary, card = released
    fitted = {name: row["serving"] for name, row in rows(card).items() if "serving" in row}
    assert set(fitted) == {name for name, row in rows(card).items() if row.get("gate", {}).get("passes")}
    assert summary["winner"] in fitted
    for name, found in fitted.items():
        assert [(t["threads"], t["batch"]) for t in found["tried"]] == [(1, 8), (1, 16), (1, 32), (1, 64)]
        assert min(t["images_per_s"] for t in found["tried"]) > 0
        assert found["meets_target"]
        assert read_fit(root, "m-1", name, cores=1) == Fit(1, found["batch"], "cpu")
        assert read_fit(root, "m-1", name, cores=2) is None, "what was found with one core holds there alone"
    assert "with 64 clients, decoding in it" in (root / "cards/m-1.html").read_text()


@pytest.fixture
def on_gpu(released, tmp_path, begin, monkeypatch):
    """Fits the winner of the whole job in several processes, as on a GPU of so many MiB."""
    whole, summary, card = released
    root = Path(shutil.copytree(whole, tmp_path / "artifacts"))

    def fit(memory_mib):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho GPU-a, NVIDIA X, 580.65.06, {memory_mib}, 9.0\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        ctx = begin(root, ONE, "j-2")
        ctx.settings = dataclasses.replace(ctx.settings, cpu_threads=2, http_processes=0)
        found = copy.deepcopy(rows(card))
        fit_on_gpu(ONE, ctx, found, summary["winner"], Dataset(root, "d-1").images("validation"))
        return found[summary["winner"]]["serving"]
    return fit, root, summary["winner"], rows(card)[summary["winner"]]["serving"]


def test_on_a_gpu_the_winner_is_fitted_in_several_processes_once_it_serves(on_gpu):
    fit, root, winner, before = on_gpu
    found = fit(2 * MIB_EACH)
    assert [best["processes"] for best in found["by_processes"]] == [1, 2]
    assert read_fit(root, "m-1", winner, cores=2, processes=2).batch == found["by_processes"][1]["batch"]
    assert processes(root, cores=2) == found["processes"]
    assert found["tried"][:len(before["tried"])] == before["tried"]


def test_a_gpu_without_memory_for_two_is_left_alone(on_gpu):
    fit, _, _, before = on_gpu
    assert fit(2 * MIB_EACH - 1) == before


def test_a_process_that_can_not_open_it_leaves_what_was_found(on_gpu, caplog):
    fit, root, winner, before = on_gpu
    for file in (root / "variants/m-1" / winner).glob("model.*"):
        file.write_bytes(b"damaged")
    assert fit(2 * MIB_EACH) == before
    assert f"{winner} is served by one process: a process of the sweep failed" in caplog.text


def test_the_card_tells_where_and_from_what_it_was_measured(released):
    _, _, card = released
    assert (card["model"], card["dataset"], card["name"], card["version"]) == ("m-1", "d-1", "sides", 1)
    assert (card["device"], card["threads"], card["size"], card["classes"]) == ("cpu", 1, 32, 4)
    assert len(card["cpu"]) > 2
    assert card["versions"]["tensorflow"].startswith("2.")
    assert card["gate"]["budget"] == 0.5
    assert card["created_at"] >= "2026"


def test_the_test_split_is_run_for_the_winner_and_keras_alone(released):
    _, _, card = released
    assert card["test"]["images"] == 60
    assert card["test"]["accuracy"].keys() == {REFERENCE, card["winner"]}


def test_the_winner_becomes_production_and_every_other_is_told_why_not(released):
    root, summary, card = released
    alias = aliases(root, "sides")["production"]
    assert (alias["variant"], alias["model"], alias["moved_by"]) == (card["winner"], "m-1", "j-1")
    assert versions(root, "sides") == {1: "m-1"}
    assert summary["winner"] == card["winner"]
    assert summary["alias"]["moved"]
    assert summary["variants"].keys() == {REFERENCE, *VARIANTS}
    assert [row["variant"] for row in card["rows"] if row.get("winner")] == [card["winner"]]
    assert all(row["why"] for row in card["rows"][1:])
    fast = [row for row in card["rows"][1:] if row["state"] == "measured" and row["gate"]["passes"]]
    assert rows(card)[card["winner"]]["images_per_s"]["8"] >= 0.95 * max(row["images_per_s"]["8"] for row in fast)


class Page(HTMLParser):
    """Collects the tags, attributes and words of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.words = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not {name for name, _ in attributes} & {"href", "onclick"}
        assert all(value.startswith("data:image/png;base64,") for name, value in attributes if name == "src")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_stands_alone_and_shows_every_row_and_the_plot(released):
    root, _, card = released
    text = (root / "cards/m-1.html").read_text()
    page = Page(text)
    assert page.open == []
    assert {"table", "svg", "circle", "style"} <= page.tags
    assert "script" not in page.tags
    words = " ".join(page.words)
    for row in card["rows"]:
        assert words.count(row["variant"]) >= 2
    assert "auto chose" not in words
    pictures = dict.fromkeys(range(900), b"")
    assert "<dd>auto chose a &lt; b</dd>" in render({**card, "recipe": {"chosen": ["a < b"]}}, pictures)
    svg = ElementTree.fromstring(text[text.index("<svg"):text.index("</svg>") + 6])
    assert len(svg.findall("circle")) == 1 + len(PORTABLE)


def test_the_card_tells_of_classes_calibration_mistakes_and_doubtful_labels_and_shows_those_images(released):
    root, _, card = released
    found = card["diagnosis"]
    assert found["of"] == card["winner"]
    assert [row["label"] for row in found["per_class"]] == open_artifact(root, "models/m-1")["spec"]["labels"]
    assert sum(row["images"] for row in found["per_class"]) == found["calibration"]["images"] == 900
    right = sum(row["recall"] * row["images"] for row in found["per_class"])
    assert right / 900 == pytest.approx(rows(card)[card["winner"]]["accuracy"])
    text = (root / "cards/m-1.html").read_text()
    named = found["mistakes"] + found["label_errors"]["images"]
    assert text.count('src="data:image/png;base64,') == len(named)


def test_an_image_on_the_page_is_the_one_that_the_card_names(released):
    root, _, card = released
    images = Dataset(root, "d-1").images("validation")
    entry = {"image": 7, "label": "<b>a", "found": "b", "confidence": 0.9, "of_label": 0.1}
    diagnosis = {**card["diagnosis"], "mistakes": [entry]}
    write_card(root, {**card, "model": "m-shown", "diagnosis": diagnosis}, images)
    text = (root / "cards/m-shown.html").read_text()
    assert Page(text).open == []
    assert "<b>a" not in text
    data = text.split('src="data:image/png;base64,')[1].split('"')[0]
    assert np.array_equal(np.asarray(Image.open(BytesIO(base64.b64decode(data)))), images[7])


def test_a_second_attempt_takes_what_the_first_published_and_keeps_one_version(released, begin, tmp_path):
    before, _, _ = released
    root = Path(shutil.copytree(before, tmp_path / "artifacts"))
    made = open_artifact(root, "variants/m-1/onnx-fp32")["created_at"]
    ctx = begin(root, ONE, "j-2")
    promote(root, "sides", "production", 1, "litert-fp16", by="j-2")  # by an earlier attempt that measured otherwise
    summary = optimize(ONE, ctx)
    assert open_artifact(root, "variants/m-1/onnx-fp32")["created_at"] == made
    assert (summary["alias"]["moved"], aliases(root, "sides")["production"]["seq"]) == (True, 3)
    assert optimize(ONE, ctx)["alias"]["seq"] == 3
    assert aliases(root, "sides")["production"]["variant"] == summary["winner"]
    assert versions(root, "sides") == {1: "m-1"}


def test_an_alias_moved_after_the_job_came_is_left_as_it_is(released, begin, tmp_path):
    before, _, _ = released
    root = Path(shutil.copytree(before, tmp_path / "artifacts"))
    ctx = begin(root, ONE, "j-2")
    promote(root, "sides", "production", register_version(root, "sides", "m-1"), "litert-fp16", by="somebody")
    summary = optimize(ONE, ctx)
    assert (summary["winner"], summary["alias"]["moved"]) == ("onnx-fp32", False)
    assert aliases(root, "sides")["production"]["variant"] == "litert-fp16"
    card = json.loads((root / summary["card"]).read_text())
    assert "somebody" in card["alias"]["reason"]


def test_where_none_passes_the_job_succeeds_and_moves_nothing(released, begin, tmp_path):
    before, _, _ = released
    root = Path(shutil.copytree(before, tmp_path / "artifacts"))
    job = OptimizeJob("m-1", "other", variants=("litert-int8",), budget=0.0)
    summary = optimize(job, begin(root, job, "j-2"))
    assert (summary["winner"], summary["alias"]["moved"]) == (None, False)
    assert aliases(root, "other") == {}
    page = (root / "cards/m-1.html").read_text()
    assert "No variant passed the gate" in page
    assert "over the budget of 0" in page


def test_a_name_with_markup_is_shown_as_text(released):
    _, _, card = released
    diagnosis = {**card["diagnosis"], "mistakes": [], "label_errors": {"suspected": 0, "images": []}}
    text = render({**card, "name": "<script>alert(1)</script>", "cpu": "a & b", "diagnosis": diagnosis}, {})
    assert "script" not in Page(text).tags
    assert "a &amp; b" in text


def test_a_variant_that_can_not_be_built_is_a_row_that_says_why_and_the_others_go_on(root, begin):
    damaged = root / "variants/m-1/litert-fp32"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{}")
    job = OptimizeJob("m-1", "sides", variants=("litert-fp32", "onnx-fp32"))
    summary = optimize(job, begin(root, job))
    assert summary["winner"] == "onnx-fp32"
    row = rows(json.loads((root / summary["card"]).read_text()))["litert-fp32"]
    assert (row["state"], row["winner"]) == ("failed", False)
    assert "lists no files" in row["why"]
    assert "lists no files" in (root / "cards/m-1.html").read_text()


def test_a_model_that_no_longer_answers_its_golden_batch_fails_the_job(root, begin):
    golden = root / "models/m-1/golden.npz"
    with np.load(golden) as arrays:
        images, scores = arrays["images"], arrays["probabilities"]
    np.savez(golden, images=images, probabilities=np.roll(scores, 1, axis=1))
    manifest = json.loads((root / "models/m-1/manifest.json").read_text())
    manifest["files"]["golden.npz"] = {"size": golden.stat().st_size, "sha256": sha256(golden)}
    (root / "models/m-1/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match="model m-1: the golden batch is off"):
        optimize(ONE, begin(root, ONE))
    assert not (root / "variants").exists()


def test_a_cancelled_job_leaves_before_it_exports(root, begin):
    ctx = begin(root, ONE)
    Ledger(root, Redis.from_url("redis://127.0.0.1:1/0")).ask_cancel("j-1")
    with pytest.raises(Cancelled):
        optimize(ONE, ctx)
    assert not (root / "variants").exists()
    assert aliases(root, "sides") == {}


def test_a_model_that_is_not_there_is_not_found(root, begin):
    job = OptimizeJob("m-2", "sides")
    with pytest.raises(NotFound, match="models/m-2"):
        optimize(job, begin(root, job))


def test_the_validation_split_is_what_the_card_was_measured_on(released):
    root, _, card = released
    dataset = Dataset(root, "d-1")
    session, _ = open_session(root, "m-1", "litert-int8")
    scores = run_in_chunks(session, dataset.images("validation"), 100)
    session.close()
    assert rows(card)["litert-int8"]["accuracy"] == float((scores.argmax(1) == dataset.labels("validation")).mean())


def weaker(root, model_id, dataset="d-1"):
    """Another Model of the same Dataset, with the first one's weights made useless."""
    staging = stage(root, "test")
    model = keras.models.load_model(root / "models/m-1/model.keras", compile=False)
    kernel, bias = model.get_layer("logits").get_weights()
    model.get_layer("logits").set_weights([kernel[:, ::-1], bias])
    model.save(staging / "model.keras")
    with np.load(root / "models/m-1/golden.npz") as golden:
        images = golden["images"]
    np.savez(staging / "golden.npz", images=images,
             probabilities=model.predict(images.astype(np.float32), verbose=0))
    manifest = {**open_artifact(root, "models/m-1"), "parents": {"dataset": dataset}}
    publish(root, staging, f"models/{model_id}",
            {key: manifest[key] for key in ("name", "parents", "spec", "metrics", "recipe", "summary")})
    return OptimizeJob(model_id, "sides", variants=("onnx-fp32",))


def test_a_model_that_is_surely_worse_on_the_same_images_does_not_replace_what_serves(released, begin, tmp_path):
    root = Path(shutil.copytree(released[0], tmp_path / "artifacts"))
    before = aliases(root, "sides")["production"]
    job = weaker(root, "m-2")
    summary = optimize(job, begin(root, job, "j-2"))
    assert (summary["winner"], summary["alias"]["moved"]) == ("onnx-fp32", False)
    assert aliases(root, "sides")["production"] == before
    reason = summary["alias"]["reason"]
    assert f"{before['variant']} of version 1, which it points at, has" in reason
    assert "% of the same 900 validation images right and this one" in reason
    assert "`lanner promote` moves it all the same" in reason
    assert "was not moved: " in (root / "cards/m-2.html").read_text()


def test_models_of_different_datasets_are_not_held_against_each_other(released, begin, tmp_path):
    root = Path(shutil.copytree(released[0], tmp_path / "artifacts"))
    shutil.copytree(root / "datasets/d-1", root / "datasets/d-2")
    job = weaker(root, "m-2", "d-2")
    assert optimize(job, begin(root, job, "j-2"))["alias"]["moved"]
    assert aliases(root, "sides")["production"]["model"] == "m-2"


def test_of_two_jobs_the_later_one_has_the_last_word(released, begin, tmp_path):
    root = Path(shutil.copytree(released[0], tmp_path / "artifacts"))
    first, second = begin(root, ONE, "j-2"), begin(root, ONE, "j-3")
    assert (second.came_after("j-2"), first.came_after("j-3"), first.came_after("api"), first.came_after("j-9")) == (
        True, False, False, False)
    promote(root, "sides", "production", 1, "litert-fp16", by="j-2")
    assert optimize(ONE, second)["alias"]["moved"]
    assert not optimize(ONE, first)["alias"]["moved"]
