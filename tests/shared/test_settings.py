"""The environment is read once, and a bad value stops the process with its name."""

import dataclasses
from pathlib import Path

import pytest

from shared.settings import DESCRIPTIONS, RANGES, Settings, SettingsError, batches, load


def test_defaults_stand_where_nothing_or_an_empty_string_is_set():
    assert load({}) == Settings() == load({"PORT": "", "DEVICE": ""})


def test_values_are_read_as_their_type():
    settings = load({"PORT": "9000", "ARTIFACTS": "/data", "REFRESH_S": "0.5", "DEVICE": "cpu"})
    assert (settings.port, settings.artifacts, settings.refresh_s, settings.device) == (9000, Path("/data"), 0.5, "cpu")


@pytest.mark.parametrize(("env", "says"), [({"PORT": "http"}, "PORT='http' is not a valid int"),
                                           ({"DEVICE": "tpu"}, "expected gpu or cpu"),
                                           ({"MIXED_PRECISION": "fp8"}, "expected auto or off"),
                                           ({"GPUS_PER_TRAINING": "0"}, "expected 1 or more"),
                                           ({"GPU_MEMORY_MIB": "-1"}, "expected 0 or more"),
                                           ({"SERVING_P99_MS": "-1"}, "expected 0 or more"),
                                           ({"QUEUE_MS": "-1"}, "expected 0 or more"),
                                           ({"LOADED_MIB": "-1"}, "expected 0 or more"),
                                           ({"HTTP_PROCESSES": "257"}, "0 to 256"),
                                           ({"DEVICE": "cpu", "HTTP_PROCESSES": "-1"}, "0 to 256"),
                                           ({"SHADOW_SHARE": "1.5"}, "expected 0 to 1"),
                                           ({"CPU_THREADS": "-1"}, "expected 0 to 4096"),
                                           ({"MAX_ATTEMPTS": "0"}, "expected 1 to 1000"),
                                           ({"LOG_LEVEL": "loud"}, "expected DEBUG or INFO or WARNING or ERROR"),
                                           ({"PORT": "99999"}, "expected 1 to 65535"),
                                           ({"REFRESH_S": "nan"}, "expected 0.001 to 3600"),
                                           ({"UPLOAD_LIMIT_MIB": "-1"}, "expected 1 or more"),
                                           ({"ENGINE_BATCHES": "1,64"}, "expected three numbers"),
                                           ({"ENGINE_BATCHES": "8,64,128"}, "the first of them 1"),
                                           ({"ENGINE_BATCHES": "1,64,32"}, "that don't fall")])
def test_a_bad_value_stops_with_its_name(env, says):
    with pytest.raises(SettingsError, match=says):
        load(env)


def test_every_number_has_its_range():
    numbers = {f.name for f in dataclasses.fields(Settings) if f.type in (int, float)}
    assert set(RANGES) == numbers


def test_every_setting_is_described():
    assert set(DESCRIPTIONS) == {f.name for f in dataclasses.fields(Settings)}


def test_engine_batches_are_three_numbers():
    assert batches(load({})) == (1, 64, 1024)
    assert batches(load({"ENGINE_BATCHES": "1, 8, 256"})) == (1, 8, 256)
