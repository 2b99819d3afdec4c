"""Rot is found: every published file is hashed again."""

import os
import time
from pathlib import Path

import pytest

from shared import scrub
from shared.artifacts import publish, stage
from shared.scrub import Scrub, report_of


@pytest.fixture
def published(root: Path) -> list[str]:
    targets = ["datasets/d-1", "models/m-1", "variants/m-1/onnx-fp32", "variants/m-1/litert-fp32", "predictions/r-1"]
    for target in targets:
        staging = stage(root, "j-test")
        (staging / "inner").mkdir()
        (staging / "data").write_bytes(os.urandom(3 << 20))
        (staging / "inner" / "more").write_bytes(b"bytes")
        publish(root, staging, target, {"summary": {}})
    return targets


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_has_other_bytes_is_found_and_all_else_is_whole(root: Path, published: list[str]) -> None:
    assert report_of(root) is None
    whole = scrub.scrub(root, rest=0)
    assert (whole["artifacts"], whole["bytes"], whole["damaged"]) == (5, 5 * (3 << 20) + 25, [])
    flip_a_byte(root / "datasets/d-1/data")
    (root / "variants/m-1/litert-fp32/inner/more").unlink()
    found = scrub.scrub(root, rest=0)
    assert found == report_of(root)
    assert [(d["target"], d["reason"]) for d in found["damaged"]] == [
        ("datasets/d-1", "data has other bytes than its manifest says"),
        ("variants/m-1/litert-fp32", "litert-fp32: inner/more is missing")]


def test_what_is_deleted_meanwhile_is_not_damaged(root: Path, published: list[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    check = scrub._check

    def slow(root: Path, target: str, rest: float) -> int:
        if target == "models/m-1":
            os.rename(root / target, root / ".staging" / "gone")
        return check(root, target, rest)

    monkeypatch.setattr(scrub, "_check", slow)
    found = scrub.scrub(root, rest=0)
    assert (found["artifacts"], found["damaged"]) == (4, [])


def test_one_begins_when_it_is_due_and_not_before(root: Path, published: list[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "REST", 0.0)
    Scrub(root, 0).begin_if_due()
    assert report_of(root) is None
    daily = Scrub(root, 86400)
    daily.begin_if_due()
    assert daily._thread is not None
    daily._thread.join(30)
    first = report_of(root)
    assert first is not None
    daily.begin_if_due()
    assert not daily._thread.is_alive()
    os.utime(root / "jobs" / ".scrub.json", (time.time() - 90_000,) * 2)
    daily.begin_if_due()
    daily._thread.join(30)
    again = report_of(root)
    assert again is not None
    assert again["at"] > first["at"]


def test_a_bad_sector_is_damage_and_all_else_is_still_looked_at(root: Path, published: list[str],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    check = scrub._check

    def bad(root: Path, target: str, rest: float) -> int:
        if target == "datasets/d-1":
            raise OSError(5, "Input/output error")
        return check(root, target, rest)

    monkeypatch.setattr(scrub, "_check", bad)
    found = scrub.scrub(root, rest=0)
    assert (found["artifacts"], [d["target"] for d in found["damaged"]]) == (5, ["datasets/d-1"])
    assert "Input/output error" in found["damaged"][0]["reason"]


def test_what_was_damaged_and_is_gone_or_published_anew_is_told_no_more(root: Path, published: list[str]) -> None:
    for target in ("datasets/d-1", "models/m-1"):
        flip_a_byte(root / target / "data")
    assert len(scrub.scrub(root, rest=0)["damaged"]) == 2
    os.rename(root / "datasets/d-1", root / "gone")
    os.rename(root / "models/m-1", root / "gone-too")
    staging = stage(root, "j-test")
    (staging / "data").write_bytes(b"other")
    publish(root, staging, "models/m-1", {"summary": {}})
    told = report_of(root)
    assert told is not None
    assert told["damaged"] == []
