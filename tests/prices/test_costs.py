"""What calls cost: each case has the usage that a provider reports and the cost computed by hand.

Costs are sums in millionths of a dollar (tokens times dollars per million tokens). The price list
of the relay must agree with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.core.exchange import Caller, Exchange, Request
from relay.core.meters.answer_meter import answer_meter, read_whole
from relay.core.meters.sent_call import SentCall
from relay.core.meters.socket_meter import OpenedSession, SocketMeter
from relay.core.meters.socket_meters import socket_meter
from relay.core.pricing import custom_cost
from relay.core.usage import CallBound, Part, Usage
from relay.prices import price_list
from relay.registry.load import Sources, load
from tests.relays import write_config

NOW_S = 1_795_521_600.0
"""2026-11-24, 12:00 UTC; prices depend on the date."""


def usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, **more}


def token_usage(input_tokens: int, output_tokens: int, **more: Any) -> dict[str, Any]:
    return {"input_tokens": input_tokens, "output_tokens": output_tokens, **more}


def gemini(**counts: Any) -> dict[str, Any]:
    return {"usageMetadata": counts}


def modality(kind: str, count: int) -> dict[str, Any]:
    return {"modality": kind, "tokenCount": count}


CACHED = {"prompt_tokens_details": {"cached_tokens": 800}}
REASONING = {"completion_tokens_details": {"reasoning_tokens": 300}}

# provider, model, kind, the response without its model, the cost
RESPONSES: Sequence[tuple[str, str, str, Any, str | None]] = (
    ("openai", "gpt-4o-mini", "chat", {"usage": usage(1000, 500)}, "1000*0.15 + 500*0.60"),
    ("openai", "gpt-4o-mini", "chat", {"usage": usage(1000, 500, **CACHED)}, "200*0.15 + 800*0.075 + 500*0.60"),
    ("openai", "gpt-4o-mini", "chat", {"usage": usage(1, 0)}, "1*0.15"),
    ("openai", "gpt-4o-mini-2024-07-18", "chat", {"usage": usage(9, 12)}, "9*0.15 + 12*0.60"),
    ("openai", "gpt-4o", "chat", {"usage": usage(1000, 500)}, "1000*2.50 + 500*10"),
    ("openai", "gpt-4o", "chat", {"usage": usage(1000, 500, **CACHED)}, "200*2.50 + 800*1.25 + 500*10"),
    ("openai", "gpt-4.1", "chat", {"usage": usage(1000, 500, **CACHED)}, "200*2 + 800*0.50 + 500*8"),
    ("openai", "gpt-4.1-nano", "chat", {"usage": usage(123, 45)}, "123*0.10 + 45*0.40"),
    ("openai", "gpt-5", "chat", {"usage": usage(1000, 500, **CACHED, **REASONING)}, "200*1.25 + 800*0.125 + 500*10"),
    ("openai", "gpt-5-mini", "chat", {"usage": usage(1000, 500)}, "1000*0.25 + 500*2"),
    ("openai", "o3", "chat", {"usage": usage(1000, 500, **REASONING)}, "1000*2 + 500*8"),
    ("openai", "o4-mini", "chat", {"usage": usage(1000, 500, **CACHED)}, "200*1.10 + 800*0.275 + 500*4.40"),
    ("openai", "gpt-3.5-turbo", "chat", {"usage": usage(1000, 500)}, "1000*0.50 + 500*1.50"),
    ("openai", "gpt-5", "responses", {"usage": token_usage(36, 87, input_tokens_details={"cached_tokens": 0}, output_tokens_details={"reasoning_tokens": 64})}, "36*1.25 + 87*10"),
    ("openai", "gpt-5", "responses", {"usage": token_usage(1000, 10, input_tokens_details={"cached_tokens": 768})}, "232*1.25 + 768*0.125 + 10*10"),
    ("openai", "text-embedding-3-small", "embeddings", {"usage": {"prompt_tokens": 1234, "total_tokens": 1234}}, "1234*0.02"),
    ("openai", "text-embedding-3-large", "embeddings", {"usage": {"prompt_tokens": 7, "total_tokens": 7}}, "7*0.13"),
    ("openai", "gpt-image-1", "image", {"usage": token_usage(50, 4160, input_tokens_details={"text_tokens": 10, "image_tokens": 40})}, "10*5 + 40*10 + 4160*40"),
    ("openai", "gpt-image-1", "image", {"usage": token_usage(10, 272)}, "10*5 + 272*40"),
    ("openai", "gpt-4o-transcribe", "transcription", {"usage": {"type": "tokens", **token_usage(114, 40, input_token_details={"text_tokens": 14, "audio_tokens": 100})}}, "14*2.50 + 100*6 + 40*10"),
    ("openai", "gpt-4o-mini-transcribe", "transcription", {"usage": {"type": "tokens", **token_usage(100, 40, input_token_details={"text_tokens": 0, "audio_tokens": 100})}}, "100*3 + 40*5"),
    ("openai", "whisper-1", "transcription", {"usage": {"type": "duration", "seconds": 90}}, "90*0.36/3600*1000000"),
    ("openai", "gpt-audio", "chat", {"usage": usage(110, 220, prompt_tokens_details={"audio_tokens": 100}, completion_tokens_details={"audio_tokens": 200})}, "10*2.50 + 100*32 + 20*10 + 200*64"),
    ("openai", "gpt-4o-audio-preview", "chat", {"usage": usage(110, 20, prompt_tokens_details={"audio_tokens": 100})}, None),
    ("openai", "unknown-model", "chat", {"usage": usage(1000, 500)}, None),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(1000, 500)}, "1000*3 + 500*15"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(10, 5, cache_read_input_tokens=1000)}, "10*3 + 1000*0.30 + 5*15"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(10, 5, cache_creation_input_tokens=1000)}, "10*3 + 1000*3.75 + 5*15"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(10, 5, cache_creation_input_tokens=1000, cache_creation={"ephemeral_5m_input_tokens": 400, "ephemeral_1h_input_tokens": 600})}, "10*3 + 400*3.75 + 600*6 + 5*15"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(10, 5, cache_creation_input_tokens=20, cache_read_input_tokens=30)}, "10*3 + 20*3.75 + 30*0.30 + 5*15"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(250_000, 100)}, "250000*6 + 100*22.50"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(200_000, 100)}, "200000*3 + 100*15"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(1, 100, cache_read_input_tokens=200_000)}, "1*6 + 200000*0.60 + 100*22.50"),
    ("anthropic", "claude-sonnet-4-5-20250929", "messages", {"usage": token_usage(3, 4)}, "3*3 + 4*15"),
    ("anthropic", "claude-opus-4-5", "messages", {"usage": token_usage(100, 50)}, "100*5 + 50*25"),
    ("anthropic", "claude-opus-4-1", "messages", {"usage": token_usage(100, 50)}, "100*15 + 50*75"),
    ("anthropic", "claude-haiku-4-5", "messages", {"usage": token_usage(100, 50, cache_read_input_tokens=900)}, "100*1 + 900*0.10 + 50*5"),
    ("google-ai-studio", "gemini-2.5-flash", "generate", gemini(promptTokenCount=10, candidatesTokenCount=4, thoughtsTokenCount=5), "10*0.30 + 9*2.50"),
    ("google-ai-studio", "gemini-2.5-flash", "generate", gemini(promptTokenCount=1000, candidatesTokenCount=40, cachedContentTokenCount=600), "400*0.30 + 600*0.03 + 40*2.50"),
    ("google-ai-studio", "gemini-2.5-flash", "generate", gemini(promptTokenCount=110, candidatesTokenCount=40, promptTokensDetails=[modality("TEXT", 10), modality("AUDIO", 100)]), "10*0.30 + 100*1 + 40*2.50"),
    ("google-ai-studio", "gemini-2.5-flash", "generate", gemini(promptTokenCount=10, candidatesTokenCount=4, toolUsePromptTokenCount=90), "100*0.30 + 4*2.50"),
    ("google-ai-studio", "gemini-2.5-flash", "generate", gemini(promptTokenCount=268, candidatesTokenCount=4, promptTokensDetails=[modality("TEXT", 10), modality("IMAGE", 258)]), "268*0.30 + 4*2.50"),
    ("google-ai-studio", "gemini-2.5-pro", "generate", gemini(promptTokenCount=1000, candidatesTokenCount=500), "1000*1.25 + 500*10"),
    ("google-ai-studio", "gemini-2.5-pro", "generate", gemini(promptTokenCount=200_001, candidatesTokenCount=500), "200001*2.50 + 500*15"),
    ("google-ai-studio", "gemini-2.5-pro", "generate", gemini(promptTokenCount=110, candidatesTokenCount=4, promptTokensDetails=[modality("AUDIO", 100)]), "110*1.25 + 4*10"),
    ("google-ai-studio", "gemini-2.5-flash-lite", "generate", gemini(promptTokenCount=1000, candidatesTokenCount=500), "1000*0.10 + 500*0.40"),
    ("google-ai-studio", "gemini-2.5-flash-image", "generate", gemini(promptTokenCount=10, candidatesTokenCount=1300, candidatesTokensDetails=[modality("IMAGE", 1290), modality("TEXT", 10)]), "10*0.30 + 1290*30 + 10*2.50"),
    ("groq", "llama-3.3-70b-versatile", "chat", {"usage": usage(1000, 500, queue_time=0.1)}, "1000*0.59 + 500*0.79"),
    ("groq", "llama-3.1-8b-instant", "chat", {"usage": usage(1000, 500)}, "1000*0.05 + 500*0.08"),
    ("groq", "whisper-large-v3", "transcription", {"usage": {"type": "duration", "seconds": 60}}, "60*0.111/3600*1000000"),
    ("mistral", "mistral-large-latest", "chat", {"usage": usage(1000, 500)}, "1000*2 + 500*6"),
    ("grok", "grok-4", "chat", {"usage": usage(100, 50, total_tokens=350, completion_tokens_details={"reasoning_tokens": 200})}, "100*3 + 250*15"),
    ("grok", "grok-4", "chat", {"usage": usage(1000, 50, total_tokens=1050, **CACHED)}, "200*3 + 800*0.75 + 50*15"),
    ("perplexity", "sonar", "chat", {"usage": usage(1000, 500)}, "1000*1 + 500*1 + 12000"),
    ("cohere", "command-r-plus", "chat", {"usage": {"billed_units": token_usage(1000.0, 500.0), "tokens": token_usage(1683.0, 520.0)}}, "1000*2.50 + 500*10"),
    ("cohere", "command-a", "chat", {"meta": {"billed_units": token_usage(39, 49), "tokens": token_usage(1683, 50)}}, "39*2.50 + 49*10"),
    ("cohere", "embed-v4.0", "embeddings", {"meta": {"billed_units": {"input_tokens": 100}}}, "100*0.12"),
    ("cohere", "embed-v4.0", "embeddings", {"meta": {"billed_units": {"input_tokens": 100, "image_tokens": 50}}}, None),
    ("cohere", "rerank-v3.5", "rerank", {"meta": {"billed_units": {"search_units": 1}}}, None),
    # tiers
    ("openai", "gpt-5", "chat", {"usage": usage(1000, 500, **CACHED), "service_tier": "flex"}, "200*0.625 + 800*0.0625 + 500*5"),
    ("openai", "gpt-5", "chat", {"usage": usage(1000, 500, **CACHED), "service_tier": "priority"}, "200*2.50 + 800*0.25 + 500*20"),
    ("openai", "gpt-5", "chat", {"usage": usage(1000, 500), "service_tier": "fast"}, "1000*2.50 + 500*20"),
    ("openai", "gpt-5", "chat", {"usage": usage(1000, 500), "service_tier": "default"}, "1000*1.25 + 500*10"),
    ("openai", "gpt-5", "chat", {"usage": usage(1000, 500), "service_tier": "auto"}, "1000*1.25 + 500*10"),
    ("openai", "gpt-5", "chat", {"usage": usage(1000, 500), "service_tier": "scale"}, None),
    ("openai", "gpt-5", "chat", {"usage": usage(1000, 500), "service_tier": "ultrafast"}, None),
    ("openai", "gpt-5-mini", "responses", {"usage": token_usage(1000, 500), "service_tier": "flex"}, "1000*0.125 + 500*1"),
    ("openai", "gpt-5-mini", "responses", {"usage": token_usage(1000, 500), "service_tier": "priority"}, "1000*0.45 + 500*3.60"),
    ("openai", "gpt-5-nano", "chat", {"usage": usage(1000, 500), "service_tier": "flex"}, "1000*0.025 + 500*0.20"),
    ("openai", "gpt-5-nano", "chat", {"usage": usage(1000, 500), "service_tier": "priority"}, None),
    ("openai", "o3", "chat", {"usage": usage(1000, 500, **CACHED), "service_tier": "priority"}, "200*3.50 + 800*0.875 + 500*14"),
    ("openai", "gpt-4o", "chat", {"usage": usage(1000, 500), "service_tier": "priority"}, "1000*4.25 + 500*17"),
    ("openai", "gpt-4o", "chat", {"usage": usage(1000, 500), "service_tier": "flex"}, None),
    ("openai", "gpt-5", "batch", {"object": "batch", "usage": token_usage(1000, 500, input_tokens_details={"cached_tokens": 800})}, "200*0.625 + 800*0.0625 + 500*5"),
    ("openai", "gpt-4.1-mini", "batch", {"object": "batch", "usage": token_usage(1000, 500)}, "1000*0.20 + 500*0.80"),
    ("openai", "text-embedding-3-small", "batch", {"object": "batch", "usage": token_usage(1000, 0)}, None),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(1000, 500, service_tier="batch", cache_read_input_tokens=100)}, "1000*1.50 + 100*0.15 + 500*7.50"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(250_000, 100, service_tier="batch")}, "250000*3 + 100*11.25"),
    ("anthropic", "claude-haiku-4-5", "messages", {"usage": token_usage(1000, 500, service_tier="batch", cache_creation_input_tokens=10, cache_creation={"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 6})}, "1000*0.50 + 4*0.625 + 6*1 + 500*2.50"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(1000, 500, service_tier="priority")}, None),
    ("anthropic", "claude-opus-4-8", "messages", {"usage": token_usage(1000, 500, speed="fast")}, "1000*10 + 500*50"),
    ("anthropic", "claude-opus-4-8", "messages", {"usage": token_usage(1000, 500, speed="fast", service_tier="batch")}, None),
    ("anthropic", "claude-opus-4-7", "messages", {"usage": token_usage(1000, 500, speed="fast")}, None),
    ("anthropic", "claude-opus-4-8", "messages", {"usage": token_usage(1000, 500, inference_geo="us")}, None),
    ("anthropic", "claude-opus-4-8", "messages", {"usage": token_usage(1000, 500, inference_geo="global", speed="standard", service_tier="standard")}, "1000*5 + 500*25"),
    ("google-ai-studio", "gemini-2.5-flash", "generate", gemini(promptTokenCount=10, candidatesTokenCount=4, serviceTier="flex"), None),
    ("google-ai-studio", "gemini-2.5-flash", "generate", gemini(promptTokenCount=10, candidatesTokenCount=4, serviceTier="standard"), "10*0.30 + 4*2.50"),
    ("groq", "openai/gpt-oss-20b", "chat", {"usage": usage(1000, 500, **CACHED), "service_tier": "on_demand"}, "200*0.075 + 800*0.0375 + 500*0.30"),
    ("groq", "openai/gpt-oss-20b", "chat", {"usage": usage(1000, 500), "service_tier": "flex"}, None),
    # long context, cache writes
    ("openai", "gpt-5.4", "chat", {"usage": usage(272_000, 10)}, "272000*2.50 + 10*15"),
    ("openai", "gpt-5.4", "chat", {"usage": usage(272_001, 10)}, "272001*5 + 10*22.50"),
    ("openai", "gpt-5.4", "chat", {"usage": usage(300_000, 10), "service_tier": "flex"}, "300000*2.50 + 10*11.25"),
    ("openai", "gpt-5.4", "chat", {"usage": usage(300_000, 10), "service_tier": "priority"}, "300000*5 + 10*30"),
    ("openai", "gpt-5.6-sol", "responses", {"usage": token_usage(4020, 10, input_tokens_details={"cached_tokens": 0, "cache_write_tokens": 4012})}, "8*4 + 4012*5 + 10*20"),
    ("openai", "gpt-5.6-sol", "responses", {"usage": token_usage(280_000, 10, input_tokens_details={"cached_tokens": 270_000, "cache_write_tokens": 5000})}, "5000*8 + 270000*0.80 + 5000*10 + 10*30"),
    ("anthropic", "claude-haiku-5-5", "messages", {"usage": token_usage(100_001, 10)}, "100001*0.50 + 10*2.50"),
    ("anthropic", "claude-opus-4-5", "messages", {"usage": token_usage(0, 5, cache_creation_input_tokens=1000, cache_creation={"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 1000})}, "1000*10 + 5*25"),
    ("google-ai-studio", "gemini-3-pro-preview", "generate", gemini(promptTokenCount=200_001, candidatesTokenCount=10, cachedContentTokenCount=100_000), "100001*4 + 100000*0.40 + 10*18"),
    # several models, refusals, tools
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(4727, 3391, iterations=[{"type": "advisor_message", "model": "claude-opus-4-7", **token_usage(2728, 3880)}])}, "4727*3 + 3391*15 + 2728*5 + 3880*25"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(612, 2819, iterations=[{"type": "compaction", **token_usage(60385, 522)}, {"type": "message", **token_usage(612, 2819)}])}, "60997*3 + 3341*15"),
    ("anthropic", "claude-opus-4-8", "messages", {"stop_reason": "refusal", "usage": token_usage(412, 0)}, "0"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(1000, 100, server_tool_use={"web_search_requests": 5, "web_fetch_requests": 2})}, "1000*3 + 100*15 + 5*10000"),
    ("anthropic", "claude-sonnet-4-5", "messages", {"usage": token_usage(1000, 100, server_tool_use={"code_execution_requests": 1})}, None),
    ("openai", "gpt-5", "responses", {"usage": token_usage(1000, 100), "tool_usage": {"web_search": {"num_requests": 3}}}, "1000*1.25 + 100*10 + 3*10000"),
    ("openai", "gpt-5", "responses", {"usage": token_usage(1000, 100), "tool_usage": {"image_gen": token_usage(10, 272)}}, None),
    ("google-ai-studio", "gemini-2.5-flash", "generate", {"candidates": [{"groundingMetadata": {"webSearchQueries": ["x"]}}], **gemini(promptTokenCount=10, candidatesTokenCount=4)}, None),
    ("grok", "grok-3-mini", "chat", {"usage": {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 241, "cost_in_usd_ticks": 1176500}}, "117.65"),
    ("grok", "grok-4", "chat", {"usage": usage(100, 50, num_sources_used=2)}, None),
    ("mistral", "mistral-large-latest", "chat", {"usage": usage(1000, 500, connectors={"web_search": 1})}, None),
    # audio, images, pages
    ("openai", "gpt-4o-mini-tts", "speech", {"type": "speech.audio.done", "usage": token_usage(14, 101)}, "14*0.60 + 101*12"),
    ("openai", "gpt-transcribe", "transcription", {"usage": {"type": "duration", "seconds": 60}}, "60*0.27/3600*1000000"),
    ("openai", "whisper-1", "transcription", {"duration": 36.7, "usage": {"type": "duration", "seconds": 37}}, "37*0.36/3600*1000000"),
    ("openai", "whisper-1", "transcription", {"duration": 60.0}, "60*0.36/3600*1000000"),
    ("openai", "whisper-1", "transcription", {"text": "hello"}, None),
    ("groq", "whisper-large-v3", "transcription", {"duration": 2.5}, "10*0.111/3600*1000000"),
    ("groq", "whisper-large-v3-turbo", "transcription", {"duration": 9.9}, "10*0.04/3600*1000000"),
    ("groq", "whisper-large-v3-turbo", "transcription", {"duration": 10.5}, "10.5*0.04/3600*1000000"),
    ("openai", "gpt-audio-mini", "chat", {"usage": usage(110, 220, prompt_tokens_details={"audio_tokens": 100}, completion_tokens_details={"audio_tokens": 200})}, "10*0.60 + 100*10 + 20*2.40 + 200*20"),
    ("openai", "gpt-image-1-mini", "image", {"usage": token_usage(50, 272, input_tokens_details={"text_tokens": 10, "image_tokens": 40}, output_tokens_details={"image_tokens": 272})}, "10*2 + 40*2.50 + 272*8"),
    ("openai", "dall-e-3", "image", {"data": [{"url": "x"}]}, None),
    ("google-ai-studio", "gemini-2.0-flash", "generate", gemini(promptTokenCount=110, candidatesTokenCount=4, cachedContentTokenCount=60, promptTokensDetails=[modality("TEXT", 10), modality("AUDIO", 100)], cacheTokensDetails=[modality("AUDIO", 60)]), "10*0.10 + 40*0.70 + 60*0.175 + 4*0.40"),
    ("google-ai-studio", "gemini-embedding-001", "embeddings", {"usageMetadata": {"promptTokenCount": 9, "promptTokenDetails": [modality("TEXT", 9)]}}, "9*0.15"),
    ("mistral", "mistral-ocr-latest", "other", {"usage_info": {"pages_processed": 3}}, "3*4000"),
    ("mistral", "mistral-ocr-latest", "other", {"document_annotation": "{}", "usage_info": {"pages_processed": 3}}, None),
    ("mistral", "mistral-embed", "embeddings", {"usage": {"prompt_tokens": 8, "total_tokens": 8, "completion_tokens": 0}}, "8*0.10"),
    ("mistral", "mistral-small-latest", "chat", {"usage": usage(1000, 500, num_cached_tokens=800)}, "200*0.15 + 800*0.015 + 500*0.60"),
    ("deepseek", "deepseek-chat", "chat", {"usage": usage(1000, 500, prompt_cache_hit_tokens=800)}, "200*0.27 + 800*0.07 + 500*1.10"),
    # costs that the provider reports
    ("perplexity", "sonar", "chat", {"usage": usage(1000, 500, cost={"total_cost": 0.0065, "request_cost": 0.005})}, "6500"),
    ("perplexity", "sonar-pro", "chat", {"usage": usage(1000, 500)}, "1000*3 + 500*15 + 14000"),
    ("openrouter", "a/b", "chat", {"usage": usage(1000, 500, cost=0, is_byok=True, cost_details={"upstream_inference_cost": 0.0003253})}, "325.30"),
    ("openrouter", "openai/gpt-4o-mini", "chat", {"usage": usage(1000, 500, cost=None)}, "1000*0.15 + 500*0.60"),
    ("deepinfra", "qwen", "chat", {"usage": usage(11, 5, estimated_cost=8.775e-06), "service_tier": "priority"}, "8.775"),
    ("openrouter", "openai/gpt-4o-mini", "chat", {"usage": usage(1000, 500, cost=0.00052)}, "520"),
    ("openrouter", "somebody/free", "chat", {"usage": usage(1000, 500, cost=0)}, "0"),
    ("openrouter", "openai/gpt-4o-mini", "chat", {"usage": usage(1000, 500)}, "1000*0.15 + 500*0.60"),
)  # fmt: skip


def done(text: int, audio: int, cached: dict[str, int] | None = None, out: tuple[int, int] = (0, 0), **more: Any) -> dict[str, Any]:
    """Return a `response.done` of OpenAI's Realtime API.

    `text` and `audio` are the input tokens, `cached` the cached input tokens by kind, and `out` the
    output tokens of text and of audio.
    """
    details: dict[str, Any] = {"text_tokens": text, "audio_tokens": audio, "cached_tokens": sum((cached or {}).values())}
    if cached is not None:
        details["cached_tokens_details"] = {f"{kind}_tokens": count for kind, count in cached.items()}
    reported = {"input_tokens": text + audio, "output_tokens": sum(out), "input_token_details": details, "output_token_details": {"text_tokens": out[0], "audio_tokens": out[1]}}
    return {"type": "response.done", "response": {"status": "completed", **more, "usage": reported}}


def session(model: str, transcriber: str | None = None) -> dict[str, Any]:
    transcription = {"audio": {"input": {"transcription": {"model": transcriber}}}} if transcriber else {}
    return {"type": "session.updated", "session": {"model": model, **transcription}}


def transcribed(reported: dict[str, Any]) -> dict[str, Any]:
    return {"type": "conversation.item.input_audio_transcription.completed", "usage": reported}


LIVE = "models/gemini-live-2.5-flash-preview"
SESSIONS: Sequence[tuple[str, str | None, Sequence[dict[str, Any]], str | None]] = (
    ("openai", "gpt-realtime", [done(119, 200, {"text": 64, "audio": 128}, (30, 90))], "55*4 + 64*0.40 + 72*32 + 128*0.40 + 30*16 + 90*64"),
    ("openai", "gpt-realtime", [done(119, 0, None, (30, 90))], "119*4 + 30*16 + 90*64"),
    ("openai", "gpt-realtime", [done(10, 0, None, (5, 0)), done(20, 100, {"text": 10, "audio": 0}, (5, 50))], "10*4 + 5*16 + 10*4 + 10*0.40 + 100*32 + 5*16 + 50*64"),
    ("openai", "gpt-realtime", [done(10, 100, None, (2, 7), status="cancelled")], "10*4 + 100*32 + 2*16 + 7*64"),
    ("openai", None, [session("gpt-realtime-mini"), done(10, 20, {"text": 0, "audio": 10}, (3, 4))], "10*0.60 + 10*10 + 10*0.30 + 3*2.40 + 4*20"),
    ("openai", "gpt-realtime", [session("gpt-realtime", "gpt-4o-mini-transcribe"), done(10, 0, None, (1, 0)), transcribed({"type": "tokens", **token_usage(50, 9, input_token_details={"text_tokens": 0, "audio_tokens": 50})})], "10*4 + 1*16 + 50*3 + 9*5"),
    ("openai", "gpt-realtime", [session("gpt-realtime", "whisper-1"), done(10, 0, None, (1, 0)), transcribed({"type": "duration", "seconds": 36})], "10*4 + 1*16 + 36*0.36/3600*1000000"),
    ("openai", "gpt-realtime", [done(10, 0, None, (1, 0)), transcribed({"type": "duration", "seconds": 3})], None),
    ("openai", "gpt-5", [{"type": "response.completed", "response": {"usage": token_usage(36, 87)}}] * 2, "2*36*1.25 + 2*87*10"),
    ("google-ai-studio", LIVE.removeprefix("models/"), [gemini(promptTokenCount=110, responseTokenCount=60, promptTokensDetails=[modality("TEXT", 10), modality("AUDIO", 100)], responseTokensDetails=[modality("AUDIO", 60)])], "10*0.50 + 100*3 + 60*12"),
)  # fmt: skip

FORMATS = {"anthropic": "anthropic", "google-ai-studio": "google", "cohere": "cohere"}


@pytest.fixture(scope="module")
def providers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("costs")
    names = {name for name, *_ in (*RESPONSES, *SESSIONS)}
    entries = {name: {"base_url": "https://x.example", "format": FORMATS.get(name, "openai")} for name in names}
    entries["tts"] = {"base_url": "https://x.example", "format": "cartesia", "pricing": PRICING}
    entries["ruled"] = {"base_url": "https://x.example", "format": "openai", "priced_as": "openai", "pricing": RULES}
    return load(write_config(folder, {"providers": entries})).registry.providers


PRICING = [
    {"models": ["sonic-2*"], "until": "2026-11-01", "characters_per_million": 50},
    {"models": ["sonic-2*"], "since": "2026-11-01", "characters_per_million": 37.5},
    {"models": ["ink-*"], "audio_per_hour": 0.13},
    {"models": ["fal-*"], "per_unit": 0.025},
    {"models": ["pictures"], "per_image": 0.04},
    {"models": ["by-call"], "per_call": 0.001},
]


RULES = [
    {"models": ["gpt-5"], "input_per_mtok": 1, "output_per_mtok": 1},
    {"models": ["own-*"], "input_per_mtok": 3, "output_per_mtok": 3},
    {"models": ["dear"], "input_per_mtok": 900, "output_per_mtok": 900},
]


def micro_usd(expression: str) -> Decimal:
    """Evaluate a sum of products and quotients of numbers exactly."""
    assert re.fullmatch(r"[\d.*/+ ]+", expression)
    total = Decimal(0)
    for product in expression.split("+"):
        value = Decimal(1)
        for sign, number in re.findall(r"([*/]?) *([\d.]+)", product):
            value = value / Decimal(number) if sign == "/" else value * Decimal(number)
        total += value
    return total


def cost(provider: Any, meter: Any, model: str | None) -> int | None:
    exchange = Exchange("i", Request("rest", "POST", Caller("c"), 0.0, model=model))
    exchange.routing.route = SimpleNamespace(provider=provider, replaced_model=None)  # type: ignore[assignment]
    exchange.usage.meter, exchange.usage.parts = meter, meter.parts
    price_list.set_cost(exchange, NOW_S)
    return exchange.usage.cost_nano_usd


def check(found: int | None, expected: str | None) -> None:
    if expected is None:
        assert found is None
    else:
        assert found is not None and abs(Decimal(found) / 1000 - micro_usd(expected)) <= Decimal("0.0005"), (found, expected)


def _id(value: Any) -> str | None:
    return value if isinstance(value, str) else None


@pytest.mark.parametrize(("name", "model", "kind", "reported", "expected"), RESPONSES, ids=_id)
def test_the_cost_of_a_response(providers: Any, name: str, model: str, kind: str, reported: Any, expected: str | None) -> None:
    body = json.dumps({"model": model, "modelVersion": model} | reported).encode()
    format_ = FORMATS.get(name, "openai")
    sent = SentCall(kind, method="GET", endpoint="batches/b") if kind == "batch" else SentCall(kind, input_tokens=100)
    meter = answer_meter(format_, sent, {}.get)
    assert meter is not None
    meter.feed(body)
    check(cost(providers[name], meter, model), expected)
    whole = read_whole(format_, sent, {}.get, body)
    assert whole is not None
    check(cost(providers[name], whole, model), expected)


NOTHING_SENT = SimpleNamespace(messages=0, bytes=0)


def session(model: str | None) -> SocketMeter:
    meter = socket_meter("openai", OpenedSession("realtime" if model else "responses", "", model, NOTHING_SENT, NOTHING_SENT, lambda: 0.0))
    assert meter is not None
    return meter


@pytest.mark.parametrize(
    ("is_session", "requested", "answered", "expected"),
    [
        (False, "gpt-5", "dear", "1000*900"),
        (True, "gpt-5", "dear", "1000*900"),
        (True, "own-model", "gpt-4o", "1000*2.5"),  # a later response of the session, whose model is listed
        (False, "own-deployment", "gpt-4o-2024-08-06", "1000*3"),
        (False, "gpt-5", "gpt-5-2025-08-07", "1000*1"),
        (True, "gpt-5", "gpt-5-2025-08-07", "1000*1"),
        (True, "gpt-5", "gpt-5-mini", "1000*0.25"),
        (True, "gpt-5", "unheard-of", "1000*1"),
    ],
)
def test_the_model_that_answered_has_its_own_price_before_the_requested_one(providers: Any, is_session: bool, requested: str, answered: str, expected: str) -> None:
    part = Part(answered, Usage(input_tokens=1000))
    meter: Any = SimpleNamespace(parts=(part,), model=answered)
    if is_session:
        meter = session(None)
        meter.add(part)
    check(cost(providers["ruled"], meter, requested), expected)


@pytest.mark.parametrize(("first", "expected"), [("gpt-4o", "1000*3"), ("gpt-5", "1000*2.5")])
def test_the_owners_name_of_a_deployment_in_the_url_of_a_session_has_its_rule(providers: Any, first: str, expected: str) -> None:
    """Not so if the session has changed to another model since."""
    meter = session("own-deployment")
    meter.received(json.dumps({"type": "session.created", "session": {"model": first}}).encode())
    meter.add(Part("gpt-4o", Usage(input_tokens=1000)))
    check(cost(providers["ruled"], meter, "own-deployment"), expected)


def test_a_tool_of_a_response_is_not_charged_by_the_rule_for_its_model(providers: Any) -> None:
    parts = (Part("own-model", Usage(input_tokens=1000)), Part("gpt-4o", Usage(input_tokens=1000)))
    check(cost(providers["ruled"], SimpleNamespace(parts=parts, model="own-model"), "own-model"), "1000*3 + 1000*2.5")


@pytest.mark.parametrize(("name", "model", "messages", "expected"), SESSIONS, ids=_id)
def test_the_cost_of_a_session(providers: Any, name: str, model: str | None, messages: Any, expected: str | None) -> None:
    nothing = SimpleNamespace(messages=0, bytes=0)
    meter = socket_meter(FORMATS.get(name, "openai"), OpenedSession("realtime", "", model, nothing, nothing, lambda: 0.0))
    assert meter is not None
    for message in messages:
        data = json.dumps(message).encode()
        if meter.received_filter is not None and meter.received_filter(data):
            meter.received(data)
    check(cost(providers[name], meter, model), expected)


def test_there_are_at_least_120_cases() -> None:
    assert len(RESPONSES) + len(SESSIONS) >= 120


@pytest.mark.parametrize(
    ("model", "used", "expected"),
    [
        ("sonic-2-2025", Usage(characters=1000), "1000*37.5"),
        ("ink-whisper", Usage(audio_ms=90_000), "90*0.13/3600*1000000"),
        ("fal-ai/flux", Usage(units_milli=1500), "1.5*25000"),
        ("pictures", Usage(images=3), "3*40000"),
        ("by-call", Usage(), "1000"),
        ("sonic-3", Usage(characters=1000), None),
        ("ink-whisper", Usage(audio_ms=1, characters=1), None),
    ],
)
def test_configured_prices_override_the_list_with_their_dates_and_units(providers: Any, model: str, used: Usage, expected: str | None) -> None:
    check(price_list.cost_nano_usd(providers["tts"], (model,), used, NOW_S), expected)


def test_the_old_price_applies_before_the_date_of_the_new_one(providers: Any) -> None:
    october = NOW_S - 40 * 86400
    check(price_list.cost_nano_usd(providers["tts"], ("sonic-2",), Usage(characters=1000), october), "1000*50")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('{"per_token_in": 0.000001, "per_token_out": 0.000002}', "1000*1 + 500*2"),
        ('{"per_token_in": 0.000001, "per_token_out": 0.000002, "per_cache_read_token": 0.0000001}', "800*1 + 200*0.1 + 500*2"),
        ('{"total_cost": 0.0123}', "12300"),
        ("not json", None), ("[]", None), ('{"per_token_in": -1, "per_token_out": 1}', None), ('{"total_cost": "1"}', None), ('{"total_cost": 1e999}', None),
    ],
)  # fmt: skip
def test_the_cost_that_a_request_header_sets(header: str, expected: str | None) -> None:
    custom = custom_cost(header)
    used = Usage(1000, 500, cache_read_tokens=200)
    check(custom.cost_nano_usd(used) if custom is not None and not isinstance(custom, int) else custom, expected)


def _listed() -> list[tuple[str, str]]:
    from genai_prices.data_snapshot import get_snapshot

    return [(p.id, m.id) for p in get_snapshot().providers for m in p.models]


LISTED = _listed()
PART = st.integers(0, 300_000)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(LISTED), PART, PART, PART, PART, st.integers(0, 1000))
def test_every_listed_model_costs_what_the_price_library_computes(listed: tuple[str, str], text: int, read: int, written: int, output: int, hour: int) -> None:
    """The library is too slow for every call, so the relay computes the same cost itself."""
    import datetime

    from genai_prices import Usage as Counted
    from genai_prices import calc_price

    provider, model = listed
    when = NOW_S - hour * 86400
    used = Usage(text + read + written, output, cache_read_tokens=read, cache_write_tokens=written)
    relay_cost = price_list.cost_nano_usd(SimpleNamespace(pricing=(), priced_as=provider, name=provider), (model,), used, when)  # type: ignore[arg-type]
    if relay_cost is None:
        return
    counted = Counted(input_tokens=text + read + written, output_tokens=output, cache_read_tokens=read, cache_write_tokens=written)
    at = datetime.datetime.fromtimestamp(when // 900 * 900, datetime.UTC)
    library_cost = calc_price(counted, model, provider_id=provider, genai_request_timestamp=at).total_price
    assert abs(Decimal(relay_cost) / 10**9 - library_cost) <= Decimal("1e-9"), (relay_cost, library_cost)


def _route(provider: str, **more: Any) -> Any:
    listed = SimpleNamespace(pricing=(), priced_as=provider, name=provider)
    return SimpleNamespace(provider=listed, alternatives=(), replaced_model=None, **more)


@given(st.sampled_from(LISTED), PART, st.sampled_from([None, 0, 4000]), st.integers(0, 3650))
@settings(max_examples=300, deadline=None)
def test_the_one_tariff_of_a_model_bounds_a_call_as_all_its_tariffs_do(listed: tuple[str, str], input_tokens: int, output_tokens: int | None, days: int) -> None:
    provider, model = listed
    when, bound = NOW_S - days * 86400, CallBound(input_tokens, output_tokens, units=1, text=b'{"cache_control":{}}')
    one, until_s = price_list.one_tariff(_route(provider), model, when)
    assert when < until_s <= when + 900
    if one is not None:
        (target,) = price_list.bound_costs(_route(provider), model, [bound], 8192, when)
        assert one.bound_nano_usd(bound, 8192) == target.nano_usd


def test_a_route_with_prices_of_its_own_or_other_targets_has_no_one_tariff(providers: Any) -> None:
    assert price_list.one_tariff(_route("openai"), "gpt-4o-mini", NOW_S)[0] is not None
    other = SimpleNamespace(**vars(_route("openai")) | {"alternatives": (_route("openai"),)})
    priced = SimpleNamespace(**vars(_route("openai")) | {"provider": SimpleNamespace(pricing=("a rule",), priced_as="openai", name="openai")})
    tiered, _ = price_list.one_tariff(_route("anthropic"), "claude-sonnet-4-5", NOW_S)
    assert [price_list.one_tariff(each, "gpt-4o-mini", NOW_S)[0] for each in (other, priced)] == [None, None]
    assert tiered is None, "its price depends on the number of input tokens"
    assert price_list.one_tariff(_route("openai"), None, NOW_S)[0] is None


def test_a_price_is_looked_up_once(providers: Any) -> None:
    used = Usage(10, 10)
    first = price_list.cost_nano_usd(providers["openai"], ("gpt-4o",), used, NOW_S)
    misses = price_list._listed.cache_info().misses
    assert misses and price_list.cost_nano_usd(providers["openai"], ("gpt-4o",), used, NOW_S) == first
    assert price_list._listed.cache_info().misses == misses


def test_a_bad_price_is_refused_at_its_place(tmp_path: Path) -> None:
    from relay.registry.load import ConfigError

    entry = {"base_url": "https://x.example", "pricing": [{"models": ["a"], "input_per_mtok": -1}]}
    sources: Sources = write_config(tmp_path, {"providers": {"x": entry}})
    with pytest.raises(ConfigError, match=r"gateway\.yaml:\d+:\d+: providers\.x\.pricing"):
        load(sources)


def test_a_batch_is_bounded_by_the_price_of_batches_if_that_is_known() -> None:
    def costs(provider: str, model: str) -> list[int | None]:
        bounds = [CallBound(1000, 1000, service_tiers=tiers) for tiers in (("batch",), ())]
        return [price_list.bound_costs(_route(provider), model, [bound], 8192, NOW_S)[0].nano_usd for bound in bounds]

    batch, normal = costs("anthropic", "claude-opus-4-5")
    assert batch is not None and normal is not None and batch * 2 == normal
    batch, normal = costs("x-ai", "grok-4")
    assert batch == normal and normal is not None
