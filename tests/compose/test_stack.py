"""The running stack: what it may do, a pipeline over HTTP, and what happens when its containers die or are scaled."""

import json
import shutil
import urllib.request

import pytest

from lanner import LannerError
from shared.init import ROLES

pytestmark = pytest.mark.compose
WORKERS = ("preprocessing", "training", "optimization")
LONG = 120  # epochs of 12 steps: some ten seconds on two cores


def writable(stack, service):
    """Folders of /artifacts in which a service can make a file."""
    code = ("import os, pathlib\n"
            "for folder in ['.', *os.listdir('/artifacts')]:\n"
            "    path = pathlib.Path('/artifacts', folder, '.probe')\n"
            "    try: path.touch(); path.unlink(); print(folder)\n"
            "    except OSError: pass")
    return set(stack.python(service, code).split())


def reaches(stack, service, host, port):
    code = (f"import socket\ntry: socket.create_connection(({host!r}, {port}), 5); print('yes')\n"
            "except OSError: print('no')")
    return stack.python(service, code) == "yes"


def models_of(stack):
    return set(stack.python("keeper", "import os; print(*os.listdir('/artifacts/models'))").split())


def hosts(view):
    return [attempt["host"] for attempt in view["attempts"]]


def test_every_service_is_up_and_healthy(stack):
    for service in (*WORKERS, "redis", "keeper", "inference", "tensorboard"):
        (container,) = stack.containers(service)
        assert container["State"]["Health"]["Status"] == "healthy", service
        assert container["Config"]["User"] == "10001:10001"
        assert container["HostConfig"]["ReadonlyRootfs"]
        assert container["HostConfig"]["CapDrop"] == ["ALL"]
    (init,) = stack.containers("init")
    assert (init["State"]["Status"], init["State"]["ExitCode"]) == ("exited", 0)
    assert stack.imports.is_dir()


def test_no_process_has_a_capability_or_may_gain_one(stack):
    for service in (*WORKERS, "keeper", "inference", "tensorboard"):
        lines = stack.python(service, "print(open('/proc/1/status').read())").splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}, service
        assert status["NoNewPrivs"].strip() == "1"
        assert status["Uid"].split() == ["10001"] * 4


def test_each_service_writes_only_what_is_its_own(stack):
    assert writable(stack, "inference") == {"raw", "jobs", "aliases"}
    assert writable(stack, "tensorboard") == set()
    for service in (*WORKERS, "keeper"):
        assert writable(stack, service) > {"work", "models", ".staging"}


def test_every_image_can_trace(stack):
    code = "import opentelemetry.exporter.otlp.proto.http.trace_exporter, opentelemetry.sdk.trace; print('there')"
    for service in ("preprocessing", "training", "optimization", "inference"):
        assert stack.python(service, code) == "there", service


def test_preprocessing_alone_reaches_the_outside(stack):
    address = stack.python("preprocessing", "import socket; print(socket.gethostbyname('pypi.org'))")
    assert reaches(stack, "preprocessing", address, 443)
    for service in ("training", "optimization", "keeper", "inference", "tensorboard"):
        assert not reaches(stack, service, address, 443), service
    assert reaches(stack, "inference", "redis", 6379)
    assert not reaches(stack, "tensorboard", "redis", 6379)


def test_redis_knows_its_roles_and_the_workers_wait_in_blmove(stack):
    clients = json.loads(stack.python("training", (
        "import json\nfrom shared.queue import connect\nfrom shared.settings import load\n"
        "print(json.dumps([[c['user'], c['cmd']] for c in connect(load()).client_list()]))")))
    assert clients.count(["worker", "blmove"]) == len(WORKERS)
    assert {user for user, _ in clients} <= set(ROLES)
    assert "NOAUTH" in stack("exec", "-T", "redis", "redis-cli", "ping")


@pytest.mark.parametrize("command", ["keys *", "flushall", "config get *"])
def test_a_worker_may_not_administer_redis(stack, command):
    refused = stack.python("training", (
        "from redis.exceptions import NoPermissionError\n"
        "from shared.queue import connect\nfrom shared.settings import load\n"
        f"try: print(connect(load()).execute_command(*{command.split()!r}))\n"
        "except NoPermissionError: print('refused')"))
    assert refused == "refused"


def test_a_pipeline_over_http_ends_in_predictions(stack, pipeline, images):
    stack.until(stack.client.ready, 30, "the promoted variant served")
    for label in ("blue", "green", "red"):
        answer = stack.client.predict("colours", images / label / "0.png")
        assert answer["variant"] == "onnx-fp32"
        assert answer["predictions"][0]["top"][0]["label"] == label
    train = stack.client.job(pipeline["jobs"]["train"])
    (container,) = stack.containers("training")
    assert hosts(train) == [container["Id"][:12]]


def test_tensorboard_shows_the_finished_training(stack, pipeline):
    def runs():
        with urllib.request.urlopen(f"http://127.0.0.1:{stack.tensorboard_port}/data/runs", timeout=10) as answer:
            return [run for run in json.load(answer) if pipeline["model_id"] in run]

    stack.until(runs, 60, "the run in TensorBoard")


def test_a_folder_under_imports_becomes_a_dataset(stack, images):
    shutil.copytree(images, stack.imports / "colours")
    (stack.imports / "colours").chmod(0o755)  # user 10001 reads it
    accepted = stack.submit("import:colours", "imported", epochs=1)
    stack.succeeded(accepted)


def test_weights_reach_the_volume_by_docker_compose_cp(stack, tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"weights")
    stack("cp", str(tmp_path / "weights.h5"), "training:/artifacts/weights/")
    for service in ("training", "inference"):
        assert stack.python(service, "print(open('/artifacts/weights/weights.h5').read())") == "weights"


def test_what_was_published_can_be_deleted(stack, source):
    accepted = stack.submit(source, "passing", epochs=1)
    stack.succeeded(accepted)
    with pytest.raises(LannerError, match="passing@production points at version 1"):
        stack.client.delete("models/passing/versions/1")
    stack.client.delete("models/passing/aliases/production")
    stack.client.delete("models/passing/versions/1")
    stack.client.delete(f"datasets/{accepted['dataset_id']}")
    assert accepted["model_id"] not in models_of(stack)
    assert accepted["dataset_id"] not in stack.python("keeper", "import os; print(os.listdir('/artifacts/datasets'))")


def test_a_training_container_killed_mid_train_is_replaced_and_publishes_once(stack, source):
    before = models_of(stack)
    accepted = stack.submit(source, "killed", LONG)
    stack.trains(accepted["jobs"]["train"])
    killed = stack.kill("training")
    train = stack.succeeded(accepted)["train"]
    assert [attempt.get("outcome") for attempt in train["attempts"]] == [None, "succeeded"]
    assert models_of(stack) - before == {accepted["model_id"]}
    (container,) = stack.containers("training")
    assert container["Id"] == killed
    assert container["RestartCount"] == 1


def test_two_containers_train_at_once_and_scaling_down_loses_nothing(stack, source):
    before = models_of(stack)
    stack.up("--no-recreate", "--scale", "training=2", "training")
    both = {container["Id"][:12] for container in stack.containers("training")}
    assert len(both) == 2
    pipelines = [stack.submit(source, name, LONG) for name in ("one", "two")]
    views = [stack.trains(accepted["jobs"]["train"]) for accepted in pipelines]
    assert {hosts(view)[-1] for view in views} == both
    stack.up("--no-recreate", "--scale", "training=1", "training")
    (left,) = stack.containers("training")
    trains = [stack.succeeded(accepted)["train"] for accepted in pipelines]
    assert models_of(stack) - before == {accepted["model_id"] for accepted in pipelines}
    outcomes = sorted([attempt["outcome"] for attempt in train["attempts"]] for train in trains)
    assert outcomes == [["stopped", "succeeded"], ["succeeded"]]
    assert all(hosts(train)[-1] == left["Id"][:12] for train in trains)


def test_down_and_up_keeps_passwords_jobs_and_the_served_model(stack, pipeline, images):
    read = "import hashlib; print(hashlib.sha256(open('/run/lanner/password', 'rb').read()).hexdigest())"
    before = stack.python("keeper", read)
    stack("down")
    stack.up()
    assert stack.python("keeper", read) == before
    assert stack.client.job(pipeline["jobs"]["optimize"])["state"] == "succeeded"
    stack.until(stack.client.ready, 30, "the model served again")
    answer = stack.client.predict("colours", images / "red" / "1.png")
    assert answer["predictions"][0]["top"][0]["label"] == "red"
