"""Leases and the start-up check, with a stand-in `nvidia-smi` on the PATH; real GPUs have their own tests."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from shared import attempt, gpu
from shared.errors import Refused, Unavailable
from shared.jobs import PreprocessJob
from shared.ledger import spent_of
from shared.settings import Settings


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Put an nvidia-smi on the PATH that prints the given rows."""
    def put(*rows):
        script = tmp_path / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        script.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(rows) + "\nEND\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return put


A = "GPU-a, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 9.0"
B = "GPU-b, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 9.0"


def test_the_hosts_gpus_are_read_from_the_driver(smi):
    smi(A, B)
    assert gpu.check() == gpu.find()
    assert gpu.find()[1] == gpu.Gpu("GPU-b", "NVIDIA H100 80GB HBM3", "580.65.06", 81559, "9.0")


def test_cuda_visible_devices_narrows_them(smi, monkeypatch):
    smi(A, B)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [g.uuid for g in gpu.find()] == ["GPU-b"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    assert [g.uuid for g in gpu.find()] == ["GPU-a"]


def test_an_old_driver_and_no_gpu_are_refused_with_the_remedy(smi):
    smi("GPU-a, Tesla V100, 470.57.02, 16160, 7.0")
    with pytest.raises(SystemExit, match="driver 470.57.02 is too old, CUDA 12 needs at least 525.60.13"):
        gpu.check()
    smi()
    with pytest.raises(SystemExit, match="or set DEVICE=cpu"):
        gpu.check()


SHARE = """
import sys
from pathlib import Path
from shared import gpu
print(gpu.share(Path(sys.argv[1]), 3).uuid, flush=True)
sys.stdin.read()
"""


def test_processes_that_serve_spread_over_the_gpus_of_one_model(smi, tmp_path):
    smi(A, "GPU-old, Tesla T4, 580.65.06, 15360, 7.5", B)

    def started():
        return subprocess.Popen([sys.executable, "-c", SHARE, str(tmp_path)], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    processes = [started() for _ in range(3)]
    try:
        assert sorted(p.stdout.readline() for p in processes) == ["GPU-a\n", "GPU-a\n", "GPU-b\n"]
        processes.append(started())  # one that is to end is replaced before it does
        assert processes[-1].stdout.readline() in ("GPU-a\n", "GPU-b\n")
        processes[0].communicate()  # it ends, and its successor takes its place
        processes.append(started())
        assert processes[-1].stdout.readline() in ("GPU-a\n", "GPU-b\n")
    finally:
        for p in processes:
            p.kill()
            p.communicate()


@pytest.mark.parametrize(("visible", "expected"), [(None, "GPU-b"), ("0,1", "GPU-old"), ("1,0", "GPU-b")])
def test_the_most_capable_serves_where_nobody_chose(smi, tmp_path, monkeypatch, visible, expected):
    smi("GPU-old, Tesla T4, 580.65.06, 15360, 7.5", B, "GPU-odd, Another, 580.65.06, [N/A], [N/A]")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    kept = []
    monkeypatch.setattr(gpu, "_kept", kept)
    assert gpu.share(tmp_path, 1).uuid == expected == os.environ["CUDA_VISIBLE_DEVICES"]
    kept[0].close()
    os.environ.pop("CUDA_VISIBLE_DEVICES")


def test_no_gpu_is_said_to_the_job(smi, root):
    smi()
    with pytest.raises(Unavailable, match="nvidia-smi shows none"), gpu.lease(root, lambda: None):
        pass


def test_two_leases_take_two_gpus_and_a_third_waits(smi, root, monkeypatch):
    smi(A, B)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    class GaveUp(Exception):
        pass

    def give_up():
        raise GaveUp

    with gpu.lease(root, give_up) as [first]:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == first.uuid == "GPU-a"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with gpu.lease(root, give_up) as [second]:
            assert second.uuid == "GPU-b"
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
            with pytest.raises(GaveUp), gpu.lease(root, give_up):
                pass
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with gpu.lease(root, give_up) as [third]:
            assert third.uuid == "GPU-b"


def hold(root, count):
    """A process that takes `count` GPUs, says which, and gives them back when its input ends."""
    code = (f"import os, sys; from pathlib import Path; from shared import gpu\n"
            f"def waiting(): print('waiting', flush=True)\n"
            f"with gpu.lease(Path({str(root)!r}), waiting, {count}):\n"
            f"    print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()")
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end(holder):
    holder.stdin.close()
    holder.wait()
    rest = holder.stdout.read().split()
    holder.stdout.close()
    return rest


def test_several_gpus_are_taken_at_once_or_not_at_all_and_nobody_is_passed_by(smi, root):
    smi(A, B)
    one = hold(root, 1)
    assert one.stdout.readline() == "GPU-a\n"
    both = hold(root, 2)
    assert both.stdout.readline() == "waiting\n"
    behind = hold(root, 1)
    for _ in range(3):  # GPU-b is free all the while, and goes to neither
        assert behind.stdout.readline() == "waiting\n"
    end(one)
    while (line := both.stdout.readline()) == "waiting\n":
        pass
    assert line == "GPU-a,GPU-b\n"
    end(both)
    assert end(behind)[-1].startswith("GPU-")


def test_one_who_waits_in_front_and_is_killed_lets_the_next_by(smi, root):
    smi(A)
    holder = hold(root, 1)
    assert holder.stdout.readline() == "GPU-a\n"
    front = hold(root, 1)
    assert front.stdout.readline() == "waiting\n"
    next_one = hold(root, 1)
    assert next_one.stdout.readline() == "waiting\n"
    front.kill()
    end(front)
    end(holder)
    assert end(next_one)[-1] == "GPU-a"


def test_more_gpus_than_there_are_is_refused_with_the_remedy(smi, root):
    smi(A, B)
    with pytest.raises(Refused, match="set GPUS_PER_TRAINING to at most 2"), gpu.lease(root, lambda: None, 3):
        pass


def test_a_killed_holders_lease_is_free_again(smi, root):
    smi(A)
    code = ("import time; from pathlib import Path; from shared import gpu\n"
            f"with gpu.lease(Path({str(root)!r}), lambda: None):\n    print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    waited = []

    def waiting():
        waited.append(time.monotonic())
        holder.kill()

    with gpu.lease(root, waiting) as [mine]:
        assert mine.uuid == "GPU-a"
    assert waited
    holder.wait()
    holder.stdout.close()


def test_what_can_be_listed_is_though_one_gpu_is_in_trouble(smi, tmp_path):
    smi(A, "Unable to determine the device handle for GPU1: Unknown Error",
        "GPU-c, NVIDIA GB10, 580.65.06, [N/A], 12.1")
    script = tmp_path / "bin" / "nvidia-smi"
    script.write_text(script.read_text() + "exit 15\n")
    assert [(g.uuid, g.memory_mib) for g in gpu.find()] == [("GPU-a", 81559), ("GPU-c", 0)]


def run(monkeypatch, root, lease):
    """The outcome of an attempt at a job of a GPU host that gets its GPU by this lease."""
    job = PreprocessJob(dataset_id="d-1", name="x")
    ledger = SimpleNamespace(request=lambda job_id: SimpleNamespace(job=job), cancel_asked=lambda job_id: False,
                             live=lambda *a, **b: None, spent=lambda job_id: 0)
    monkeypatch.setattr(gpu, "lease", lease)
    ctx = attempt.Attempt("j-1", Settings(device="gpu", artifacts=root), ledger)
    return attempt._run(ledger, "j-1", lambda job, ctx: {"done": True}, ctx)


def test_a_job_that_waits_long_for_a_gpu_goes_back_to_the_queue_where_its_time_begins_anew(monkeypatch, root):
    @contextmanager
    def none_free(root, waiting, count):
        while True:
            waiting()
        yield

    monkeypatch.setattr(attempt, "GPU_WAIT_S", 0.1)
    outcome = run(monkeypatch, root, none_free)
    assert (outcome.word, outcome.message) == ("stopped", "no GPU was free for an hour")


def test_a_gpu_that_can_not_be_seen_for_a_moment_fails_no_job(monkeypatch, root, smi):
    smi()
    outcome = run(monkeypatch, root, gpu.lease)
    assert (outcome.word, outcome.code) == ("gpu_missing", "gpu_missing")
    assert spent_of([{"outcome": outcome.word}] * 9) == 0
