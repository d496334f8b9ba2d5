"""What all readers share: the document they yield, and the account of what they had to leave out.

A reader never stops at one bad document and never drops one silently: it calls `Reading.skip(reason, where)` and goes on. Only what makes
the whole source useless (a missing file, an archive cut short, a column that is not there) is a Refusal.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

PIECE = 1 << 20  # characters; a longer document travels in pieces

BROKEN_ENCODING = "broken encoding"
INVALID_JSON = "invalid JSON"
NO_TEXT = "no text field"
EMPTY = "empty document"
OTHER_KIND = "file of another kind"


class Document(NamedTuple):
    """Text, and the file or dataset it came from. `begins` is False for the later pieces of a document too long for one."""

    text: str
    origin: str
    begins: bool = True


@dataclass
class Reading:
    """The account of one pass over the sources: bytes read so far of how many (None: unknown), and what was skipped and where first."""

    total: int | None = 0
    done: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        """Count one document (or file) that is left out."""
        self.skipped[reason] += 1
        self.first.setdefault(reason, where)

    def decode(self, data: bytes, where: str) -> str | None:
        """UTF-8, or None and a count."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.skip(BROKEN_ENCODING, where)
            return None

    def accept(self, text: object, where: str) -> str | None:
        """The text of a record if it is a text that is not empty and has an encoding; else None and a count."""
        if not isinstance(text, str):
            self.skip(NO_TEXT, where)
        elif not text.strip():
            self.skip(EMPTY, where)
        elif not _encodable(text):
            self.skip(BROKEN_ENCODING, where)
        else:
            return text
        return None


def _encodable(text: str) -> bool:
    """Whether there is UTF-8 for it: JSON can spell half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def cut(text: str, length: int = PIECE) -> int:
    """Where to cut a text longer than `length`: before the last whitespace that follows a non-space.

    Words of GPT-2's pattern, which ours shares, take one leading space with them and never reach across such a place: the pieces give the
    same tokens as the whole.
    """
    end = min(len(text), length)
    while end > 1:
        at = max(text.rfind("\n", 1, end), text.rfind(" ", 1, end))
        if at < 1:
            break
        if not text[at - 1].isspace():
            return at
        end = at
    return min(len(text), length)


def pieces(text: str, origin: str, begins: bool = True) -> list[Document]:
    """One document as one or several pieces of at most PIECE characters."""
    found = []
    while len(text) > PIECE:
        at = cut(text)
        found.append(Document(text[:at], origin, begins))
        text, begins = text[at:], False
    found.append(Document(text, origin, begins))
    return found
