"""`relay doctor`: probe each configured provider, and say what failed and what to do.

Owns the diagnosis: one cheap call and one WebSocket handshake a provider, the cause of a failure,
and the list of what was not probed. Probes are calls through a relay in this process, so a client
would see the same results.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import uvloop

from relay import log
from relay.cli.agent_checks import check_agents
from relay.cli.findings import Finding, Say, elapsed_ms, report
from relay.cli.sources import sources_of
from relay.client import AIGateway, AIGatewayError
from relay.client.answers import Stream
from relay.core.provider import Provider, Target
from relay.registry.load import Config, Sources, load
from relay.storage.redis import RedisConnection
from relay.upstream.failures import NO_NAME

TIMEOUT_S = 20.0
_ANSWER_BYTES = 4 * 1024 * 1024


class _Cause(NamedTuple):
    name: str
    advice: str


_DNS = _Cause("DNS", "check base_url in gateway.yaml, and this machine's name server")
_NETWORK = _Cause("network", "check that this machine may reach {host}:{port} (firewall, proxy)")
_PROXY = _Cause("the proxy", "check {proxy}, and that it lets this machine reach {host}:{port}")
_TLS = _Cause(
    "TLS",
    "check this machine's clock and CA certificates, and whether a proxy intercepts TLS",
)
_SILENCE = _Cause("network", "{host} accepts connections but does not answer; see its status page")
_CLOUDFLARE = _Cause("Cloudflare", "check CLOUDFLARE_ACCOUNT_ID and CLOUDFLARE_GATEWAY_ID")
_CLOUDFLARE_KEY = _Cause(
    "Cloudflare's credential",
    "CLOUDFLARE_API_KEY must be a token with the permission AI Gateway: Run, for this account",
)
_PROVIDER_KEY = _Cause(
    "the provider's credential", "check {variables}: wrong, expired, or without access"
)
_RATE = _Cause(
    "rate limit", "the account is over its quota or rate; see the provider's billing page"
)
_MODEL = _Cause(
    "model", "name a model that this account may use: websocket.default_query in gateway.yaml"
)
_PROVIDER = _Cause("the provider", "the provider itself failed; see its status page, and try again")
_RELAY = _Cause("the relay", "see the message: this machine failed, and no provider was called")
_REFUSED = _Cause(
    "the request", "the provider refused the probe; check base_url, paths and check in gateway.yaml"
)
_BY_CODE = {
    "relay_not_started": _RELAY, "upstream_tls_failed": _TLS, "upstream_timeout": _SILENCE,
    "upstream_disconnected": _NETWORK,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument of the command."""
    parser.add_argument("providers", nargs="*", help="probe these providers alone")
    parser.add_argument(
        "--agents",
        action="store_true",
        help="test the programs that `relay connect` set up, with one free call each, instead",
    )


def run(options: argparse.Namespace) -> int:
    """Probe the providers, or the connected agents; 0 if no probe failed, else 1."""
    if options.agents:
        return 0 if check_agents(Path.home(), os.environ, options.providers, print) else 1
    sources = sources_of(options)
    log.setup("error", "json")
    return 0 if uvloop.run(examine(sources, options.providers, print)) else 1


async def examine(sources: Sources, names: Sequence[str], say: Say) -> bool:
    """Probe the providers at the same time; say a line for each probe. True if none failed."""
    config = load(sources)
    chosen = [p for p in config.registry.providers.values() if not names or p.name in names]
    built_in = {"demo"} if config.settings.demo.enabled else set()
    unknown = set(names) - {provider.name for provider in chosen} - built_in
    for name in sorted(unknown):
        say(f"{name}: {config.path} has no such provider")
    for name in built_in & set(names):
        say(f"{name}: not tried: it is built into the relay")
    ready = [provider for provider in chosen if not provider.missing]
    async with AIGateway.from_config(sources.config, sources.env_file) as gateway:
        probed = await asyncio.gather(*(_probe_provider(gateway, provider) for provider in ready))
    rows = [
        (provider.name, finding)
        for provider, findings in zip(ready, probed, strict=True)
        for finding in findings
    ]
    tried = len({name for name, finding in rows if finding.result != "not tried"})
    for provider in chosen:
        if provider.missing:
            missing = f"not configured: set {', '.join(provider.missing)}"
            rows.append((provider.name, Finding("not tried", missing)))
    if (url := config.settings.redis.url) is not None:
        rows.append(("redis", await _probe_redis(url, config.settings.redis.timeout_s)))
    width = max((len(name) for name, _ in rows), default=0)
    for name, finding in rows:
        report(f"{name:<{width}}", finding, say)
    if not ready:
        say("No provider is configured: put keys into .env (see .env.example).")
    for warning in config.warnings:
        say(f"warning: {warning}")
    failed = sum(finding.result == "FAILED" for _, finding in rows)
    say(f"{tried} provider(s) tried, {failed} problem(s). {_way(config)}")
    return not failed and not unknown


def _way(config: Config) -> str:
    account = config.settings.cloudflare
    if not account.account_id:
        return "Providers are called directly."
    return f"Providers with a slug are called through Cloudflare's gateway '{account.gateway_id}'."


async def _probe_provider(gateway: AIGateway, provider: Provider) -> list[Finding]:
    findings = []
    if provider.check is not None:
        probe = _probe_rest(gateway, provider, provider.check)
        findings.append(await _guarded(f"GET {provider.check.partition('?')[0]}", probe))
    if provider.websocket_rules is not None:
        probe = _probe_websocket(gateway, provider)
        findings.append(await _guarded("WebSocket handshake", probe))
    if untried := _untried(provider):
        findings.append(Finding("not tried", "; ".join(untried)))
    return findings


def _untried(provider: Provider) -> list[str]:
    """The ways into a provider that no probe takes."""
    found = []
    if provider.check is None:
        found.append("REST: gateway.yaml names no `check`")
    if (rules := provider.websocket_rules) is not None:
        if others := [path for path in rules.paths if path != rules.default_path]:
            found.append(f"WebSockets at {', '.join(others)}")
    if provider.paths:
        found.append(f"REST under {', '.join(rule.prefix for rule in provider.paths)}")
    if (more := len(provider.rest.pool) - 1) > 0:
        found.append(f"{more} more of its keys")
    if provider.rest_after is not None:
        found.append(
            f"the way {provider.rest_after.via}, which is used when {provider.rest.via} fails"
        )
    return found


async def _guarded(what: str, probe: Coroutine[Any, Any, Finding]) -> Finding:
    """The finding of a probe. An unexpected exception is a finding too: it must not end the other
    probes.
    """
    try:
        return await probe
    except Exception as error:
        cause = log.redacted(f"{type(error).__name__}: {error}")
        return Finding("FAILED", f"{what}: {cause}", "the probe", "please report this bug")


async def _probe_redis(url: str, timeout_s: float) -> Finding:
    began, redis = monotonic(), RedisConnection(url, timeout_s, monotonic, lambda *_: None)
    try:
        await redis.client.ping()
    except redis.errors as error:
        advice = "check redis.url, and that Redis runs; until then each process counts alone"
        return Finding("FAILED", f"PING: {type(error).__name__}", "Redis", advice)
    finally:
        await redis.close()
    return Finding("ok", f"PING: answered in {elapsed_ms(began)}")


async def _probe_rest(gateway: AIGateway, provider: Provider, endpoint: str) -> Finding:
    what, began = f"GET {endpoint.partition('?')[0]}", monotonic()
    uncached = {"cf-aig-skip-cache": "true"}
    try:
        async with (
            asyncio.timeout(TIMEOUT_S),
            gateway.stream(provider=provider.name, endpoint=endpoint, headers=uncached) as answer,
        ):
            status, step = answer.status, answer.headers.get("cf-aig-step", "0")
            await _read(answer)
    except TimeoutError:
        return _failed(what, None, provider, provider.rest)
    except AIGatewayError as error:
        # A provider may have no endpoint that costs nothing but one that answers 404 to a good key.
        if error.status != 404 or error.source == "relay":
            return _failed(what, error, provider, provider.rest)
        status, step = error.status, "0"
    if step != "0":
        cause = f"{provider.rest.via} failed, and another way answered"
        advice = f"see `relay logs`: its `attempts` say why {provider.rest.via} failed"
        return Finding("FAILED", f"{what}: {cause}", provider.rest.via, advice)
    return Finding("ok", f"{what}: {status} in {elapsed_ms(began)} ({_path(provider.rest)})")


async def _read(answer: Stream) -> None:
    """Read an answer to its end, where it may still fail; an endless one up to a limit."""
    count = 0
    async for chunk in answer.chunks():
        count += len(chunk)
        if count > _ANSWER_BYTES:
            return


async def _probe_websocket(gateway: AIGateway, provider: Provider) -> Finding:
    what, began = "WebSocket handshake", monotonic()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            session = await gateway.connect(provider=provider.name)
            elapsed = elapsed_ms(began)
            await session.close()
    except TimeoutError:
        return _failed(what, None, provider, provider.websocket)
    except AIGatewayError as error:
        if error.status in (400, 404, 422) and error.source == "provider":
            if "model" in error.message.lower():
                return _failed(what, error, provider, provider.websocket)
            # The provider took the credential; a session needs an agent or a voice, for example.
            why = f"the provider answered {error.status}: it needs more than this probe sends"
            return Finding("not tried", f"WebSocket session: {why}")
        return _failed(what, error, provider, provider.websocket)
    return Finding("ok", f"{what}: 101 in {elapsed} ({_path(provider.websocket)})")


def _path(target: Target) -> str:
    return target.via if target.proxy is None else f"{target.via}, proxy {target.proxy}"


def _cause_of(error: AIGatewayError, target: Target) -> _Cause:
    """What failed, from the relay's error code or the status and source of the answer."""
    if target.proxy is not None and target.proxy.shown in error.message:
        return _PROXY
    if error.code == "upstream_unreachable":
        return _DNS if NO_NAME in error.message else _NETWORK
    if (cause := _BY_CODE.get(error.code)) is not None:
        return cause
    if error.source == "cloudflare":
        return _CLOUDFLARE_KEY if error.status in (401, 403) else _CLOUDFLARE
    if error.status in (401, 403):
        return _PROVIDER_KEY
    if error.status == 429:
        return _RATE
    if error.status >= 500:
        return _PROVIDER
    return _MODEL if "model" in error.message.lower() else _REFUSED


def _failed(what: str, error: AIGatewayError | None, provider: Provider, target: Target) -> Finding:
    """The finding of a failed probe; `error` is None where the probe ran out of time."""
    cause = _cause_of(error, target) if error is not None else _SILENCE
    what = f"{what}: {error.message if error is not None else f'no answer in {TIMEOUT_S:g} s'}"
    labels = [keys.provider.label for keys in target.pool if keys.provider]
    variables = ", ".join(dict.fromkeys(labels)) or "the key stored at Cloudflare"
    advice = cause.advice.format(
        host=target.host, port=target.port, variables=variables, proxy=target.proxy
    )
    return Finding("FAILED", what, cause.name, advice)
