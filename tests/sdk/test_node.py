"""The official Node SDKs of vendors, unmodified, and the stand-in providers of aimock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import StartRelay
from tests.nginx import Nginx
from tests.processes import output
from tests.relays import CLIENT_KEY, HANG_GUARD_S, Relay, packaged_provider
from tests.sdk.conftest import Front
from tests.sdk.lazy import Lazy
from tests.tools import need

anthropic, openai = Lazy("anthropic"), Lazy("openai")
genai, types = Lazy("google.genai"), Lazy("google.genai.types")
pytestmark = pytest.mark.programs

NODE = Path(__file__).parent / "node"
SDKS = {
    "openai": "openai", "genai": "google-ai-studio", "anthropic": "anthropic", "elevenlabs": "elevenlabs", "fal": "fal",
    "agents": "openai",
}  # fmt: skip


def need_packages(folder: Path) -> None:
    """Skip the test if Node or the packages are not installed. CI installs both."""
    need("node")
    if not (folder / "node_modules").is_dir():
        pytest.skip(f"npm ci was not run in {folder.name}: scripts/install-test-tools does")


async def node(script: str, env: dict[str, str]) -> str:
    """Run a script. Returns what it prints; raises AssertionError if it fails."""
    return await output("node", str(NODE / script), env={"CLIENT_KEY": CLIENT_KEY} | env)


@pytest.fixture
def packages() -> None:
    """Skip before `front` starts: it checks the calls of a test, and a skipped test makes none."""
    need_packages(NODE)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("sdk", SDKS)
async def test_sdk(front: Front, sdk: str) -> None:
    provider = SDKS[sdk]
    env = {"BASE": front.base(provider), "TLS_BASE": front.base(provider, tls=True), "NODE_EXTRA_CA_CERTS": str(front.authority)}
    assert await node(f"{sdk}.mjs", env) == "ok\n"
    front.check_credentials()


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("model", ["gpt-realtime", "openai/gpt-realtime"])
@pytest.mark.parametrize("front", ["nginx"], indirect=True)
async def test_a_realtime_session_on_v1(front: Front, model: str) -> None:
    env = {"CLIENT_KEY": CLIENT_KEY, "TLS_BASE": front.tls_url, "NODE_EXTRA_CA_CERTS": str(front.authority)}
    assert await output("node", str(NODE / "unified-realtime.mjs"), model, env=env) == "ok\n"
    front.check_credentials()
    assert [seen.target for seen in front.seen("openai") if "/realtime" in seen.target] == ["/v1/realtime?model=gpt-realtime"]


@pytest.mark.usefixtures("packages")
async def test_a_fal_queue_submitted_by_proxy_is_polled_through_the_relay(front: Front) -> None:
    await node("fal.mjs", {"BASE": front.base("fal")})
    targets = [seen.target for seen in front.seen("fal-queue")]
    assert targets[0] == "/fal-ai/flux/schnell" and any("/requests/r1/status" in target for target in targets)
    assert not any("x-fal-target-url" in seen.names for seen in front.seen("fal-queue"))


# @copilotkit/aimock -----------------------------------------------------------------------------


@pytest.fixture(params=[pytest.param("bare", marks=pytest.mark.soak), "nginx"])
async def aimock(request: pytest.FixtureRequest, start: StartRelay, nginx: Nginx) -> AsyncIterator[tuple[Relay, str]]:
    need_packages(NODE)
    process = await asyncio.create_subprocess_exec("node", str(NODE / "aimock.mjs"), stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    url = (await asyncio.wait_for(process.stdout.readline(), HANG_GUARD_S)).decode().strip()
    relay = await start({"providers": {name: packaged_provider(name, url) for name in ("openai", "anthropic", "google-ai-studio")}})
    front = await nginx.start(relay.port) if request.param == "nginx" else relay.url
    yield relay, f"{front}/api/v1/ai-gateway/providers"
    process.terminate()
    await process.wait()


async def test_aimock_chat_and_responses(aimock: tuple[Relay, str]) -> None:
    async with openai.AsyncOpenAI(api_key=CLIENT_KEY, base_url=f"{aimock[1]}/openai", max_retries=0) as client:
        answer = await client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "hello"}])
        assert answer.choices[0].message.content == "Hi from aimock!"
        stream = await client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "hello"}], stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]) == "Hi from aimock!"
        assert (await client.responses.create(model="gpt-5", input="hello")).output_text == "Hi from aimock!"
        events = [event async for event in await client.responses.create(model="gpt-5", input="hello", stream=True)]
        assert events[-1].type == "response.completed"


async def test_aimock_anthropic(aimock: tuple[Relay, str]) -> None:
    async with anthropic.AsyncAnthropic(api_key=CLIENT_KEY, base_url=f"{aimock[1]}/anthropic", max_retries=0) as client:
        asked = {"model": "claude-x", "max_tokens": 10, "messages": [{"role": "user", "content": "hello"}]}
        assert (await client.messages.create(**asked)).content[0].text == "Hi from aimock!"  # type: ignore[call-overload]
        async with client.messages.stream(**asked) as stream:  # type: ignore[arg-type]
            assert "".join([text async for text in stream.text_stream]) == "Hi from aimock!"


async def test_aimock_gemini(aimock: tuple[Relay, str]) -> None:
    client = genai.Client(api_key=CLIENT_KEY, http_options={"base_url": f"{aimock[1]}/google-ai-studio", "api_version": "v1beta"})  # type: ignore[arg-type]
    assert (await client.aio.models.generate_content(model="gemini-2.5-flash", contents="hello")).text == "Hi from aimock!"
    stream = await client.aio.models.generate_content_stream(model="gemini-2.5-flash", contents="hello")
    assert "".join([chunk.text or "" async for chunk in stream]) == "Hi from aimock!"
    await client.aio.aclose()


async def test_aimock_realtime(aimock: tuple[Relay, str]) -> None:
    async with openai.AsyncOpenAI(api_key=CLIENT_KEY, base_url=f"{aimock[1]}/openai") as client, asyncio.timeout(HANG_GUARD_S):
        async with client.realtime.connect(model="gpt-realtime") as connection:
            said = ""
            content = [{"type": "input_text", "text": "hello"}]
            await connection.conversation.item.create(item={"type": "message", "role": "user", "content": content})  # type: ignore[arg-type, typeddict-item]
            await connection.response.create(response={"output_modalities": ["text"]})
            async for event in connection:
                said += event.delta if event.type == "response.output_text.delta" else ""
                if event.type == "response.done":
                    break
    assert said == "Hi from aimock!"


async def test_aimock_gemini_live(aimock: tuple[Relay, str]) -> None:
    """The Python SDK requires wss://, so the test sends the same messages without it."""
    relay, base = aimock
    path = "ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent"
    async with asyncio.timeout(HANG_GUARD_S), relay.client.ws_connect(f"{base}/google-ai-studio/{path}") as socket:
        await socket.send_json({"setup": {"model": "models/gemini-live", "generationConfig": {"responseModalities": ["TEXT"]}}})
        assert "setupComplete" in await socket.receive_json()
        turn = types.Content(role="user", parts=[types.Part(text="hello")]).model_dump(exclude_none=True)
        await socket.send_json({"clientContent": {"turns": [turn], "turnComplete": True}})
        said = ""
        while True:
            content = (await socket.receive_json()).get("serverContent", {})
            said += "".join(part.get("text", "") for part in content.get("modelTurn", {}).get("parts", []))
            if content.get("turnComplete"):
                break
    assert said == "Hi from aimock!"
