"""Which settings a running relay cannot take over from a reload.

Owns: that list. A reload names those that changed, so that nobody takes them for being in force.
"""

from __future__ import annotations

from relay.registry.schema import GatewayFile

AT_START = {
    "server": ("host", "port", "workers", "keepalive_timeout_s"),
    "tls": ("certificate", "key", "host", "port"),
    "cache": ("store",),
    "redis": ("url", "timeout_s"),
    "metrics": ("enabled", "max_models"),
    "tracing": ("endpoint", "headers", "service_name"),
    "log": ("level", "format"),
    "demo": ("enabled",),
}
"""Settings that are read when the process starts, and `database`. All others hold from the next
call on."""


def needing_restart(in_force: GatewayFile, loaded: GatewayFile) -> list[str]:
    """The changed settings that need a restart, such as `server.port`."""
    changed = [
        f"{section}.{key}"
        for section, keys in AT_START.items()
        for key in keys
        if getattr(getattr(in_force, section), key) != getattr(getattr(loaded, section), key)
    ]
    return changed + (["database"] if in_force.database != loaded.database else [])
