"""Every accepted job ends, and ends once: real workers, a real keeper and a real Valkey, killed in turn."""

import json
import signal
import time
from pathlib import Path

import pytest

from shared import faults
from shared.artifacts import open_artifact
from shared.jobs import new_id
from shared.keeper import Keeper
from shared.queue import queue_of
from shared.settings import Settings, load

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("standin")]


def published_once(stack, view):
    assert [p.name for p in (stack.root / "datasets").iterdir()] == [view["job"]["dataset_id"]]
    open_artifact(stack.root, f"datasets/{view['job']['dataset_id']}")


def test_a_job_runs_and_its_record_tells(stack, job):
    stack.worker()
    view = stack.ended(stack.accept(job()))
    assert view["state"] == "succeeded"
    assert view["result"] == {"dataset_id": view["job"]["dataset_id"], "resumed_at": 0, "ahead": True}
    assert [a["outcome"] for a in view["attempts"]] == ["succeeded"]
    assert view["progress"]["stage"] == "decode"
    published_once(stack, view)


@pytest.mark.parametrize("victim", ["job", "job and worker"])
@pytest.mark.parametrize("point", ["after-pop", "mid-decode", "before-rename", "after-rename", "before-record-ends"])
def test_a_kill_at_any_point_loses_nothing_and_publishes_once(stack, job, point, victim):
    assert point in faults.POINTS
    fault = {"FAULT": point + (":worker" if "worker" in victim else "")}
    stack.keeper()
    stack.worker(**fault)
    job_id = stack.accept(job())
    if "worker" in victim:
        assert stack.processes["preprocessing"].wait(20) == -signal.SIGKILL
        stack.worker(name="second", **fault)
    view = stack.ended(job_id)
    assert view["state"] == "succeeded"
    assert (stack.root / ".faults" / point).exists()
    published_once(stack, view)


def test_a_worker_killed_from_outside_is_replaced_by_another(stack, job):
    stack.keeper()
    stack.worker()
    job_id = stack.accept(job(steps=60))
    stack.running(job_id)
    stack.kill("preprocessing")
    began = time.monotonic()
    stack.worker(name="second")
    view = stack.ended(job_id)
    assert view["state"] == "succeeded"
    assert len(view["attempts"]) == 2
    assert time.monotonic() - began < 20
    published_once(stack, view)


def test_a_wiped_redis_loses_no_accepted_job(stack, job, valkey):
    stack.keeper()
    stack.worker()
    running = stack.accept(job(steps=40))
    stack.running(running)
    queued = [stack.accept(job(steps=1)) for _ in range(3)]
    valkey.wipe()
    assert [stack.ended(i, 60)["state"] for i in [running, *queued]] == ["succeeded"] * 4
    assert len(list((stack.root / "datasets").iterdir())) == 4


def test_sigterm_saves_the_job_and_costs_no_attempt(stack, job):
    stack.keeper()
    stack.worker()
    job_id = stack.accept(job(steps=60))
    stack.until(lambda: (stack.ledger.view(job_id)["progress"] or {}).get("step", 0) > 3)
    stack.kill("preprocessing", signal.SIGTERM)
    assert stack.processes["preprocessing"].wait(10) == 0
    assert stack.ledger.state(job_id) == "queued"
    assert stack.ledger.spent(job_id) == 0
    stack.worker(name="second")
    view = stack.ended(job_id)
    assert view["state"] == "succeeded"
    assert view["result"]["resumed_at"] > 0


def test_a_job_that_kills_its_process_each_time_fails_as_poison_and_the_next_runs(stack, job):
    stack.keeper()
    stack.worker()
    poison, good = stack.accept(job("poison", 1)), stack.accept(job(steps=1))
    view = stack.ended(poison)
    assert (view["state"], view["error"]["code"], len(view["attempts"])) == ("failed", "poison", 3)
    assert stack.ended(good)["state"] == "succeeded"


def test_a_job_that_raises_is_tried_again_and_fails_with_its_reason(stack, job):
    stack.keeper(MAX_ATTEMPTS="2")
    stack.worker(MAX_ATTEMPTS="2")
    view = stack.ended(stack.accept(job("raises", 1)))
    assert (view["state"], len(view["attempts"])) == ("failed", 2)
    assert view["error"] == {"code": "internal", "message": "RuntimeError: planted"}
    said = [event["because"] for _, event in stack.ledger.events(view["id"]) if "because" in event]
    assert said[-1] == "attempt 1 ended as error"
    for number in (1, 2):
        logged = stack.ledger.log_of(view["id"], number).read_text()
        assert f"{view['id']} attempt {number} begins" in logged
        assert "Traceback" in logged
        assert logged.rstrip().endswith("RuntimeError: planted [internal]")


def test_a_stage_is_delivered_at_the_first_look_after_its_parent(stack, job):
    stack.worker()
    first = stack.accept(job())
    child = stack.accept(job(), parent=first)
    stack.ended(first)
    stack.until(lambda: not stack.ledger.is_running(first))
    Keeper(load({"ARTIFACTS": str(stack.root)}), stack.ledger).step()
    assert stack.ended(child)["state"] == "succeeded"


def test_a_child_waits_for_its_parent_and_fails_with_it(stack, job):
    stack.keeper(MAX_ATTEMPTS="1")
    stack.worker(MAX_ATTEMPTS="1")
    good = stack.accept(job(steps=10))
    child = stack.accept(job(), parent=good)
    assert stack.ledger.state(child) == "waiting"
    assert stack.ended(child)["state"] == "succeeded"
    bad = stack.accept(job("raises", 1))
    orphan = stack.ended(stack.accept(job(), parent=bad))
    assert (orphan["state"], orphan["error"]["code"], orphan["attempts"]) == ("failed", "parent_failed", [])


def test_cancel_ends_a_queued_a_waiting_and_a_running_job(stack, job):
    stack.keeper()
    stack.worker()
    running = stack.accept(job(steps=200))
    stack.running(running)
    queued = stack.accept(job())
    waiting = stack.accept(job(), parent=queued)
    for job_id in (queued, running):
        stack.ledger.ask_cancel(job_id)
    assert [stack.ended(i)["state"] for i in (queued, waiting, running)] == ["cancelled"] * 3
    assert not (stack.root / "datasets").exists()
    stack.until(lambda: not list((stack.root / "work").iterdir()), what="work swept")


def test_a_job_that_hangs_is_killed_and_told_so(stack, job):
    stack.keeper(STALL_S="2", MAX_ATTEMPTS="2")
    stack.worker(MAX_ATTEMPTS="2")
    slow, hung = stack.accept(job(steps=70)), stack.accept(job("deaf", 1))  # the first takes longer, and tells
    view = stack.ended(hung, 60)
    assert (view["state"], view["error"]["code"], len(view["attempts"])) == ("failed", "poison", 2)
    assert "gave up after 2 attempts; the last: showed no progress for 2 s" in view["error"]["message"]
    assert [event["because"] for _, event in stack.ledger.events(hung) if event["what"] == "killed"] == [
        "showed no progress for 2 s"] * 2
    assert stack.ledger.view(slow)["state"] == "succeeded"
    assert len(stack.ledger.attempts(slow)) == 1


def test_a_job_that_ignores_cancel_is_killed(stack, job, monkeypatch):
    from shared import keeper

    monkeypatch.setattr(keeper, "CANCEL_GRACE_S", 1.0)
    stack.worker()
    job_id = stack.accept(job("deaf", 1))
    stack.running(job_id)
    stack.ledger.ask_cancel(job_id)
    guard = keeper.Keeper(keeper.load({"ARTIFACTS": str(stack.root)}), stack.ledger)
    stack.until(lambda: guard.step() or stack.ledger.ended(job_id), 30)
    assert stack.ledger.state(job_id) == "cancelled"


def test_a_second_attempt_does_not_run_beside_the_first(stack, job):
    stack.worker()
    stack.worker(name="second")
    job_id = stack.accept(job(steps=30))
    stack.running(job_id)
    queue = queue_of("preprocessing", stack.redis)
    twin = queue.enqueue_call("preprocessing.jobs.run", args=(job_id,), job_id=f"{job_id}_twin")
    stack.until(lambda: twin.get_status(refresh=True).value == "finished", 10)
    assert twin.return_value() == {"outcome": "busy"}
    assert len(stack.ended(job_id)["attempts"]) == 1


def test_a_foreign_function_on_the_queue_is_refused(stack, tmp_path):
    stack.worker()
    canary = tmp_path / "canary"
    evil = queue_of("preprocessing", stack.redis).enqueue_call("os.system", args=(f"touch {canary}",))
    stack.until(lambda: evil.get_status(refresh=True).value == "failed", 10)
    assert not canary.exists()
    assert "refused to run 'os.system'" in evil.latest_result().exc_string


def test_a_redis_that_dies_mid_job_costs_no_second_run(own_valkey, stack, job):
    stack.keeper()
    stack.worker()
    job_id = stack.accept(job(steps=60))
    stack.running(job_id)
    own_valkey.kill()
    time.sleep(1)
    own_valkey.start()
    view = stack.ended(job_id)
    assert (view["state"], len(view["attempts"])) == ("succeeded", 1)


def test_the_workers_parent_loads_no_gpu_library(stack, job):
    worker = stack.worker()
    stack.ended(stack.accept(job(steps=1)))
    loaded = Path(f"/proc/{worker.pid}/maps").read_text()
    assert not [name for name in ("tensorflow", "cudf", "cupy", "tensorrt") if name in loaded]


def test_a_record_that_can_not_be_read_keeps_no_other_job_waiting(stack, job):
    odd = stack.root / "jobs" / "j-odd"
    odd.mkdir(parents=True)
    (odd / "request.json").write_text(json.dumps({"id": "j-odd", "kind": "train", "job": {"colour": "blue"},
                                                  "parent": "", "pipeline": "", "accepted_at": "2026-01-01"}))
    stack.worker()
    stack.keeper()
    first = job(steps=1)
    request, _ = stack.ledger.accept(new_id("j"), first)  # delivered by the keeper alone
    assert stack.ended(request.id)["state"] == "succeeded"
    log = (stack.root / "log").read_text()
    assert log.count("j-odd can't be kept") == 1


def test_the_kill_goes_to_the_process_that_runs_not_to_a_later_delivery(stack, job, monkeypatch):
    from shared import keeper

    monkeypatch.setattr(keeper, "CANCEL_GRACE_S", 1.0)
    stack.worker()
    job_id = stack.accept(job("deaf", 1))
    stack.running(job_id)
    stack.ledger.live(job_id, delivery=2)  # as after a delivery that was taken for lost
    stack.ledger.ask_cancel(job_id)
    guard = keeper.Keeper(keeper.load({"ARTIFACTS": str(stack.root)}), stack.ledger)
    stack.until(lambda: guard.step() or stack.ledger.ended(job_id), 30)
    assert stack.ledger.state(job_id) == "cancelled"


def test_what_a_full_disk_kept_from_the_record_is_told_in_the_end(stack, job):
    job_id = "j-full"
    stack.ledger.accept(job_id, job(steps=1))
    for _ in range(3):
        with stack.ledger.run_lock(job_id):
            stack.ledger.begin(job_id, "w", "")
    stack.ledger.live(job_id, lost="disk_full; writing that failed: [Errno 28] No space left on device")
    guard = Keeper(Settings(artifacts=stack.root), stack.ledger)
    guard.step()
    end = stack.ledger.ended(job_id)
    assert (end["code"], "No space left on device" in end["message"]) == ("poison", True)
