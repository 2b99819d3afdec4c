"""Jobs that a full disk or a GPU out of sight keeps from running wait, and no attempt is counted against them."""

import errno
import os
import tempfile

import pytest

from shared import disk, keeper
from shared.keeper import Keeper
from shared.settings import load

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("standin")]


@pytest.fixture
def guard(stack, monkeypatch):
    """A keeper that waits a moment where others wait for a minute."""
    monkeypatch.setattr(keeper, "FULL_DELAY_S", 0.2)
    monkeypatch.setattr(keeper, "FULL_DELAY_MOST_S", 0.4)
    return Keeper(load({"ARTIFACTS": str(stack.root)}), stack.ledger)


def outcomes(stack, job_id):
    return [attempt.get("outcome") for attempt in stack.ledger.attempts(job_id)]


def test_a_job_waits_for_disk_space_and_then_succeeds(stack, job, guard):
    (stack.root / "written").symlink_to("/dev/full")
    stack.worker()
    job_id = stack.accept(job("writes", 1))
    stack.until(lambda: guard.step() or outcomes(stack, job_id)[:4] == ["disk_full"] * 4)
    stack.until(lambda: (stack.ledger.view(job_id)["progress"] or {}).get("stage") == "waiting for disk space")
    view = stack.ledger.view(job_id)
    assert view["state"] == "queued"
    assert "No space left on device" in view["attempts"][0]["message"]
    assert stack.ledger.spent(job_id) == 0
    assert list((stack.root / ".staging").iterdir()) == []
    (stack.root / "written").unlink()
    stack.until(lambda: guard.step() or stack.ledger.ended(job_id))
    assert stack.ledger.view(job_id)["state"] == "succeeded"


def test_nothing_is_delivered_while_the_disk_is_full(stack, job, guard, monkeypatch):
    stack.worker()
    monkeypatch.setattr(disk, "RESERVE", 1 << 60)
    request, _ = stack.ledger.accept("j-1", job(steps=1))
    monkeypatch.setattr(keeper, "ACCEPT_GRACE_S", 0.0)
    for _ in range(3):
        guard.step()
    assert stack.ledger.attempts("j-1") == []
    assert stack.ledger.view("j-1")["progress"] == {"stage": "waiting for disk space"}
    monkeypatch.undo()
    stack.until(lambda: guard.step() or stack.ledger.ended("j-1"))
    assert stack.ledger.view("j-1")["state"] == "succeeded"


def test_after_a_day_without_space_it_fails_with_that_reason(stack, job, guard, monkeypatch):
    monkeypatch.setattr(keeper, "FULL_TRIES", 2)
    (stack.root / "written").symlink_to("/dev/full")
    stack.worker()
    job_id = stack.accept(job("writes", 1))
    stack.until(lambda: guard.step() or stack.ledger.ended(job_id))
    end = stack.ledger.ended(job_id)
    assert (end["state"], end["code"]) == ("failed", "disk_full")
    assert "gave up after 2 attempts: the volume is full" in end["message"]


def test_a_worker_that_sees_no_gpu_any_more_ends_and_its_job_waits_for_the_next(stack, job, guard, tmp_path):
    smi, shown = tmp_path / "bin" / "nvidia-smi", tmp_path / "shown"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\ncat {shown} 2>/dev/null\n")
    smi.chmod(0o755)
    gpu = {"DEVICE": "gpu", "PATH": f"{smi.parent}:{os.environ['PATH']}"}
    shown.write_text("GPU-a, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 9.0\n")
    worker = stack.worker(**gpu)
    assert stack.ended(stack.accept(job(steps=1)))["state"] == "succeeded"
    shown.unlink()
    first, second = stack.accept(job(steps=1)), stack.accept(job(steps=1))
    assert worker.wait(30) == 1
    assert outcomes(stack, first) == ["gpu_missing"]
    assert outcomes(stack, second) == []
    assert stack.ledger.view(first)["progress"] == {"stage": "waiting for a GPU"}
    assert stack.worker(name="blind", **gpu).wait(30) == 1  # it refuses to begin
    shown.write_text("GPU-a, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 9.0\n")
    stack.worker(name="third", **gpu)
    stack.until(lambda: guard.step() or all(stack.ledger.ended(job_id) for job_id in (first, second)))
    assert outcomes(stack, first) == ["gpu_missing", "succeeded"]
    assert outcomes(stack, second) == ["succeeded"]


def test_a_full_folder_for_temporary_files_is_not_the_volume(tmp_path, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    assert disk.is_full(error, tmp_path)
    assert disk.is_full(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "models/x")), tmp_path)
    assert not disk.is_full(OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), tmp_path / "artifacts")
    assert not disk.is_full(OSError(errno.EIO, "Input/output error"), tmp_path)
    usage = disk.shutil.disk_usage
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(path)._replace(
        free=0 if str(path) == tempfile.gettempdir() else 1 << 40))
    assert not disk.is_full(error, tmp_path)
