"""A job's attempts and stages as spans: one trace for all jobs of a pipeline, whichever process ran them."""

import json

import pytest

from shared import attempt as attempts
from shared.errors import Refused
from shared.jobs import PreprocessJob, TrainJob
from shared.ledger import Ledger
from shared.tracing import traceparent_of

from ..collector import collecting


@pytest.fixture
def collector():
    with collecting() as server:
        yield server


@pytest.fixture
def ledger(root, redis, valkey, collector, monkeypatch):
    for name, value in {"ARTIFACTS": root, "REDIS_URL": valkey.url, "DEVICE": "cpu",
                        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}.items():
        monkeypatch.setenv(name, str(value))
    return Ledger(root, redis)


def publish_nothing(job, ctx):
    for stage in ("read", "write"):
        for step in range(3):
            ctx.report(stage, step, 2)
    return {"images": 3}


def refuse(job, ctx):
    ctx.report("epoch", 0, 9)
    raise Refused("there is nothing to learn from", "no_images")


def test_the_jobs_of_a_pipeline_are_one_trace_with_their_stages(ledger, collector):
    ledger.accept("j-1", PreprocessJob(dataset_id="d-1", name="cats"), pipeline="p-1")
    ledger.accept("j-2", TrainJob(dataset_id="d-1", model_id="m-1", name="cats"), parent="j-1", pipeline="p-1")
    assert attempts.attempt("j-1", publish_nothing)["outcome"] == "succeeded"
    assert attempts.attempt("j-2", refuse)["outcome"] == "failed"
    spans = collector.named(7)
    _, trace, meeting, _ = traceparent_of("p-1").split("-")
    assert {span.trace_id.hex() for span in collector.spans} == {trace}
    first, second = spans["preprocess"], spans["train"]
    assert {first.parent_span_id.hex(), second.parent_span_id.hex()} == {meeting}
    for job, stages in ((first, ["queued", "read", "write"]), (second, ["queued", "epoch"])):
        inside = [span for span in collector.spans if span.parent_span_id == job.span_id]
        assert [span.name for span in inside] == stages
        moments = [job.start_time_unix_nano]
        for span in inside:
            moments += [span.start_time_unix_nano, span.end_time_unix_nano]
        assert moments == sorted(moments)
        assert moments[-1] <= job.end_time_unix_nano
    told = {a.key: a.value.string_value or a.value.int_value for a in first.attributes}
    assert told == {"lanner.job": "j-1", "lanner.name": "cats", "lanner.attempt": 1, "lanner.pipeline": "p-1"}
    assert (first.status.code, second.status.code, second.status.message) == (0, 2, "there is nothing to learn from")
    assert collector.services == {"lanner-preprocessing", "lanner-training"}


def test_a_collector_that_does_not_answer_fails_no_job(ledger, monkeypatch, root):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    ledger.accept("j-1", PreprocessJob(dataset_id="d-1", name="cats"))
    assert attempts.attempt("j-1", publish_nothing)["outcome"] == "succeeded"
    assert json.loads((root / "jobs/j-1/end.json").read_text())["result"] == {"images": 3}


def test_the_jobs_of_one_who_told_a_trace_belong_to_it(ledger, collector):
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    ledger.accept("j-1", PreprocessJob(dataset_id="d-1", name="cats"), pipeline="p-1", traceparent=parent)
    assert attempts.attempt("j-1", publish_nothing)["outcome"] == "succeeded"
    job = collector.named(4)["preprocess"]
    assert (job.trace_id.hex(), job.parent_span_id.hex()) == ("a" * 32, "b" * 16)
