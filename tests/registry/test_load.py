"""gateway.yaml: what it configures, and how mistakes in it are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from relay.registry.credentials import expand, is_set
from relay.registry.load import ConfigError, Sources, load
from relay.registry.schema import GatewayFile
from tests.relays import KEYS, canary, configured

ROOT = Path(__file__).parent.parent.parent
KEYED = {"auth": {"header": "Authorization", "value": "Bearer ${OPENAI_API_KEY}"}}


def _problems(folder: Path, text: str, env: str = "") -> list[str]:
    (folder / "gateway.yaml").write_text(text)
    (folder / ".env").write_text(env)
    with pytest.raises(ConfigError) as caught:
        load(Sources(folder / "gateway.yaml", folder / ".env"))
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sever: {}", "gateway.yaml:1:1: sever: unknown key; did you mean 'server'?"),
        ("server:\n  port: x", "gateway.yaml:2:3: server.port: should be a whole number, but is text"),
        ("server: {port: 1}\nserver: {}", "gateway.yaml:2:1: server: duplicate key; the first is in line 1"),
        ("a: &x 1", "gateway.yaml:1:4: anchors are not supported: write the value out"),
        ("a: *x", "gateway.yaml:1:4: aliases are not supported: write the value out"),
        ("server: [1", "gateway.yaml:1:9: the [ that begins here is not closed"),
        ("server: []", "gateway.yaml:1:1: server: should be a mapping, but is a list: write `key: value`, without the -"),
        ("- 1", "gateway.yaml:1:1: should be a mapping, but is a list: write `key: value`, without the -"),
        ("server: {host: '${NOPE}'}", "gateway.yaml:1:10: server.host: NOPE is not set; set it, or write ${NAME:-default}"),
        ("server: {host: '${1x}'}", "gateway.yaml:1:10: server.host: '${1x}' is not ${NAME}, ${NAME:-default} or ${file:PATH}"),
        ("server: {host: '${X'}", "gateway.yaml:1:10: server.host: a '${' is not closed"),
        (
            "providers:\n  p:\n    base_url: https://x.example/v1\n    websocket: {default_path: v1/realtime, paths: [responses]}",
            "gateway.yaml:4:44: providers.p.websocket.paths: no pattern matches the default path 'v1/realtime'",
        ),
        ("include: [nothing.yaml]", "gateway.yaml:1:11: include.0: no file matches 'nothing.yaml'"),
        ("cors: {origins: [example.com]}", "gateway.yaml:1:18: cors.origins.0: should be an origin such as https://app.example.com, https://*.example.com or http://localhost:5173"),
        ("providers:\n  p: {base_url: http://example.com, auth: {header: x, value: '${K}'}}", "gateway.yaml:2:7: providers.p.base_url: would send a credential over plain http://; use https:// or allow_http: true"),
        ("providers:\n  p: {base_url: 'ftp://x'}", "gateway.yaml:2:7: providers.p.base_url: should be an http:// or https:// URL"),
        ("providers:\n  p: {base_url: 'https://u:p@x'}", "gateway.yaml:2:7: providers.p.base_url: must not have user and password (…@); put the credential under `auth`"),
        ("providers:\n  p: {base_url: 'https://x', auth: {value: x}}", "gateway.yaml:2:30: providers.p.auth: should name exactly one of header, query, subprotocol"),
        ("providers:\n  p: {base_url: 'https://x', via: cloudflare}", "gateway.yaml:2:30: providers.p.via: needs a cloudflare slug for rest"),
        ("providers:\n  P: {base_url: 'https://x'}", "gateway.yaml:2:3: providers.P: a provider's name is lower-case letters, digits, dots and dashes"),
        ("providers:\n  p: {}", "gateway.yaml:2:3: providers.p.base_url: is missing"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_its_place_and_a_remedy(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in _problems(tmp_path, text)


def test_all_mistakes_are_reported_together_in_order(tmp_path: Path) -> None:
    text = "server:\n  prot: 1\n  workers: 0\nproviders:\n  a: {base_ur: x}\n  b: {base_url: '${NOPE}'}\n"
    lines = [int(problem.split(":")[1]) for problem in _problems(tmp_path, text)]
    assert lines == sorted(lines) and set(lines) == {2, 3, 5, 6}


def test_a_file_over_1_mib_is_refused(tmp_path: Path) -> None:
    assert _problems(tmp_path, "#" * (1024 * 1024 + 1)) == ["gateway.yaml:1:1: the file is larger than 1 MiB"]


def test_an_alias_bomb_and_deep_nesting_are_refused(tmp_path: Path) -> None:
    text = "a: &a [x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(50))
    assert "anchors are not supported" in _problems(tmp_path, text)[0]
    deep = "x: " + "[" * 200 + "]" * 200
    assert any("nested too deeply" in problem for problem in _problems(tmp_path, deep))


def test_a_missing_or_unreadable_file_is_reported_with_its_cause(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.yaml:1:1: cannot be read: No such file"):
        load(Sources(tmp_path / "gateway.yaml", None))
    (tmp_path / "gateway.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load(Sources(tmp_path / "gateway.yaml", None))
    (tmp_path / "gateway.yaml").write_text("{}")
    (tmp_path / ".env").write_bytes(b"A=\xff")
    with pytest.raises(ConfigError, match=r"\.env:1:1: cannot be read: it is not UTF-8 text"):
        load(Sources(tmp_path / "gateway.yaml", tmp_path / ".env"))
    (tmp_path / ".env").unlink()
    (tmp_path / ".env").mkdir()
    with pytest.raises(ConfigError, match=r"\.env:1:1: cannot be read: Is a directory"):
        load(Sources(tmp_path / "gateway.yaml", tmp_path / ".env"))


def test_plain_words_stay_text(tmp_path: Path) -> None:
    config, _ = configured(tmp_path, {"providers": {"p": {"base_url": "https://x", "headers": {"a": "no", "b": "2025-01-01"}}}})
    assert config.registry.providers["p"].headers == (("a", "no"), ("b", "2025-01-01"))
    (tmp_path / "gateway.yaml").write_text("providers: {p: {base_url: https://x, headers: {a: no, b: 2025-01-01, c: on}}}")
    loaded = load(Sources(tmp_path / "gateway.yaml", None))
    assert dict(loaded.registry.providers["p"].headers) == {"a": "no", "b": "2025-01-01", "c": "on"}


@pytest.mark.parametrize("value", ["", "  ", "your_account_id", "your-key", "YOUR_API_KEY", "<key>", "changeme", "xxx", "XXXX"])
def test_a_copied_placeholder_counts_as_not_set(value: str, tmp_path: Path) -> None:
    assert not is_set(value)
    assert expand("${A:-fallback}", {"A": value}, tmp_path).text == "fallback"
    assert expand("Bearer ${A}", {"A": value}, tmp_path).missing == ("A",)


def test_an_unset_key_leaves_one_provider_unconfigured(tmp_path: Path) -> None:
    entry = {"base_url": "https://x", "auth": {"header": "Authorization", "value": "Bearer ${NOT_SET}"}}
    config, _ = configured(tmp_path, {"providers": {"a": entry, "b": {"base_url": "https://y", **KEYED}}})
    assert config.registry.providers["a"].missing == ("NOT_SET",)
    assert config.registry.providers["b"].missing == ()


def test_a_secret_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(canary("file") + "\n")
    config, _ = configured(tmp_path, {"providers": {"p": {"base_url": "https://x", "auth": {"header": "k", "value": "${file:secret}"}}}})
    assert config.registry.providers["p"].rest.pool[0].provider.value == canary("file")
    assert "CANARY" not in repr(config) and "CANARY" not in str(config.registry)


def test_environment_variables_override_the_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", canary("real"))
    config, _ = configured(tmp_path, {"providers": {"p": {"base_url": "https://x", **KEYED}}})
    assert config.registry.providers["p"].rest.pool[0].provider.value == f"Bearer {canary('real')}"


def test_included_files_add_providers_and_may_not_repeat_one(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("providers: {q: {base_url: https://q}}")
    config, _ = configured(tmp_path, {"include": ["*ore.yaml"], "providers": {"p": {"base_url": "https://p"}}})
    assert set(config.registry.providers) == {"p", "q"}
    (tmp_path / "more.yaml").write_text("providers: {p: {base_url: https://q}}\nserver: {}")
    text = "include: [more.yaml]\nproviders: {p: {base_url: https://p}}"
    assert _problems(tmp_path, text) == [
        "more.yaml:1:13: providers.p: gateway.yaml has a provider of this name too",
        "more.yaml:2:1: server: unknown key; known keys: providers",
    ]
    (tmp_path / "more.yaml").write_text("providers: {p: {base_url: https://q}}")
    assert _problems(tmp_path, text) == ["more.yaml:1:13: providers.p: gateway.yaml has a provider of this name too"]


CLOUDFLARE = {"account_id": "acct", "gateway_id": "gw", "api_key": canary("cf")}
REST_THROUGH_CLOUDFLARE = [
    ("openai", "chat/completions", "openai/chat/completions"), ("openai", "v1/responses", "openai/responses"),
    ("anthropic", "v1/messages", "anthropic/v1/messages"), ("google-ai-studio", "v1beta/models/m:generateContent", "google-ai-studio/v1beta/models/m:generateContent"),
    ("groq", "openai/v1/chat/completions", "groq/chat/completions"), ("grok", "chat/completions", "grok/v1/chat/completions"),
    ("mistral", "v1/chat/completions", "mistral/v1/chat/completions"), ("deepseek", "chat/completions", "deepseek/chat/completions"),
    ("perplexity", "chat/completions", "perplexity-ai/chat/completions"), ("cohere", "v1/chat", "cohere/v1/chat"),
    ("openrouter", "chat/completions", "openrouter/v1/chat/completions"), ("cartesia", "tts/bytes", "cartesia/tts/bytes"),
    ("elevenlabs", "v1/text-to-speech/v", "elevenlabs/v1/text-to-speech/v"), ("fal", "fal-ai/flux", "fal/fal-ai/flux"),
]  # fmt: skip
SOCKETS_THROUGH_CLOUDFLARE = [
    ("openai", "", "openai"), ("openai", "v1/realtime", "openai"), ("openai", "responses", "openai/responses"),
    ("cartesia", "", "cartesia"), ("elevenlabs", "", "elevenlabs"), ("fal", "fal-ai/x", "fal/fal-ai/x"), ("deepgram", "", "deepgram/v1/listen"),
]  # fmt: skip


def _shipped(tmp_path: Path, **extra: object):  # type: ignore[no-untyped-def]
    document = yaml.safe_load((ROOT / "gateway.yaml").read_text()) | {"cloudflare": CLOUDFLARE} | extra
    document["include"] = [str(ROOT / "config/providers" / Path(name).name) for name in document["include"]]
    for at, name in enumerate(document["include"]):
        (tmp_path / Path(name).name).write_text(Path(name).read_text())
        document["include"][at] = Path(name).name
    return configured(tmp_path, document)[0].registry


def test_rest_urls_through_cloudflare(tmp_path: Path) -> None:
    registry = _shipped(tmp_path)
    base = "https://gateway.ai.cloudflare.com/v1/acct/gw/"
    got = [(name, endpoint, registry.match_rest(name, endpoint).url("").removeprefix(base)) for name, endpoint, _ in REST_THROUGH_CLOUDFLARE]
    assert got == REST_THROUGH_CLOUDFLARE


def test_socket_urls_and_credentials_through_cloudflare(tmp_path: Path) -> None:
    registry = _shipped(tmp_path)
    base = "https://gateway.ai.cloudflare.com/v1/acct/gw/"
    got = [(name, endpoint, registry.match_websocket(name, endpoint).url("").removeprefix(base)) for name, endpoint, _ in SOCKETS_THROUGH_CLOUDFLARE]
    assert got == SOCKETS_THROUGH_CLOUDFLARE
    places = {name: registry.providers[name].websocket.auth for name in ("openai", "cartesia", "elevenlabs", "fal")}
    assert {name: (auth.place, auth.name) for name, auth in places.items()} == {
        "openai": ("header", "Authorization"), "cartesia": ("query", "api_key"),
        "elevenlabs": ("subprotocol", "xi-api-key."), "fal": ("subprotocol", "fal-api-key."),
    }  # fmt: skip
    assert registry.providers["cartesia"].websocket.pool[0].provider.value == KEYS["CARTESIA_API_KEY"], "without the scheme, which belongs to the header"
    live = registry.match_websocket("google-ai-studio", "")
    assert live.url("").startswith("https://generativelanguage.googleapis.com/ws/"), "Gemini Live is called directly"


def test_other_hosts_of_a_provider_are_called_directly(tmp_path: Path) -> None:
    route = _shipped(tmp_path).match_rest("fal", "queue/fal-ai/flux/requests/1/status")
    assert route.url("logs=1") == "https://queue.fal.run/fal-ai/flux/requests/1/status?logs=1"
    assert (route.target.via, route.target.gateway_credential) == ("direct", None)


def test_a_key_stored_at_cloudflare_is_not_sent(tmp_path: Path) -> None:
    entry = {"base_url": "https://x/v1", "cloudflare": {"slug": "x"}, "stored_at_cloudflare": True, "auth": {"header": "k", "value": "${NOT_SET}"}}
    config, _ = configured(tmp_path, {"cloudflare": CLOUDFLARE, "providers": {"p": entry}})
    target = config.registry.match_rest("p", "y").target
    assert (len(target.pool), target.pool[0].provider, target.missing, target.auth) == (1, None, (), None)
    assert target.gateway_credential is not None and target.gateway_credential.name == "cf-aig-authorization"


def test_a_placeholder_account_does_not_turn_cloudflare_on(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text((ROOT / "gateway.yaml").read_text().partition("include:")[0] + "providers: {openai: {base_url: 'https://api.openai.com/v1', cloudflare: {slug: openai}}}")
    (tmp_path / ".env").write_text("CLOUDFLARE_ACCOUNT_ID=your_account_id\nCLOUDFLARE_GATEWAY_ID=\nCLOUDFLARE_API_KEY=your_token\n")
    config = load(Sources(tmp_path / "gateway.yaml", tmp_path / ".env"))
    assert config.registry.match_rest("openai", "x").target.via == "direct"
    assert (config.settings.cloudflare.gateway_id, config.settings.cloudflare.api_key) == ("default", "")


def test_the_shipped_files_and_every_example_provider_load(tmp_path: Path) -> None:
    assert set(_shipped(tmp_path).providers) == {
        "openai", "google-ai-studio", "cartesia", "elevenlabs", "fal", "anthropic", "assemblyai", "cohere", "deepgram",
        "deepseek", "grok", "groq", "mistral", "openrouter", "perplexity",
    }  # fmt: skip
    for name in ("ollama", "vllm", "azure-openai"):
        (tmp_path / "gateway.yaml").write_text(f"include: [{name}.yaml]")
        (tmp_path / f"{name}.yaml").write_text((ROOT / f"config/providers/{name}.yaml").read_text())
        (tmp_path / ".env").write_text("AZURE_OPENAI_RESOURCE=res\n")
        config = load(Sources(tmp_path / "gateway.yaml", tmp_path / ".env"))
        assert set(config.registry.providers) == {name}
    assert config.registry.match_rest("azure-openai", "gpt/chat/completions").url("api-version=1") == (
        "https://res.openai.azure.com/openai/deployments/gpt/chat/completions?api-version=1"
    )


def test_the_schema_describes_every_key(tmp_path: Path) -> None:
    schema = GatewayFile.model_json_schema()
    fields = [(name, field) for name, section in schema["$defs"].items() for field in section["properties"].values()]
    assert all("description" in field for _, field in fields)
