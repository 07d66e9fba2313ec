"""The shipped gateway.yaml with bytes deleted, swapped or inserted loads or is refused cleanly."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.registry.load import ConfigError, Sources, load
from relay.registry.problems import Document
from relay.registry.yaml_file import _Builder, _Loader, _read_fast

ROOT = Path(__file__).parent.parent.parent
# Without comments, where a change has no effect, and without included files, which take ten times
# as long.
SHIPPED = re.sub(rb"(?m)^ *(#|- config/).*\n|  +#.*$|^include:\n|^\n", b"", (ROOT / "gateway.yaml").read_bytes())
PIECES = st.sampled_from(
    [b"\t", b"\n", b"\r", b"\0", b"\x1b", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"{", b"}", b"[", b"]", b"'", b'"', b":", b": ", b"- ", b"#", b",", b"${", b"}", b"$",
     b"|", b">", b"&a", b"*a", b"!!str ", b"%", b"@", b"`", b"?", b"? ", b"\\", b"---\n", b"null", b"-1", b"1e999", b"9" * 30, b".inf", b"{" * 40, b"[" * 40, b"..", b"/../", b" ", b"\xc2\xa0",
     b"https://", b"*", b"**", b"${file:/etc/passwd}", b"${file:\0}", b"<<: "]
)  # fmt: skip
CHANGES = st.tuples(st.sampled_from(["delete", "swap", "insert", "repeat", "truncate"]), st.integers(0, len(SHIPPED)), st.integers(1, 40), st.one_of(PIECES, st.binary(max_size=4)))
PLACE = re.compile(r"[^:]+:\d+:\d+: .")


def _apply_one(data: bytes, change: tuple[str, int, int, bytes]) -> bytes:
    kind, at, length, piece = change
    if kind == "delete":
        return data[:at] + data[at + length :]
    if kind == "swap":
        return data[:at] + data[at + 1 : at + 1 + length] + data[at : at + 1] + data[at + 1 + length :]
    if kind == "insert":
        return data[:at] + piece + data[at:]
    return data[:at] + data[at : at + length] * 2 + data[at + length :] if kind == "repeat" else data[:at]


def _apply(changes: list[tuple[str, int, int, bytes]]) -> bytes:
    data = SHIPPED
    for change in changes:
        data = _apply_one(data, change)
    return data


def test_the_unchanged_file_loads(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_bytes(SHIPPED)
    assert len(load(Sources(tmp_path / "gateway.yaml", None)).registry.providers) == 5


def _load_or_refuse(data: bytes) -> None:
    """Load `data`, or check that each problem has a place and one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gateway.yaml"
        path.write_bytes(data)
        try:
            assert load(Sources(path, None)).registry.providers is not None
        except ConfigError as error:
            assert error.problems
            for problem in error.problems:
                assert PLACE.match(str(problem)) and str(problem).isprintable(), problem
                assert 1 <= problem.line <= data.count(b"\n") + data.count(b"\r") + 2


@settings(max_examples=7, deadline=None, database=None)
@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_a_file_with_changed_bytes_loads_or_is_refused_with_places(changes: list[tuple[str, int, int, bytes]]) -> None:
    _load_or_refuse(_apply(changes))


@settings(max_examples=7, deadline=None, database=None)
@given(st.integers(0, len(SHIPPED)))
def test_a_file_that_is_truncated_anywhere_loads_or_is_refused_with_places(at: int) -> None:
    _load_or_refuse(SHIPPED[:at])


@settings(max_examples=30, deadline=None, database=None)
@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_libyaml_reads_the_same_data_at_the_same_places_as_the_parser_of_pyyaml(changes: list[tuple[str, int, int, bytes]]) -> None:
    text = _apply(changes).decode("utf-8", "replace")
    if (fast := _read_fast(text, "gateway.yaml")) is None:
        return  # the other parser decides
    _assert_read_alike(text, fast)


def _assert_read_alike(text: str, fast: Document) -> None:
    document = Document("gateway.yaml")
    data = _Builder(_Loader(text), document).build()
    assert repr(data) == repr(fast.data) and document.marks == fast.marks and not document.problems


@pytest.mark.parametrize("text", ["a: {b: x?y, c?: z}", "a: [https://x/y?z, a ?, ?b, ? c]", "a: {? b : c, ?d: e}", "a: x?y\n? b\n: c"])
def test_a_question_mark_is_text_for_both_parsers(text: str) -> None:
    fast = _read_fast(text, "gateway.yaml")
    assert fast is not None
    _assert_read_alike(text, fast)


@pytest.mark.parametrize("text", ["a: [!, b]", "a: |# b\n  c", "a: >-2#\n   c"])
def test_a_file_that_the_parsers_read_differently_is_left_to_pyyaml(text: str) -> None:
    assert _read_fast(text, "gateway.yaml") is None
