"""The page in a real browser, Chromium: what people press, and what they then see."""

import io
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from redis import Redis

from shared import artifacts
from shared.jobs import TrainJob
from shared.ledger import Ledger

from .conftest import LABELS, RED, Server, png, publish_model, publish_variant, until

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no browser: apt-get install chromium, or CHROMIUM names one")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, own_server: Server) -> Iterator[Page]:
    """The page of a server with nothing on it. Fails on whatever its script or its policy does not allow."""
    page = browser.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(f"http://127.0.0.1:{own_server.port}/")
    expect(page.locator("#ready")).to_have_text(re.compile("no model yet, no optimization worker .*, no keeper"))
    yield page
    page.close()
    assert wrong == []


@pytest.fixture
def ledger(root: Path, valkey: Any) -> Ledger:
    return Ledger(root, Redis.from_url(valkey.url))


def publish_dataset(root: Path, dataset_id: str) -> None:
    staging = artifacts.stage(root, "j-test")
    images = np.zeros((9, 32, 32, 3), np.uint8)
    images[..., 0] = 200
    for split in ("train", "validation", "test"):
        np.save(staging / f"{split}.npy", images)
        np.save(staging / f"{split}.labels.npy", np.zeros(9, np.int32))
    artifacts.write_json(staging / "stats.json", {})
    artifacts.publish(root, staging, f"datasets/{dataset_id}", {
        "name": "reds", "spec": {"size": 32, "labels": LABELS, "mean": [0.5] * 3, "std": [0.2] * 3},
        "summary": {"images": dict.fromkeys(("train", "validation", "test"), 9), "classes": 3, "size": 32,
                    "skipped": 2}})


def test_an_image_is_labelled_by_what_serves_and_by_every_variant(page: Page, root: Path, tmp_path: Path) -> None:
    publish_model(root, "colors", "m-1")
    publish_variant(root, "m-1", "onnx-int8", np.eye(3)[::-1] * 0.05)  # takes red for blue
    artifacts.promote(root, "colors", "production", 1, "onnx-fp32", by="test")
    expect(page.locator("#ready")).to_contain_text("serving 1")
    (tmp_path / "red.png").write_bytes(png(RED))
    page.set_input_files("#image", tmp_path / "red.png")
    answer = page.locator("#answer")
    expect(answer.locator("div").first).to_contain_text("red")
    expect(answer).to_contain_text("version 1, onnx-fp32 on cpu")
    page.check("#every")
    page.set_input_files("#image", [])
    page.set_input_files("#image", tmp_path / "red.png")
    rows = answer.locator("tbody tr")
    expect(rows).to_have_count(2)
    assert [row.split("\t")[:2] for row in rows.all_inner_texts()] == [["onnx-fp32", "red"], ["onnx-int8", "blue"]]
    expect(rows.nth(1)).to_have_class("bad")
    with page.expect_download() as download:
        page.click("text=download")
    with zipfile.ZipFile(download.value.path()) as archive:
        assert "colors-1-onnx-fp32/model.onnx" in archive.namelist()


def test_an_archive_is_sent_and_its_pipeline_can_be_cancelled(page: Page, tmp_path: Path, ledger: Ledger) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("red/1.png", png(RED))
    (tmp_path / "reds.zip").write_bytes(packed.getvalue())
    page.set_input_files("input[name=file]", tmp_path / "reds.zip")
    page.fill("input[name=epochs]", "2")
    page.click("text=Start")
    expect(page.locator("#said")).to_contain_text("is accepted: reds")
    jobs = page.locator("#jobs li")
    expect(jobs).to_have_count(3)
    preprocess = jobs.filter(has_text="preprocess")
    expect(preprocess).to_contain_text("queued")
    preprocess.get_by_role("button", name="cancel").click()
    expect(preprocess.get_by_role("button", name="cancelling")).to_be_disabled()
    (request,) = [r for r in ledger.requests() if r.kind == "preprocess"]
    assert ledger.cancel_asked(request.id)
    assert next(r.job.epochs for r in ledger.requests() if isinstance(r.job, TrainJob)) == 2


def test_what_failed_says_why_and_is_tried_again(page: Page, root: Path, ledger: Ledger) -> None:
    publish_dataset(root, "d-1")
    ledger.accept("j-1", TrainJob("m-1", "d-1", "reds"))
    ledger.end("j-1", "failed", code="internal", message="the planted reason")
    failed = page.locator("#jobs li")
    expect(failed).to_contain_text("the planted reason")
    failed.get_by_role("button", name="try again").click()
    expect(page.locator("#jobs li")).to_have_count(2)
    assert {ledger.state(r.id) for r in ledger.requests()} == {"failed", "queued"}


def test_a_dataset_shows_its_images_and_is_trained_on_again_and_stays_while_a_job_reads_it(
        page: Page, root: Path, ledger: Ledger) -> None:
    publish_dataset(root, "d-1")
    item = page.locator("#datasets li")
    expect(item).to_contain_text("9 train, 9 validation, 9 test · 3 classes · 32 pixels · 2 files skipped")
    item.scroll_into_view_if_needed()
    expect(item.locator("img")).to_have_count(8)
    until(lambda: page.evaluate("[...document.querySelectorAll('#datasets img')].every(i => i.naturalWidth === 32)"))
    page.check("input[value=dataset]")
    page.click("text=Start")
    expect(page.locator("#said")).to_contain_text("is accepted: reds")
    assert {request.kind for request in ledger.requests()} == {"train", "optimize"}
    item.get_by_role("button", name="delete").click()
    expect(page.locator("#trouble")).to_contain_text("still stands on dataset d-1")
    assert (root / "datasets/d-1").is_dir()


def test_an_alias_goes_back_by_a_button(page: Page, root: Path) -> None:
    for model in ("m-1", "m-2"):
        publish_model(root, "colors", model)
    for version in (1, 2):
        artifacts.promote(root, "colors", "production", version, "onnx-fp32", by="test")
    page.get_by_role("button", name="back to version 1, onnx-fp32").click()
    expect(page.locator("#models")).to_contain_text("production → version 1, onnx-fp32")
    assert artifacts.aliases(root, "colors")["production"]["version"] == 1
