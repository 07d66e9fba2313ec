"""Which proxy a target is reached through: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY.

Owns: reading these variables as curl does, and the check that the relay can use what they name.
aiohttp's own reading of them (`trust_env`) reads .netrc too, and again for each call.
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
"""Notes a problem with a variable: its name, and what is wrong, without its value."""

_OF_ALL = ("all_proxy", "ALL_PROXY")
_VARIABLES = {
    "https": ("https_proxy", "HTTPS_PROXY", *_OF_ALL),
    "http": ("http_proxy", "HTTP_PROXY", *_OF_ALL),
}
"""By the target's scheme: the first one that is set counts."""
_EXEMPTING = ("no_proxy", "NO_PROXY")
_SCHEMES = ("http", "https")
_ODD = re.compile(r"[^\x21-\x7e]")
_PORT = re.compile(r"(.*):([0-9]{1,5})\Z")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class _Exemption:
    """One entry of NO_PROXY: a name with all below it, or addresses; of one port, or all."""

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
    """The proxies that the environment names."""

    __slots__ = ("_add_problem", "_exemptions", "_none", "_variables")

    def __init__(self, variables: Mapping[str, str], add_problem: AddProblem) -> None:
        self._variables, self._add_problem = variables, add_problem
        _, given = _first(variables, _EXEMPTING)
        entries = re.split(r"[,\s]+", given.lower())
        self._none = "*" in entries
        self._exemptions = [_exemption(entry) for entry in entries if entry.strip("*.")]

    def find(self, origin: URL) -> Proxy | None:
        """The proxy for a target, if any; a needed variable that cannot be used is a problem."""
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
    """The name and value of the first that is set; an empty one is not, as with curl."""
    found = ((name, variables.get(name, "").strip()) for name in names)
    return next(((name, value) for name, value in found if value), ("", ""))


def _exemption(entry: str) -> _Exemption:
    """`example.com`, `.example.com`, `*.example.com`, `10.0.0.0/8`, `::1`, `[::1]:443`, `a:80`. Of
    none of these forms, it names a host that there is not.
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
    """Raises ValueError with what is wrong, in words that show nothing of the value's secrets."""
    scheme, separator, _ = given.partition("://")
    if separator and scheme.lower() not in _SCHEMES:
        raise ValueError(
            f"the relay can use http:// and https:// proxies, not {scheme[:20]!r}; unset it, or"
            " name the hosts to be called directly in NO_PROXY"
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
        raise ValueError("its user and password may have no characters beyond Latin-1") from None
    if ":" in user:
        raise ValueError("its user may have no colon")
    shown = str(URL.build(scheme=url.scheme, host=host, port=port)).rstrip("/")
    if url.is_default_port():
        shown = f"{shown}:{port}"
    return Proxy(str(url), shown, variable)
