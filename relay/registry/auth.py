"""Interpret the `auth` sections of a provider: where its credential goes, and the key pool.

Owns the meaning and the checks of these sections. credentials.py expands the templates in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from relay.core.provider import AuthRule, Credential, Strategy
from relay.registry import entries
from relay.registry.credentials import Expanded
from relay.registry.problems import Where


@dataclass(frozen=True, slots=True)
class Auth:
    """Where a credential goes, the credentials that are set, and the variables that are not."""

    rule: AuthRule | None = None
    ready: tuple[Credential, ...] = ()
    missing: tuple[str, ...] = ()
    strategy: Strategy = "round_robin"
    weights: tuple[float, ...] = ()
    """A weight for each of `ready`, or empty."""
    affinity: bool = True


@dataclass(frozen=True, slots=True)
class AuthReader:
    """Reads the `auth` sections of one provider; problems go to `add_problem`."""

    provider: str
    main: entries.Auth | None
    templates: Mapping[Where, Expanded]
    add_problem: Callable[[Where, str], None]

    def own(self) -> Auth:
        """Read the provider's own section."""
        return self.read(self.main, ("auth",))

    def read(self, auth: entries.Auth | None, where: Where) -> Auth:
        """Read the section at `where`."""
        if auth is None:
            return Auth()
        places = [
            (place, name)
            for place in ("header", "query", "subprotocol")
            if (name := getattr(auth, place))
        ]
        if len(places) != 1:
            self.add_problem(where, "should name exactly one of header, query, subprotocol")
            return Auth()
        place, name = places[0]
        templates = self._templates_at(where)
        if not templates:
            return Auth(AuthRule(place, name))  # type: ignore[arg-type]
        rule = AuthRule(place, name, templates[0].scheme)  # type: ignore[arg-type]
        for template in templates:
            if not template.missing and not _is_header_value(template.text):
                self.add_problem((*where, "value"), "contains a character that no header may have")
        ready = tuple(
            Credential(rule.place, rule.name, template.text, ", ".join(template.names))
            for template in templates
            if not template.missing
        )
        missing = tuple(dict.fromkeys(name for template in templates for name in template.missing))
        weights = self._weights(auth, where, templates)
        missing = () if ready else missing
        return Auth(rule, ready, missing, auth.pool, weights, auth.affinity)

    def _weights(
        self, auth: entries.Auth, where: Where, templates: list[Expanded]
    ) -> tuple[float, ...]:
        if (auth.pool == "weight") != bool(auth.weights):
            self.add_problem(where, "`pool: weight` and `weights` go together")
        elif auth.weights and len(auth.weights) != len(templates):
            self.add_problem((*where, "weights"), f"should be {len(templates)}, one for each value")
        else:
            pairs = zip(templates, auth.weights, strict=False)
            return tuple(weight for template, weight in pairs if not template.missing)
        return ()

    def _templates_at(self, where: Where) -> list[Expanded]:
        place = ("providers", self.provider, *where, "value")
        return [expanded for at, expanded in self.templates.items() if at[: len(place)] == place]

    def merged(self, auth: entries.Auth | None, where: Where) -> Auth:
        """Read the section at `where`. Without a `value` it has the provider's secrets; without the
        section, the provider's own auth applies.
        """
        own = self.own()
        if auth is None:
            return own
        given = self.read(auth, where)
        if auth.value or given.rule is None:
            return given
        scheme = own.rule.scheme if own.rule else ""
        moved = tuple(
            given.rule.credential(c.value.removeprefix(scheme), c.label) for c in own.ready
        )
        return replace(own, rule=given.rule, ready=moved)


def _is_header_value(text: str) -> bool:
    return text.isprintable() and text.isascii()
