"""Read a trace's JSON piece by piece: memory holds one event at a time, however large the file is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

EVENTS = "traceEvents"
CHUNK = 1 << 20  # characters
LONGEST_VALUE = 1 << 26  # characters of one event, or of one entry of the header
BLANKS = re.compile(r"[ \t\n\r]*")
# Numbers with a fraction stay text, because a float does not hold absolute times in ns.
DECODER = json.JSONDecoder(parse_float=str, parse_constant=str, strict=False)


def read_items(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a trace's header, and each of its events as an entry `traceEvents`.

    Args:
        file: an object with a list `traceEvents`, or that list alone. If `traceEvents` is no list, it is yielded
            whole.

    Raises:
        ValueError: the text is no JSON, is not complete, or holds a value of more than LONGEST_VALUE characters.
    """
    text = _Text(file)
    if text.next() == "[":
        yield from ((EVENTS, event) for event in _elements(text))
    else:
        text.take("{")
        while text.next() != "}":
            key = text.value()
            text.take(":")
            if key == EVENTS and text.next() == "[":
                yield from ((EVENTS, event) for event in _elements(text))
            else:
                yield str(key), text.value()
            if text.next() != "}":
                text.take(",")
        text.take("}")
    if text.next():
        raise ValueError(f"something follows its end: {text.next()!r}")


def _elements(text: _Text) -> Iterator[Any]:
    text.take("[")
    while text.next() != "]":
        yield text.value()
        if text.next() != "]":
            text.take(",")
    text.take("]")


class _Text:
    """The part of a file that has been read and not yet used."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at = file, "", 0

    def next(self) -> str:
        """Return the next character that is no blank, or "" at the end. It stays there."""
        while True:
            blanks = BLANKS.match(self._text, self._at)
            self._at = blanks.end() if blanks else self._at
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> None:
        """Step over a character that must be next."""
        if (found := self.next()) != character:
            raise ValueError(f"expected {character!r}, found {found!r}" if found else "it ends too early")
        self._at += 1

    def value(self) -> Any:
        """Return the next value."""
        self.next()
        while True:
            try:
                found, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._fill():
                    raise
                continue
            if end < len(self._text) or not self._fill():  # at the end of the text a number may go on
                self._at = end
                return found

    def _fill(self) -> bool:
        """Read on; at least as much as is unused, so that a long value is not tried often."""
        unused = len(self._text) - self._at
        if unused > LONGEST_VALUE:
            raise ValueError(f"one of its values is longer than {LONGEST_VALUE} characters")
        piece = self._file.read(max(CHUNK, unused))
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)
