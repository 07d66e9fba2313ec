"""Prose: it contains no phrase of the old style, and its lines end at 100 columns.

In Python only comments, docstrings and other string literals are searched, so names are free. ruff
checks the width of comments and docstrings in relay/ (W505, max-doc-length in pyproject.toml).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.processes import ROOT

MAX_COLUMNS = 100
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".js", ".jsx", ".conf", ".service", ".socket", ".example", "")
WITHOUT = {"node_modules", "__pycache__", "dist", "migrations", "test"}

PHRASES = {
    # The docstring of a module says in a sentence what it owns: "Owns the recording".
    "Owns:": r"\b(?-i:Does not own|Owns): ",
    "is x.py's": r"\b\w+\.py's(?= *[.,;:)]|$)",
    # Omitted nouns and double genitives.
    "a key of the provider's": r"\bof (?:a|the|our|any) (?:relay|provider|client|caller|vendor)'s(?! own)(?= *[.,;:)]|$)",
    "of all together": r"\b(?:of )?all together,? (?:is|as may)\b|\bof all together\b",
    "its own people": r"\bown people\b|\bthe machine's own\b",
    # Sentences without a real subject.
    "somebody": r"(?<!/)\b(?:some|any|no)body\b(?![\"'/`])",
    # Verbs of people and other metaphors for the work of a program.
    "told": r"\b(?:un)?told\b(?!\.\w)",
    "tells": r"\btells\b(?! (?:people|you|users|readers|SDKs|clients)\b)|\btell (?:its|their|what|how|whether|no|nothing|usage)\b",
    "takes down": r"\b(?:takes?|taken|taking) down\b",
    "gives way": r"\b(?:gives?|gave|giving) way\b",
    "stands in": r"\b(?:stands?|stood|standing) in (?:for|where|the place)\b|\bwhat stands\b",
    "lies at": r"\b(?:lies|lie|lay) (?:at|on)\b",
    "goes alone": r"\b(?:goes|go|went) alone\b",
    "comes to": r"\bwhat (?:it|they|a \w+|an \w+|the \w+|\w+) (?:comes?|came) to\b|\bcomes? to (?:about|a)\b",
    "bears": r"\b(?:bears|borne)\b",
    "the door": r"\b(?:at|by|to|in|through|behind|front) (?:the )?door\b",
    "by the line": r"\brefus\w+ (?:by|at|on) the line\b",
    "a leg": r"\bleg's (?:look|own)\b",
    "lives along": r"\bliv(?:e|es|ed|ing) along\b",
    "is away": r"\b(?:Redis|database|it|store) (?:is|was|are) away\b|\bcounts as away\b",
    "said no": r"\bsaid no\b",
    "name it plainly": r"\bname it plainly\b|\bnot plainly\b",
    "given again": r"\bgiven again\b",
    "made speech": r"\b(?:text|speech|characters) made (?:text|speech)\b",
    "takes nothing": r"\btakes? nothing of\b",
    "goes unnoticed": r"\bgoes unnoticed\b",
    "unasked": r"\bunasked\b",
    "at once, of": r"\bmany (?:calls )?(?:run|wait)[^.]{0,30} as may\b",
    "without being asked": r"\bwithout being asked\b",
}
"""Case-insensitive patterns by the name of the phrase."""
EXAMPLES = {
    "Owns:": "Owns: the taking down.",
    "is x.py's": "Counting is gate/limits.py's.",
    "a key of the provider's": "Where a client puts a key of the provider's, in order",
    "of all together": "The limit of calls at once, of all together, is reached.",
    "its own people": "the machine's own people",
    "somebody": "nobody knows",
    "told": "what was told",
    "tells": "the event that tells its usage",
    "takes down": "Take down an answer as it passes",
    "gives way": "a limited key gives way",
    "stands in": "what stands in for it",
    "lies at": "a URL that lies on none of its hosts",
    "goes alone": "by metadata goes alone",
    "comes to": "What a call came to",
    "bears": "how its loss is borne",
    "the door": "refused at the door",
    "by the line": "a refusal by the line",
    "a leg": "a leg's look",
    "lives along": "and then lives along",
    "is away": "While Redis is away",
    "said no": "the network said no",
    "name it plainly": "its body does not name it plainly",
    "given again": "so that it can be given again",
    "made speech": "text made speech",
    "takes nothing": "how long a client may take nothing of its answer",
    "goes unnoticed": "An outage goes unnoticed.",
    "unasked": "it tells its usage unasked",
    "at once, of": "As many calls run, of all or of a provider, as may",
    "without being asked": "cached without being asked",
}
LEGITIMATE = [  # no pattern may find these
    "a label of their own: reloads", "Change the file, and tell the relay", "clients can resolve it; the relay reports usage", "Owns the recording: chunk boundaries", "lines of the log",
    "see core/errors.py, and its test", "the provider's own header", "when the relay goes down", "forward to the provider",
]


def _files() -> Iterator[Path]:
    for name in ("relay", "config", "docs", "scripts", "tests", "web"):
        for folder, folders, files in os.walk(ROOT / name):
            folders[:] = set(folders) - WITHOUT
            yield from (Path(folder, file) for file in files)
    yield from (path for path in ROOT.iterdir() if path.suffix in (".md", ".yaml") or path.name in ("Makefile", ".env.example"))


@cache
def _texts() -> dict[str, str]:
    """The text of every file with prose, by its path."""
    found = (path for path in _files() if path.suffix in SUFFIXES and path != Path(__file__))
    return {str(path.relative_to(ROOT)): path.read_text(errors="replace") for path in found}


def _is_python(name: str, text: str) -> bool:
    return name.endswith(".py") or (text.startswith("#!") and "python" in text.partition("\n")[0])


_PYTHON_PROSE = re.compile(
    r"#[^\n]*(?:\n[ \t]*#[^\n]*)*"  # comments whose lines follow each other
    r'|"""(?:[^\\]|\\.)*?"""'
    r"|\'\'\'(?:[^\\]|\\.)*?\'\'\'"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*'",
    re.DOTALL,
)
_LINE_BREAK = re.compile(r"[ \t]*\n[ \t]*(?:(?:#|//|\*|>)[ \t]*)?")


def _python_texts(text: str) -> Iterator[tuple[int, str]]:
    """Comments and string literals, with their first line."""
    for match in _PYTHON_PROSE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match[0]


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    line = 1
    for paragraph in re.split(r"\n[ \t#]*\n", text):
        yield line, paragraph
        line += paragraph.count("\n") + 2


@cache
def _prose(name: str) -> list[tuple[int, str]]:
    """Pieces of prose without line breaks, each with its first line.

    They are the comments and string literals of Python, and the paragraphs of other files.
    """
    text = _texts()[name]
    found = _python_texts(text) if _is_python(name, text) else _paragraphs(text)
    return [(line, _LINE_BREAK.sub(" ", part)) for line, part in found]


_BETWEEN = "\0\n"
"""No pattern matches it: one search finds what is in any piece of prose of a file."""


@cache
def _all_prose(name: str) -> str:
    return _BETWEEN.join(part for _, part in _prose(name))


def _matches(pattern: re.Pattern[str], name: str) -> Iterator[str]:
    """Where a pattern matches the prose of a file, and what."""
    for match in pattern.finditer(_all_prose(name)):
        line, _ = _prose(name)[_all_prose(name).count(_BETWEEN, 0, match.start())]
        yield f"{name}:{line}: {match[0]!r}"


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_pattern_finds_its_example_and_nothing_legitimate(phrase: str) -> None:
    pattern = re.compile(PHRASES[phrase], re.IGNORECASE)
    assert pattern.search(EXAMPLES[phrase])
    assert not [text for text in LEGITIMATE if pattern.search(text)]


def test_no_prose_contains_a_phrase_of_the_old_style() -> None:
    """One test for all phrases, for the prose is read by the process that runs it."""
    assert len(_texts()) > 250
    patterns = [re.compile(pattern, re.IGNORECASE) for pattern in PHRASES.values()]
    assert [found for pattern in patterns for name in _texts() for found in _matches(pattern, name)] == []


_LINK = re.compile(r"\]\([^)]*\)|https?://\S+")


def _long_lines(name: str, text: str) -> Iterator[int]:
    """The lines of prose that are too long: Markdown, and comments of YAML and the Makefile."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if name.endswith(".md"):
            fenced ^= line.lstrip().startswith(("```", "~~~"))
            is_code = fenced or line.startswith(" " * 4) or line.lstrip().startswith(("```", "~~~"))
            is_prose = not is_code and not line.lstrip().startswith(("|", "<"))
        else:
            is_prose = re.search(r"(?:^|\s)#", line) is not None
        has_long_link = any(len(link) > MAX_COLUMNS // 2 for link in _LINK.findall(line))
        if is_prose and len(line) > MAX_COLUMNS and not has_long_link:
            yield number


def test_prose_is_wrapped_at_100_columns() -> None:
    wrapped = [name for name in _texts() if name.endswith((".md", ".yaml", ".yml", "Makefile"))]
    assert {"gateway.yaml", "README.md", "Makefile", "docs/ledger.md"} <= set(wrapped)
    assert [f"{name}:{number}" for name in wrapped for number in _long_lines(name, _texts()[name])] == []


def test_comments_and_literals_of_python_are_searched_and_names_are_not() -> None:
    text = 'told = 1  # a told\n# b\n"""c\ntold"""\nx = {told: \'d\', "\\"e": told}\n'
    assert [part for _, part in _python_texts(text)] == ["# a told\n# b", '"""c\ntold"""', "'d'", '"\\"e"']


def test_a_table_a_code_block_and_a_long_link_may_be_longer() -> None:
    long = "word " * 30
    text = f"{long}\n| {long} |\n```sh\n{long}\n```\n    {long}\n{long}[x](https://example.com/{'a' * 60})\n{long}\n"
    assert list(_long_lines("x.md", text)) == [1, 8]
    assert list(_long_lines("x.yaml", f"a: {long}\nb: 1  # {long}\n# {long}\n")) == [2, 3]
