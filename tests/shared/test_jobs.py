"""Payloads: plain JSON there and back, and bad ones refused with what was expected."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import Refused
from shared.jobs import (
    ID,
    KINDS,
    OptimizeJob,
    PredictJob,
    PreprocessJob,
    TrainJob,
    TuneJob,
    check_id,
    kind_of,
    new_id,
    parse,
    payload,
)

GOOD = {
    "preprocess": {"dataset_id": "d-1", "name": "cifar10"},
    "train": {"model_id": "m-1", "dataset_id": "d-1", "name": "cifar10"},
    "tune": {"model_id": "m-1", "dataset_id": "d-1", "name": "cifar10"},
    "optimize": {"model_id": "m-1", "name": "cifar10"},
    "predict": {"predictions_id": "r-1", "name": "cifar10", "source": "dataset:d-1/test"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_survives_json(kind):
    job = parse(kind, GOOD[kind])
    assert kind_of(job) == kind
    assert parse(kind, json.loads(json.dumps(payload(job)))) == job


@pytest.mark.parametrize(("kind", "change", "says"), [
    ("preprocess", {"path": "/etc"}, "has no field 'path'"),
    ("preprocess", {"size": 16}, "size is 16: expected 32 to 256"),
    ("preprocess", {"size": "32"}, "size is '32', expected an integer"),
    ("preprocess", {"source": "http://x"}, "expected cifar10, upload:<id> or import:<name>"),
    ("preprocess", {"source": "upload:../x"}, "upload id '../x' is not valid"),
    ("preprocess", {"name": "Ä"}, "expected 1 to 63"),
    ("train", {"dataset_id": None}, "dataset_id is None, expected a string"),
    ("train", {"augmentation": []}, "expected an object"),
    ("train", {"seed": True}, "seed is True, expected an integer"),
    ("tune", {"recipes": "small"}, "recipes is 'small', expected a list of names"),
    ("tune", {"recipes": []}, "expected some, each once"),
    ("tune", {"recipes": ["small", "small"]}, "expected some, each once"),
    ("tune", {"recipes": ["../small"]}, "recipe '../small' is not valid"),
    ("tune", {"trials": 0}, "trials is 0: expected 1 to 1000"),
    ("optimize", {"variants": ["onnx-fp64"]}, "expected some of onnx-fp32"),
    ("optimize", {"budget": -1}, "budget is -1.0: expected 0 to 100"),
    ("predict", {"source": "dataset:d-1/all"}, "expected upload:<id>, import:<name>, dataset:<id>, or dataset:"),
    ("predict", {"source": "upload:u-1/test"}, "source 'upload:u-1/test' is unknown"),
    ("predict", {"source": "import:"}, "source 'import:' is unknown"),
    ("predict", {"source": "dataset:../x"}, "source 'dataset:../x' is unknown"),
    ("predict", {"variant": "onnx"}, "variant is 'onnx': expected one of onnx-fp32"),
    ("predict", {"embedding": 1}, "embedding is 1, expected true or false"),
])
def test_a_bad_job_is_refused_with_what_was_expected(kind, change, says):
    with pytest.raises(Refused, match=says.replace("(", r"\(")) as caught:
        parse(kind, {**GOOD[kind], **change})
    assert caught.value.code in ("bad_job", "bad_name")


def test_a_missing_field_and_an_unknown_kind_are_named():
    with pytest.raises(Refused, match="lacks 'dataset_id'"):
        parse("train", {"model_id": "m-1", "name": "x"})
    with pytest.raises(Refused, match="expected one of preprocess, train, tune, optimize, predict"):
        parse("deploy", {})


def test_every_kind_has_a_service_and_a_target():
    assert [cls.SERVICE for cls in KINDS.values()] == ["preprocessing", "training", "training", "optimization",
                                                        "optimization"]
    assert PredictJob("r-1", "x", "dataset:d-1").target == "predictions/r-1"
    assert PreprocessJob("d-1", "x").target == "datasets/d-1"
    assert TrainJob("m-1", "d-1", "x").target == "models/m-1"
    assert TuneJob("m-1", "d-1", "x").target == "models/m-1"
    assert OptimizeJob("m-1", "x").target == ""


@given(st.text())
def test_no_id_can_name_a_path(text):
    try:
        assert check_id(text) == text
    except Refused:
        return
    assert ID.fullmatch(text)
    assert not set(text) & set("/\\.%\0 \n")


def test_new_ids_are_valid_and_differ():
    assert check_id(new_id("j")) != new_id("j")
