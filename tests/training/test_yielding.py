"""Giving way to predictions, against a real Valkey; a whole training beside a real API is in tests/system."""

import pytest

from shared import gpu, serving
from shared.attempt import Stopped
from shared.datasets import Dataset
from shared.jobs import TrainJob
from shared.settings import Settings
from training import fitting
from training.recipes import resolve
from training.yielding import Yielding


def beside(valkey, target_ms=20):
    return Yielding(Settings("cpu", redis_url=valkey.url, serving_p99_ms=target_ms))


def computed(yielding, seconds):
    """As if the training had computed for so long."""
    yielding._resumed -= seconds


def test_over_the_target_it_pauses_as_long_as_it_computed_and_goes_on(valkey, redis):
    serving.say(redis, "cpu", 21)
    yielding = beside(valkey)
    for _ in range(3):
        serving.say(redis, "cpu", 21)
        before = yielding.seconds
        computed(yielding, 0.05)
        yielding.give_way(lambda: None)
        assert yielding.seconds - before >= 0.05


def test_at_the_target_idle_or_without_one_it_goes_on(valkey, redis):
    idle = beside(valkey)
    serving.say(redis, "GPU-other", 500)
    computed(idle, 9)
    idle.give_way(lambda: None)
    assert (idle.seconds, idle.call_s(1.0)) == (0, 1.0)
    serving.say(redis, "cpu", 20)
    within, off = beside(valkey), beside(valkey, target_ms=0)
    for yielding in (within, off):
        computed(yielding, 9)
        yielding.give_way(lambda: None)
    assert (within.seconds, off.seconds) == (0, 0)
    assert (within.call_s(1.0), off.call_s(1.0)) == (1.0, 1.0)


def test_within_the_target_again_pauses_go_on_for_a_while(valkey, redis):
    serving.say(redis, "cpu", 21)
    yielding = beside(valkey)
    computed(yielding, 0.01)
    yielding.give_way(lambda: None)
    serving.say(redis, "cpu", 5)
    yielding._look_at = 0.0
    before = yielding.seconds
    computed(yielding, 0.01)
    yielding.give_way(lambda: None)
    assert yielding.seconds > before
    yielding._slow_until = 0.0  # as if that while had passed
    before = yielding.seconds
    computed(yielding, 9)
    yielding.give_way(lambda: None)
    assert yielding.seconds == before


def test_what_is_said_is_forgotten_and_the_training_goes_on(valkey, redis):
    serving.say(redis, "cpu", 21)
    yielding = beside(valkey)
    checks = []

    def check():
        checks.append(redis.delete(serving.KEY.format("cpu")))

    computed(yielding, 3600)
    yielding.give_way(check)
    assert checks[0] == 1
    assert len(checks) <= 3
    assert redis.pttl(serving.KEY.format("cpu")) == -2
    serving.say(redis, "cpu", 21)
    assert 0 < redis.pttl(serving.KEY.format("cpu")) <= serving.KEPT_MS


def test_a_pause_ends_when_the_training_should_stop(valkey, redis):
    serving.say(redis, "cpu", 21)
    yielding = beside(valkey)
    computed(yielding, 3600)

    def check():
        raise Stopped

    with pytest.raises(Stopped):
        yielding.give_way(check)


def test_without_redis_nobody_waits(own_valkey):
    yielding = beside(own_valkey)
    own_valkey.kill()
    computed(yielding, 3600)
    yielding.give_way(lambda: None)
    assert (yielding.seconds, yielding.call_s(1.0)) == (0, 1.0)


def test_programs_get_short_at_once_and_long_again_once_predictions_are_fast(valkey, redis, root, write_dataset,
                                                                             new_attempt):
    job = TrainJob("m-1", write_dataset(root), "colours")
    training = fitting.Training(Dataset(root, job.dataset_id), resolve(job, 225), 0, new_attempt(root, job))
    training.yielding, training.steps_a_call, training.steps_an_epoch = beside(valkey), 400, 400
    serving.say(redis, "cpu", 20)
    training._fit_to_time(1.0)
    assert training.steps_a_call == 400
    serving.say(redis, "cpu", 21)
    training.yielding._look_at = 0.0
    training._fit_to_time(1.0)
    assert training.steps_a_call == 20  # 50 ms
    serving.say(redis, "cpu", 5)
    training.yielding._look_at = 0.0
    training._fit_to_time(0.05)
    assert training.steps_a_call == 20  # for a while
    training.yielding._slow_until = 0.0  # as if that while had passed
    training._fit_to_time(0.05)
    assert training.steps_a_call == 40


def test_on_gpus_it_listens_to_its_own(valkey, redis, monkeypatch):
    cards = [gpu.Gpu(uuid, "H100", "580.1", 81559, "9.0") for uuid in ("GPU-a", "GPU-b")]
    monkeypatch.setattr(gpu, "find", lambda: cards)
    yielding = Yielding(Settings("gpu", redis_url=valkey.url, serving_p99_ms=20))
    serving.say(redis, "GPU-a", 5)
    serving.say(redis, "GPU-b", 30)
    computed(yielding, 0.05)
    yielding.give_way(lambda: None)
    assert yielding.seconds >= 0.05
