"""A Redis client for a server that answers people: it never waits long, nor again at once."""

import time
from typing import Any

from redis import ConnectionError, Redis, TimeoutError

from shared.queue import connect
from shared.settings import Settings

ANSWER_S = 0.4  # bounds one try; there are two
REST_S = 1.0


class ImpatientRedis(Redis):
    """Fails at once for a second after a call got no answer: a list of 50 jobs waits for a dead server once."""

    _silent_until = 0.0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if time.monotonic() < self._silent_until:
            raise ConnectionError("Redis did not answer a moment ago")
        try:
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except (ConnectionError, TimeoutError):
            self._silent_until = time.monotonic() + REST_S
            raise


def impatient(settings: Settings) -> ImpatientRedis:
    return ImpatientRedis(connection_pool=connect(settings, timeout_s=ANSWER_S).connection_pool)
