"""Responses of each provider as it documents or sends them, with the usage to read from each.

The responses are taken from the vendors' documentation, their SDKs' types and recordings; texts
are shortened. The table in docs/ledger.md is generated from these rows (tests/cli/test_golden.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from relay.core.usage import Part, Usage


class Row(NamedTuple):
    """A call, its response, and the usage to read from the response."""

    provider: str
    method: str
    path: str
    answer: bytes
    expected: tuple[Part, ...]
    """The usage, by model. A part with an `object_id` is counted once for that object."""
    headers: Mapping[str, str]
    sent: bytes
    note: str
    """What the response does not report, or what is not read from it."""

    @property
    def content_type(self) -> str:
        return self.headers["Content-Type"]


def row(provider: str, path: str, answer: Any, *expected: Part, method: str = "POST", sent: Any = None, note: str = "", **headers: str) -> Row:
    """`answer` is a JSON object, a list of events, or bytes."""
    kind = "audio/mpeg"
    if isinstance(answer, dict):
        answer, kind = json.dumps(answer).encode(), "application/json"
    elif isinstance(answer, list):
        answer, kind = b"".join(map(event, answer)), "text/event-stream"
    if method == "POST":  # an object that the call created is always counted
        expected = tuple(part._replace(booking="made") if part.object_id and provider != "fal" else part for part in expected)
    named = {"Content-Type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
    return Row(provider, method, path, answer, expected, named, json.dumps(sent).encode() if sent is not None else b"", note)


def event(data: Any) -> bytes:
    if data == "[DONE]":
        return b"data: [DONE]\n\n"
    name = data.get("type") or data.get("event_type")
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"


def used(model: str | None = None, object_id: str = "", billed: Usage | None = None, **counts: Any) -> Part:
    return Part(model, Usage(**counts), billed, object_id)


def lines(*documents: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in documents)


def chat(model: str, usage: Any, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Hello"}
    return {"id": "c-1", "object": "chat.completion", "created": 1, "model": model, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage} | more


def deltas(model: str, *last: dict[str, Any], **each: Any) -> list[Any]:
    chunk = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": model}
    first = chunk | {"choices": [{"index": 0, "delta": {"content": "Hello"}}]} | each
    return [first, first, *(chunk | end for end in last), "[DONE]"]


def finish(usage: Any, **more: Any) -> dict[str, Any]:
    """Return the last chunk of a vendor that reports usage beside the last choice."""
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage} | more


def usage_chunk(usage: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [], "usage": usage} | more


def chat_usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion} | more


def token_usage(input_tokens: int, output_tokens: int, **more: Any) -> dict[str, Any]:
    return {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": input_tokens + output_tokens} | more


def response(status: str = "completed", usage: Any = None, model: str = "gpt-5-2025-08-07", **more: Any) -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "status": status, "background": False, "model": model, "output": [], "service_tier": "default", "usage": usage} | more


def responding(end: str, last: dict[str, Any], model: str = "gpt-5-2025-08-07") -> list[Any]:
    started = response("in_progress", model=model, service_tier="auto")
    return [
        {"type": "response.created", "response": started},
        {"type": "response.in_progress", "response": started},
        {"type": "response.output_item.added", "item": {"id": "msg_1", "status": "in_progress", "type": "message"}},
        {"type": "response.output_text.delta", "delta": "Hello"},
        {"type": f"response.{end}", "response": last},
    ]


REASONING_USAGE = token_usage(100, 50, input_tokens_details={"cached_tokens": 40, "cache_write_tokens": 10}, output_tokens_details={"reasoning_tokens": 30})
REASONING_USED: dict[str, Any] = {"input_tokens": 100, "output_tokens": 50, "cache_read_tokens": 40, "cache_write_tokens": 10, "reasoning_tokens": 30}
TIERED = "gpt-5-2025-08-07"
DETAILED_USAGE = chat_usage(
    100, 50, prompt_tokens_details={"cached_tokens": 40, "cache_write_tokens": 5, "audio_tokens": 20, "image_tokens": 10, "text_tokens": 70},
    completion_tokens_details={"reasoning_tokens": 30, "audio_tokens": 8, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 2},
)  # fmt: skip
DETAILED_USED: dict[str, Any] = {"input_tokens": 100, "output_tokens": 50, "cache_read_tokens": 40, "cache_write_tokens": 5, "reasoning_tokens": 30, "input_audio_tokens": 20, "output_audio_tokens": 8, "input_image_tokens": 10}
TRANSCRIBED_USAGE = {"type": "tokens", "input_tokens": 14, "input_token_details": {"text_tokens": 4, "audio_tokens": 10}, "output_tokens": 45, "total_tokens": 59}
TRANSCRIBED_USED: dict[str, Any] = {"input_tokens": 14, "output_tokens": 45, "input_audio_tokens": 10}
IMAGE_USAGE = token_usage(50, 4160, input_tokens_details={"text_tokens": 10, "image_tokens": 40}, output_tokens_details={"text_tokens": 60, "image_tokens": 4100})
IMAGE_USED: dict[str, Any] = {"input_tokens": 50, "output_tokens": 4160, "input_image_tokens": 40, "output_image_tokens": 4100}
MINUTE = {"audio_ms": 60_000}

OPENAI = [
    row("openai", "chat/completions", chat("gpt-4o-2024-08-06", DETAILED_USAGE, service_tier="default"), used("gpt-4o-2024-08-06", **DETAILED_USED)),
    row("openai", "chat/completions", deltas("gpt-4o-2024-08-06", usage_chunk(DETAILED_USAGE), usage=None, service_tier="flex"), used("gpt-4o-2024-08-06", **DETAILED_USED, service_tier="flex")),
    row("openai", "chat/completions", chat("gpt-5", chat_usage(1, 2), service_tier="priority"), used("gpt-5", input_tokens=1, output_tokens=2, service_tier="priority")),
    row("openai", "chat/completions/c-1", chat("gpt-5", DETAILED_USAGE), method="GET", note="a stored completion, read again"),
    row("openai", "completions", {"id": "cmpl-1", "object": "text_completion", "model": "davinci-002", "choices": [{"text": "Hello"}], "usage": chat_usage(5, 7)}, used("davinci-002", input_tokens=5, output_tokens=7)),
    row("openai", "responses", response(usage=REASONING_USAGE), used(TIERED, "resp_1", **REASONING_USED)),
    row("openai", "responses", responding("completed", response(usage=REASONING_USAGE, service_tier="flex")), used(TIERED, "resp_1", **REASONING_USED, service_tier="flex")),
    row("openai", "responses", responding("incomplete", response("incomplete", usage=REASONING_USAGE)), used(TIERED, "resp_1", **REASONING_USED)),
    row("openai", "responses", responding("failed", response("failed", usage=REASONING_USAGE)), used(TIERED, "resp_1", **REASONING_USED)),
    row("openai", "responses", response(usage=REASONING_USAGE, tool_usage={"web_search": {"num_requests": 3}, "image_gen": {"input_tokens": 0, "output_tokens": 0}}), used(TIERED, "resp_1", **REASONING_USED, web_searches=3)),
    row("openai", "responses", response(usage=REASONING_USAGE, tool_usage={"web_search": {"num_requests": 0}, "image_gen": {"input_tokens": 9, "output_tokens": 272}}), used(TIERED, "resp_1", **REASONING_USED, incomplete=True), note="generated images, and code that was run: unpriced"),
    row("openai", "responses", response("queued", background=True), note="a queued response: read later"),
    row("openai", "responses/resp_1", response(usage=REASONING_USAGE, background=True), used(TIERED, "resp_1", **REASONING_USED), method="GET"),
    row("openai", "responses/resp_1", responding("completed", response(usage=REASONING_USAGE)), used(TIERED, "resp_1", **REASONING_USED), method="GET"),
    row("openai", "responses/resp_1", response("in_progress", background=True), method="GET"),
    row("openai", "responses/resp_1/cancel", response("cancelled", usage=REASONING_USAGE)),
    row("openai", "responses/resp_1/input_items", {"object": "list", "data": [{"usage": REASONING_USAGE}]}, method="GET"),
    row("openai", "responses/input_tokens", {"object": "response.input_tokens", "input_tokens": 11}),
    row("openai", "responses/compact", {"id": "resp_2", "object": "response.compaction", "created_at": 1, "output": [], "usage": REASONING_USAGE}, used(None, **REASONING_USED)),
    row("openai", "decisions", {"answers": [], "model": "gpt-5", "usage": REASONING_USAGE}, used("gpt-5", **REASONING_USED)),
    row("openai", "embeddings", {"object": "list", "data": [{"embedding": [0.1]}], "model": "text-embedding-3-small", "usage": {"prompt_tokens": 8, "total_tokens": 8}}, used("text-embedding-3-small", input_tokens=8)),
    row("openai", "moderations", {"id": "modr-1", "model": "omni-moderation-latest", "results": []}),
    row("openai", "images/generations", {"created": 1, "data": [{"b64_json": "AA=="}], "usage": IMAGE_USAGE}, used(None, **IMAGE_USED)),
    row("openai", "images/generations", {"created": 1, "data": [{"b64_json": "AA=="}], "usage": token_usage(50, 4160)}, used(None, input_tokens=50, output_tokens=4160, output_image_tokens=4160)),
    row("openai", "images/generations", {"created": 1, "data": [{"url": "https://x.example/1"}]}, used(None, images=2, estimated=True), sent={"model": "dall-e-3", "n": 2, "prompt": "x"}, note="without tokens: `n` of the request"),
    row("openai", "images/generations", {"created": 1, "data": [], "usage": IMAGE_USAGE, "svg_usage": {"model": "gpt-5.6-sol", "input_tokens": 7, "output_tokens": 9, "total_tokens": 16}}, used(None, **IMAGE_USED), used("gpt-5.6-sol", input_tokens=7, output_tokens=9)),
    row("openai", "images/generations", [{"type": "image_generation.partial_image", "b64_json": "AA=="}, {"type": "image_generation.completed", "b64_json": "AA==", "usage": IMAGE_USAGE}], used(None, **IMAGE_USED)),
    row("openai", "images/edits", [{"type": "image_edit.completed", "b64_json": "AA==", "usage": token_usage(1, 2)}, {"type": "image_edit.completed", "b64_json": "AA==", "usage": token_usage(1, 3)}], used(None, input_tokens=2, output_tokens=5, output_image_tokens=5, incomplete=True), note="a stream of several images: it is unknown whether usage is cumulative"),
    row("openai", "images/variations", {"created": 1, "data": [{"url": "https://x.example/1"}]}, used(None, images=1, estimated=True)),
    row("openai", "audio/speech", b"\xff\xfb sound", used(None, characters=5), sent={"model": "tts-1", "input": "hello"}, note="audio: the characters of `input`"),
    row("openai", "audio/speech", [{"type": "speech.audio.delta", "audio": "AA=="}, {"type": "speech.audio.done", "usage": token_usage(14, 101)}], used(None, input_tokens=14, output_tokens=101), sent={"input": "hello"}),
    row("openai", "audio/transcriptions", {"text": "Hello", "usage": TRANSCRIBED_USAGE}, used(None, **TRANSCRIBED_USED)),
    row("openai", "audio/transcriptions", {"text": "Hello", "usage": {"type": "duration", "seconds": 60}}, used(None, **MINUTE)),
    row("openai", "audio/transcriptions", {"task": "transcribe", "language": "english", "duration": 36.709999, "text": "Hello", "segments": [{"id": 0, "end": 36.7}], "usage": {"type": "duration", "seconds": 37}}, used(None, audio_ms=37_000)),
    row("openai", "audio/transcriptions", {"task": "transcribe", "duration": 60.0, "text": "Hello", "segments": []}, used(None, **MINUTE)),
    row("openai", "audio/transcriptions", [{"type": "transcript.text.delta", "delta": "Hello"}, {"type": "transcript.text.done", "text": "Hello", "usage": TRANSCRIBED_USAGE}], used(None, **TRANSCRIBED_USED)),
    row("openai", "audio/transcriptions", b"Hello", used(None, incomplete=True), Content_Type="text/plain", note="plain text, subtitles: estimated by the upload, unpriced where it is a URL"),
    row("openai", "audio/translations", {"text": "Hello"}, used(None, incomplete=True), note="without `verbose_json`: estimated by the upload"),
    row("openai", "audio/translations", {"task": "translate", "duration": 60.0, "text": "Hello"}, used(None, **MINUTE)),
    row("openai", "videos", {"id": "video_1", "object": "video", "model": "sora-2", "status": "queued", "seconds": "8"}),
    row("openai", "videos/video_1", {"id": "video_1", "object": "video", "model": "sora-2", "status": "in_progress", "seconds": "8"}, method="GET"),
    row("openai", "videos/video_1", {"id": "video_1", "object": "video", "model": "sora-2", "status": "completed", "seconds": "8"}, used("sora-2", "video_1", incomplete=True), method="GET", note="seconds and size of videos: each is counted once, unpriced"),
    row("openai", "videos/video_1", {"id": "video_1", "object": "video", "model": "sora-2", "status": "failed", "seconds": "8"}, method="GET"),
    row("openai", "batches", {"id": "batch_1", "object": "batch", "status": "validating"}),
    row("openai", "batches/batch_1", {"id": "batch_1", "object": "batch", "status": "finalizing", "usage": token_usage(1, 1)}, method="GET"),
    row("openai", "batches/batch_1", {"id": "batch_1", "object": "batch", "status": "completed", "model": "gpt-5-2025-08-07", "usage": REASONING_USAGE}, used(TIERED, "batch_1", **{**REASONING_USED, "service_tier": "batch"}), method="GET"),
    row("openai", "batches/batch_1", {"id": "batch_1", "object": "batch", "status": "completed", "request_counts": {"total": 2}}, used(None, "batch_1", incomplete=True), method="GET", note="a batch without usage: unpriced"),
    row("openai", "batches", {"object": "list", "data": [{"id": "batch_1", "object": "batch", "status": "completed", "usage": REASONING_USAGE}]}, method="GET"),
    row("openai", "files/file_1/content", lines({"id": "batch_req_1", "response": {"status_code": 200, "body": chat("gpt-5", DETAILED_USAGE)}}), method="GET", Content_Type="application/jsonl", note="a batch's output: the batch itself reports the usage"),
    row("openai", "fine_tuning/jobs", {"object": "fine_tuning.job", "id": "ftjob-1", "model": "gpt-4o-mini", "status": "validating_files", "trained_tokens": None}),
    row("openai", "fine_tuning/jobs/ftjob-1", {"object": "fine_tuning.job", "id": "ftjob-1", "model": "gpt-4o-mini", "status": "succeeded", "trained_tokens": 5768}, used("gpt-4o-mini", "ftjob-1", input_tokens=5768, incomplete=True), method="GET", note="the price of training"),
    row("openai", "evals/eval_1/runs/evalrun_1", {"object": "eval.run", "id": "evalrun_1", "status": "completed", "per_model_usage": [{"model_name": "gpt-4o", "prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 4, "total_tokens": 15}, {"model_name": "gpt-5", "prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 0, "total_tokens": 3}]}, used("gpt-4o", "evalrun_1", input_tokens=10, output_tokens=5, cache_read_tokens=4), used("gpt-5", "evalrun_1", input_tokens=1, output_tokens=2), method="GET"),
    row("openai", "threads/thread_1/runs", {"id": "run_1", "object": "thread.run", "status": "queued", "model": "gpt-4o", "usage": None}),
    row("openai", "threads/thread_1/runs/run_1", {"id": "run_1", "object": "thread.run", "status": "completed", "model": "gpt-4o", "usage": chat_usage(20, 5)}, used("gpt-4o", "run_1", input_tokens=20, output_tokens=5), method="GET"),
    row("openai", "threads/runs", [{"id": "run_1", "object": "thread.run", "status": "queued", "model": "gpt-4o", "usage": None}, {"id": "step_1", "object": "thread.run.step", "status": "completed", "usage": chat_usage(20, 5)}, {"id": "run_1", "object": "thread.run", "status": "completed", "model": "gpt-4o", "usage": chat_usage(20, 5)}], used("gpt-4o", "run_1", input_tokens=20, output_tokens=5)),
    row("openai", "threads/thread_1/messages", {"id": "msg_1", "object": "thread.message", "content": []}),
    row("openai", "organization/usage/completions", {"object": "page", "data": [{"results": [{"input_tokens": 1000}]}]}, method="GET"),
    row("azure-openai", "gpt-4o/chat/completions", [{"choices": [], "created": 0, "id": "", "model": "", "object": "", "prompt_filter_results": [{"prompt_index": 0}]}, *deltas("gpt-4o-2024-08-06", usage_chunk(DETAILED_USAGE), usage=None)], used("gpt-4o-2024-08-06", **DETAILED_USED)),
    row("azure-openai", "deepseek/chat/completions", chat("DeepSeek-R1", chat_usage(19, 1969, reasoning_tokens=1500, audio_prompt_tokens=0, prompt_tokens_details=None)), used("DeepSeek-R1", input_tokens=19, output_tokens=1969, reasoning_tokens=1500)),
]  # fmt: skip

GROQ_TIMES = {"queue_time": 0.04, "prompt_time": 0.001, "completion_time": 0.05, "total_time": 0.06}
PERPLEXITY_COST = {"input_tokens_cost": 0.001, "output_tokens_cost": 0.0005, "request_cost": 0.005, "total_cost": 0.0065}
KIMI = chat_usage(100, 50, cached_tokens=80)
FOLLOWERS = [
    row("groq", "chat/completions", chat("openai/gpt-oss-20b", chat_usage(80, 9, **GROQ_TIMES, prompt_tokens_details={"cached_tokens": 64}, completion_tokens_details={"reasoning_tokens": 5}), service_tier="on_demand", usage_breakdown=None, x_groq={"id": "req_1", "usage": {"dram_cached_tokens": 64, "sram_cached_tokens": 0}}), used("openai/gpt-oss-20b", input_tokens=80, output_tokens=9, cache_read_tokens=64, reasoning_tokens=5)),
    row("groq", "chat/completions", deltas("llama-3.1-8b-instant", finish(chat_usage(40, 9, **GROQ_TIMES), x_groq={"id": "req_1", "usage": chat_usage(40, 9, **GROQ_TIMES)})), used("llama-3.1-8b-instant", input_tokens=40, output_tokens=9)),
    row("groq", "chat/completions", deltas("llama-3.1-8b-instant", finish(None, x_groq={"id": "req_1", "usage": chat_usage(40, 9)})), used("llama-3.1-8b-instant", input_tokens=40, output_tokens=9)),
    row("groq", "responses", response(usage=REASONING_USAGE, model="openai/gpt-oss-20b"), used("openai/gpt-oss-20b", "resp_1", **REASONING_USED)),
    row("groq", "audio/transcriptions", {"text": "Hello", "x_groq": {"id": "req_1"}, "task": "transcribe", "duration": 60.0}, used(None, **MINUTE)),
    row("groq", "batches/batch_1", {"id": "batch_1", "object": "batch", "status": "completed"}, used(None, "batch_1", incomplete=True), method="GET", note="a batch's usage is only in its output: unpriced"),
    row("deepseek", "chat/completions", chat("deepseek-chat", chat_usage(30, 9, prompt_tokens_details={"cached_tokens": 20}, prompt_cache_hit_tokens=20, prompt_cache_miss_tokens=10)), used("deepseek-chat", input_tokens=30, output_tokens=9, cache_read_tokens=20)),
    row("deepseek", "chat/completions", deltas("deepseek-reasoner", finish(chat_usage(30, 9, prompt_cache_hit_tokens=20, completion_tokens_details={"reasoning_tokens": 4})), usage=None), used("deepseek-reasoner", input_tokens=30, output_tokens=9, cache_read_tokens=20, reasoning_tokens=4)),
    row("grok", "chat/completions", chat("grok-3-mini", {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 241, "prompt_tokens_details": {"text_tokens": 12, "cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 228}, "num_sources_used": 0, "cost_in_usd_ticks": 1176500}), used("grok-3-mini", input_tokens=12, output_tokens=229, cache_read_tokens=2, reasoning_tokens=228, billed_nano_usd=117_650)),
    row("grok", "chat/completions", deltas("grok-4", usage_chunk({"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 41, "completion_tokens_details": {"reasoning_tokens": 28}, "num_sources_used": 3})), used("grok-4", input_tokens=12, output_tokens=29, reasoning_tokens=28, incomplete=True), note="without xAI's own cost: the fees of searches and tools"),
    row("grok", "responses", response(usage=token_usage(199, 1079, input_tokens_details={"cached_tokens": 163}, output_tokens_details={"reasoning_tokens": 863}, num_sources_used=0, num_server_side_tools_used=2, cost_in_usd_ticks=5494500, context_details={"input_tokens": 1, "output_tokens": 1}), model="grok-4"), used("grok-4", "resp_1", input_tokens=199, output_tokens=1079, cache_read_tokens=163, reasoning_tokens=863, billed_nano_usd=549_450)),
    row("grok", "chat/completions", {"request_id": "d-1"}),
    row("grok", "chat/deferred-completion/d-1", chat("grok-4", chat_usage(1, 2)), used("grok-4", "c-1", input_tokens=1, output_tokens=2), method="GET"),
    row("grok", "images/generations", {"data": [{"url": "https://x.example/1"}], "usage": {"cost_in_usd_ticks": 200_000_000}}, used(None, billed_nano_usd=20_000_000)),
    row("grok", "videos/generations", {"request_id": "v-1"}),
    row("grok", "videos/v-1", {"status": "pending"}, method="GET"),
    row("grok", "videos/v-1", {"status": "done", "video": {"url": "https://x.example/1", "duration": 8}, "model": "grok-imagine-video", "usage": {"cost_in_usd_ticks": 4_000_000_000}}, used("grok-imagine-video", "v-1", billed_nano_usd=400_000_000), method="GET"),
    row("mistral", "chat/completions", chat("mistral-large-2512", chat_usage(13, 9, num_cached_tokens=8)), used("mistral-large-2512", input_tokens=13, output_tokens=9, cache_read_tokens=8)),
    row("mistral", "chat/completions", deltas("mistral-small-2603", finish(chat_usage(13, 9, prompt_token_details={"cached_tokens": 8}, prompt_audio_seconds=None))), used("mistral-small-2603", input_tokens=13, output_tokens=9, cache_read_tokens=8)),
    row("mistral", "fim/completions", chat("codestral-2508", chat_usage(13, 9)), used("codestral-2508", input_tokens=13, output_tokens=9)),
    row("mistral", "agents/completions", chat("mistral-large-2512", chat_usage(13, 9)), used("mistral-large-2512", input_tokens=13, output_tokens=9)),
    row("mistral", "conversations", {"object": "conversation.response", "conversation_id": "conv_1", "outputs": [], "usage": chat_usage(13, 9, connector_tokens=0)}, used(None, input_tokens=13, output_tokens=9)),
    row("mistral", "conversations", [{"type": "message.output.delta", "content": "Hello"}, {"type": "conversation.response.done", "usage": chat_usage(13, 9, connectors={"web_search": 1})}], used(None, input_tokens=13, output_tokens=9, incomplete=True), note="fees of connectors: unpriced"),
    row("mistral", "embeddings", {"id": "e-1", "object": "list", "data": [], "model": "mistral-embed", "usage": {"prompt_tokens": 8, "total_tokens": 8, "completion_tokens": 0}}, used("mistral-embed", input_tokens=8)),
    row("mistral", "ocr", {"pages": [{"index": 0, "markdown": "Hello"}], "model": "mistral-ocr-2512", "document_annotation": None, "usage_info": {"pages_processed": 3, "doc_size_bytes": 4000}}, used("mistral-ocr-2512", pages=3)),
    row("mistral", "ocr", {"pages": [], "model": "mistral-ocr-2512", "document_annotation": "{}", "usage_info": {"pages_processed": 3}}, used("mistral-ocr-2512", pages=3, incomplete=True), note="the higher price of annotated pages: unpriced"),
    row("mistral", "audio/transcriptions", {"model": "voxtral-mini-2507", "text": "Hello", "language": None, "segments": [], "usage": {"prompt_audio_seconds": 36, "prompt_tokens": 13, "completion_tokens": 151, "total_tokens": 164, "request_count": 1}}, used("voxtral-mini-2507", audio_ms=36_000)),
    row("mistral", "audio/transcriptions", [{"type": "transcription.text.delta", "text": "Hello"}, {"type": "transcription.done", "text": "Hello", "model": "voxtral-mini-2507", "usage": chat_usage(13, 151, prompt_audio_seconds=36)}], used("voxtral-mini-2507", audio_ms=36_000)),
    row("mistral", "batch/jobs", {"id": "b-1", "object": "batch", "status": "QUEUED", "model": "mistral-small-2603"}),
    row("mistral", "batch/jobs/b-1", {"id": "b-1", "object": "batch", "status": "SUCCESS", "model": "mistral-small-2603", "output_file": "f"}, used("mistral-small-2603", "b-1", incomplete=True), method="GET", note="a batch's usage is only in its output: unpriced"),
    row("perplexity", "chat/completions", chat("sonar", chat_usage(14, 50, search_context_size="low", reasoning_tokens=7, citation_tokens=9, cost=PERPLEXITY_COST)), used("sonar", input_tokens=14, output_tokens=50, billed_nano_usd=6_500_000)),
    row("perplexity", "chat/completions", deltas("sonar", finish(chat_usage(14, 5, cost=PERPLEXITY_COST | {"total_cost": 0.006}), status="PENDING"), finish(chat_usage(14, 50, cost=PERPLEXITY_COST), type="end_of_stream", status="COMPLETED")), used("sonar", input_tokens=14, output_tokens=50, billed_nano_usd=6_500_000)),
    row("perplexity", "v1/responses", response(usage=token_usage(100, 20, input_tokens_details={"cache_creation_input_tokens": 5, "cache_read_input_tokens": 60}, tool_calls_details={"search_web": {"invocation": 1}}, cost={"currency": "USD", "input_cost": 0.001, "output_cost": 0.0005, "total_cost": 0.0065}), model="openai/gpt-5-mini"), used("openai/gpt-5-mini", "resp_1", input_tokens=100, output_tokens=20, cache_read_tokens=60, cache_write_tokens=5, billed_nano_usd=6_500_000)),
    row("perplexity", "v1/responses", responding("completed", response(usage=token_usage(100, 20, cost={"total_cost": 0.0065}), model="sonar-pro"), "sonar-pro"), used("sonar-pro", "resp_1", input_tokens=100, output_tokens=20, billed_nano_usd=6_500_000)),
    row("perplexity", "async/chat/completions", {"id": "a-1", "model": "sonar-deep-research", "status": "CREATED", "response": None}),
    row("perplexity", "async/chat/completions/a-1", {"id": "a-1", "model": "sonar-deep-research", "status": "COMPLETED", "response": chat("sonar-deep-research", chat_usage(14, 50, cost=PERPLEXITY_COST))}, used("sonar-deep-research", "a-1", input_tokens=14, output_tokens=50, billed_nano_usd=6_500_000), method="GET"),
    row("perplexity", "v1/embeddings", {"object": "list", "data": [], "model": "pplx-embed-v1", "usage": {"prompt_tokens": 8, "total_tokens": 8, "cost": {"currency": "USD", "input_cost": 0.0001, "total_cost": 0.0001}}}, used("pplx-embed-v1", input_tokens=8, billed_nano_usd=100_000)),
    row("openrouter", "chat/completions", chat("openai/gpt-5-mini", chat_usage(100, 50, cost=7.75e-06, is_byok=False, cost_details={"upstream_inference_cost": None}, prompt_tokens_details={"cached_tokens": 40, "cache_write_tokens": 5, "audio_tokens": 0}, completion_tokens_details={"reasoning_tokens": 30, "image_tokens": 0}, server_tool_use_details={"web_search_requests": 2})), used("openai/gpt-5-mini", input_tokens=100, output_tokens=50, cache_read_tokens=40, cache_write_tokens=5, reasoning_tokens=30, web_searches=2, billed_nano_usd=7_750)),
    row("openrouter", "chat/completions", [*deltas("openai/gpt-5-mini", finish(chat_usage(100, 50, cost=0, is_byok=True, cost_details={"upstream_inference_cost": 0.0003253})))], used("openai/gpt-5-mini", input_tokens=100, output_tokens=50, billed_nano_usd=325_300)),
    row("openrouter", "responses", response(usage=token_usage(100, 20, cost=0.00125, cost_details={"upstream_inference_input_cost": 0.001}), model="openai/gpt-5-mini"), used("openai/gpt-5-mini", "resp_1", input_tokens=100, output_tokens=20, billed_nano_usd=1_250_000)),
    row("openrouter", "audio/transcriptions", {"text": "Hello", "usage": {"seconds": 60, "cost": 0.006}}, used(None, audio_ms=60_000, billed_nano_usd=6_000_000)),
    row("openrouter", "generation", {"data": {"id": "gen-1", "total_cost": 0.001, "usage": 0.001, "tokens_prompt": 10}}, method="GET"),
    row("openrouter", "key", {"data": {"usage": 12.5, "limit": None}}, method="GET"),
    row("vllm", "chat/completions", deltas("m", usage_chunk(chat_usage(5, 3)), usage=chat_usage(5, 1)), used("m", input_tokens=5, output_tokens=3)),
    row("vllm", "rerank", {"id": "r-1", "model": "m", "usage": {"total_tokens": 56}, "results": []}, used("m", input_tokens=56)),
    row("ollama", "chat/completions", chat("llama3.2", chat_usage(26, 10)), used("llama3.2", input_tokens=26, output_tokens=10)),
    row("moonshot", "chat/completions", chat("kimi-k2", KIMI), used("kimi-k2", input_tokens=100, output_tokens=50, cache_read_tokens=80)),
    row("moonshot", "chat/completions", deltas("kimi-k2", {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": KIMI}]}, usage_chunk(KIMI)), used("kimi-k2", input_tokens=100, output_tokens=50, cache_read_tokens=80)),
    row("cerebras", "chat/completions", deltas("qwen-3", finish(chat_usage(9, 8, prompt_tokens_details={"cached_tokens": 4}, completion_tokens_details={"reasoning_tokens": 2}))), used("qwen-3", input_tokens=9, output_tokens=8, cache_read_tokens=4, reasoning_tokens=2)),
    row("deepinfra", "chat/completions", chat("qwen", chat_usage(11, 5, estimated_cost=8.775e-06), service_tier="priority"), used("qwen", input_tokens=11, output_tokens=5, billed_nano_usd=8_775, service_tier="priority")),
    row("voyage", "embeddings", {"object": "list", "data": [], "model": "voyage-3", "usage": {"total_tokens": 10}}, used("voyage-3", input_tokens=10)),
    row("together", "rerank", {"object": "rerank", "model": "m", "results": [], "usage": chat_usage(2966, 0)}, used("m", input_tokens=2966)),
]  # fmt: skip

CACHED = {"input_tokens": 2, "cache_creation_input_tokens": 3068, "cache_read_input_tokens": 100, "cache_creation": {"ephemeral_5m_input_tokens": 1068, "ephemeral_1h_input_tokens": 2000}, "output_tokens": 69, "service_tier": "standard", "inference_geo": "global"}
CACHED_USED: dict[str, Any] = {"input_tokens": 3170, "cache_read_tokens": 100, "cache_write_tokens": 3068, "cache_write_1h_tokens": 2000}
CLAUDE = "claude-sonnet-4-5-20250929"


def message(usage: Any, model: str = CLAUDE, **more: Any) -> dict[str, Any]:
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": [{"type": "text", "text": "Hello"}], "stop_reason": "end_turn", "usage": usage} | more


def messages(start: Any, *ends: Any, model: str = CLAUDE, stop: str = "end_turn") -> list[Any]:
    return [
        {"type": "message_start", "message": message(start, model, content=[], stop_reason=None)},
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
        *({"type": "message_delta", "delta": {"stop_reason": stop}, "usage": end} for end in ends),
        {"type": "message_stop"},
    ]


def turn(kind: str, input_tokens: int, output_tokens: int, **more: Any) -> dict[str, Any]:
    return {"type": kind, "input_tokens": input_tokens, "output_tokens": output_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0} | more


COMPACTED = {"input_tokens": 612, "output_tokens": 2819, "iterations": [turn("compaction", 60385, 522, cache_creation_input_tokens=5), turn("message", 612, 2819)]}
ADVISED = {"input_tokens": 4727, "output_tokens": 3391, "iterations": [turn("message", 1051, 35), turn("advisor_message", 2728, 3880, model="claude-opus-4-7"), turn("message", 3676, 3356)]}
FELL_BACK = {"input_tokens": 412, "output_tokens": 264, "iterations": [turn("message", 408, 0, model="claude-fable-5"), turn("fallback_message", 412, 264, model="claude-opus-4-8")]}
START = {"input_tokens": 25, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 1, "service_tier": "standard"}
RESULTS = lines(
    {"custom_id": "a", "result": {"type": "succeeded", "message": message({"input_tokens": 10, "output_tokens": 5, "service_tier": "batch"})}},
    {"custom_id": "b", "result": {"type": "errored", "error": {"type": "invalid_request"}}},
    {"custom_id": "c", "result": {"type": "succeeded", "message": message({"input_tokens": 20, "output_tokens": 7, "cache_read_input_tokens": 3, "service_tier": "batch"})}},
    {"custom_id": "d", "result": {"type": "succeeded", "message": message({"input_tokens": 1, "output_tokens": 1, "service_tier": "batch"}, "claude-haiku-4-5")}},
)
BATCH = {"id": "msgbatch_1", "type": "message_batch", "processing_status": "in_progress", "request_counts": {"processing": 3}, "results_url": None}
ANTHROPIC = [
    row("anthropic", "v1/messages", message(CACHED), used(CLAUDE, **CACHED_USED, output_tokens=69)),
    row("anthropic", "v1/messages", messages(CACHED | {"output_tokens": 1}, {"output_tokens": 30}, {"output_tokens": 69}), used(CLAUDE, **CACHED_USED, output_tokens=69)),
    row("anthropic", "v1/messages", messages(START | {"input_tokens": 2037}, {"input_tokens": 15665, "output_tokens": 300, "server_tool_use": {"web_search_requests": 2, "web_fetch_requests": 1}, "output_tokens_details": {"thinking_tokens": 40}}), used(CLAUDE, input_tokens=15665, output_tokens=300, web_searches=2, reasoning_tokens=40)),
    row("anthropic", "v1/messages", messages(START | {"cache_read_input_tokens": 900}, dict.fromkeys(START, 0) | {"output_tokens": 50, "service_tier": None}), used(CLAUDE, input_tokens=925, cache_read_tokens=900, output_tokens=50)),
    row("anthropic", "v1/messages", message(COMPACTED), used(CLAUDE, input_tokens=61002, output_tokens=3341, cache_write_tokens=5)),
    row("anthropic", "v1/messages", messages(START | {"input_tokens": 60385}, COMPACTED), used(CLAUDE, input_tokens=61002, output_tokens=3341, cache_write_tokens=5)),
    row("anthropic", "v1/messages", message(ADVISED), used(CLAUDE, input_tokens=4727, output_tokens=3391), used("claude-opus-4-7", input_tokens=2728, output_tokens=3880)),
    row("anthropic", "v1/messages", messages(START | {"input_tokens": 408}, FELL_BACK, model="claude-fable-5"), used("claude-opus-4-8", input_tokens=412, output_tokens=264)),
    row("anthropic", "v1/messages", message(START | {"input_tokens": 412, "output_tokens": 0}, stop_reason="refusal"), used(CLAUDE, input_tokens=412, billed_nano_usd=0)),
    row("anthropic", "v1/messages", message(START | {"output_tokens": 5, "speed": "fast"}, "claude-opus-4-8"), used("claude-opus-4-8", input_tokens=25, output_tokens=5, service_tier="fast")),
    row("anthropic", "v1/messages", message(START | {"output_tokens": 5, "service_tier": "priority"}), used(CLAUDE, input_tokens=25, output_tokens=5, service_tier="priority")),
    row("anthropic", "v1/messages", message(START | {"output_tokens": 5, "inference_geo": "us"}), used(CLAUDE, input_tokens=25, output_tokens=5, incomplete=True), note="the factor of `inference_geo: us`, fees of code execution: unpriced"),
    row("anthropic", "v1/messages/count_tokens", {"input_tokens": 2095}),
    row("anthropic", "v1/messages/batches", BATCH),
    row("anthropic", "v1/messages/batches/msgbatch_1", BATCH | {"processing_status": "ended", "results_url": "https://x.example"}, method="GET"),
    row("anthropic", "v1/messages/batches/msgbatch_1/results", RESULTS, used(CLAUDE, "msgbatch_1", input_tokens=33, output_tokens=12, cache_read_tokens=3, service_tier="batch"), used("claude-haiku-4-5", "msgbatch_1", input_tokens=1, output_tokens=1, service_tier="batch"), method="GET", Content_Type="application/x-jsonl"),
    row("anthropic", "v1/chat/completions", chat("claude-sonnet-4-5", chat_usage(10, 5, prompt_tokens_details={}, completion_tokens_details=None)), used("claude-sonnet-4-5", input_tokens=10, output_tokens=5)),
    row("anthropic", "v1/organizations/usage_report/messages", {"data": [{"results": [{"uncached_input_tokens": 1500, "usage": START}]}]}, method="GET"),
    row("deepseek", "anthropic/v1/messages", message({"input_tokens": 10, "output_tokens": 5}, "deepseek-chat"), used("deepseek-chat", input_tokens=10, output_tokens=5)),
    row("openrouter", "messages", messages({"input_tokens": 10, "output_tokens": 0}, {"output_tokens": 5}, model="anthropic/claude-sonnet-4.5"), used("anthropic/claude-sonnet-4.5", input_tokens=10, output_tokens=5)),
    row("vllm", "messages", messages({"input_tokens": 0, "output_tokens": 0}, {"input_tokens": 1000, "cache_read_input_tokens": 500, "output_tokens": 50}, model="m"), used("m", input_tokens=1500, output_tokens=50, cache_read_tokens=500)),
]  # fmt: skip


def modality(kind: str, count: int) -> dict[str, Any]:
    return {"modality": kind, "tokenCount": count}


def gemini(metadata: Any, **more: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"parts": [{"text": "Hello"}], "role": "model"}}], "usageMetadata": metadata, "modelVersion": "gemini-2.5-flash", "responseId": "r-1"} | more


GENERATE = "v1beta/models/gemini-2.5-flash:generateContent"
GENERATE_STREAM = "v1beta/models/gemini-2.5-flash:streamGenerateContent"
THINKING_USAGE = {"promptTokenCount": 100, "candidatesTokenCount": 29, "thoughtsTokenCount": 50, "cachedContentTokenCount": 40, "totalTokenCount": 179, "promptTokensDetails": [modality("TEXT", 60), modality("AUDIO", 30), modality("IMAGE", 10)], "cacheTokensDetails": [modality("AUDIO", 20), {"modality": "TEXT"}], "trafficType": "ON_DEMAND"}
THINKING_USED: dict[str, Any] = {"input_tokens": 100, "output_tokens": 79, "cache_read_tokens": 40, "reasoning_tokens": 50, "input_audio_tokens": 30, "cache_audio_read_tokens": 20, "input_image_tokens": 10}
INTERACTION_USAGE = {"total_input_tokens": 22, "total_output_tokens": 590, "total_thought_tokens": 1173, "total_tool_use_tokens": 198, "total_cached_tokens": 4, "total_tokens": 1983, "input_tokens_by_modality": [{"modality": "text", "tokens": 12}, {"modality": "audio", "tokens": 10}]}
INTERACTION_USED: dict[str, Any] = {"input_tokens": 220, "output_tokens": 1763, "cache_read_tokens": 4, "reasoning_tokens": 1173, "input_audio_tokens": 10}


def interaction(status: str = "completed", usage: Any = None, **more: Any) -> dict[str, Any]:
    reported = {} if usage is None else {"usage": usage}
    return {"id": "i-1", "object": "interaction", "model": "gemini-2.5-flash", "status": status, "service_tier": "standard", "steps": []} | reported | more


INTERACTING = [
    {"event_type": "interaction.created", "interaction": interaction("in_progress")},
    {"event_type": "step.delta", "index": 0, "delta": {"type": "text", "text": "Hello"}},
    {"event_type": "step.stop", "index": 0, "usage": {"total_input_tokens": 1}, "step_usage": {"total_input_tokens": 1}},
    {"event_type": "interaction.completed", "interaction": interaction(usage=INTERACTION_USAGE)},
    "[DONE]",
]
FLASH = "gemini-2.5-flash"
OPERATION = "models/veo-3.1/operations/o-1"
GOOGLE = [
    row("google-ai-studio", GENERATE, gemini(THINKING_USAGE), used(FLASH, **THINKING_USED)),
    row("google-ai-studio", GENERATE_STREAM, [gemini({"trafficType": "ON_DEMAND"}), gemini(THINKING_USAGE | {"candidatesTokenCount": 10}), gemini(THINKING_USAGE), gemini({"trafficType": "ON_DEMAND"})], used(FLASH, **THINKING_USED)),
    row("google-ai-studio", GENERATE_STREAM, json.dumps([gemini(THINKING_USAGE | {"candidatesTokenCount": 10}), gemini(THINKING_USAGE)], indent=1).encode(), used(FLASH, **THINKING_USED), Content_Type="application/json"),
    row("google-ai-studio", GENERATE, gemini({"promptTokenCount": 417, "thoughtsTokenCount": 71, "totalTokenCount": 488}), used(FLASH, input_tokens=417, output_tokens=71, reasoning_tokens=71)),
    row("google-ai-studio", GENERATE, gemini({"promptTokenCount": 10, "candidatesTokenCount": 4, "toolUsePromptTokenCount": 90, "serviceTier": "flex"}), used(FLASH, input_tokens=100, output_tokens=4, service_tier="flex")),
    row("google-ai-studio", GENERATE, gemini({"promptTokenCount": 10, "candidatesTokenCount": 4}), used(FLASH, input_tokens=10, output_tokens=4, service_tier="priority"), x_gemini_service_tier="priority"),
    row("google-ai-studio", GENERATE, {"candidates": [{"content": {"parts": []}, "groundingMetadata": {"webSearchQueries": ["x"]}}], "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 4}, "modelVersion": FLASH}, used(FLASH, input_tokens=10, output_tokens=4, incomplete=True), note="fees of Google Search and Maps: unpriced"),
    row("google-ai-studio", GENERATE, gemini({"promptTokenCount": 10, "candidatesTokenCount": 1300, "candidatesTokensDetails": [modality("IMAGE", 1290)]}, modelVersion="gemini-2.5-flash-image"), used("gemini-2.5-flash-image", input_tokens=10, output_tokens=1300, output_image_tokens=1290)),
    row("google-ai-studio", GENERATE, gemini({"promptTokenCount": 50, "candidatesTokenCount": 4, "promptTokensDetails": [modality("TEXT", 535), modality("AUDIO", 80)]}), used(FLASH, input_tokens=50, output_tokens=4, input_audio_tokens=50)),
    row("google-ai-studio", "v1beta/models/gemini-embedding-001:embedContent", {"embedding": {"values": [0.1]}, "usageMetadata": {"promptTokenCount": 9, "promptTokenDetails": [modality("IMAGE", 5), modality("TEXT", 4)]}}, used(None, input_tokens=9, input_image_tokens=5)),
    row("google-ai-studio", "v1beta/models/gemini-embedding-001:batchEmbedContents", {"embeddings": []}, used(None, incomplete=True), note="older embedding models report no usage: unpriced"),
    row("google-ai-studio", "v1beta/models/gemini-2.5-flash:countTokens", {"totalTokens": 31, "promptTokensDetails": [modality("TEXT", 31)]}),
    row("google-ai-studio", "v1beta/cachedContents", {"name": "cachedContents/c-1", "usageMetadata": {"totalTokenCount": 5000, "promptTokenCount": 5000}}),
    row("google-ai-studio", "v1beta/models/imagen-4:predict", {"predictions": [{"mimeType": "image/png", "bytesBase64Encoded": "AA=="}]}, used(None, images=3, estimated=True), sent={"instances": [{"prompt": "x"}], "parameters": {"sampleCount": 3}}, note="images: `sampleCount` of the request"),
    row("google-ai-studio", "v1beta/models/veo-3.1:predictLongRunning", {"name": OPERATION}),
    row("google-ai-studio", f"v1beta/{OPERATION}", {"name": OPERATION}, method="GET"),
    row("google-ai-studio", f"v1beta/{OPERATION}", {"name": OPERATION, "done": True, "response": {"generateVideoResponse": {"generatedSamples": [{}]}}}, used(None, OPERATION, incomplete=True), method="GET", note="seconds of videos: each is counted once, unpriced"),
    row("google-ai-studio", f"v1beta/{OPERATION}", {"name": OPERATION, "done": True, "error": {"code": 3}}, method="GET"),
    row("google-ai-studio", "v1beta/models/gemini-2.5-flash:batchGenerateContent", {"name": "batches/b-1", "metadata": {"state": "BATCH_STATE_PENDING"}}),
    row("google-ai-studio", "v1beta/batches/b-1", {"name": "batches/b-1", "done": True, "metadata": {"state": "BATCH_STATE_SUCCEEDED"}, "response": {"inlinedResponses": {"inlinedResponses": [{"response": gemini(THINKING_USAGE)}]}}}, used(None, "batches/b-1", incomplete=True), method="GET", note="usage in a batch's responses: unpriced"),
    row("google-ai-studio", "v1beta/interactions", interaction(usage=INTERACTION_USAGE), used(FLASH, "i-1", **INTERACTION_USED)),
    row("google-ai-studio", "v1beta/interactions", INTERACTING, used(FLASH, "i-1", **INTERACTION_USED)),
    row("google-ai-studio", "v1beta/interactions", interaction(usage=INTERACTION_USAGE | {"grounding_tool_count": [{"type": "google_search", "count": 2}]}), used(FLASH, "i-1", **INTERACTION_USED, incomplete=True)),
    row("google-ai-studio", "v1beta/interactions", interaction("in_progress", background=True)),
    row("google-ai-studio", "v1beta/interactions/i-1", interaction("requires_action", usage=INTERACTION_USAGE, service_tier="priority"), used(FLASH, "i-1", **INTERACTION_USED, service_tier="priority"), method="GET"),
    row("google-ai-studio", "v1beta/interactions/i-1/cancel", interaction("cancelled", usage=INTERACTION_USAGE)),
    row("google-ai-studio", "v1beta/decisions", {"answers": [], "model": FLASH, "usage": INTERACTION_USAGE}, used(FLASH, **INTERACTION_USED)),
    row("google-ai-studio", "v1beta/openai/chat/completions", chat("gemini-2.5-pro", {"completion_tokens": 12, "prompt_tokens": 35, "total_tokens": 109}), used("gemini-2.5-pro", input_tokens=35, output_tokens=74, reasoning_tokens=62)),
    row("google-ai-studio", "v1beta/openai/chat/completions", deltas("gemini-2.5-pro", finish({"completion_tokens": 12, "prompt_tokens": 35, "total_tokens": 109}), usage={"completion_tokens": 3, "prompt_tokens": 35, "total_tokens": 38}), used("gemini-2.5-pro", input_tokens=35, output_tokens=74, reasoning_tokens=62)),
    row("google-ai-studio", "v1beta/openai/embeddings", {"object": "list", "data": [], "model": "gemini-embedding-001", "usage": {"prompt_tokens": 9, "total_tokens": 9}}, used("gemini-embedding-001", input_tokens=9)),
]  # fmt: skip

COHERE_USAGE = {"billed_units": {"input_tokens": 39.0, "output_tokens": 49.0}, "tokens": {"input_tokens": 1683.0, "output_tokens": 50.0}, "cached_tokens": 16.0}
COHERE_USED = used(None, input_tokens=1683, output_tokens=50, cache_read_tokens=16, billed=Usage(39, 49, cache_read_tokens=16))
COHERE = [
    row("cohere", "v2/chat", {"id": "c-1", "finish_reason": "COMPLETE", "message": {"content": [{"type": "text", "text": "Hello"}]}, "usage": COHERE_USAGE}, COHERE_USED),
    row("cohere", "v2/chat", [{"type": "message-start", "id": "c-1"}, {"type": "content-delta", "delta": {"message": {"content": {"text": "Hello"}}}}, {"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": COHERE_USAGE}}], COHERE_USED),
    row("cohere", "v1/chat", {"text": "Hello", "generation_id": "g-1", "meta": {"api_version": {"version": "1"}, **COHERE_USAGE}}, COHERE_USED),
    row("cohere", "v1/chat", lines({"event_type": "text-generation", "text": "Hello"}, {"event_type": "stream-end", "response": {"text": "Hello", "meta": COHERE_USAGE}}), COHERE_USED, Content_Type="application/stream+json"),
    row("cohere", "v2/embed", {"id": "e-1", "embeddings": {"float": [[0.1]]}, "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 10, "image_tokens": 5}}}, used(None, input_tokens=15, input_image_tokens=5, incomplete=True), note="the higher price of images: unpriced"),
    row("cohere", "v1/embed", {"id": "e-1", "embeddings": [[0.1]], "meta": {"billed_units": {"images": 2}}}, used(None, images=2)),
    row("cohere", "v2/rerank", {"id": "r-1", "results": [], "meta": {"billed_units": {"search_units": 1}}}, used(None, units_milli=1000)),
    row("cohere", "v1/classify", {"id": "r-1", "classifications": [], "meta": {"billed_units": {"classifications": 4}}}, used(None, units_milli=4000)),
    row("cohere", "v2/audio/transcriptions", {"text": "Hello"}, used(None, incomplete=True), note="no usage is reported: unpriced"),
    row("cohere", "v1/tokenize", {"tokens": [1, 2], "meta": {"api_version": {"version": "1"}}}),
    row("cohere", "compatibility/v1/chat/completions", chat("command-a-03-2025", chat_usage(10, 5)), used("command-a-03-2025", input_tokens=10, output_tokens=5)),
]  # fmt: skip

SPEECH = [
    row("cartesia", "tts/bytes", b"sound", used(None, characters=9), sent={"model_id": "sonic-3", "transcript": "hello you"}, note="audio: the characters of `transcript`"),
    row("cartesia", "tts/sse", [{"type": "chunk", "data": "AA==", "done": False, "step_time": 12.5}, {"type": "done", "done": True}], used(None, characters=9), sent={"transcript": "hello you"}),
    row("cartesia", "infill/bytes", b"sound", used(None, incomplete=True), note="no usage is reported: unpriced"),
    row("cartesia", "voice-changer/bytes", b"sound", used(None, incomplete=True)),
    row("cartesia", "stt", {"type": "transcript", "text": "Hello", "duration": 2.479, "language": "en", "words": [{"word": "Hello", "end": 1.5}]}, used(None, audio_ms=2479)),
    row("elevenlabs", "v1/text-to-speech/v-1", b"sound", used(None, characters=403), sent={"text": "x" * 735}, character_cost="403", note="without `character-cost`: the characters of `text`"),
    row("elevenlabs", "v1/text-to-speech/v-1/with-timestamps", {"audio_base64": "AA==", "alignment": {"characters": ["a"]}}, used(None, characters=5), sent={"text": "hello"}),
    row("elevenlabs", "v1/sound-generation", b"sound", used(None, characters=200), character_cost="200"),
    row("elevenlabs", "v1/music", b"sound", used(None, incomplete=True), note="without `character-cost`, no usage is reported: unpriced"),
    row("elevenlabs", "v1/speech-to-text", {"language_code": "en", "text": "hi", "audio_duration_secs": 60.0, "transcription_id": "t-1", "words": [{"end": 59.5}]}, used(None, "t-1", **MINUTE)),
    row("elevenlabs", "v1/speech-to-text", {"transcripts": [{"audio_duration_secs": 30.0}, {"audio_duration_secs": 30.0}], "audio_duration_secs": 60.0}, used(None, **MINUTE)),
    row("elevenlabs", "v1/speech-to-text", {"language_code": "en", "text": "hi", "words": []}, used(None, incomplete=True)),
    row("elevenlabs", "v1/speech-to-text", {"message": "ok", "request_id": "r-1", "transcription_id": "t-1"}, note="a transcript for a webhook: counted when it is read"),
    row("elevenlabs", "v1/speech-to-text/transcripts/t-1", {"text": "hi", "audio_duration_secs": 60.0, "transcription_id": "t-1"}, used(None, "t-1", **MINUTE), method="GET"),
    row("elevenlabs", "v1/history", {"history": [{"character_count_change_to": 10}]}, method="GET"),
    row("deepgram", "v1/listen", {"metadata": {"request_id": "r-1", "duration": 25.933313, "channels": 1, "summary_info": {"input_tokens": 95, "output_tokens": 63}}, "results": {"channels": []}}, used(None, audio_ms=25_933), note="whether several channels are billed separately; tokens of summaries and topics"),
    row("deepgram", "v1/listen", {"request_id": "r-1"}, used(None, incomplete=True), note="with `callback`, no usage is reported: unpriced"),
    row("deepgram", "v1/speak", b"sound", used(None, characters=7), sent={"text": "hello"}, dg_char_count="7"),
    row("deepgram", "v1/speak", b"sound", used(None, characters=5), sent={"text": "hello"}),
    row("deepgram", "v1/read", {"metadata": {"summary_info": {"input_tokens": 95}}, "results": {}}, used(None, incomplete=True), note="tokens of text intelligence: unpriced"),
    row("assemblyai", "v2/transcript", {"id": "t-1", "status": "queued", "audio_duration": None}),
    row("assemblyai", "v2/transcript/t-1", {"id": "t-1", "status": "processing", "audio_duration": None}, method="GET"),
    row("assemblyai", "v2/transcript/t-1", {"id": "t-1", "status": "completed", "text": "hi", "audio_duration": 281, "words": [{"end": 500}]}, used(None, "t-1", audio_ms=281_000), method="GET"),
    row("assemblyai", "v2/transcript/t-1", {"id": "t-1", "status": "error", "error": "x", "audio_duration": None}, method="GET"),
    row("assemblyai", "v2/transcript/t-1/sentences", {"id": "t-1", "audio_duration": 281, "sentences": []}, method="GET"),
    row("fal", "fal-ai/flux/dev", {"images": [{"url": "https://x.example/1"}], "usage": {"input_tokens": 5}}, used(None, "f-1", units_milli=3008), x_fal_billable_units="3.008", x_fal_request_id="f-1"),
    row("fal", "fal-ai/flux/dev", {"images": []}, used(None, incomplete=True), note="apps that are billed by time report no units: unpriced"),
    row("fal", "queue/fal-ai/flux/dev", {"status": "IN_QUEUE", "request_id": "f-1", "queue_position": 0}),
    row("fal", "queue/fal-ai/flux/requests/f-1/status", {"status": "COMPLETED", "metrics": {"inference_time": 1.5}}, method="GET"),
    row("fal", "queue/fal-ai/flux/requests/f-1", {"images": []}, used(None, "f-1", units_milli=1250), method="GET", x_fal_billable_units="1.25", x_fal_request_id="f-1"),
    row("fal", "queue/fal-ai/flux/requests/f-1/cancel", {"status": "CANCELLATION_REQUESTED"}, method="PUT"),
]  # fmt: skip

ROWS = [*OPENAI, *FOLLOWERS, *ANTHROPIC, *GOOGLE, *COHERE, *SPEECH]
