"""The record: written before the enqueue, ended once, readable without Redis."""

import pytest
from redis import Redis

from shared.errors import Conflict, NotFound
from shared.jobs import PreprocessJob
from shared.ledger import Ledger
from shared.queue import deliver, queue_of

JOB = PreprocessJob(dataset_id="d-1", name="cats")


@pytest.fixture
def ledger(root, redis):
    return Ledger(root, redis)


def test_accepting_the_same_job_twice_is_one_record(ledger):
    first, new = ledger.accept("j-1", JOB)
    again, newer = ledger.accept("j-1", JOB)
    assert (new, newer, again) == (True, False, first)
    assert ledger.ids() == ["j-1"]


def test_an_id_stands_for_one_job(ledger):
    ledger.accept("j-1", JOB)
    with pytest.raises(Conflict, match="accepted with other values"):
        ledger.accept("j-1", PreprocessJob(dataset_id="d-2", name="cats"))


def test_an_unknown_job_is_not_found(ledger):
    with pytest.raises(NotFound):
        ledger.view("j-9")


def test_the_first_end_stays(ledger):
    ledger.accept("j-1", JOB)
    assert ledger.end("j-1", "succeeded", result={"a": 1})
    assert not ledger.end("j-1", "failed", code="late", message="too late")
    view = ledger.view("j-1")
    assert (view["state"], view["result"], view["error"]) == ("succeeded", {"a": 1}, None)


def test_attempts_that_were_stopped_do_not_count(ledger):
    ledger.accept("j-1", JOB)
    ledger.finish_attempt("j-1", ledger.begin("j-1", "w-1"), "stopped")
    ledger.begin("j-1", "w-2")
    assert [a["worker"] for a in ledger.attempts("j-1")] == ["w-1", "w-2"]
    assert ledger.spent("j-1") == 1


def test_the_run_lock_keeps_two_attempts_apart(ledger):
    ledger.accept("j-1", JOB)
    assert not ledger.is_running("j-1")
    with ledger.run_lock("j-1") as first, ledger.run_lock("j-1") as second:
        assert (first, second) == (True, False)
        assert ledger.is_running("j-1")
    assert not ledger.is_running("j-1")


def test_the_record_reads_the_same_with_redis_gone(root, ledger):
    ledger.accept("j-1", JOB)
    ledger.begin("j-1", "w-1")
    ledger.end("j-1", "failed", code="bad", message="why")
    with Redis(port=1) as nobody:
        view = Ledger(root, nobody).view("j-1")
    assert view["error"] == {"code": "bad", "message": "why"}
    assert view["attempts"][0]["worker"] == "w-1"
    assert view["progress"] is None


def test_events_are_read_from_where_one_left_off(ledger):
    ledger.accept("j-1", JOB)
    ledger.event("j-1", "one")
    first = ledger.events("j-1")
    ledger.event("j-1", "two")
    assert [e["what"] for _, e in ledger.events("j-1", after=first[-1][0])] == ["two"]
    assert [e["what"] for _, e in first] == ["queued", "one"]


def test_delivering_twice_is_one_delivery_until_it_has_run(ledger, redis):
    request, _ = ledger.accept("j-1", JOB)
    assert deliver(ledger, request) == "j-1_1"
    redis.delete("lanner:live:j-1")  # the reply, and so the number, was lost
    assert deliver(ledger, request) == "j-1_1"
    queue = queue_of("preprocessing", redis)
    assert queue.job_ids == ["j-1_1"]
    queue.fetch_job("j-1_1").set_status("finished")
    assert deliver(ledger, request) == "j-1_2"


def test_a_half_written_request_is_no_job(ledger):
    (ledger.folder / "j-2").mkdir(parents=True)
    (ledger.folder / "j-2" / ".request.json.1234").write_text("{")
    assert ledger.ids() == []


@pytest.mark.parametrize("reading", ["request", "read_live", "ended", "state", "attempts"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_job_that_ends_while_it_is_looked_at_is_shown_whole(root, redis, reading, before):
    class Meanwhile(Ledger):
        """The job ends beside the first call of `reading`."""

    def ends_beside(self, job_id):
        delattr(Meanwhile, reading)
        if before:
            self.end(job_id, "succeeded", result={"a": 1})
        found = getattr(self, reading)(job_id)
        if not before:
            self.end(job_id, "succeeded", result={"a": 1})
        return found

    ledger = Meanwhile(root, redis)
    ledger.accept("j-1", JOB)
    setattr(Meanwhile, reading, ends_beside)
    view = ledger.view("j-1")
    assert (view["state"] == "succeeded") == (view["result"] == {"a": 1}) == (view["ended_at"] is not None)
    assert ledger.view("j-1")["result"] == {"a": 1}


def test_a_child_of_a_record_that_can_not_be_read_waits(ledger, root, redis):
    ledger.accept("j-1", JOB)
    ledger.accept("j-2", PreprocessJob(dataset_id="d-2", name="cats"), parent="j-1")
    path = root / "jobs/j-1/request.json"
    path.write_text(path.read_text().replace('"preprocess"', '"distil"'))
    redis.flushall()
    other = Ledger(root, redis)
    assert other.state("j-2") == "waiting"
    assert other.view("j-2")["state"] == "waiting"
    assert [request.id for request in other.requests()] == ["j-2"]
