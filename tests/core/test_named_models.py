"""Which models a request names: every row of docs/models-per-client.md, and every disguise."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import model_search
from relay.core.formats import Format
from relay.core.model_patterns import allowed
from relay.core.model_search import Found, Named, Unreadable, search_json
from relay.core.named_models import (
    CallText,
    is_named_at,
    models_of_call,
    models_of_handshake,
    models_of_message,
    places_of_call,
    places_of_session,
    reads_model,
    socket_rule,
)
from tests.processes import ROOT

JSON = ("application/json",)
DOCUMENT = (ROOT / "docs/models-per-client.md").read_text()
ROWS = [tuple(cell.strip().strip("`") for cell in line.split("|")[1:5]) for line in DOCUMENT.splitlines() if re.match(r"\| \w+ \| (?:body|form|path|query|message) \|", line)]


def nested(field: str, value: Any) -> Any:
    """`a.b` -> {"a": {"b": value}}"""
    for name in reversed(field.split(".")):
        value = {name: value}
    return value


def form(*fields: tuple[str, str]) -> tuple[bytes, tuple[str, ...]]:
    parts = "".join(f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields)
    return f"{parts}--b--\r\n".encode(), ("multipart/form-data; boundary=b",)


def call(format_: str, body: bytes | None = b"", types: tuple[str, ...] = JSON, path: str = "", query: str = "") -> Found:
    return models_of_call(CallText(format_, path, query, types, body))


def models(found: Found) -> list[str]:
    assert not isinstance(found, Unreadable), found
    return [each.model for each in found]


def request_of(format_: str, where: str, field: str) -> Found:
    """Name the model `m` at this place, with nothing else around it."""
    if where == "path":
        path = "/queue/m/requests/1" if field == "app" else f"/v1/{field}/m:generateContent"
        return call(format_, path=path)
    if where == "query":
        name, _, inner = field.partition(".")
        return call(format_, query=f"a=1&{name}=" + (json.dumps({inner: "m"}).replace(" ", "%20") if inner else "m"))
    if where == "form":
        return call(format_, *form(("file", "x"), (field, "m")))
    data = json.dumps({"type": "x", "text": "hello"} | nested(field, "m")).encode()
    return models_of_message(format_, data) if where == "message" else call(format_, data)


# The table ----------------------------------------------------------------------------------------


def test_a_list_of_models_chooses_only_where_a_vendor_falls_back() -> None:
    for endpoint, expected in (("chat/completions", True), ("v1/responses", True), ("images/generations", False)):
        assert is_named_at(places_of_call("POST", "openai", endpoint), [Named("body", "models", "m")]) is expected


def test_the_table_has_every_wire_format() -> None:
    assert {row[0] for row in ROWS} == set(Format.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("format_", "where", "field", "chooses"), ROWS)
def test_a_documented_field_names_a_model(format_: str, where: str, field: str, chooses: str) -> None:
    found = request_of(format_, where, field)
    expected = {"tunedModels": "tunedModels/m", "preset": "@preset/m"}.get(field, "m")
    assert isinstance(found, tuple) and Named(where, field, expected) in found  # type: ignore[arg-type]
    assert set(models(found)) == {expected}


@pytest.mark.parametrize(("format_", "where", "field"), [row[:3] for row in ROWS if row[3] == "yes"])
def test_a_documented_place_chooses_the_model_of_a_call(format_: str, where: str, field: str) -> None:
    found = request_of(format_, where, field)
    assert isinstance(found, tuple)
    endpoints = ["v1beta/interactions", "async/chat/completions", "images/generations"]
    assert any(is_named_at(places_of_call("POST", format_, endpoint), found) for endpoint in endpoints)


SESSIONS = [
    ("openai", "responses", "message", "model"), ("openai", "responses", "message", "response.model"), ("openai", "live/sessions", "message", "session.model"),
    ("openai", "realtime", "query", "model"), ("openai", "realtime/translations", "query", "model"),
    ("google", "ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent", "message", "setup.model"),
    ("elevenlabs", "v1/text-to-speech/v/stream-input", "query", "model_id"), ("elevenlabs", "v1/text-to-dialogue/stream-input", "query", "model_id"),
    ("elevenlabs", "v1/speech-to-text/realtime", "query", "model_id"), ("cartesia", "tts/websocket", "message", "model_id"), ("cartesia", "stt/turns/websocket", "query", "model"),
    ("deepgram", "v2/listen", "query", "model"), ("deepgram", "v1/speak", "query", "model"), ("deepgram", "v1/agent/converse", "message", "agent.think.provider.model"),
    ("assemblyai", "v3/ws", "query", "speech_model"), ("fal", "fal-ai/flux/realtime", "path", "app"),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "endpoint", "where", "field"), SESSIONS)
def test_the_model_of_a_session_is_read_at_its_place(format_: str, endpoint: str, where: str, field: str) -> None:
    rule = socket_rule(format_, endpoint)
    assert rule is not None and (format_, where, field) in {row[:3] for row in ROWS}
    assert is_named_at(places_of_session(rule, ""), [Named(where, field, "m")])  # type: ignore[arg-type]
    assert not is_named_at(places_of_session(rule, ""), [Named("message", "session.input_audio_transcription.model", "m")])


@pytest.mark.parametrize(("format_", "endpoint"), [("elevenlabs", "v1/convai/conversation"), ("cartesia", "agents/stream/a"), ("openai", "stt"), ("anthropic", "x")])
def test_the_model_of_an_agent_is_not_read(format_: str, endpoint: str) -> None:
    assert socket_rule(format_, endpoint) is None


def test_a_transcription_session_may_name_its_model_in_a_message() -> None:
    rule = socket_rule("openai", "realtime")
    assert rule is not None
    named = [Named("message", "session.audio.input.transcription.model", "m")]
    assert is_named_at(places_of_session(rule, "intent=transcription"), named)
    assert not is_named_at(places_of_session(rule, "intent=x"), named)


READ = [
    ("POST", "openai", "chat/completions"), ("POST", "openai", "videos"), ("POST", "anthropic", "v1/messages/batches"), ("POST", "google", "v1beta/models/g:generateContent"),
    ("POST", "google", "v1beta/models/g:batchGenerateContent"), ("POST", "assemblyai", "v2/transcript"), ("POST", "deepgram", "v1/listen"), ("POST", "elevenlabs", "v1/text-to-speech/v/stream"),
    ("POST", "elevenlabs", "v1/speech-to-speech/v/stream"), ("GET", "fal", "queue/fal-ai/flux/requests/1/status"), ("PUT", "fal", "queue/fal-ai/flux/requests/1/cancel"),
    ("POST", "openai", "async/chat/completions"), ("PUT", "openai", "chat/completions"), ("GET", "openai", "models"), ("GET", "openai", "v1/models/gpt-5"),
]  # fmt: skip
NOT_READ = [
    ("POST", "openai", "files"), ("POST", "openai", "batches"), ("GET", "openai", "responses/resp_1"), ("POST", "openai", "responses/resp_1/cancel"), ("POST", "openai", "realtime/client_secrets"),
    ("POST", "openai", "fine_tuning/jobs"), ("GET", "openai", "chat/completions"), ("DELETE", "openai", "models/ft"), ("POST", "elevenlabs", "v1/convai/agents/create"),
    ("POST", "fal", "rest/storage/upload/initiate"), ("POST", "openai", "chat/completion%73"), ("POST", "google", "v1beta/cachedContents"), ("POST", "openai", ""), ("GET", "fal", ""),
]  # fmt: skip


@pytest.mark.parametrize(("method", "format_", "endpoint"), READ)
def test_the_model_of_these_calls_is_read(method: str, format_: str, endpoint: str) -> None:
    assert reads_model(method, format_, endpoint)


@pytest.mark.parametrize(("method", "format_", "endpoint"), NOT_READ)
def test_the_model_of_any_other_call_is_not_read(method: str, format_: str, endpoint: str) -> None:
    assert not reads_model(method, format_, endpoint)


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "Model", "MODEL", "model_id", "modelId", "model-id", "models", "base_model", "speechModel", "analysis_llm", "model_name", "model\0", " model ", "model.", "session.model", "mode\u006c"])
def test_a_name_is_compared_as_the_most_tolerant_parser_does(name: str) -> None:
    assert models(call("openai", json.dumps({name: "m"}).encode())) == ["m"]


@pytest.mark.parametrize("name", ["modell", "modeled", "mode", "remodeling", "prompt", "x" * 100 + "model"])
def test_another_name_names_nothing(name: str) -> None:
    assert models(call("openai", json.dumps({name: "m"}).encode())) == []


VALUES: list[tuple[Any, list[str]]] = [
    ("m", ["m"]), (["a", "b"], ["a", "b"]), ([["a"], "b"], ["a", "b"]), ({"id": "m", "speed": "fast"}, ["m"]), ({"name": "m"}, ["m"]), ([{"id": "a"}, "b"], ["a", "b"]),
    ("", []), (None, []), (5, []), (True, []), ({"type": "string", "description": "d"}, []), ({"type": {"model": "m"}}, ["m"]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), VALUES)
def test_a_model_is_a_text_a_list_or_an_object(value: Any, expected: list[str]) -> None:
    assert models(call("openai", json.dumps({"model": value}).encode())) == expected


def test_the_values_of_a_plural_are_models_whatever_their_names_are() -> None:
    assert models(call("openai", b'{"models":{"fast":"a","slow":"b"}}')) == ["a", "b"]


DATA = [
    ("openai", {"metadata": {"model": "m"}}), ("openai", {"tools": [{"type": "function", "name": "f", "parameters": {"examples": [{"model": "m"}]}}]}),
    ("openai", {"functions": [{"name": "f", "parameters": {"model": "m"}}]}), ("openai", {"prompt": {"id": "p", "variables": {"car_model": "m"}}}),
    ("openai", {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"const": {"model": "m"}}}}}), ("openai", {"input": [{"type": "image_generation_call", "svg_usage": {"model": "m"}}]}),
    ("anthropic", {"messages": [{"content": [{"type": "tool_use", "id": "1", "name": "Task", "input": {"model": "haiku"}}]}]}), ("anthropic", {"tools": [{"name": "t", "input_schema": {"default": {"model": "m"}}}]}),
    ("google", {"contents": [{"parts": [{"functionCall": {"name": "f", "args": {"model": "m"}}}, {"functionResponse": {"name": "f", "response": {"model": "m"}}}]}]}),
    ("google", {"generationConfig": {"responseSchema": {"example": {"model": "m"}}}, "labels": {"model": "m"}}), ("cohere", {"documents": [{"model": "m"}]}),
    ("elevenlabs", {"dynamic_variables": {"car_model": "m"}}),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "body"), DATA)
def test_the_data_of_the_application_names_nothing(format_: str, body: Any) -> None:
    assert models(call(format_, json.dumps(body).encode())) == []
    assert "m" in models(call("fal", json.dumps(body).replace("haiku", "m").encode())), "fal: the input of any app"


NO_DATA = [
    ("openai", '{"tools":[{"type":"openrouter:advisor","name":"a","parameters":{"model":"m"}}]}'), ("openai", '{"tools":[{"type":"function","type":"x","name":"a","parameters":{"model":"m"}}]}'),
    ("openai", '{"tools":[{"type":"function","Type":"x","name":"a","parameters":{"model":"m"}}]}'), ("openai", '{"tools":[{"name":5,"parameters":{"model":"m"}}]}'),
    ("openai", '{"type":"response.create","name":"a","response":{"model":"m"}}'), ("openai", '{"input":{"model":"m"}}'), ("anthropic", '{"type":"tool_use","type":"message","input":{"model":"m"}}'),
    ("openai", '{"documents":[{"model":"m"}]}'), ("openai", '{"type":"tool_use","input":[{"tools":[{"model":"m"}]}]}'), ("anthropic", '{"id":"p","variables":{"model":"m"}}'),
    ("openai", '{"name":"a","response":{"model":"m"}}'),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "body"), NO_DATA)
def test_what_only_looks_like_data_of_the_application_is_searched(format_: str, body: str) -> None:
    assert models(call(format_, body.encode())) == ["m"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("models/g", "g"), ("publishers/google/models/g", "g"), ("projects/p/locations/l/publishers/google/models/g", "g"), ("tunedModels/g", "tunedModels/g"), ("publishers/x/models/g", "publishers/x/models/g"), ("a/models/g", "a/models/g")],
)
def test_a_prefix_of_google_is_no_part_of_the_name(value: str, expected: str) -> None:
    assert models(call("google", json.dumps({"model": value}).encode())) == [expected]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1beta/models/g:generateContent", "g"), ("/v1/projects/p/locations/l/publishers/google/models/g:predict", "g"), ("/v1/publishers/anthropic/models/c:rawPredict", "publishers/anthropic/models/c"),
        ("/v1beta/%6Dodels/g%2D1:generateContent", "g-1"), ("/v1beta/models/a:b:generateContent", "a:b"), ("/openai/deployments/d/chat/completions", "d"), ("/v1/models/a/models/b:x", "a b"), ("/v1/models/a%2Fb:x", "a/b"),
    ],
)  # fmt: skip
def test_a_path_is_decoded_before_its_model_is_read(path: str, expected: str) -> None:
    assert " ".join(models(call("openai", path=path))) == expected


@pytest.mark.parametrize("path", ["fal-ai/flux", "queue/fal-ai/flux", "ws/fal-ai/flux", "fal-ai/flux/realtime", "fal-ai/flux/stream", "queue/fal-ai/flux/requests/1/status", "fal%2Dai/flux"])
def test_the_app_of_fal_is_its_model(path: str) -> None:
    assert models(call("fal", path=path)) == ["fal-ai/flux"]


def test_a_preset_within_a_model_is_named_too() -> None:
    assert models(call("openai", b'{"model":"a@preset/b"}')) == ["a", "@preset/b"]
    assert models(call("openai", b'{"model":"@preset/b"}')) == ["@preset/b"]


@pytest.mark.parametrize("query", ["model=a&model=b", "model=a;model=b", "model=a&Model=b", "model=a&%6Dodel=b", "model=a&model%5B%5D=b", "model=a&+model=b"])
def test_a_query_with_two_models_is_unreadable(query: str) -> None:
    assert isinstance(call("deepgram", query=query), Unreadable)


def test_a_list_in_a_query_is_split() -> None:
    assert models(call("assemblyai", query="speech_models=a,b%2Cc")) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["model", "Model", "session[model]", "model[0]", "model[]", "session.model"])
def test_a_form_names_models_in_every_notation(name: str) -> None:
    assert models(call("openai", *form((name, "m")))) == ["m"]
    assert models(call("openai", f"x=1&{name}=m".encode(), ("application/x-www-form-urlencoded",))) == ["m"]


def test_json_in_a_form_is_searched_and_text_that_begins_like_it_is_not() -> None:
    assert models(call("openai", *form(("session", '{"model":"m"}'), ("prompt", "[a photo] of a model")))) == ["m"]


# Disguises ----------------------------------------------------------------------------------------

UNREADABLE = [
    b'{"model":"a","model":"b"}', b'{"model":"a","mod\\u0065l":"b"}', b'{"model":"a","MODEL":"b"}', b'{"a":{"models":["a"],"models":["b"]}}', b'{"model":"a"} {"model":"b"}', b'{"model":"a"}x',
    b'\xef\xbb\xbf{"model":"a"}', '{"model":"a"}'.encode("utf-16"), '{"model":"a"}'.encode("utf-16-le"), b'{"model":"a",}', b'{"model":"a"/**/}', b"{'model':'a'}", b"{model:'a'}", b'{"model":"a","t":NaN}',
    b'{"model":"a","t":-Infinity}', b'{"model":"a","x":"\x01"}', b'{"model":"caf\xe9"}', b"[" * 100_000, b'{"a":' * 150_001 + b"1" + b"}" * 150_001, b"\x1f\x8b\x08\x00", b"model=a", b'{"model":"a"', b" ",
]  # fmt: skip


@pytest.mark.parametrize("body", UNREADABLE, ids=lambda body: repr(body[:30]))
def test_a_body_that_parsers_read_in_different_ways_is_unreadable(body: bytes) -> None:
    assert isinstance(call("openai", body), Unreadable)
    assert isinstance(models_of_message("openai", body), Unreadable)


def test_a_body_that_is_not_held_is_unreadable() -> None:
    assert isinstance(call("openai", None), Unreadable)


BAD_TYPES = [
    ("application/json", "application/json"), ("application/json; charset=utf-16",), ("application/json; charset=utf-7",), ("application/json;charset='cp037'",),
    ("application/x-www-form-urlencoded",), ("multipart/form-data; boundary=b",), ("multipart/form-data; boundary=b; boundary=c",),
]  # fmt: skip


@pytest.mark.parametrize("types", BAD_TYPES)
def test_json_of_an_ambiguous_content_type_is_unreadable(types: tuple[str, ...]) -> None:
    assert isinstance(call("openai", b'{"model":"a"}&model=b', types), Unreadable)
    assert isinstance(call("openai", b' {"model":"a"}\r\n' + form(("model", "b"))[0], types), Unreadable)


@pytest.mark.parametrize("types", [(), ("text/plain",), ("application/vnd.api+json; charset=UTF-8",), ("audio/wav",)])
def test_json_is_read_whatever_the_content_type_is(types: tuple[str, ...]) -> None:
    assert models(call("openai", b'{"model":"a"}', types)) == ["a"]


def test_a_form_with_two_models_is_unreadable() -> None:
    assert isinstance(call("openai", *form(("model", "a"), ("model", "b"))), Unreadable)
    assert isinstance(call("openai", *form(("model", "a"), ("Model", "b"))), Unreadable)
    assert isinstance(call("openai", form(("model", "a"))[0][:-10], form()[1]), Unreadable)


def test_audio_of_a_vendor_with_the_model_in_its_query_names_nothing() -> None:
    assert models(call("deepgram", b'{"\x00RIFF', ("audio/wav",), query="model=nova-3")) == ["nova-3"]
    assert models(call("deepgram", b'{"url":"u","model":"m"}', JSON)) == ["m"]
    assert isinstance(call("elevenlabs", b"RIFF", ("audio/wav",)), Unreadable)


_texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
_documents = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4), max_leaves=15)


def escaped(text: str, which: list[bool]) -> str:
    """Write some characters of a JSON string as \\u escapes."""
    return "".join(f"\\u{ord(char):04x}" if escape else char for char, escape in zip(text, which, strict=False))


@given(_documents, st.lists(_texts.filter(lambda name: name not in ("metadata", "schema")), max_size=6), st.lists(st.booleans(), min_size=5, max_size=5), st.integers(0, 2000))
def test_a_model_is_found_at_any_depth_however_it_is_spelled(around: Any, path: list[str], which: list[bool], padding: int) -> None:
    if any(model_search.sorter("fal").sort(name) == "name" for name in path):
        return
    member = f'"{escaped("model", which)}"{" " * padding}:{" " * padding}"forbidden"'
    text = f'{{"before":{json.dumps(around)},{member}}}'
    for name in path:
        text = f'{{{json.dumps(name)}:[0,{text}],"after":{json.dumps(around)}}}'
    found = search_json("body", "fal", text.encode())
    assert isinstance(found, Unreadable) or "forbidden" in [each.model for each in found]


@given(st.lists(st.sampled_from(["model", "mod\\u0065l", "Model", "MODEL", "mo_del"]), min_size=2, max_size=4), _documents)
def test_two_fields_of_one_name_are_never_readable(names: list[str], between: Any) -> None:
    members = [f'"{name}":"m{number}"' for number, name in enumerate(names)]
    text = f'{{"x":{json.dumps(between)},{",".join(members)}}}'
    assert isinstance(search_json("body", "openai", text.encode()), Unreadable)


@given(st.binary(max_size=200) | _texts.map(str.encode))
def test_any_bytes_are_readable_or_not_and_nothing_raises(data: bytes) -> None:
    for format_ in ("openai", "fal", "deepgram"):
        assert isinstance(models_of_message(format_, data), (tuple, Unreadable))
        assert isinstance(call(format_, data, ("multipart/form-data; boundary=b",), query=data.decode("latin-1")), (tuple, Unreadable))


# MessagePack --------------------------------------------------------------------------------------


@given(_documents)
def test_messagepack_names_the_same_models_as_json(document: Any) -> None:
    whole = {"model": "m", "input": document}
    try:
        packed = msgspec.msgpack.encode(whole)
    except OverflowError:
        return
    in_json, in_msgpack = models_of_message("fal", json.dumps(whole).encode()), models_of_message("fal", packed)
    assert isinstance(in_json, Unreadable) == isinstance(in_msgpack, Unreadable)
    if isinstance(in_json, tuple):
        assert sorted(models(in_json)) == sorted(models(in_msgpack))


@pytest.mark.parametrize(
    "packed",
    [b"\x81\xa5model\xa1m", b"\x81\xd9\x05model\xa1m", b"\x81\xda\x00\x05model\xa1m", b"\x81\xdb\x00\x00\x00\x05model\xd9\x01m", b"\x81\xc4\x05model\xc4\x01m", b"\xde\x00\x01\xa5model\xa1m", b"\xdf\x00\x00\x00\x01\xa5model\xa1m", b"\x81\xa1a\x91\x81\xa5model\xa1m", b"\x82\xa1t\xd6\xff\x00\x00\x00\x00\xa5model\xa1m", b"\x82\xa1t\xc7\x02\x01ab\xa5model\xa1m", b"\x82\xa1t\xcb\x00\x00\x00\x00\x00\x00\x00\x00\xa5model\xa1m"],
)
def test_messagepack_is_read_in_every_form(packed: bytes) -> None:
    assert models(models_of_message("fal", packed)) == ["m"]


@pytest.mark.parametrize("packed", [b"", b"\x81\xa5model", b"\x82\xa5model\xa1a\xa5model\xa1b", b"\x81\xa5model\xa1a\x81\xa5model\xa1b", b"\xc1", b"\xdf\xff\xff\xff\xff", b"\x91" * 100 + b"\x00", b"\xdd\x00\x01\x00\x00" + b"\x00" * 65536, b'{"model":"a",'])
def test_messagepack_that_is_malformed_or_too_much_is_unreadable(packed: bytes) -> None:
    assert isinstance(models_of_message("fal", packed), Unreadable)


# Bounds -------------------------------------------------------------------------------------------

MIB = 1024 * 1024
LARGE: list[tuple[str, bytes, bool]] = [
    ("base64", b'{"model":"m","image":"' + b"QUJD" * (6 * MIB) + b'"}', True),
    ("padding", b'{"x":"' + b"a" * MIB + b'",' + b" " * MIB + b'"model":"m"}', True),
    ("arrays", b'{"model":"m","x":[' + b",".join([b"[]"] * 140_000) + b"]}", True),
    ("integers", b'{"model":"m","x":[' + b",".join([b"1"] * 490_000) + b"]}", True),
    ("long numbers", b'{"model":"m","x":[' + b",".join([b"1" * 40_000, b"0." + b"9" * 40_000] * 100) + b"]}", True),
    ("fields", b'{"model":"m",' + b",".join(b'"%x":1' % number for number in range(45_000)) + b"}", True),
    ("many arrays", b'{"model":"m","x":[' + b",".join([b"[]"] * 200_000) + b"]}", False),
    ("many integers", b'{"model":"m","x":[' + b",".join([b"1"] * 600_000) + b"]}", False),
    ("many fields", b'{"model":"m",' + b",".join(b'"%x":1' % number for number in range(55_000)) + b"}", False),
    ("many names", b"{" + b",".join(b'"%dmodel":1' % number for number in range(40_000)) + b',"model":"m"}', True),
    ("many models", b'{"models":["' + b'","'.join([b"m"] * 400_000) + b'"]}', False),
    ("long names", b'{"model":"m","' + b"a" * MIB + b'":{' + b",".join([b'"b":{}'] * 40_000) + b"}}", True),
]  # fmt: skip


@pytest.mark.parametrize(("body", "readable"), [row[1:] for row in LARGE], ids=[row[0] for row in LARGE])
def test_a_large_document_is_searched_in_bounded_time_or_not_at_all(body: bytes, readable: bool) -> None:
    began = time.process_time()
    found = search_json("body", "openai", body)
    assert time.process_time() - began < 2.0  # it takes 5 to 60 ms; quadratic work would take minutes
    assert isinstance(found, tuple) == readable
    assert not readable or set(models(found)) == {"m"}


def test_large_binary_data_in_messagepack_and_forms_takes_no_long_time_and_is_no_model() -> None:
    began, image = time.process_time(), bytes(range(256)) * 40_000
    assert models(models_of_message("fal", msgspec.msgpack.encode({"image": image, "model": "m"}))) == ["m"]
    [long] = models(models_of_message("fal", msgspec.msgpack.encode({"model": "m" * 5000})))
    content, types = form(("file", "x"), ("model", "m" * 5000))
    assert models(call("openai", content.replace(b"\r\nx\r\n", b"\r\n" + image + b"\r\n"), types)) == [long]
    assert not allowed(("*",), long)
    assert time.process_time() - began < 2.0


def test_the_url_of_a_session_names_models_in_path_and_query() -> None:
    assert models(models_of_handshake("fal", "fal-ai/flux/realtime", "model=m")) == ["fal-ai/flux", "m"]
    assert isinstance(models_of_handshake("openai", "realtime", "model=a&model=b"), Unreadable)
