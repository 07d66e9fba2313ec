"""The fields of a JSON request body that the relay reads before it sends a call: all in one pass.

Owns their list. Their values are not decoded here: core/peek.py decodes what names the call,
core/bounds.py what limits its response.
"""

from __future__ import annotations

import msgspec

from relay.core.fields import ABSENT, Reader


class RequestFields(msgspec.Struct):
    """The wanted fields; the rest of the body is skipped without building it. They keep the body in
    memory.
    """

    model: msgspec.Raw = ABSENT
    model_id: msgspec.Raw = ABSENT
    stream: msgspec.Raw = ABSENT
    user: msgspec.Raw = ABSENT
    safety_identifier: msgspec.Raw = ABSENT
    metadata: msgspec.Raw = ABSENT
    background: msgspec.Raw = ABSENT
    prompt_cache_key: msgspec.Raw = ABSENT
    previous_response_id: msgspec.Raw = ABSENT
    # What limits the response, or changes its price.
    max_tokens: msgspec.Raw = ABSENT
    max_completion_tokens: msgspec.Raw = ABSENT
    max_output_tokens: msgspec.Raw = ABSENT
    max_tokens_to_sample: msgspec.Raw = ABSENT
    generationConfig: msgspec.Raw = ABSENT
    generation_config: msgspec.Raw = ABSENT
    n: msgspec.Raw = ABSENT
    best_of: msgspec.Raw = ABSENT
    num_generations: msgspec.Raw = ABSENT
    service_tier: msgspec.Raw = ABSENT
    speed: msgspec.Raw = ABSENT


read_fields = Reader(RequestFields).read
"""Return the fields of a body; None if it is no readable object."""
