"""The base of the readers that find usage in the documents of a response, one for each format.

Owns FormatReader. Its subclasses interpret the fields (core/meters/openai.py and others).
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
    """Reads one response in one wire format. A base class."""

    wanted: Wanted
    """The fields of usage, and those of errors (core/meters/inner_errors.py)."""
    needle: ClassVar[bytes] = b'"usage'
    """The beginning of the usage's key in every event that reports usage."""
    texts: ClassVar[tuple[bytes, ...]] = ()
    """The JSON keys of the texts that the model made."""
    stream_texts: tuple[bytes, ...] = ()
    """Their keys in a stream that repeats each text at its end; empty if they are the same."""
    thoughts: ClassVar[tuple[bytes, ...]] = ()
    """Those of `texts` that are thoughts, where the thoughts have seals."""
    seals: ClassVar[tuple[bytes, ...]] = ()
    """The keys of encrypted thoughts, in base64."""
    reports_input_first: ClassVar[bool] = False
    """True if a stream reports its input again and again, and its output only at the end."""
    media_characters: ClassVar[int] = 0
    """How many characters of base64 under `data` are an audio token; 0: there is no such output."""
    mark: ClassVar[bytes] = b""
    """A response that contains these bytes used something that its usage does not include."""

    def __init__(self, sent: SentCall, ignored_fields: IgnoredFields) -> None:
        self._sent, self._ignored_fields = sent, ignored_fields
        self.model: str | None = None
        """The model that answered."""
        self.object_id = ""
        """The provider's id of the object that the response describes, or empty."""
        self.is_final = True
        """False for an object whose usage is not final."""
        self.in_background = False
        """True for an object that continues at the provider after its stream has ended."""
        self.lacks_output = False
        """True if the usage so far has no output."""
        self.is_paid_job = False
        """True for a finished job that is billed, even if it reports no usage."""

    @abstractmethod
    def read(self, document: Document) -> None:
        """Read a document."""

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """Return the usage, by model."""


class NoReader(FormatReader):
    """The reader of formats without readable usage."""

    wanted = Wanted()

    def __init__(self, sent: SentCall, ignored_fields: IgnoredFields) -> None:
        super().__init__(sent, ignored_fields)
        self.is_paid_job = True

    def read(self, document: Document) -> None:
        """Ignore the document."""

    def parts(self) -> Iterator[Part]:
        return iter(())
