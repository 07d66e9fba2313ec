"""Redis: volatile state that several workers and machines share.

Owns: the connections, and how its loss is borne. What limits and cache do without it is theirs;
that nobody waits for it again and again is done here: after a failure it is left alone for a
second, then the next call tries.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from relay.core.text import clean

if TYPE_CHECKING:
    from redis.asyncio import Redis

T = TypeVar("T")
AWAY_S = 1.0
PREFIX = "relay"
_CONNECTIONS = 64

Report = Callable[[str, str], None]
"""Takes `redis.unavailable`, `redis.recovered` or `redis.foreign_value`, and why."""
_REPORT_FOREIGN_S = 1.0
_MAX_KEY_CHARACTERS = 200


class RedisConnection:
    """One Redis. `failures` are counted for /readyz, and `foreign_values`: keys of the relay's that
    held something which it did not write.
    """

    def __init__(
        self, url: str, timeout_s: float, clock: Callable[[], float], report: Report
    ) -> None:
        """Opens nothing yet."""
        # Imported only where it is used: it takes a tenth of a second and some megabytes.
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
        self._away = False
        self._again_s = 0.0

    @property
    def state(self) -> str:
        """For /readyz."""
        return "unavailable" if self._away else "ok"

    async def ask(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """What `work`, which asks Redis, comes to; None while it is away: after a failure one call
        a second tries.
        """
        if self._away:
            now = self._clock()
            if now < self._again_s:
                return None
            self._again_s = now + AWAY_S
        try:
            answer = await work()
        except self.errors as error:
            if str(error).startswith("WRONGTYPE"):
                self.found_foreign("a key of another type")
                return None
            self.failures += 1
            self._again_s = self._clock() + AWAY_S
            if not self._away:
                self._away = True
                self._report("redis.unavailable", type(error).__name__)
            return None
        if self._away:
            self._away = False
            self._report("redis.recovered", "")
        return answer

    def found_foreign(self, key: str) -> None:
        """A key held something else than it should: Redis itself is well. Logged once a second."""
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
