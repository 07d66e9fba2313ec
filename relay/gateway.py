"""Hold the parts of a running relay that calls need, and begin and end each Exchange.

Owns the configuration in force and the sets of running exchanges and sessions. A reload replaces
`config`; an Exchange keeps the Route that it has. The parts get their clocks and their randomness
from here. What happens to a call between its begin and its end is in rest.py and websocket.py.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import web

from relay import log
from relay.background import BackgroundQueue
from relay.cache.inflight import Inflight
from relay.cache.store import Cache, MemoryStore, Purge, RedisStore
from relay.core.access import Rights
from relay.core.addresses import host_name
from relay.core.budgets import WARNING_LEVELS
from relay.core.deadline_queue import DeadlineQueue
from relay.core.exchange import Caller, Exchange, Request, Transport, uuid7
from relay.core.injection import UsageRefusals
from relay.core.limits import Rule
from relay.core.memo import BoundedMemo
from relay.core.provider import Provider
from relay.core.redaction import Secrets
from relay.core.retry_policy import AttemptResult
from relay.core.traces import HEADER as TRACE
from relay.core.traces import trace
from relay.gate.access import OpenAccess, Origins
from relay.gate.budget_warnings import BudgetWarnings
from relay.gate.budgets import Budgets
from relay.gate.identify import Callers, Proxies
from relay.gate.keys import ClientKeys
from relay.gate.leases import Leases
from relay.gate.limits import LimitCounts, Limits
from relay.gate.made_objects import MadeObjects
from relay.gate.management import Management
from relay.gate.spending import Spending
from relay.gate.tickets import Tickets
from relay.gate.windows import Windows
from relay.ledger.group_rollups import grouping
from relay.ledger.ledger import Ledger
from relay.ledger.metrics import Metrics, Sample
from relay.ledger.retention import Retention
from relay.ledger.traces import Traces
from relay.registry.changes import Reloaded
from relay.registry.files import Snapshot
from relay.registry.limits import find_broken_promise
from relay.registry.load import Config
from relay.registry.registry import Registry
from relay.registry.restart import taken_over
from relay.registry.schema import GatewayFile
from relay.registry.unified_routes import UnifiedRoutes
from relay.storage.access import AccessStore
from relay.storage.budget_reports import BudgetReports
from relay.storage.budgets import BudgetStore
from relay.storage.database import Database, database_url
from relay.storage.memory_windows import MemoryWindows
from relay.storage.objects import ObjectStore
from relay.storage.redis import RedisConnection
from relay.storage.tickets import TicketStore
from relay.upstream.attempts import Attempts, Budget
from relay.upstream.codex_lists import CodexLists
from relay.upstream.health import COOLDOWN_KINDS, Health
from relay.upstream.model_lists import ModelLists
from relay.upstream.session import UpstreamSessions

if TYPE_CHECKING:
    from relay.calls.call import Call
    from relay.calls.keepalive import Keepalive
    from relay.sessions.listing import SessionPage
    from relay.sessions.session import Session

_MAX_CLIENT_LIMITS = 4096


class Gateway:
    """One per application. Call `start` and `stop` within the running event loop."""

    def __init__(self, config: Config) -> None:
        self.clock: Callable[[], float] = time.monotonic
        self.background = BackgroundQueue()
        self.shared = self._connect_redis(config)
        memory = MemoryWindows(self.clock)
        self.windows = Windows(memory, self.shared, self.background, new_id)
        self.limit_counts = LimitCounts()
        self.keys = ClientKeys(self.clock)
        self.inflight = Inflight(self.clock)
        self.secrets = Secrets(config.secrets)
        log.protect(self.secrets)
        url = config.settings.database
        database = Database(database_url(url)) if url else None
        self.ledger = Ledger(database, self.clock, new_id, self.secrets)
        self.access_store = AccessStore(database) if database is not None else None
        tickets = TicketStore(database) if database is not None else None
        self.tickets = Tickets(tickets, self.keys, time.time, lambda: self.refresh_access())
        self.leases: Leases | None = None
        if database is not None:
            self.leases = Leases(
                BudgetStore(database), time.time, new_id, lambda: self.refresh_access()
            )
            self.leases.watch = BudgetWarnings(self.leases, BudgetReports(database)).look
        self.spending = Spending(lambda: self.budgets, self.keys, self.clock)
        self.metrics, self.traces = self._observers(config.settings)
        memory_store = MemoryStore(config.settings.cache.memory_bytes, self.clock)
        redis_store = RedisStore(self.shared, time.time) if self.shared is not None else None
        self.cache = Cache(memory_store, redis_store, self.background)
        objects = ObjectStore(database) if database is not None else None
        self.made_objects = MadeObjects(objects, self.background, time.time)
        self.model_lists = ModelLists(lambda: self.upstream.rest, self.clock)
        self.codex_lists = CodexLists(lambda: self.upstream.rest, self.clock)
        self._apply(config)
        self.calls: set[Exchange] = set()  # each periodic sweep checks their timeouts
        self.keepalives: set[Keepalive] = set()  # of streams that get any; each sweep sends them
        self.in_session: set[Exchange] = set()  # with an open WebSocket: see `sessions`
        self.sessions: DeadlineQueue[Session] = DeadlineQueue()
        self.held_bytes = 0
        self.draining = False
        self.admitted: set[object] = set()
        """Connections whose request load shedding admitted and no handler has taken yet."""
        self.requests_shed = 0
        """Number of requests that load shedding refused; relay/periodic.py logs it."""
        self.shed_logged = 0
        self.mounted = False
        """True in a host application, whose server (with aiohttp's defaults) decompresses request
        bodies and does not cancel the handler of a client that disconnected."""
        self.has_admin_listener = False
        """True if management has a listener of its own (server/worker.py)."""
        self.started_with = config
        self.reload: Callable[[], Awaitable[Reloaded]] | None = None
        """Reloads the configuration in all processes."""
        self.apply: Callable[[Snapshot], Awaitable[Reloaded]] | None = None
        """Applies a configuration from files that the supervisor has read, in this process."""
        self.when_replaced: Callable[[Config], None] | None = None
        """Applies the server's part of a new configuration."""
        self.purge: Callable[[Purge], Awaitable[int]] = self.cache.purge
        """Purges the cache of this process; with several workers, of all of them."""
        self.refresh_access: Callable[[], Awaitable[None]] = _nothing
        """Applies the changes of clients and keys, and answers recalls of leases, in this process;
        with several workers, in all."""
        self.list_sessions: Callable[[str, int], Awaitable[SessionPage]]
        """Lists the open sessions above an id, at most so many, of all processes."""
        self.end_session: Callable[[str], Awaitable[tuple[bool, Sequence[str]]]]
        """Ends the session with an id, whichever process has it. False if none has it; and the
        workers that did not answer."""
        self.upstream: UpstreamSessions
        health = Health(self.clock, random.random, _warn_of_refused_key)
        self.attempts = Attempts(health, self._budget(), self.clock, random.random, time.time)

    def _observers(self, settings: GatewayFile) -> tuple[Metrics | None, Traces | None]:
        """Make the metrics and the traces, which the ledger gives each finished call. Raises
        PackageMissing.
        """
        rules, metrics = settings.metrics, None
        if rules.enabled:
            metrics = Metrics(rules.max_models, rules.max_clients)
        traces = None
        if settings.tracing.endpoint is not None:
            traces = Traces(settings.tracing, lambda name: self.registry.providers.get(name))
        for observer in (metrics, traces):
            if observer is not None:
                self.ledger.counted.append(observer.count)
        return metrics, traces

    async def start(self) -> None:
        """Open the connection pools and the ledger, and start the background queue."""
        self.upstream = UpstreamSessions()
        await self.ledger.start(
            lambda: _retention(self.settings), lambda: grouping(self.settings.ledger)
        )
        await self.background.start()
        if self.leases is not None:
            self.leases.start()

    async def stop(self) -> None:
        """End the shared calls, finish background work, write the ledger, and close all
        connections.
        """
        log.keep_protecting(self.secrets)
        await self.model_lists.stop()
        await self.codex_lists.stop()
        await self.inflight.stop()
        await self.spending.stop()
        await self.background.stop()
        await self.ledger.stop(self.leases.stop if self.leases is not None else None)
        if self.traces is not None:
            await self.traces.stop()
        await self.upstream.close()
        if self.shared is not None:
            await self.shared.close()

    def gauges(self) -> dict[Sample, float]:
        """Return the current values of the gauges (ledger/metrics.py)."""
        gauges: dict[Sample, float] = {
            ("relay_workers",): not self.draining,
            ("relay_requests_in_flight",): len(self.calls) + len(self.in_session),
            ("relay_sessions",): len(self.sessions),
            ("relay_ledger_rows_waiting",): self.ledger.waiting,
            ("relay_request_bodies_held_bytes",): self.held_bytes,
        }
        if self.ledger.database is not None:
            gauges["relay_store_up", "database"] = self.ledger.state == "ok"
            gauges["relay_store_up", "access"] = self.keys.is_fresh
        if self.shared is not None:
            gauges["relay_store_up", "redis"] = self.shared.state == "ok"
        for name, provider in self._ready_providers().items():
            state = self.attempts.health.count_cooling_down(provider)
            gauges["relay_provider_targets_cooling_down", name] = state.cooling_targets
            if state.keys:
                gauges["relay_provider_keys", name] = state.keys
                gauges["relay_provider_keys_cooling_down", name] = state.cooling_keys
        return gauges

    def _ready_providers(self) -> dict[str, Provider]:
        """The providers whose variables are set."""
        providers = self.registry.providers
        return {name: provider for name, provider in providers.items() if not provider.missing}

    def counters(self) -> dict[Sample, float]:
        """Return what is counted since the start outside of calls (ledger/metrics.py)."""
        lost = self.ledger.lost
        counters: dict[Sample, float] = {
            ("relay_ledger_failures_total",): lost.failures,
            ("relay_ledger_rows_dropped_total",): lost.rows,
            ("relay_ledger_bodies_dropped_total",): lost.bodies,
            ("relay_meter_failures_total",): lost.meters,
            ("relay_usage_fields_ignored_total",): lost.usage_fields,
            ("relay_log_lines_lost_total",): log.losses.lines,
            ("relay_background_dropped_total",): self.background.dropped,
            ("relay_requests_shed_total",): self.requests_shed,
        }
        if self.shared is not None:
            counters["relay_redis_failures_total",] = self.shared.failures
            counters["relay_redis_foreign_values_total",] = self.shared.foreign_values
        # A counter that begins at 0 lets Prometheus see its first increase.
        refusals = {rule.name: 0 for rule in self.config.all_limits} | self.limit_counts.refusals
        for rule, count in refusals.items():
            counters["relay_limit_refusals_total", rule] = count
        counters |= self._budget_counters()
        none = {(name, *kind): 0 for name in self._ready_providers() for kind in COOLDOWN_KINDS}
        for labels, count in (none | self.attempts.health.cooldowns).items():
            counters["relay_cooldowns_total", *labels] = count
        return counters

    def _budget_counters(self) -> dict[Sample, float]:
        """Return what the budgets of this process have counted."""
        if self.leases is None:
            return {}
        counts, names = self.leases.counts, [rule.name for rule in self.config.budgets.rules]
        warned = {(name, level): 0 for name in names for level in WARNING_LEVELS}
        return {
            ("relay_budget_unaccounted_usd_total",): counts.unaccounted_nano / 1e9,
            **{
                ("relay_budget_refusals_total", name): count
                for name, count in (dict.fromkeys(names, 0) | counts.refusals).items()
            },
            **{
                ("relay_budget_warnings_total", name, str(level)): count
                for (name, level), count in (warned | counts.warnings).items()
            },
        }

    @property
    def running(self) -> set[Exchange]:
        """All exchanges that have not ended."""
        return self.calls | self.in_session

    @property
    def lists_origins(self) -> bool:
        """True if some pages of other origins may call: responses then vary by Origin."""
        return self.access.origins.listed or self.keys.origins.listed

    def open_session(self, exchange: Exchange) -> None:
        """Note that the WebSocket of `exchange` is open: its session's timeouts apply now."""
        self.calls.discard(exchange)
        self.in_session.add(exchange)

    def replace(self, config: Config) -> None:
        """Apply a checked configuration. Running exchanges keep the configuration with which they
        began; settings that need a restart keep their values of the start.
        """
        config = taken_over(self.started_with, config)
        self._apply(config)
        self.sessions.make_all_due()  # their limits may have changed
        self.spending.make_all_due()
        self.attempts.budget = self._budget()
        self.secrets.replace(config.secrets)
        if self.when_replaced is not None:
            self.when_replaced(config)

    def _budget(self) -> Budget:
        rules = self.settings.retry_budget
        return Budget(rules.percent, rules.per_s, self.clock)

    def _connect_redis(self, config: Config) -> RedisConnection | None:
        redis = config.settings.redis
        if redis.url is None:
            return None
        return RedisConnection(redis.url, redis.timeout_s, self.clock, _log_redis_change)

    def _apply(self, config: Config) -> None:
        self.config = config
        self.settings: GatewayFile = config.settings
        self.registry: Registry = config.registry
        self.cache.configure(config.settings.cache.store, config.settings.cache.memory_bytes)
        server = config.settings.server
        hosts = accepted_hosts(config.settings)
        mode, origins = config.settings.access.mode, Origins(config.settings.cors.origins)
        self.access = OpenAccess(hosts, origins, mode)
        self.keys.configure(config.clients)
        self.callers = Callers(
            Proxies(server.trusted_proxies), self.access, server.public_url, self.keys, time.time
        )
        tokens = config.settings.access
        self.management = Management(
            {"admin": tokens.admin_token, "read": tokens.read_token}, self.keys
        )
        self.keys.management = self.management.digests
        self.limits = self._make_limits(config.limits) if config.limits else None
        self._client_limits = BoundedMemo(self._limits_with, _MAX_CLIENT_LIMITS)
        self.unified = UnifiedRoutes(self.registry, config.unified, self.model_lists)
        self.model_lists.forget()
        self.codex_lists.forget()
        self.budgets = None
        if self.leases is not None:
            self.budgets = Budgets(config.budgets, self.leases, self.ledger.recorded)
            self.leases.renew_all(config.budgets.rules)
        if self.metrics is not None:
            self.metrics.configure(config.models, config.clients.by_name.keys())
        self.usage_refusals = UsageRefusals()

    def _make_limits(self, rules: Sequence[Rule]) -> Limits:
        return Limits(rules, self.windows, self.limit_counts, self.ledger.settle)

    def _limits_with(self, rights: Rights) -> Limits:
        """Return the limits for clients with these rights: those for all clients, and their own."""
        for rule in rights.limits:
            # A record of the database may be older than the number of workers.
            if (problem := find_broken_promise(rule, self.settings)) is not None:
                log.warn("limit.multiplied", rule=rule.name, cause=problem)
        return self._make_limits((*self.config.limits, *rights.limits))

    def limits_of(self, caller: Caller) -> Limits | None:
        """Return the limits that apply to the calls of `caller`; None if there are none."""
        record = caller.record
        if record is None or not record.rights.limits:
            return self.limits
        return self._client_limits[record.rights]

    def begin(self, call: Call, transport: Transport, web_request: web.Request) -> Exchange:
        """Begin an Exchange for `call`; it counts as running until `close`."""
        headers = call.headers
        request = Request(
            transport,
            call.method,
            call.caller,
            self.clock(),
            headers,
            call.provider,
            call.endpoint,
            call.surface,
            call.error_format,
        )
        web_request[EXCHANGE] = exchange = Exchange(new_id(), request, asyncio.current_task())
        if self.traces is not None:
            of_client, share = headers.get(TRACE), self.settings.tracing.sample
            request.trace = trace(of_client, random.getrandbits, lambda: random.random() < share)  # noqa: S311
        if self.mounted:  # in a server that does not cancel the handler of a client that left
            exchange.waiting.client_left = lambda: has_left(web_request)
        self.calls.add(exchange)
        return exchange

    def hold(self, exchange: Exchange, count: int) -> None:
        """Count `count` bytes of a request body that are held in memory."""
        exchange.request.held_bytes += count
        self.held_bytes += count

    def let_go(self, exchange: Exchange, count: int) -> None:
        """Count `count` bytes less: they are no longer held."""
        exchange.request.held_bytes -= count
        self.held_bytes -= count

    def release(self, exchange: Exchange) -> None:
        """Release what an Exchange reserved, and drop the references that form cycles with it, so
        that it is freed without the garbage collector. Does not raise.
        """
        exchange.move_to("ended")
        self.calls.discard(exchange)
        self.in_session.discard(exchange)
        if exchange.request.held_bytes:
            self.let_go(exchange, exchange.request.held_bytes)
        at_end, exchange.at_end = exchange.at_end, ()
        exchange.response.meter_observer = None
        for release in at_end:
            try:
                release()
            except Exception as error:
                # After any exception the others are still released, and the call gets its row.
                log.bug("exchange.close_failed", error, id=exchange.id)

    def close(self, exchange: Exchange) -> None:
        """End an Exchange, exactly once, without waiting or raising. The ledger works out its usage
        and cost, and writes its log line and row, soon after; if it leads a shared call that still
        runs, when that call has ended.
        """
        self.release(exchange)
        exchange.outcome.ended_s = self.clock()
        if exchange.cache is None or not exchange.cache.leads:
            self.ledger.take(exchange)

    def end_lead(self, leader: Exchange) -> None:
        """Note that the shared call of `leader` has ended; record `leader` if it has ended too."""
        assert leader.cache is not None
        leader.cache.leads = False
        if leader.state == "ended":
            self.ledger.take(leader)


async def _nothing() -> None:
    """Do nothing."""


def accepted_hosts(settings: GatewayFile) -> list[str]:
    """The Host names, beside those of loopback, by which clients may call; `*` is any name."""
    server = settings.server
    own = [host_name(urlsplit(server.public_url).netloc)] if server.public_url else []
    return list(dict.fromkeys([*server.hosts, *own]))


def _retention(settings: GatewayFile) -> Retention:
    day_s, rules = 86400, settings.ledger
    return Retention(
        rules.retention_days * day_s,
        rules.body_retention_days * day_s,
        rules.group_retention_days * day_s,
    )


def _warn_of_refused_key(
    provider: str, label: str, ended: AttemptResult, key_cooldown_s: float
) -> None:
    """Warn the operator that a provider refused a key of the relay."""
    status = ended.effective_status
    why = {"status": status, "code": ended.dead_key or str(status)}
    log.warn("key.refused", provider=provider, key=label, **why, rests_s=key_cooldown_s)


def _log_redis_change(event: str, cause: str) -> None:
    if cause:
        log.warn(event, cause=cause)
    else:
        log.event(event)


def new_id() -> str:
    """Make a UUIDv7. An id is not a secret: knowing one must not grant access to its call."""
    return uuid7(time.time_ns(), random.getrandbits)


def has_left(request: web.Request) -> bool:
    """True if the client of `request` has closed its connection."""
    return request.transport is None or request.transport.is_closing()


GATEWAY = web.AppKey("gateway", Gateway)
EXCHANGE = web.RequestKey("exchange", Exchange)
