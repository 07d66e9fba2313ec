"""`relay doctor`: one cheap call and one handshake for each configured provider, and what is wrong.

Owns: the diagnosis, which leg failed and what to do. The probes take the very line that calls take,
in this process: what they find is what a client would.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple

import uvloop

from relay import log
from relay.cli.sources import sources_of
from relay.client import AIGateway, AIGatewayError
from relay.client.answers import Stream
from relay.core.provider import Provider, Target
from relay.registry.load import Config, Sources, load
from relay.storage.redis import RedisConnection
from relay.upstream.failures import NO_NAME

TIMEOUT_S = 20.0
_TEXT_CHARS = 500
_ANSWER_BYTES = 4 * 1024 * 1024

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one probe found. `leg` is where it failed, empty if it did not."""

    what: str
    leg: str = ""
    advice: str = ""


class _Leg(NamedTuple):
    name: str
    advice: str


_DNS = _Leg("DNS", "check base_url in gateway.yaml, and this machine's name server")
_NETWORK = _Leg("network", "check that this machine may reach {host}:{port} (firewall, proxy)")
_PROXY = _Leg("the proxy", "check {proxy}, and that it lets this machine reach {host}:{port}")
_TLS = _Leg(
    "TLS", "check this machine's clock and CA certificates, and for a proxy that breaks TLS up"
)
_SILENCE = _Leg("network", "{host} takes connections but does not answer; see its status page")
_CLOUDFLARE = _Leg("Cloudflare", "check CLOUDFLARE_ACCOUNT_ID and CLOUDFLARE_GATEWAY_ID")
_CLOUDFLARE_KEY = _Leg(
    "Cloudflare's credential",
    "CLOUDFLARE_API_KEY must be a token with the permission AI Gateway: Run, for this account",
)
_PROVIDER_KEY = _Leg(
    "the provider's credential", "check {variables}: wrong, expired, or without access"
)
_RATE = _Leg("rate limit", "the account is over its quota or rate; see the provider's billing page")
_MODEL = _Leg(
    "model", "name a model that this account may use: websocket.default_query in gateway.yaml"
)
_PROVIDER = _Leg("the provider", "it failed on its own side; see its status page, and try again")
_RELAY = _Leg("the relay", "this is on this machine: see the message; no provider was asked")
_REFUSED = _Leg(
    "the request", "the provider did not take the probe; check base_url, paths and check"
)
_BY_CODE = {
    "relay_not_started": _RELAY, "upstream_tls_failed": _TLS, "upstream_timeout": _SILENCE,
    "upstream_disconnected": _NETWORK,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("providers", nargs="*", help="only these")


def run(options: argparse.Namespace) -> int:
    """Probe the providers; 0 if all is well, else 1."""
    sources = sources_of(options)
    log.setup("error", "json")
    return 0 if uvloop.run(examine(sources, options.providers, print)) else 1


async def examine(sources: Sources, names: Sequence[str], say: Say) -> bool:
    """Probe the providers, all at once; say a line for each probe. True if all is well."""
    config = load(sources)
    chosen = [p for p in config.registry.providers.values() if not names or p.name in names]
    unknown = set(names) - {provider.name for provider in chosen}
    for name in sorted(unknown):
        say(f"{name}: there is no such provider in {config.path}")
    ready = [provider for provider in chosen if not provider.missing]
    async with AIGateway.from_config(sources.config, sources.env_file) as gateway:
        found = await asyncio.gather(*(_examine_one(gateway, provider) for provider in ready))
    width = max((len(provider.name) for provider in chosen), default=0)
    for provider, findings in zip(ready, found, strict=True):
        for finding in findings:
            _report(f"{provider.name:<{width}}", finding, say)
    for provider in chosen:
        if provider.missing:
            say(f"{provider.name:<{width}}  not configured: set {', '.join(provider.missing)}")
    if not ready:
        say("No provider is configured: put keys into .env (see .env.example).")
    if (url := config.settings.redis.url) is not None:
        redis = await _redis(url, config.settings.redis.timeout_s)
        _report(f"{'redis':<{width}}", redis, say)
        found.append([redis])
    for warning in config.warnings:
        say(f"warning: {warning}")
    bad = [finding for findings in found for finding in findings if finding.leg]
    say(f"{len(ready)} provider(s) tried, {len(bad)} problem(s). {_way(config)}")
    return not bad and not unknown


def _report(name: str, finding: Finding, say: Say) -> None:
    if finding.leg:
        say(f"{name}  FAILED  {_printable(finding.what)}  [{finding.leg}]")
        say(f"{' ' * len(name)}          to do: {finding.advice}")
    else:
        say(f"{name}  ok      {finding.what}")


def _printable(text: str) -> str:
    """In it are a provider's own words, and they go to a terminal."""
    return "".join(each if each.isprintable() else " " for each in text[:_TEXT_CHARS])


def _way(config: Config) -> str:
    account = config.settings.cloudflare
    if not account.account_id:
        return "All were reached directly."
    return f"Through Cloudflare's gateway '{account.gateway_id}', where they have a slug."


async def _examine_one(gateway: AIGateway, provider: Provider) -> list[Finding]:
    findings = []
    if provider.check is not None:
        probe = _rest(gateway, provider, provider.check)
        findings.append(await _alone(f"GET {provider.check.partition('?')[0]}", probe))
    if provider.websocket_rules is not None:
        findings.append(await _alone("WebSocket handshake", _websocket(gateway, provider)))
    return findings or [Finding("no probe: it has neither `check` nor WebSockets")]


async def _alone(what: str, probe: Coroutine[Any, Any, Finding]) -> Finding:
    """What a probe found. One that fails in a way that nobody thought of must not end the others:
    that is what it found.
    """
    try:
        return await probe
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        return Finding(f"{what}: {cause}", "the probe", "a bug of the relay's: please report it")


async def _redis(url: str, timeout_s: float) -> Finding:
    began, shared = monotonic(), RedisConnection(url, timeout_s, monotonic, lambda *_: None)
    try:
        await shared.client.ping()
    except shared.errors as error:
        advice = "check redis.url, and that it runs; meanwhile each process counts for itself"
        return Finding(f"PING: {type(error).__name__}", "Redis", advice)
    finally:
        await shared.close()
    return Finding(f"PING: answered in {(monotonic() - began) * 1e3:.0f} ms")


async def _rest(gateway: AIGateway, provider: Provider, endpoint: str) -> Finding:
    what, began = f"GET {endpoint.partition('?')[0]}", monotonic()
    uncached = {"cf-aig-skip-cache": "true"}
    try:
        async with (
            asyncio.timeout(TIMEOUT_S),
            gateway.stream(provider=provider.name, endpoint=endpoint, headers=uncached) as answer,
        ):
            status = answer.status
            await _read(answer)
    except TimeoutError:
        return _failed(what, None, provider, provider.rest)
    except AIGatewayError as error:
        if error.status != 404 or error.source == "relay":
            return _failed(what, error, provider, provider.rest)
        status = error.status
    return Finding(f"{what}: {status} in {_ms(began)} ({_path(provider.rest)})")


async def _read(answer: Stream) -> None:
    """An answer to its end, which may show that it is none, but not an endless one."""
    count = 0
    async for chunk in answer.chunks():
        count += len(chunk)
        if count > _ANSWER_BYTES:
            return


async def _websocket(gateway: AIGateway, provider: Provider) -> Finding:
    what, began = "WebSocket handshake", monotonic()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            session = await gateway.connect(provider=provider.name)
            took = _ms(began)
            await session.close()
    except TimeoutError:
        return _failed(what, None, provider, provider.websocket)
    except AIGatewayError as error:
        if error.status in (400, 404, 422) and error.source == "provider":
            if "model" in error.message.lower():
                return _failed(what, error, provider, provider.websocket)
            # The credential was taken; a session needs what a probe cannot know: an agent, a voice.
            return Finding(f"{what}: reached, it wants more than a probe has ({error.status})")
        return _failed(what, error, provider, provider.websocket)
    return Finding(f"{what}: 101 in {took} ({_path(provider.websocket)})")


def _path(target: Target) -> str:
    return target.via if target.proxy is None else f"{target.via}, proxy {target.proxy}"


def _leg(error: AIGatewayError, target: Target) -> _Leg:
    """Whose failure it is, from the relay's code or the answer's status and source."""
    if target.proxy is not None and target.proxy.shown in error.message:
        return _PROXY
    if error.code == "upstream_unreachable":
        return _DNS if NO_NAME in error.message else _NETWORK
    if (leg := _BY_CODE.get(error.code)) is not None:
        return leg
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
    """Without an error the probe ran out of time."""
    leg = _leg(error, target) if error is not None else _SILENCE
    what = f"{what}: {error.message}" if error is not None else what
    labels = [keys.provider.label for keys in target.pool if keys.provider]
    variables = ", ".join(dict.fromkeys(labels)) or "the key stored at Cloudflare"
    advice = leg.advice.format(
        host=target.host, port=target.port, variables=variables, proxy=target.proxy
    )
    return Finding(what, leg.name, advice)


def _ms(began: float) -> str:
    return f"{(monotonic() - began) * 1e3:.0f} ms"
