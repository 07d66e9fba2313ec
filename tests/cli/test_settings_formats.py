"""Single settings changed in the text of JSON, TOML, .env and YAML files."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.cli.json_text import NotJson, parse, with_value, without_value
from relay.cli.settings_formats import ABSENT, ENV, JSON, TOML, YAML, NotUnderstood

NAMES = st.sampled_from(["a", "b", "env", 'q"uote', "ü", "// no comment", ","])
SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=12)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=4)
INDENTS = st.sampled_from([None, 2, "\t"])


def _with_comments(text: str) -> str:
    """Comments behind every line; a trailing comma where a line closes."""
    lines = [f"{line} // c {{" if line.strip() else line for line in text.split("\n")]
    return "/* } */\n" + "\n".join(lines) + "\n"


@given(OBJECTS, INDENTS, st.lists(NAMES, min_size=1, max_size=3), st.text(max_size=5), st.booleans())
def test_a_value_of_json_is_set_and_removed_and_all_else_stays(document: dict[str, Any], indent: Any, path: list[str], value: str, has_comments: bool) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    if has_comments:
        text = _with_comments(text)
    assert parse(text) == document
    expected: Any = json.loads(json.dumps(document))
    group = expected
    for name in path[:-1]:
        group = group.setdefault(name, {}) if isinstance(group, dict) else None
    if not isinstance(group, dict):
        with pytest.raises((KeyError, NotUnderstood)):
            JSON.changed(text, {tuple(path): value or "x"})
        return
    is_whole = isinstance(group.get(path[-1]), dict | list)
    group[path[-1]] = value
    changed = with_value(text, path, value)
    assert parse(changed) == expected
    if not is_whole:  # a list or an object goes with the comments within it
        assert changed.count("// c {") == text.count("// c {")
    del group[path[-1]]
    assert parse(without_value(changed, path)) == expected


@given(OBJECTS, INDENTS)
def test_json_without_comments_is_read_as_the_standard_library_reads_it(document: dict[str, Any], indent: Any) -> None:
    text = json.dumps(document, indent=indent)
    assert parse(text) == json.loads(text)


@given(st.text(alphabet='{}[],:"\\/*a1 \n.-', max_size=30))
def test_any_text_is_json_or_refused_with_its_line(text: str) -> None:
    try:
        parse(text)
    except NotJson as error:
        assert "is not JSON" in str(error)


@pytest.mark.parametrize("text", ["[" * 200 + "]" * 200, '{"a": ' * 200 + "1" + "}" * 200])
def test_deep_json_is_refused(text: str) -> None:
    with pytest.raises(NotUnderstood):
        JSON.parse(text)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("{}", '{\n  "env": {\n    "A": "1"\n  }\n}'),
        ('{"b": 1}', '{"b": 1, "env": {\n  "A": "1"\n}}'),
        ('{\n  "b": 1 // c\n}\n', '{\n  "b": 1, // c\n  "env": {\n    "A": "1"\n  }\n}\n'),
        ('{\n\t"env": {\n\t\t"B": "2",\n\t},\n}\n', '{\n\t"env": {\n\t\t"B": "2",\n\t\t"A": "1"\n\t},\n}\n'),
        ('{"env": {"A": "0", "B": "2"}}', '{"env": {"A": "1", "B": "2"}}'),
        ('{"env": {"A": "0", "A": "2"}}', '{"env": {"A": "0", "A": "1"}}'),
    ],
)
def test_json_keeps_its_form(before: str, after: str) -> None:
    assert JSON.changed(before, {("env", "A"): "1"}) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", 'p = "x"\n\n[m.r]\nk = "y"\n'),
        ("# c\na = 1\n\n[t]\nb = 2\n", '# c\na = 1\np = "x"\n\n[t]\nb = 2\n\n[m.r]\nk = "y"\n'),
        ("[t]\nb = 2", 'p = "x"\n\n[t]\nb = 2\n\n[m.r]\nk = "y"\n'),
        ("p = 'old' # c\n[ m . \"r\" ] # d\nk = \"\\\"\"\n[z]\n", 'p = "x" # c\n[ m . "r" ] # d\nk = "y"\n[z]\n'),
        ("a = [\n  1,\n]\n", 'a = [\n  1,\n]\np = "x"\n\n[m.r]\nk = "y"\n'),
    ],
)
def test_toml_keeps_its_form(before: str, after: str) -> None:
    assert TOML.changed(before, {("p",): "x", ("m", "r", "k"): "y"}) == after


@pytest.mark.parametrize("text", ['m = {r = {k = "a"}}\n', 'm.r.k = "a"\n', 'p = """\na"""\n', "p = 3\n", "[[m]]\nr = 1\n"])
def test_toml_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(NotUnderstood):
        TOML.changed(text, {("p",): "x", ("m", "r", "k"): "y"})


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12))
def test_any_value_is_written_and_read_again_or_refused(value: str) -> None:
    for format in (JSON, TOML, YAML, ENV):
        try:
            text = format.changed("# c\n" if format is not JSON else "", {("A",): value})
        except NotUnderstood:
            continue
        assert format.parse(text) == {"A": value}
        assert format.parse(format.changed(text, {("A",): ABSENT})) == {}


def test_env_and_yaml_keep_the_other_lines() -> None:
    assert ENV.changed("# c\nexport A=0\nB='x y'\n", {("A",): "1", ("C",): "http://h/p"}) == "# c\nA=1\nB='x y'\nC=http://h/p\n"
    assert YAML.changed("# c\na: 0  # d\nb:\n  a: 1\n", {("a",): "1", ("c",): "x"}) == '# c\na: "1"\nb:\n  a: 1\nc: "x"\n'
