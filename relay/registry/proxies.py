"""Choose the forward proxy of a target by HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY.

Owns the interpretation of these variables, which is curl's, and the check that the relay can use
the proxy. aiohttp's `trust_env` is not used: it reads .netrc too, and does so for each call.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from yarl import URL

from relay.core.addresses import Address, address_of, is_loopback
from relay.core.provider import Proxy

AddProblem = Callable[[str, str], None]
"""Adds a problem of a variable: its name, and what is wrong, without its value."""

_OF_ALL = ("all_proxy", "ALL_PROXY")
_VARIABLES = {
    "https": ("https_proxy", "HTTPS_PROXY", *_OF_ALL),
    "http": ("http_proxy", "HTTP_PROXY", *_OF_ALL),
}
"""Scheme of the target to the variables for it; the first one that is set is used."""
_EXEMPTING = ("no_proxy", "NO_PROXY")
_SCHEMES = ("http", "https")
_ODD = re.compile(r"[^\x21-\x7e]")
_PORT = re.compile(r"(.*):([0-9]{1,5})\Z")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class _Exemption:
    """An entry of NO_PROXY: a name and its subdomains, or addresses; with one port, or all."""

    name: str
    network: Network | None
    port: int | None

    def holds(self, host: str, address: Address | None, port: int) -> bool:
        if self.port is not None and self.port != port:
            return False
        if self.network is not None:
            return address is not None and address in self.network
        return host == self.name or host.endswith(f".{self.name}")


class Proxies:
    """The proxies of the environment."""

    __slots__ = ("_add_problem", "_exemptions", "_none", "_variables")

    def __init__(self, variables: Mapping[str, str], add_problem: AddProblem) -> None:
        self._variables, self._add_problem = variables, add_problem
        _, given = _first(variables, _EXEMPTING)
        entries = re.split(r"[,\s]+", given.lower())
        self._none = "*" in entries
        self._exemptions = [_exemption(entry) for entry in entries if entry.strip("*.")]

    def find(self, origin: URL) -> Proxy | None:
        """Return the proxy for a target, if any. An unusable variable is a problem if needed."""
        assert origin.raw_host is not None and origin.port is not None
        host = origin.raw_host.lower().rstrip(".")
        if self._none or is_loopback(host):
            return None
        address = address_of(host)
        if any(each.holds(host, address, origin.port) for each in self._exemptions):
            return None
        variable, given = _first(self._variables, _VARIABLES[origin.scheme])
        if not given:
            return None
        try:
            return _proxy(variable, given)
        except ValueError as error:
            self._add_problem(variable, str(error))
            return None


def _first(variables: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, str]:
    """Return name and value of the first variable that is set and not empty, as curl does."""
    found = ((name, variables.get(name, "").strip()) for name in names)
    return next(((name, value) for name, value in found if value), ("", ""))


def _exemption(entry: str) -> _Exemption:
    """Parse `example.com`, `.example.com`, `*.example.com`, `10.0.0.0/8`, `::1`, `[::1]:443` or
    `a:80`. An entry of any other form matches no host.
    """
    network = _network(entry)
    with_port = None if network is not None else _PORT.match(entry)
    name = with_port[1] if with_port is not None else entry
    network = network or _network(name)
    port = int(with_port[2]) if with_port is not None else None
    return _Exemption(name.removeprefix("*").strip("."), network, port)


def _network(text: str) -> Network | None:
    try:
        return ipaddress.ip_network(text.removeprefix("[").removesuffix("]"), strict=False)
    except ValueError:
        return None


def _proxy(variable: str, given: str) -> Proxy:
    """Parse the URL of a proxy. The text of the ValueError that it raises has no secrets."""
    scheme, separator, _ = given.partition("://")
    if separator and scheme.lower() not in _SCHEMES:
        raise ValueError(
            f"the relay supports http:// and https:// proxies, not {scheme[:20]!r}; unset the"
            " variable, or list the hosts to be called directly in NO_PROXY"
        )
    wrong = ValueError("is not the URL of a proxy, such as http://proxy.example:3128")
    try:
        url = URL(given if separator else f"http://{given}")
        host, port = url.host, url.port
        user, password = url.user or "", url.password or ""
    except ValueError:
        raise wrong from None
    if _ODD.search(given) or not host or not port or url.raw_path_qs != "/" or url.raw_fragment:
        raise wrong
    try:
        (user + password).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError("user and password must not have characters beyond Latin-1") from None
    if ":" in user:
        raise ValueError("the user must not have a colon")
    shown = str(URL.build(scheme=url.scheme, host=host, port=port)).rstrip("/")
    if url.is_default_port():
        shown = f"{shown}:{port}"
    return Proxy(str(url), shown, variable)
