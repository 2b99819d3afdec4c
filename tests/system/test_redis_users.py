"""The Redis users of the Compose stack, on a real server with a real worker and keeper; and their health checks."""

import subprocess
import sys
import time

import pytest
from redis import AuthenticationError, Redis
from redis.exceptions import NoPermissionError

from shared.init import ROLES, acl, password

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("standin", "own_valkey")]


@pytest.fixture
def users(stack, tmp_path):
    """The stack's server with every user of the ACL but the default one, which stays on for the test's own use."""
    passwords = {role: password(tmp_path / "access" / role / "password") for role in (*ROLES, "health")}
    for line in acl({role: passwords[role] for role in ROLES}, passwords["health"]).splitlines():
        _, name, *rules = line.split()
        if name != "default":
            stack.redis.execute_command("ACL", "SETUSER", name, *rules)
    return passwords


def env(tmp_path, role):
    return {"REDIS_USER": role, "REDIS_PASSWORD_FILE": str(tmp_path / "access" / role / "password")}


def health(stack, tmp_path, service, role):
    """(exit status, what it says) of the health check as a container runs it."""
    settings = {"ARTIFACTS": str(stack.root), "REDIS_URL": stack.valkey.url, **env(tmp_path, role)}
    process = subprocess.run([sys.executable, "-m", "shared.health", service], env=settings, capture_output=True,
                             text=True, timeout=30)
    return process.returncode, process.stderr.strip()


def test_a_job_runs_under_the_acl_and_the_worker_waits_in_blmove(stack, users, tmp_path, job):
    stack.worker(**env(tmp_path, "worker"))
    stack.keeper(**env(tmp_path, "keeper"))
    clients = lambda: {(c["user"], c["cmd"]) for c in stack.redis.client_list()}  # noqa: E731
    stack.until(lambda: ("worker", "blmove") in clients(), what="a worker in BLMOVE")
    assert stack.ended(stack.accept(job()))["state"] == "succeeded"
    stack.until(lambda: "keeper" in {user for user, _ in clients()}, what="a keeper's connection")
    assert {user for user, _ in clients()} == {"default", "worker", "keeper"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("command", ["KEYS *", "FLUSHALL", "CONFIG GET *", "ACL LIST", "MONITOR", "SHUTDOWN", "SAVE",
                                     "CLIENT KILL ID 1", "SET other 1", "SUBSCRIBE other"])
def test_a_role_may_neither_administer_redis_nor_leave_its_keys(stack, users, role, command):
    with Redis.from_url(stack.valkey.url, username=role, password=users[role]) as client:
        assert client.ping()
        with pytest.raises(NoPermissionError):
            client.execute_command(*command.split())


def test_the_health_user_may_only_ping(stack, users):
    with Redis.from_url(stack.valkey.url, username="health", password=users["health"], driver_info=None) as client:
        assert client.ping()
        with pytest.raises(NoPermissionError):
            client.get("rq:queues")


def test_a_role_needs_its_own_password(stack, users):
    with Redis.from_url(stack.valkey.url, username="api", password=users["worker"]) as client, \
         pytest.raises(AuthenticationError):
        client.ping()


def test_passwords_are_kept_when_made_again(tmp_path):
    assert password(tmp_path / "x" / "password") == password(tmp_path / "x" / "password")
    assert password(tmp_path / "x" / "password") != password(tmp_path / "y" / "password")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o700


def test_health_follows_the_worker_and_the_keeper(stack, users, tmp_path):
    assert health(stack, tmp_path, "preprocessing", "worker")[0] == 1
    status, why = health(stack, tmp_path, "keeper", "keeper")
    assert (status, why) == (1, "Unavailable: no keeper holds the lease")
    stack.worker(**env(tmp_path, "worker"))
    stack.keeper(**env(tmp_path, "keeper"))
    stack.until(lambda: health(stack, tmp_path, "preprocessing", "worker") == (0, ""), what="healthy worker")
    stack.until(lambda: health(stack, tmp_path, "keeper", "keeper") == (0, ""), what="healthy keeper")
    status, why = health(stack, tmp_path, "training", "worker")
    assert status == 1
    assert why.startswith("Unavailable: no training worker of ")


def test_a_worker_whose_heartbeat_is_old_is_unhealthy(stack, users, tmp_path):
    stack.worker(**env(tmp_path, "worker"))
    stack.until(lambda: health(stack, tmp_path, "preprocessing", "worker") == (0, ""), what="healthy worker")
    (key,) = [k for k in stack.redis.keys("rq:worker:*") if stack.redis.type(k) == b"hash"]
    stack.redis.hset(key, "last_heartbeat", time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(time.time() - 90)))
    status, why = health(stack, tmp_path, "preprocessing", "worker")
    assert status == 1
    assert "heartbeat is 9" in why
