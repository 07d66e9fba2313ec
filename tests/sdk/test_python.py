"""The official Python SDKs of vendors, unmodified, through the relay."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import ROOT
from tests.relays import CLIENT_KEY, HANG_GUARD_S
from tests.sdk.conftest import Front
from tests.sdk.lazy import Lazy
from tests.upstream.media import AUDIO

anthropic, cartesia, deepgram, groq, openai = map(Lazy, ("anthropic", "cartesia", "deepgram", "groq", "openai"))
elevenlabs, elevenlabs_client = Lazy("elevenlabs"), Lazy("elevenlabs.client")
conversational_ai = Lazy("elevenlabs.conversational_ai.conversation")
genai, types = Lazy("google.genai"), Lazy("google.genai.types")

pytestmark = pytest.mark.programs

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
async def the_relays_credentials(front: Front):  # type: ignore[no-untyped-def]
    """Check after each test that the providers got the keys of the relay and none of the client."""
    yield
    front.check_credentials()


# OpenAI -----------------------------------------------------------------------------------------


async def test_openai_chat_stream_and_speech(front: Front) -> None:
    async with openai.AsyncOpenAI(api_key=CLIENT_KEY, base_url=front.base("openai"), max_retries=0) as client:
        stream = await client.chat.completions.create(model="gpt-5", messages=MESSAGES, stream=True)  # type: ignore[call-overload]
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello wörld"
        async with client.audio.speech.with_streaming_response.create(model="tts-1", voice="alloy", input="hi") as speech:
            assert len(b"".join([piece async for piece in speech.iter_bytes()])) == 16384


@pytest.mark.parametrize("tls", [False, True], ids=["ws", "wss"])
async def test_openai_realtime(front: Front, tls: bool) -> None:
    async with openai.AsyncOpenAI(api_key=CLIENT_KEY, base_url=front.base("openai", tls=tls)) as client, asyncio.timeout(HANG_GUARD_S):
        async with client.realtime.connect(model="gpt-realtime") as connection:
            await connection.response.create()
            async for event in connection:
                if event.type == "response.done":
                    assert event.response.usage is not None and event.response.usage.total_tokens == 253
                    break


# Anthropic, Groq --------------------------------------------------------------------------------


async def test_anthropic_messages_and_stream(front: Front) -> None:
    async with anthropic.AsyncAnthropic(api_key=CLIENT_KEY, base_url=front.base("anthropic"), max_retries=0) as client:
        message = await client.messages.create(model="claude-x", max_tokens=10, messages=MESSAGES)  # type: ignore[arg-type]
        assert message.content[0].text == "Hi"  # type: ignore[union-attr]
        async with client.messages.stream(model="claude-x", max_tokens=10, messages=MESSAGES) as stream:  # type: ignore[arg-type]
            assert "".join([text async for text in stream.text_stream]) == "Hi"
            assert (await stream.get_final_message()).usage.output_tokens == 6


async def test_groq_chat(front: Front) -> None:
    async with groq.AsyncGroq(api_key=CLIENT_KEY, base_url=front.base("groq"), max_retries=0) as client:
        answer = await client.chat.completions.create(model="llama", messages=MESSAGES)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == "Hello wörld"


# Google -----------------------------------------------------------------------------------------


def _genai(front: Front, **options: object) -> genai.Client:
    return genai.Client(api_key=CLIENT_KEY, http_options={"base_url": front.base("google-ai-studio", **options)})  # type: ignore[arg-type]


async def test_google_generate_and_stream(front: Front) -> None:
    client = _genai(front)
    assert (await client.aio.models.generate_content(model="gemini-2.5-flash", contents="hi")).text == "Hi"
    stream = await client.aio.models.generate_content_stream(model="gemini-2.5-flash", contents="hi")
    assert [chunk.text async for chunk in stream] == ["Hi", "Hi"]
    await client.aio.aclose()


async def test_google_resumable_upload_stays_on_the_relay(front: Front, tmp_path: Path) -> None:
    content = bytes(range(256)) * 50_000
    (tmp_path / "big.bin").write_bytes(content)
    client = _genai(front)
    file = await asyncio.to_thread(client.files.upload, file=str(tmp_path / "big.bin"), config={"mime_type": "text/plain"})
    assert file.name == "files/abc"
    started, *pieces = front.seen("google-ai-studio")
    assert started.header("X-Goog-Upload-Command") == "start"
    assert b"".join(seen.body for seen in pieces) == content
    assert all(seen.header("x-goog-api-key") for seen in pieces), "the upload goes through the relay, which adds its key"


async def test_google_live_over_tls(front: Front) -> None:
    """The SDK uses wss:// whatever the scheme of its base URL is."""
    client = _genai(front, tls=True)
    async with asyncio.timeout(HANG_GUARD_S), client.aio.live.connect(model="gemini-live", config={"response_modalities": ["TEXT"]}) as session:  # type: ignore[arg-type]
        await session.send_client_content(turns=types.Content(role="user", parts=[types.Part(text="hi")]))
        said = [message.text async for message in session.receive() if message.text]
    await client.aio.aclose()
    assert said == ["Hello from Gemini"]


# ElevenLabs -------------------------------------------------------------------------------------


def _elevenlabs(front: Front) -> Any:
    return elevenlabs_client.ElevenLabs(api_key=CLIENT_KEY, base_url=front.base("elevenlabs", tls=True), timeout=HANG_GUARD_S)


async def test_elevenlabs_speech_stream(front: Front) -> None:
    async with httpx.AsyncClient() as http:
        client = elevenlabs_client.AsyncElevenLabs(api_key=CLIENT_KEY, base_url=front.base("elevenlabs"), httpx_client=http)
        pieces = [piece async for piece in client.text_to_speech.stream("voice", text="hello there")]
    assert b"".join(pieces) == AUDIO


async def test_elevenlabs_stream_input_over_tls(front: Front) -> None:
    """The SDK uses wss:// whatever the scheme of its base URL is."""
    client = _elevenlabs(front)
    audio = await asyncio.to_thread(lambda: b"".join(client.text_to_speech.convert_realtime("voice", text=iter(["Hello there. "]), model_id="m")))
    assert AUDIO in audio


async def test_elevenlabs_scribe(front: Front) -> None:
    client = elevenlabs_client.AsyncElevenLabs(api_key=CLIENT_KEY, base_url=front.base("elevenlabs"), httpx_client=httpx.AsyncClient())
    options = {"model_id": "scribe_v2_realtime", "audio_format": elevenlabs.AudioFormat.PCM_16000, "sample_rate": 16000, "commit_strategy": elevenlabs.CommitStrategy.MANUAL}
    connection = await client.speech_to_text.realtime.connect(options)  # type: ignore[arg-type]
    heard: asyncio.Queue[object] = asyncio.Queue()
    connection.on(elevenlabs.RealtimeEvents.COMMITTED_TRANSCRIPT, heard.put_nowait)
    await connection.send({"audio_base_64": base64.b64encode(AUDIO).decode()})
    await connection.commit()
    assert (await asyncio.wait_for(heard.get(), HANG_GUARD_S))["text"] == "hello world"  # type: ignore[index]
    await connection.close()


def _silent() -> Any:
    class Silent(conversational_ai.AudioInterface):  # type: ignore[misc]
        def start(self, input_callback: object) -> None: ...
        def stop(self) -> None: ...
        def output(self, audio: bytes) -> None: ...
        def interrupt(self) -> None: ...

    return Silent()


@pytest.mark.parametrize("requires_auth", [False, True], ids=["public", "signed-url"])
async def test_elevenlabs_agent(front: Front, requires_auth: bool) -> None:
    """A signed URL is rewritten to one of the relay, so that the session does not bypass it."""
    heard: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    conversation = conversational_ai.Conversation(
        _elevenlabs(front), "agent-1", requires_auth=requires_auth, audio_interface=_silent(),
        callback_agent_response=lambda text: loop.call_soon_threadsafe(heard.put_nowait, text),
    )  # fmt: skip
    await asyncio.to_thread(conversation.start_session)
    assert await asyncio.wait_for(heard.get(), HANG_GUARD_S) == "Hello there."
    await asyncio.to_thread(conversation.end_session)
    await asyncio.to_thread(conversation.wait_for_session_end)
    sessions = [seen for seen in front.seen("elevenlabs") if seen.header("Upgrade")]
    assert len(sessions) == 1 and ("conversation_signature=cvtkn_1" in sessions[0].target) is requires_auth


# Cartesia ---------------------------------------------------------------------------------------

_SPEECH = {"model_id": "sonic-3", "transcript": "hello", "voice": {"mode": "id", "id": "v1"}}
_RAW = {"container": "raw", "encoding": "pcm_s16le", "sample_rate": 16000}


async def test_cartesia_bytes_and_sse(front: Front) -> None:
    async with cartesia.AsyncCartesia(api_key=CLIENT_KEY, base_url=front.base("cartesia"), max_retries=0) as client:
        spoken = await client.tts.generate(**_SPEECH, output_format=_RAW)  # type: ignore[arg-type]
        assert await spoken.read() == AUDIO
        stream = await client.tts.generate_sse(**_SPEECH, output_format=_RAW)  # type: ignore[arg-type]
        assert b"".join([event.audio or b"" async for event in stream if event.type == "chunk"]) == AUDIO


@pytest.mark.parametrize("plain", [True, False], ids=["websocket_base_url", "wss"])
async def test_cartesia_websocket(front: Front, plain: bool) -> None:
    """The SDK uses wss:// unless `websocket_base_url` is set."""
    websocket = {"websocket_base_url": front.base("cartesia").replace("http", "ws", 1)} if plain else {}
    async with cartesia.AsyncCartesia(api_key=CLIENT_KEY, base_url=front.base("cartesia", tls=not plain), **websocket) as client:  # type: ignore[arg-type]
        async with asyncio.timeout(HANG_GUARD_S), client.tts.websocket_connect() as connection:
            await connection.send({**_SPEECH, "context_id": "c1", "output_format": _RAW})  # type: ignore[typeddict-item]
            events = []
            async for event in connection:
                events.append(event.type)
                if event.type == "done":
                    break
    assert events == ["chunk", "done"]


# Deepgram ---------------------------------------------------------------------------------------


def _deepgram(front: Front, http: httpx.AsyncClient) -> deepgram.AsyncDeepgramClient:
    rest, live = front.base("deepgram"), front.base("deepgram").replace("http", "ws", 1)
    from deepgram.environment import DeepgramClientEnvironment

    places = DeepgramClientEnvironment(base=rest, production=live, agent=live, agent_rest=rest)
    return deepgram.AsyncDeepgramClient(api_key=CLIENT_KEY, environment=places, httpx_client=http)


async def test_deepgram_file(front: Front) -> None:
    async with httpx.AsyncClient() as http:
        answer = await _deepgram(front, http).listen.v1.media.transcribe_file(request=AUDIO, model="nova-3")
    assert answer.results.channels[0].alternatives[0].transcript == "hello world"  # type: ignore[union-attr, index]


async def test_deepgram_live(front: Front) -> None:
    async with asyncio.timeout(HANG_GUARD_S), httpx.AsyncClient() as http, _deepgram(front, http).listen.v1.connect(model="nova-3") as connection:
        await connection.send_media(AUDIO)
        first = await connection.recv()
        assert first.channel.alternatives[0].transcript == "hello world"  # type: ignore[union-attr]
        await connection.send_close_stream()
        assert (await connection.recv()).type == "Metadata"


# fal --------------------------------------------------------------------------------------------

FAL = """
import fal_client
client = fal_client.SyncClient(key="CANARY-client-7d1f")
print(client.run("fal-ai/flux", arguments={"prompt": "a cat"})["prompt"])
print([event["n"] for event in client.stream("fal-ai/flux", arguments={"prompt": "a cat"})])
handle = client.submit("fal-ai/flux", arguments={"prompt": "a cat"})
print(type(handle.status()).__name__, handle.get()["images"][0]["url"])
"""


async def test_fal_run_stream_submit_and_result(front: Front) -> None:
    """The SDK reads its hosts from the environment at import, and always uses https://."""
    base = front.base("fal", tls=True).removeprefix("https://")
    env = {"FAL_RUN_HOST": base, "FAL_QUEUE_RUN_HOST": f"{base}/queue", "SSL_CERT_FILE": str(front.authority), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", FAL], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["a cat", "[0, 1]", "Completed https://v3.fal.media/files/q.png"]
    submitted, *polled, got = (seen.target for seen in front.seen("fal-queue"))
    assert (submitted, got) == ("/fal-ai/flux", "/fal-ai/flux/requests/r1")
    assert {target.partition("?")[0] for target in polled} == {"/fal-ai/flux/requests/r1/status"}
