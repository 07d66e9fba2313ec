"""The settings that need a restart.

Owns their list. A reload reports those that changed, and keeps their old values for the whole
process, so that no part of it uses a new value while others use the old one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relay.registry.load import Config
from relay.registry.schema import GatewayFile

AT_START: Mapping[str, tuple[str, ...]] = {
    "server": ("host", "port", "admin_host", "admin_port", "workers", "keepalive_timeout_s"),
    "tls": ("host", "port"),
    "redis": ("url", "timeout_s"),
    "metrics": ("enabled", "max_models", "max_clients"),
    "tracing": ("endpoint", "headers", "service_name"),
    "log": ("level", "format"),
    "demo": ("enabled",),
}
"""Settings that need a restart, as `database` does. All others apply from the next call on, except
`cache.store` without Redis, `tls.certificate` and `tls.key` if they turn TLS on or off, and
`access.mode` if it becomes open."""


def _at_start(started: GatewayFile, loaded: GatewayFile) -> dict[str, tuple[str, ...]]:
    """Return the settings that need a restart for a change from `started` to `loaded`."""
    needed = dict(AT_START)
    if started.redis.url is None:
        needed["cache"] = ("store",)
    if (started.access.mode, loaded.access.mode) == ("required", "open"):
        needed["access"] = ("mode",)  # it may listen beyond loopback
    if (started.tls.certificate is None) != (loaded.tls.certificate is None):
        needed["tls"] = ("certificate", "key", *needed["tls"])
    return needed


def needing_restart(started: GatewayFile, loaded: GatewayFile) -> list[str]:
    """Return the changed settings that need a restart, such as `server.port`."""
    changed = [
        f"{section}.{key}"
        for section, keys in _at_start(started, loaded).items()
        for key in keys
        if getattr(getattr(started, section), key) != getattr(getattr(loaded, section), key)
    ]
    return changed + (["database"] if started.database != loaded.database else [])


def taken_over(started: Config, loaded: Config) -> Config:
    """Return the configuration in force after a reload: `loaded`, with the values of `started` for
    the settings that need a restart.
    """
    before, now = started.settings, loaded.settings
    unchanged: dict[str, Any] = {"database": before.database}
    for section, keys in _at_start(before, now).items():
        values = {key: getattr(getattr(before, section), key) for key in keys}
        unchanged[section] = getattr(now, section).model_copy(update=values)
    has_tls = (started.certificate is None) == (loaded.certificate is None)
    certificate = loaded.certificate if has_tls else started.certificate
    return replace(loaded, settings=now.model_copy(update=unchanged), certificate=certificate)
