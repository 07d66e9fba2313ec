"""A new wire format is complete, or is listed here with what it lacks."""

from __future__ import annotations

from typing import get_args

import pytest

from relay.core import completeness, error_bodies
from relay.core.formats import Format
from relay.core.meters import answer_meter

FORMATS = get_args(Format)
WITHOUT_A_READER = {"fal"}
"""The usage of fal is in response headers."""
WITHOUT_STREAMED_RESPONSES = {"elevenlabs", "fal", "deepgram", "assemblyai"}
"""They stream audio, or over WebSockets; a stream of events ends as `_UNKNOWN_STREAM` says."""
WITH_OPENAIS_ERRORS = {"openai"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_has_a_reader_of_usage(name: str) -> None:
    assert (name in answer_meter._READERS) != (name in WITHOUT_A_READER)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_how_its_streams_end(name: str) -> None:
    """The cache stores a stream only if its last event is seen."""
    ends = {format_ for format_, _ in completeness._STREAM_ENDS}
    assert (name in ends) != (name in WITHOUT_STREAMED_RESPONSES)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_has_an_error_body_that_its_sdk_parses(name: str) -> None:
    assert (name in error_bodies._FORMATS) != (name in WITH_OPENAIS_ERRORS)
