"""Mistakes in gateway.yaml are refused in plain words at their place, or cause a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay.registry.load import Config, ConfigError, Sources, load
from tests.relays import canary

P = "providers:\n  p:\n    base_url: "


def _load(folder: Path, text: str, env: str = "") -> Config:
    (folder / "gateway.yaml").write_text(text, newline="")
    (folder / ".env").write_text(env)
    (folder / ".env").chmod(0o600)
    return load(Sources(folder / "gateway.yaml", folder / ".env"))


def _refused(folder: Path, text: str, env: str = "") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        _load(folder, text, env)
    return caught.value


def _problems(folder: Path, text: str, env: str = "") -> list[str]:
    return [str(problem) for problem in _refused(folder, text, env).problems]


# Keys of an older relay ---------------------------------------------------------------------------

RENAMED = {
    "meter": (f"{P}https://x.example\n    meter: openai\n", "gateway.yaml:4:5: providers.p.meter: `meter` was renamed to `format`"),
    "meter, beside format": (f"{P}https://x.example\n    format: openai\n    meter: openai\n", "gateway.yaml:5:5: providers.p.meter: `meter` was renamed to `format`"),
    "jobs": ("log: {}\njobs: {cache: cloudflare}\n", "gateway.yaml:2:1: jobs: `jobs` was renamed to `cloudflare.delegate`"),
}


@pytest.mark.parametrize("case", RENAMED)
def test_a_renamed_key_is_refused_with_its_new_name(case: str, tmp_path: Path) -> None:
    text, expected = RENAMED[case]
    assert _problems(tmp_path, text) == [expected]


@pytest.mark.parametrize("text", ["[cache, limits]", "{cache: cloudflare, limits: cloudflare}"])
def test_a_list_of_delegated_features_is_short_for_a_mapping(text: str, tmp_path: Path) -> None:
    delegation = _load(tmp_path, f"cloudflare: {{delegate: {text}}}").settings.cloudflare.delegate
    assert (delegation.retries, delegation.limits, delegation.cache) == ("relay", "cloudflare", "cloudflare")


@pytest.mark.parametrize("host", ["ai.example.com:8443", "https://ai.example.com", "ai.example.com/", "[::2]", "a b"])
def test_a_host_that_no_host_header_can_match_is_refused(host: str, tmp_path: Path) -> None:
    [problem] = _problems(tmp_path, f'server: {{hosts: ["{host}"]}}\n')
    assert problem.startswith("gateway.yaml:1:18: server.hosts.0: should be a host name or an address")


def test_hosts_may_be_names_addresses_and_any(tmp_path: Path) -> None:
    hosts = ["AI.example.com", "10.0.0.7", "fe80::1", "*"]
    assert _load(tmp_path, f"server: {{hosts: {hosts}}}\n").settings.server.hosts == hosts


def test_a_mistake_in_delegated_features_hides_no_problem_of_a_provider(tmp_path: Path) -> None:
    text = "cloudflare: {delegate: [cash]}\nproviders: {p: {base_url: https://x.example, fallback: [{provider: q}]}}\n"
    assert _problems(tmp_path, text) == [
        "gateway.yaml:1:14: cloudflare.delegate.cash: unknown key; did you mean 'cache'?",
        "gateway.yaml:2:58: providers.p.fallback.0.provider: there is no provider 'q'",
    ]


# YAML's own errors --------------------------------------------------------------------------------

SYNTAX = {
    "tab": ("server:\n\tport: 1", "gateway.yaml:2:1: the line is indented with a tab; YAML allows only spaces"),
    "unclosed quote": ('log:\n  level: "info\n  format: auto\n', "gateway.yaml:2:10: the quote that begins here is not closed"),
    "quote closed by the next one": ('log:\n  level: "info\n  format: "auto"\n', "gateway.yaml:3:12: text follows a closing quote: an earlier quote is not closed"),
    "quote within quotes": ("log: {level: 'it's'}", "gateway.yaml:1:18: a comma is missing before this"),
    "unquoted braces": (f"{P}{{HOST}}/v1\n", "gateway.yaml:3:21: text follows a closing } or ]; put a value that begins with { or [ in quotes"),
    "unquoted reference in braces": ("log: {level: ${LEVEL}}", 'gateway.yaml:1:14: between { } or [ ] a ${NAME} needs quotes: "${NAME}"'),
    "unclosed brace": ("log: {level: info", "gateway.yaml:1:6: the { that begins here is not closed"),
    "unclosed bracket": ("cors:\n  origins: [a\nlog: {}\n", "gateway.yaml:2:12: the [ that begins here is not closed"),
    "brace too many": ("log: {level: info}}\n", "gateway.yaml:1:19: text follows a closing } or ]"),
    "no space after a colon": ("server:\n  port:1\n  host: x", "gateway.yaml:2:7: a space is missing after `port:`"),
    "no space after a colon, at the end": ("log: {}\nserver:1\n", "gateway.yaml:2:7: a space is missing after `server:`"),
    "no colon": ("server:\n  port 1\n  host: x", "gateway.yaml:2:3: a colon is missing after this key"),
    "two colons": ("database: a: b", "gateway.yaml:1:12: a second `: ` in one line; if it belongs to the value, put the value in quotes"),
    "indented too deep": ("server:\n  port: 1\n   host: x", "gateway.yaml:3:4: the line is indented deeper than the one above, which has a value already"),
    "indented too little": ("server:\n    port: 1\n  host: x", "gateway.yaml:3:3: the line's indentation matches no line above"),
    "list beside keys": ("server:\n  port: 1\n  - x\n", "gateway.yaml:3:3: a list (`- item`) and a mapping (`key: value`) have the same indentation"),
    "list behind its key": ("include: - x.yaml\n", "gateway.yaml:1:10: a list cannot begin on the line of its key"),
    "missing comma": ("server: {port: 1 host: x}", "gateway.yaml:1:22: a comma is missing before this"),
    "comma too many": ("include: [a,, b]", "gateway.yaml:1:13: a value is missing before this comma"),
    "percent": ("database: %x", "gateway.yaml:1:11: a value cannot begin with %; put it in quotes"),
    "at": ("database: @x", "gateway.yaml:1:11: a value cannot begin with @; put it in quotes"),
    "star": ("database: *", "gateway.yaml:1:11: a value that begins with * needs quotes"),
    "greater": ("database: >x", "gateway.yaml:1:11: a value that begins with > needs quotes"),
    "closing brace": ("database: }", "gateway.yaml:1:11: this } closes nothing; put a value that begins with it in quotes"),
    "backslash": ('database: "C:\\data"', "gateway.yaml:1:15: within double quotes \\ begins an escape, and this is none: write \\\\ for a backslash, or use single quotes"),
    "control character": ("server:\n  host: \x01", "gateway.yaml:2:9: there is a control character (U+0001) here; remove it"),
    "directive": ("%YAML 3.0\n---\nserver: {}", "gateway.yaml:1:1: a line that begins with % is a directive"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), SYNTAX.values(), ids=SYNTAX)
def test_invalid_yaml_is_explained_with_its_line_and_a_caret(tmp_path: Path, text: str, problem: str) -> None:
    error = _refused(tmp_path, text)
    [found] = error.problems
    assert str(found).startswith(problem)
    shown, caret = found.excerpt
    assert caret == " " * (found.column - 1) + "^" and len(shown) == len(text.split("\n")[found.line - 1])
    assert found.in_full.splitlines() == [str(found), f"    {shown}", f"    {caret}"] and str(error) == found.in_full


@pytest.mark.parametrize(
    "line",
    [
        f'value: "Bearer {canary("key")}', f'value: "Bearer {canary("key")}" x', f'"{canary("key")}', f'database: "postgres://u:{canary("pw")}@h',
        f'headers: {{x: "{canary("h")}', f'api_key: "{canary("h")} ${{X}}', f"a: ['{canary('item')}",
    ],
)  # fmt: skip
def test_the_excerpt_of_a_line_contains_no_secret(tmp_path: Path, line: str) -> None:
    shown = str(_refused(tmp_path, f"providers:\n  p:\n    {line}\n"))
    assert "CANARY" not in shown and "7d1f" not in shown and "****" in shown


def test_a_long_line_is_truncated_around_the_caret(tmp_path: Path) -> None:
    [found] = _refused(tmp_path, "a: [" + "b, " * 2000 + "c d: e {\n").problems
    shown, caret = found.excerpt
    assert len(shown) <= 100 and len(caret) <= 101


# What YAML allows and gateway.yaml does not

PLAIN = {
    "missing space, only key": ("server:\n  port:1\n", "gateway.yaml:1:1: server: should be a mapping, but is text: a space is missing after `port:`"),
    "list for a mapping": ("server:\n  - port: 1\n", "gateway.yaml:1:1: server: should be a mapping, but is a list: write `key: value`, without the -"),
    "mapping for a list": ("limits:\n  requests: 1\n", "gateway.yaml:1:1: limits: should be a list, but is a mapping: write `- item` lines, or [item, item]"),
    "nothing for a mapping": ("server:\n", "gateway.yaml:1:1: server: should be a mapping, but is empty; write a value, or remove the key"),
    "mapping for text": (f"{P}{{HOST}}\n", "gateway.yaml:3:5: providers.p.base_url: should be text, but is a mapping: a value that begins with { needs quotes"),
    "mapping for a template": (f"{P}https://x\n    auth: {{header: k, value: {{KEY}}}}\n", "gateway.yaml:4:23: providers.p.auth.value: should be a list, but is a mapping: a value that begins with { needs quotes"),
    "list for text": (f"{P}[a]\n", "gateway.yaml:3:5: providers.p.base_url: should be text, but is a list: a value that begins with [ needs quotes"),
    "number for text": (f"{P}https://x\n    headers: {{a: 1}}\n", "gateway.yaml:4:15: providers.p.headers.a: should be text, but is a number: put it in quotes"),
    "text for a number": ("server: {port: eighty}", "gateway.yaml:1:10: server.port: should be a whole number, but is text"),
    "too large a number": (f"server: {{port: {'9' * 6000}}}", "gateway.yaml:1:10: server.port: should be a whole number, but is text"),
    "infinity": ("upstream: {idle_timeout_s: inf}", "gateway.yaml:1:12: upstream.idle_timeout_s: should be a finite number"),
    "too long a time": ("upstream: {idle_timeout_s: 99999999999}", "gateway.yaml:1:12: upstream.idle_timeout_s: should be less than or equal to 31622400"),
    "text for a boolean": ("demo: {enabled: maybe}", "gateway.yaml:1:8: demo.enabled: should be true or false, but is text"),
    "a misspelt choice": ("log: {level: Warning}", "gateway.yaml:1:7: log.level: should be 'debug', 'info', 'warning' or 'error'; did you mean 'warning'?"),
    "second document": ("log: {}\n---\nlog: {}\n", "gateway.yaml:2:1: a second document begins here; a file must have only one"),
    "tag": ("server: !!python/object:os.system {}", "gateway.yaml:1:9: server: a value that begins with ! needs quotes: tags are not supported"),
    "key that is a mapping": ("{a: 1}: 2", "gateway.yaml:1:1: a key must be plain text; put one that begins with { or [ in quotes"),
    "key that is nothing": ("server: {? : 1}", "gateway.yaml:1:11: server: a key is missing before the colon"),
    "no-break space": ("server:\n\u00a0\u00a0port: 1", "gateway.yaml:2:1: the key contains U+00A0, which only looks like a space"),
    "typographic quotes": ("server: {host: \u201cx\u201d}", "gateway.yaml:1:16: server.host: \u201c is not a quote in YAML; write \" or '"),
    "escaped control character": ('server: {host: "a\\0b"}', "gateway.yaml:1:16: server.host: contains a control character (U+0000)"),
    "lone surrogate": ('server: {host: "\\ud800"}', "gateway.yaml:1:16: server.host: contains a control character (U+D800)"),
    "end of a block": (f"{P}|\n      https://x\n", "gateway.yaml:3:15: providers.p.base_url: contains a control character (U+000A); write |- or >- instead of | or >"),
    "providers as a list": ("providers:\n  - name: openai\n", "gateway.yaml:1:1: providers: should be a mapping, but is a list: write `NAME:` with its keys below, not `- name: NAME`"),
    "plain text": ("hello", "gateway.yaml:1:1: should be a mapping, but is text"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), PLAIN.values(), ids=PLAIN)
def test_a_value_of_the_wrong_kind_is_explained(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in _problems(tmp_path, text)


def test_an_encoding_other_than_utf8_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_bytes("server: {}".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"gateway\.yaml:1:1: is not UTF-8 text but UTF-16; save it as UTF-8"):
        load(Sources(tmp_path / "gateway.yaml", None))
    (tmp_path / "gateway.yaml").write_bytes(b"log: {}\nserver: {host: \xe4}")
    with pytest.raises(ConfigError, match=r"gateway\.yaml:2:16: is not UTF-8 text$"):
        load(Sources(tmp_path / "gateway.yaml", None))


# Bounds -------------------------------------------------------------------------------------------

BOMBS = {
    "flow": ("x: " + "[" * 50_000, "nested too deeply"),
    "closed flow": ("x: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
    "mappings": ("{a: " * 5000, "nested too deeply"),
    "block": ("\n".join(" " * depth + "a:" for depth in range(600)), "nested too deeply"),
    "keys": ("? " * 2000, "nested too deeply"),
    "values": ("x: [" + "1," * 200_000, "more than 50000 values"),
}


@pytest.mark.parametrize(("text", "words"), BOMBS.values(), ids=BOMBS)
def test_a_file_that_is_nested_too_deeply_or_too_long_is_refused_at_the_limit(
    tmp_path: Path, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.registry.yaml_file.MAX_VALUES", 500)
    words = words.replace("50000", "500")
    problems = _problems(tmp_path, text)
    assert len(problems) == 1 and words in problems[0] and problems[0].startswith("gateway.yaml:")


def test_the_problems_of_one_file_are_bounded(tmp_path: Path) -> None:
    problems = _problems(tmp_path, "a: [" + "*x, " * 500 + "]")
    assert len(problems) <= 102


# Includes -----------------------------------------------------------------------------------------

INCLUDES = {
    "/etc/relay/*.yaml": "is an absolute path: name the file relative to gateway.yaml",
    "/etc/relay.yaml": "is an absolute path: name the file relative to gateway.yaml",
    "**": "`**` is not supported: name the folder, and use * for the files in it",
    "providers/**/*.yaml": "`**` is not supported: name the folder, and use * for the files in it",
    "a**b.yaml": "`**` is not supported: name the folder, and use * for the files in it",
    "": "is empty: name a file, or remove the entry",
    ".": "is not a pattern of file names",
    "..": "no file matches '..'",
    "[": "no file matches '['",
    "gateway.yaml": "gateway.yaml includes itself",
    "*.yaml": "gateway.yaml includes itself",
}


@pytest.mark.parametrize(("pattern", "words"), INCLUDES.items())
def test_an_invalid_include_is_refused_at_its_place(tmp_path: Path, pattern: str, words: str) -> None:
    assert _problems(tmp_path, f"log: {{}}\ninclude:\n  - '{pattern}'\n") == [f"gateway.yaml:3:5: include.0: {words}"]


def test_an_included_file_cannot_include_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: [b.yaml]")
    (tmp_path / "b.yaml").write_text("include: [a.yaml]")
    assert _problems(tmp_path, "include: [a.yaml, b.yaml]") == [
        "a.yaml:1:1: include: unknown key; only gateway.yaml can include files",
        "b.yaml:1:1: include: unknown key; only gateway.yaml can include files",
    ]


def test_a_file_that_two_patterns_match_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.yaml").write_text("providers: {a: {base_url: https://a}}")
    assert set(_load(tmp_path, "include: [more/a.yaml, more/*.yaml]").registry.providers) == {"a"}


def test_too_many_included_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.registry.files.MAX_INCLUDED", 2)
    (tmp_path / "more").mkdir()
    for name in "abc":
        (tmp_path / f"more/{name}.yaml").write_text("providers: {}")
    assert _problems(tmp_path, "include: [more/*]") == ["gateway.yaml:1:11: include.0: matches more than 2 files"]


# URLs, paths, headers -----------------------------------------------------------------------------

URLS = {
    "https://x /v1": "contains a blank or a control character",
    "https://u@x": "must not have user and password (…@); put the credential under `auth`",
    "https://u:p@x/v1": "must not have user and password (…@); put the credential under `auth`",
    "https://x/v1?a=b": "must not have a query (?…)",
    "https://x/v1?": "must not have a query (?…)",
    "https://x/v1#a": "must not have a fragment (#…)",
    "https://x/v1#": "must not have a fragment (#…)",
    "https://x/a/../b": "contains a dot segment",
    "https://x/./b": "contains a dot segment",
    "https://x/..": "contains a dot segment",
    "https://x/%2e%2e/b": "contains a dot segment",
    "https://x/%252e%252e/b": "contains a dot segment",
    "https://x\\y": "must not have a backslash",
    "https://x/%zz": "contains a character that must be percent-encoded",
    "https://x/ä": "contains a character that must be percent-encoded",
    "https://exämple.com": "should have its host in ASCII (xn--…)",
    "https://x:99999": "has an invalid host or port",
    "https://x:": "should have a port from 1 to 65535, or none",
    "https://x:0": "should have a port from 1 to 65535, or none",
    "https://x:port": "has an invalid host or port",
    "https://[::1": "has an invalid host or port",
    "https://a..b": "has an invalid host name",
    "https://<resource>.openai.azure.com": "has an invalid host name",
    "https://": "should be an http:// or https:// URL",
    "https:/x": "should be an http:// or https:// URL",
    "x.example.com": "should be an http:// or https:// URL",
    "": "should be an http:// or https:// URL",
    "wss://x": "should begin with https://, also for WebSockets",
    "ws://x": "should begin with http://, also for WebSockets",
}


@pytest.mark.parametrize(("url", "words"), URLS.items())
def test_an_invalid_url_is_refused_at_its_place(tmp_path: Path, url: str, words: str) -> None:
    assert _problems(tmp_path, f"{P}'{url}'") == [f"gateway.yaml:3:5: providers.p.base_url: {words}"]


@pytest.mark.parametrize(
    ("written", "origin", "prefix"),
    [
        (" https://x/v1 ", "https://x", "/v1"), ("HTTPS://x/v1/", "https://x", "/v1"), ("https://x:8443", "https://x:8443", ""),
        ("http://[::1]:80/a", "http://[::1]:80", "/a"), ("https://my_host-1.example.com./a%20b", "https://my_host-1.example.com.", "/a%20b"),
    ],
)  # fmt: skip
def test_a_url_is_normalised_only_in_blanks_scheme_and_trailing_slash(tmp_path: Path, written: str, origin: str, prefix: str) -> None:
    target = _load(tmp_path, f"{P}'{written}'").registry.providers["p"].rest
    assert (target.origin, target.prefix) == (origin, prefix)


OTHER_PLACES = {
    "headers": ('headers: {"a b": x}', 'gateway.yaml:4:15: providers.p.headers.a b: should be a header\'s name: letters, digits and dashes'),
    "header name": ('headers: {"a\\nb": x}', "gateway.yaml:4:15: providers.p.headers: the key contains a control character (U+000A)"),
    "header value": ('headers: {a: "x\\r\\ny: z"}', "gateway.yaml:4:18: providers.p.headers.a: contains a control character (U+000D)"),
    "framing": ("headers: {Content-Length: '5'}", "gateway.yaml:4:15: providers.p.headers.Content-Length: is a header that the relay itself sets"),
    "auth": ("auth: {header: 'a:', value: x}", "gateway.yaml:4:12: providers.p.auth.header: should be a header's name: letters, digits and dashes"),
    "auth.query": ("auth: {query: 'a&b', value: x}", "gateway.yaml:4:12: providers.p.auth.query: should be a plain name: letters, digits, . _ and -"),
    "paths": ("paths: {a: /x/../y}", "gateway.yaml:4:13: providers.p.paths.a: contains a dot segment"),
    "paths to a host": ("paths: {a: 'https://y#z'}", "gateway.yaml:4:13: providers.p.paths.a: must not have a fragment (#…)"),
    "check": ("check: 'a b'", "gateway.yaml:4:5: providers.p.check: contains a character that must be percent-encoded"),
    "slug": ("cloudflare: {slug: a/../b}", "gateway.yaml:4:18: providers.p.cloudflare.slug: contains a dot segment"),
    "socket": ("websocket: {default_path: a, base_url: 'https://u@x'}", "gateway.yaml:4:34: providers.p.websocket.base_url: must not have user and password (…@); put the credential under `auth`"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "problem"), OTHER_PLACES.values(), ids=OTHER_PLACES)
def test_each_value_that_becomes_part_of_a_request_is_checked(tmp_path: Path, line: str, problem: str) -> None:
    assert problem in _problems(tmp_path, f"{P}https://x\n    {line}\n")


@pytest.mark.parametrize(
    "text", ["server: {public_url: 'http://[:::'}", "redis: {url: 'redis://x:99999999'}", "database: 'postgres://[x'", "tracing: {endpoint: 'http://[x'}", "cloudflare: {account_id: 'a/../b'}", "cloudflare: {base_url: 'https://x?y'}"]
)  # fmt: skip
def test_an_invalid_url_of_another_section_is_refused(tmp_path: Path, text: str) -> None:
    [problem] = _problems(tmp_path, text)
    assert problem.startswith("gateway.yaml:1:")


@pytest.mark.parametrize("value", [":memory:", "sqlite:///:memory:", "sqlite://", "sqlite:///"])
def test_a_database_in_memory_is_refused_since_queries_have_connections_of_their_own(tmp_path: Path, value: str) -> None:
    [problem] = _problems(tmp_path, f"database: '{value}'")
    assert problem.startswith("gateway.yaml:1:") and "database: should be a file" in problem


def test_a_variable_with_a_control_character_is_refused_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGO", "a\nb")
    assert _problems(tmp_path, f"{P}https://x\n    headers: {{a: '${{LOGO}}'}}\n") == [
        "gateway.yaml:4:15: providers.p.headers.a: contains a control character (U+000A)"
    ]


# Hints --------------------------------------------------------------------------------------------

AUTH = 'here it is auth: {header: Authorization, value: "Bearer ${NAME}"}'
HINTS = {
    "api_key": (f"{P}https://x\n    api_key: k", f"providers.p.api_key: unknown key; {AUTH}"),
    "apiKey": (f"{P}https://x\n    apiKey: k", f"providers.p.apiKey: unknown key; {AUTH}"),
    "baseURL": ("providers: {p: {baseURL: https://x}}", "providers.p.baseURL: unknown key; did you mean 'base_url'?"),
    "base-url": ("providers: {p: {base-url: https://x}}", "providers.p.base-url: unknown key; did you mean 'base_url'?"),
    "api_base": ("providers: {p: {api_base: https://x}}", "providers.p.api_base: unknown key; here it is base_url"),
    "num_retries": (f"{P}https://x\n    num_retries: 2", "providers.p.num_retries: unknown key; here it is retries: {max_attempts: …}"),
    "model_list": ("model_list: []", "model_list: unknown key; here providers: is a mapping of name to {base_url, auth}"),
    "litellm_params": (f"{P}https://x\n    litellm_params: {{}}", "providers.p.litellm_params: unknown key; here providers: is a mapping of name to {base_url, auth}"),
    "virtual_keys": ("virtual_keys: []", "virtual_keys: unknown key; here they are clients"),
    "port": ("port: 8080", "port: unknown key; here it is server: {port: …}"),
    "litellm's variables": (f"{P}https://x\n    auth: {{header: k, value: os.environ/OPENAI_API_KEY}}", "providers.p.auth.value: os.environ/… is not supported; write ${OPENAI_API_KEY}"),
    "nearest": ("retires: {}", "retires: unknown key; did you mean 'retries'?"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), HINTS.values(), ids=HINTS)
def test_a_key_of_another_program_is_refused_with_its_name_in_this_one(tmp_path: Path, text: str, words: str) -> None:
    assert any(words in problem for problem in _problems(tmp_path, text))


def test_one_wrong_provider_hides_no_problem_of_another_or_of_a_section(tmp_path: Path) -> None:
    text = """\
providers:
  a: {base_ur: https://a}
  b: {base_url: "https://b b", fallback: [{provider: a}, {provider: other}]}
  c: {base_url: "${NOPE}"}
cache: {store: redis}
limits: [{requests: 1, tokens: 1}, {requests: 1, providers: [c, other]}]
log: {level: loud}
include: [/x.yaml]
"""
    problems = _problems(tmp_path, text)
    expected = [
        "2:3: providers.a.base_url: is missing", "2:7: providers.a.base_ur: unknown key; did you mean 'base_url'?",
        "3:7: providers.b.base_url: contains a blank or a control character", "4:7: providers.c.base_url: NOPE is not set; set it, or write ${NAME:-default}",
        "5:9: cache.store: needs redis.url", "6:10: limits.0: should have exactly one of requests, tokens, handshakes, calls_at_once, sessions_at_once",
        "6:65: limits.1.providers.1: there is no such provider", "7:7: log.level: should be 'debug', 'info', 'warning' or 'error'",
        "8:11: include.0: is an absolute path: name the file relative to gateway.yaml",
    ]  # fmt: skip
    assert problems == [f"gateway.yaml:{each}" for each in expected]


# Warnings -----------------------------------------------------------------------------------------


def _warnings(config: Config) -> list[str]:
    return [str(warning) for warning in config.warnings]


def test_a_dollar_without_braces_is_warned_about(tmp_path: Path) -> None:
    text = f"{P}https://x\n    auth: {{header: k, value: Bearer $THE_KEY}}\n    headers: {{a: $UNKNOWN, b: 5$, c: a$5}}\n"
    config = _load(tmp_path, text, f"THE_KEY={canary('key')}\n")
    assert _warnings(config) == [
        "gateway.yaml:4:23: providers.p.auth.value: `$` without braces is plain text; a variable is written ${THE_KEY}",
        "gateway.yaml:5:15: providers.p.headers.a: `$` without braces is plain text; a variable is written ${NAME}",
    ]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_around_a_variable_of_the_environment_are_removed_and_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quote: str) -> None:
    monkeypatch.setenv("THE_KEY", f" {quote}{canary('quoted')}{quote}\n")
    monkeypatch.setenv("NOT_USED", '"x"')
    config = _load(tmp_path, f"{P}https://x\n    auth: {{header: k, value: 'Bearer ${{THE_KEY}}'}}\n")
    assert config.registry.providers["p"].rest.pool[0].provider.value == f"Bearer {canary('quoted')}"
    [warning] = _warnings(config)
    assert warning.startswith("gateway.yaml:4:23: providers.p.auth.value: the value of the environment variable THE_KEY has quotes, which were removed")
    assert "CANARY" not in warning


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o644, True)])
def test_an_env_file_that_others_may_read_is_warned_about_with_the_command(tmp_path: Path, mode: int, warned: bool) -> None:
    _load(tmp_path, "{}", "THE_KEY=x\n")
    (tmp_path / ".env").chmod(mode)
    found = _warnings(load(Sources(tmp_path / "gateway.yaml", tmp_path / ".env")))
    assert found == ([f".env:1:1: other users may read this file (mode {mode:04o}): chmod 600 {tmp_path / '.env'}"] if warned else [])


def test_a_credential_of_systemd_is_not_taken_for_a_file_that_others_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its access list for the user of the service is shown as the mode of the group."""
    _load(tmp_path, "{}", "THE_KEY=x\n")
    (tmp_path / ".env").chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert _warnings(load(Sources(tmp_path / "gateway.yaml", tmp_path / ".env"))) == []


def test_an_env_file_without_values_is_not_warned_about(tmp_path: Path) -> None:
    _load(tmp_path, "{}", "# THE_KEY=\nOTHER=\n")
    (tmp_path / ".env").chmod(0o644)
    assert _warnings(load(Sources(tmp_path / "gateway.yaml", tmp_path / ".env"))) == []


def test_a_line_of_the_env_file_that_sets_nothing_is_warned_about(tmp_path: Path) -> None:
    found = _warnings(_load(tmp_path, "{}", "A=1\nB='not closed\nC=3\n"))
    assert found == [".env:2:1: sets nothing: a line is NAME=value, and a quote that begins must end"]


def test_the_shipped_files_give_no_warning() -> None:
    assert load(Sources(Path(__file__).parent.parent.parent / "gateway.yaml", None)).warnings == ()


def test_a_mistake_in_a_short_form_has_its_place_and_the_known_keys(tmp_path: Path) -> None:
    assert _problems(tmp_path, "models: {a: [{x: 1}]}\n") == [
        "gateway.yaml:1:14: models.a.0.provider: is missing", "gateway.yaml:1:14: models.a.0.model: is missing",
        "gateway.yaml:1:15: models.a.0.x: unknown key; known keys: model, provider, weight",
    ]  # fmt: skip


@pytest.mark.parametrize("number", ["1_0", "\\u0663", "ten"])
def test_a_number_in_text_has_plain_digits_only(number: str, tmp_path: Path) -> None:
    [problem] = _problems(tmp_path, f'limits: [{{requests: "{number}", window_s: 1}}]\n')
    assert problem == "gateway.yaml:1:11: limits.0.requests: should be a whole number, but is text"


UNPRICED = {
    "another word": ("deny", "2:3: budgets.unpriced: should be allow, refuse or {usd: AMOUNT}"),
    "a number": ("0.01", "2:3: budgets.unpriced: should be allow, refuse or {usd: AMOUNT}"),
    "a list": ("[allow]", "2:3: budgets.unpriced: should be allow, refuse or {usd: AMOUNT}"),
    "an empty mapping": ("{}", "2:3: budgets.unpriced: should be allow, refuse or {usd: AMOUNT}"),
    "no amount": ("{usd: null}", "2:3: budgets.unpriced: should be allow, refuse or {usd: AMOUNT}"),
    "another key": ("{usd: 1, x: 2}", "2:22: budgets.unpriced.x: unknown key; known keys: usd"),
    "a wrong amount": ("{usd: -1}", "2:14: budgets.unpriced.usd: should be greater than or equal to 0"),
    "no number": ("{usd: '1_0'}", "2:14: budgets.unpriced.usd: should be a number such as 20 or 0.5"),
}


@pytest.mark.parametrize("case", UNPRICED)
def test_a_mistake_in_the_charge_of_unpriced_calls_has_one_message(case: str, tmp_path: Path) -> None:
    text, expected = UNPRICED[case]
    assert _problems(tmp_path, f"budgets:\n  unpriced: {text}\n") == [f"gateway.yaml:{expected}"]


@pytest.mark.parametrize("usd", ["'1_0'", '"\\u0663"', "' 5'", "'+5'", "true", "[5]", ".nan"])
def test_an_amount_that_is_no_plain_number_is_refused(usd: str, tmp_path: Path) -> None:
    assert _problems(tmp_path, f"database: x.db\nbudgets: {{rules: [{{usd: {usd}, period: day}}]}}\n")[0].endswith(
        "budgets.rules.0.usd: should be a number such as 20 or 0.5"
    )
