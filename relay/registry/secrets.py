"""The secrets of a configuration, which nothing that is logged or stored may show."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from relay.registry.load import Config


def secrets_of(config: Config) -> frozenset[str]:
    """Every secret of a configuration: keys, tokens, passwords in URLs."""
    settings = config.settings
    found = {settings.cloudflare.api_key, *settings.tracing.headers.values()}
    urls = [settings.redis.url, settings.database]
    for provider in config.registry.providers.values():
        targets = [
            provider.rest, provider.websocket, provider.rest_after, provider.websocket_after,
            *(rule.target for rule in provider.paths),
        ]  # fmt: skip
        urls += [t.proxy.url for t in targets if t and t.proxy]
        for credential in (c for t in targets if t for keys in t.pool if (c := keys.provider)):
            found |= {credential.value, credential.value.rpartition(" ")[2]}
    for url in urls:
        password = urlsplit(url or "").password or ""
        found |= {password, unquote(password)}
    return frozenset(secret for secret in found if secret)
