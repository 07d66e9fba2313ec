"""The ends of server-sent events are found at every byte of a stream."""

from __future__ import annotations

from relay.core.sse import EventParser, at_boundary

EVENTS = [b'data: {"n": 1}\n\n', b"event: thing\r\ndata: {}\r\n\r\n", b": comment\r\r", b"id: 7\ndata: a\ndata: b\n\r\n", b"data: [DONE]\r\n\n"]
STREAM = b"".join(EVENTS)
ENDS = {sum(map(len, EVENTS[:count])) for count in range(len(EVENTS) + 1)}


def test_a_stream_is_at_a_boundary_only_between_events() -> None:
    for at in range(len(STREAM) + 1):
        # CRLF after the CR or LF of a blank line ends the same event again.
        assert at_boundary(STREAM[max(0, at - 4) : at]) == (at in ENDS), STREAM[:at]


def test_a_stream_in_two_pieces_gives_the_same_events_wherever_it_is_split() -> None:
    whole = EventParser().feed(STREAM)
    assert [event.data for event in whole] == ['{"n": 1}', "{}", "a\nb", "[DONE]"]
    for at in range(len(STREAM) + 1):
        parser = EventParser()
        assert parser.feed(STREAM[:at]) + parser.feed(STREAM[at:]) == whole, STREAM[:at]
