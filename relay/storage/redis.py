"""Connect to Redis, which holds volatile state that several workers and machines share.

Owns the connections, and the back-off while Redis is unavailable: after a failure no command is
sent for a second, then the next call tries, so that calls do not wait for timeouts again and again.
gate/windows.py and cache/store.py decide what happens without Redis.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from relay.core.text import clean

if TYPE_CHECKING:
    from redis.asyncio import Redis

T = TypeVar("T")
RETRY_AFTER_S = 1.0
"""How long no command is sent after a failure."""
PREFIX = "relay"
_CONNECTIONS = 64

Report = Callable[[str, str], None]
"""Called with `redis.unavailable`, `redis.recovered` or `redis.foreign_value`, and the cause."""
_REPORT_FOREIGN_S = 1.0
_MAX_KEY_CHARACTERS = 200


class RedisConnection:
    """The connections to one Redis. `failures` counts failed commands, `foreign_values` keys of the
    relay whose value the relay did not write.
    """

    def __init__(
        self, url: str, timeout_s: float, clock: Callable[[], float], report: Report
    ) -> None:
        """Make the pool; it connects with the first command."""
        # Imported only if it is used: the import takes a tenth of a second and some megabytes.
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        self._pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self.client: Redis = Redis(connection_pool=self._pool)
        self.errors: tuple[type[Exception], ...] = (RedisError, OSError, TimeoutError)
        self.failures = self.foreign_values = 0
        self._foreign_reported_s = -_REPORT_FOREIGN_S
        self._clock, self._report = clock, report
        self._unavailable = False
        self._retry_at_s = 0.0

    @property
    def state(self) -> str:
        """The state of Redis for /readyz: `ok` or `unavailable`."""
        return "unavailable" if self._unavailable else "ok"

    async def ask(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """Return the result of `work`, which sends commands to Redis; None while Redis is
        unavailable. After a failure one call a second tries.
        """
        if self._unavailable:
            now = self._clock()
            if now < self._retry_at_s:
                return None
            self._retry_at_s = now + RETRY_AFTER_S
        try:
            answer = await work()
        except self.errors as error:
            if str(error).startswith("WRONGTYPE"):
                self.found_foreign("a key of another type")
                return None
            self.failures += 1
            self._retry_at_s = self._clock() + RETRY_AFTER_S
            if not self._unavailable:
                self._unavailable = True
                self._report("redis.unavailable", type(error).__name__)
            return None
        if self._unavailable:
            self._unavailable = False
            self._report("redis.recovered", "")
        return answer

    def found_foreign(self, key: str) -> None:
        """Count a key whose value the relay did not write; log at most one a second."""
        self.foreign_values += 1
        now = self._clock()
        if now - self._foreign_reported_s >= _REPORT_FOREIGN_S:
            self._foreign_reported_s = now
            self._report("redis.foreign_value", clean(key, _MAX_KEY_CHARACTERS))

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()
        await self._pool.aclose()

    def __repr__(self) -> str:
        return f"<RedisConnection {self.state}>"
