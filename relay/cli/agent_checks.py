"""`relay doctor --agents`: test each connected program with one call that costs nothing.

Owns the calls. URL and key are those that the program's own files have now, so a setting that was
changed since is found; the call is a GET of the provider's models, through the relay.
"""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from relay.cli.agent_tools import (
    BASES,
    TOOLS,
    Base,
    Key,
    Setting,
    Tool,
    Vendor,
    is_key,
    without_password,
)
from relay.cli.connections import (
    ConnectFailed,
    Connection,
    load_record,
    read_settings,
    records_folder,
)
from relay.cli.findings import Finding, Say, elapsed_ms, report
from relay.cli.settings_formats import ENV, value_at
from relay.registry.urls import BadUrl, read_url

_TIMEOUT_S = 20.0
_ANSWER_BYTES = 4 * 1024 * 1024


class _Probe(NamedTuple):
    vendor: Vendor
    url: str
    path: str
    key: str
    setting: str


def check_agents(
    home: Path, environment: Mapping[str, str], names: Collection[str], say: Say
) -> bool:
    """Test the connected programs, or those of these names; say a line for each call. True if none
    failed.
    """
    folder, failed, width = records_folder(home, environment), 0, max(map(len, TOOLS))
    connected = 0
    for name in (*TOOLS, "env"):
        if names and name not in names:
            continue
        try:
            record = load_record(folder, name)
            findings = list(_check(name, record, home, environment)) if record is not None else []
        except ConnectFailed as error:
            advice = f"run `relay connect {name}` when that is corrected"
            findings = [Finding("FAILED", str(error), "the settings", advice)]
            record = Connection(name, "")
        connected += record is not None
        if record is None:
            findings = [Finding("not tried", f"not connected: `relay connect {name}`")]
        for finding in findings:
            report(f"{name:<{width}}", finding, say)
        failed += sum(finding.result == "FAILED" for finding in findings)
    unknown = set(names) - {*TOOLS, "env"}
    for name in sorted(unknown):
        say(f"{name}: `relay connect` knows no such program")
    say(f"{connected} program(s) connected, {failed} problem(s).")
    return not failed and not unknown


def _check(
    name: str, record: Connection, home: Path, environment: Mapping[str, str]
) -> Iterator[Finding]:
    if (tool := TOOLS.get(name)) is None:
        yield Finding("not tried", "its variables are those of a shell, which is not looked into")
        return
    for probe in _probes(tool, home, environment):
        if isinstance(probe, Finding):
            yield probe
        elif probe.url != record.url and not probe.url.startswith(f"{record.url}/"):
            where = without_password(probe.url, "…")
            what = f"{probe.setting} is {where}, and not a URL of {record.url}"
            advice = f"run `relay connect {name}` again, or with --undo"
            yield Finding("FAILED", what, "the settings", advice)
        else:
            yield _get(name, probe)


def _probes(tool: Tool, home: Path, environment: Mapping[str, str]) -> Iterator[_Probe | Finding]:
    """Yield the calls of a program, or a finding for a setting that is not there."""
    for file in tool.files:
        path = file.path(home, environment)
        _, settings = read_settings(path, file.format)
        if file.format is ENV:  # the environment wins over the file
            settings |= {name: environment[name] for name in settings if name in environment}
        keys = [setting for setting in file.settings if isinstance(setting.value, Key)]
        for setting in file.settings:
            if not isinstance(setting.value, Base):
                continue
            vendor, _, endpoint = BASES[setting.value.name]
            beside = [key for key in keys if key.path[:-1] == setting.path[:-1]] or keys
            url, key = value_at(settings, setting.path), value_at(settings, beside[0].path)
            if not isinstance(url, str) or not isinstance(key, str) or not is_key(key):
                yield _missing(setting, beside[0], path)
            else:
                yield _Probe(vendor, url.rstrip("/"), endpoint, key, setting.name)


def _missing(setting: Setting, key: Setting, path: Path) -> Finding:
    what = f"{path} has no {setting.name} or no {key.name}"
    return Finding("FAILED", what, "the settings", "run `relay connect` for it again")


def _get(name: str, probe: _Probe) -> Finding:
    began = monotonic()
    what = f"GET {probe.vendor} {probe.path.partition('?')[0]}"
    try:
        answer = _answer(probe)
    except BadUrl as error:
        return Finding("FAILED", f"{probe.setting} {error}", "the settings", _again(name))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        advice = f"start the relay, or run `relay connect {name} --url URL` with its URL"
        return Finding("FAILED", f"{what}: no relay answers ({reason})", "network", advice)
    # A provider may have no list of models, but refuse a wrong key before it says so.
    if answer.is_list or (answer.status == 404 and answer.source == "provider"):
        return Finding("ok", f"{what}: {answer.status} in {elapsed_ms(began)}")
    what = f"{what}: {answer.status} {answer.message}".rstrip()
    if answer.source is None:
        advice = f"run `relay connect {name} --url URL` with the relay's URL"
        return Finding("FAILED", f"{what} of a server that is no relay", "network", advice)
    if answer.code and answer.status in (401, 403):
        return Finding("FAILED", what, "the client's key", _again(name))
    if answer.code:
        return Finding("FAILED", what, "the relay", f"docs/errors.md explains {answer.code}")
    advice = f"`relay doctor {probe.vendor}`, in the relay's folder, says more"
    return Finding("FAILED", what, "the provider", advice)


def _again(name: str) -> str:
    return (
        f"run `relay connect {name}` again in the relay's folder: it makes a new key if the old one"
        " is not valid, and writes the settings anew"
    )


class _Answer(NamedTuple):
    status: int
    code: str
    """The relay's error code."""
    source: str | None
    """Who answered, "provider" or "relay"; None for a server that is no relay."""
    message: str
    is_list: bool
    """True for the JSON of a successful call."""


def _answer(probe: _Probe) -> _Answer:
    """Make the call. Raises BadUrl, OSError, HTTPException; ValueError for some errors of TLS."""
    place = urlsplit(str(read_url(probe.url)))
    secure = place.scheme == "https"
    connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = connect(place.hostname or "", place.port, timeout=_TIMEOUT_S)
    headers = {"accept": "application/json", "cf-aig-skip-cache": "true"}
    if probe.vendor == "google-ai-studio":
        headers["x-goog-api-key"] = probe.key
    else:
        headers["Authorization"] = f"Bearer {probe.key}"
    with contextlib.closing(connection):
        connection.request("GET", place.path + probe.path, headers=headers)
        response = connection.getresponse()
        body = response.read(_ANSWER_BYTES)
    source = response.headers.get("x-relay-error-source")
    if source is None and "cf-aig-log-id" in response.headers:
        source = "provider"
    code = response.headers.get("x-relay-error", "")
    answer = _object(body)
    is_list = response.status < http.client.MULTIPLE_CHOICES and answer is not None
    return _Answer(response.status, code, source, _message(answer), is_list)


def _object(body: bytes) -> dict[str, Any] | None:
    """The object of a JSON body, or the first one of an array, as Google sends errors."""
    answer: Any = None
    with contextlib.suppress(ValueError):
        answer = json.loads(body)
    if isinstance(answer, list) and answer:
        answer = answer[0]
    return answer if isinstance(answer, dict) else None


def _message(answer: dict[str, Any] | None) -> str:
    """The message of an error in the format of any vendor; empty if there is none."""
    error = answer.get("error") if answer is not None else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""
