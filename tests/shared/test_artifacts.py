"""Published means whole, immutable and first; an alias moves only to what verifies."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from shared import artifacts
from shared.artifacts import aliases, names, open_artifact, promote, publish, register_version, stage, versions
from shared.errors import Conflict, Damaged, NotFound


def make(root, target, text="bytes", **manifest):
    folder = stage(root, "j-1")
    (folder / "logs").mkdir()
    (folder / "data").write_text(text)
    (folder / "logs" / "events").write_text("events")
    return publish(root, folder, target, {"summary": {}, **manifest})


def test_a_published_artifact_opens_with_every_file_accounted_for(root):
    manifest = make(root, "datasets/d-1", name="cats")
    assert manifest == open_artifact(root, "datasets/d-1")
    assert sorted(manifest["files"]) == ["data", "logs/events"]
    assert (manifest["kind"], manifest["id"], manifest["name"]) == ("dataset", "d-1", "cats")
    assert list((root / ".staging").iterdir()) == []


def test_the_first_publisher_wins_and_the_second_gets_its_manifest(root):
    first = make(root, "models/m-1", "first")
    assert make(root, "models/m-1", "second") == first
    assert (root / "models/m-1/data").read_text() == "first"
    assert list((root / ".staging").iterdir()) == []


@pytest.mark.parametrize(("harm", "says"), [
    (lambda p: (p / "data").write_text("bytez"), "other bytes"),
    (lambda p: (p / "data").write_text("byte"), "has 4 bytes, expected 5"),
    (lambda p: (p / "data").unlink(), "data is missing"),
    (lambda p: (p / "manifest.json").write_text(""), "not valid JSON"),
    (lambda p: (p / "manifest.json").write_text("{}"), "lists no files"),
    (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
])
def test_a_damaged_artifact_does_not_open(root, harm, says):
    make(root, "datasets/d-1")
    harm(root / "datasets/d-1")
    with pytest.raises(Damaged, match=says):
        open_artifact(root, "datasets/d-1")


def test_what_is_not_there_is_not_found(root):
    with pytest.raises(NotFound, match="datasets/d-2 does not exist"):
        open_artifact(root, "datasets/d-2")


def test_versions_count_up_and_a_model_keeps_its_own(root):
    assert [register_version(root, "cats", m) for m in ("m-1", "m-2", "m-1", "m-3")] == [1, 2, 1, 3]
    assert versions(root, "cats") == {1: "m-1", 2: "m-2", 3: "m-3"}
    assert names(root) == ["cats"]


def test_an_alias_moves_to_a_published_variant_and_says_who_moved_it(root):
    make(root, "variants/m-1/onnx-fp32")
    register_version(root, "cats", "m-1")
    first = promote(root, "cats", "production", 1, "onnx-fp32", by="j-1")
    second = promote(root, "cats", "production", 1, "onnx-fp32", by="api")
    assert (first["seq"], second["seq"], second["moved_by"]) == (1, 2, "api")
    assert aliases(root, "cats") == {"production": second}
    assert second["manifest_sha256"] == artifacts.manifest_digest(root, "variants/m-1/onnx-fp32")


def test_an_alias_does_not_move_to_what_is_absent_or_damaged(root):
    make(root, "variants/m-1/onnx-fp32")
    register_version(root, "cats", "m-1")
    with pytest.raises(NotFound, match="has no version 2"):
        promote(root, "cats", "production", 2, "onnx-fp32", by="api")
    with pytest.raises(NotFound, match="variants/m-1/onnx-int8 does not exist"):
        promote(root, "cats", "production", 1, "onnx-int8", by="api")
    (root / "variants/m-1/onnx-fp32/data").write_text("bytez")
    with pytest.raises(Damaged):
        promote(root, "cats", "production", 1, "onnx-fp32", by="api")
    assert aliases(root, "cats") == {}


def test_a_rollback_does_not_undo_a_move_that_it_has_not_seen(root):
    for variant in ("onnx-fp32", "onnx-int8"):
        make(root, f"variants/m-1/{variant}")
    register_version(root, "cats", "m-1")
    promote(root, "cats", "production", 1, "onnx-fp32", by="j-1")
    seen = promote(root, "cats", "production", 1, "onnx-int8", by="j-2")
    assert seen["previous"] == {"version": 1, "variant": "onnx-fp32"}
    later = promote(root, "cats", "production", 1, "onnx-fp32", by="j-3")
    with pytest.raises(Conflict, match="moved by j-3 just now"):
        promote(root, "cats", "production", 1, "onnx-fp32", by="api", seq=seen["seq"])
    assert aliases(root, "cats")["production"] == later
    assert artifacts.roll_back(root, "cats", "production", by="api")["variant"] == "onnx-int8"


def test_the_gate_leaves_an_alias_that_was_moved_after_its_job_was_accepted(root):
    make(root, "variants/m-1/onnx-fp32")
    register_version(root, "cats", "m-1")
    by_hand = promote(root, "cats", "production", 1, "onnx-fp32", by="api")
    with pytest.raises(Conflict, match="was moved by api just now"):
        promote(root, "cats", "production", 1, "onnx-fp32", by="j-1", seq=0)  # it had none when the job was accepted
    assert aliases(root, "cats")["production"] == by_hand


def _publish_for_ever(root):
    while True:
        folder = stage(root, "j-1")
        (folder / "data").write_bytes(os.urandom(200_000))
        publish(root, folder, f"datasets/d-{os.urandom(4).hex()}", {"summary": {}})


def test_kill_9_while_publishing_leaves_only_whole_artifacts(root):
    context = multiprocessing.get_context("spawn")
    for _ in range(3):
        before = set(artifacts.list_ids(root, "datasets"))
        process = context.Process(target=_publish_for_ever, args=(root,))
        process.start()
        end = time.monotonic() + 60
        while set(artifacts.list_ids(root, "datasets")) == before and time.monotonic() < end:
            time.sleep(0.01)
        process.join(0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    published = artifacts.list_ids(root, "datasets")
    assert published
    for name in published:
        open_artifact(root, f"datasets/{name}")


def test_a_json_file_is_replaced_whole(root):
    path = root / "x" / "a.json"
    artifacts.write_json(path, {"a": 1})
    artifacts.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
