"""What all readers of answers have in common: one reads the documents of one answer, in one format.

Owns: the noun FormatReader. What fields mean is its children's (core/meters/openai.py and
siblings).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from relay.core.meters.documents import Document, Wanted
from relay.core.meters.sent_call import SentCall
from relay.core.meters.tolerant_json import IgnoredFields
from relay.core.usage import Part


class FormatReader(ABC):
    """Made by one of its children, for one answer."""

    wanted: Wanted
    """The fields that it reads, and those where errors stand (core/meters/inner_errors.py)."""
    needle: ClassVar[bytes] = b'"usage'
    """Stands before the usage in every event that tells some."""
    texts: ClassVar[tuple[bytes, ...]] = ()
    """The keys of a stream's texts."""
    mark: ClassVar[bytes] = b""
    """Where it stands anywhere in an answer, something was used that the usage does not tell."""

    def __init__(self, sent: SentCall, ignored_fields: IgnoredFields) -> None:
        self._sent, self._ignored_fields = sent, ignored_fields
        self.model: str | None = None
        """The one that answered."""
        self.object_id = ""
        """The provider's id of what it tells of; empty if it has none."""
        self.is_final = True
        """False of an object whose usage is still to come."""
        self.in_background = False
        """It goes on at the provider when its stream has ended."""
        self.lacks_output = False
        """What was told so far says nothing of the output."""
        self.is_paid_job = False
        """A job that has ended and is paid for, though it may not tell what it used."""

    @abstractmethod
    def read(self, document: Document) -> None:
        """Take what a document tells."""

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """What it came to, by model."""


class NoReader(FormatReader):
    """Of answers in a format that nothing is read in."""

    wanted = Wanted()

    def __init__(self, sent: SentCall, ignored_fields: IgnoredFields) -> None:
        super().__init__(sent, ignored_fields)
        self.is_paid_job = True

    def read(self, document: Document) -> None:
        """There are no documents."""

    def parts(self) -> Iterator[Part]:
        return iter(())
