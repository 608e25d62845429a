# SPDX-License-Identifier: Apache-2.0
"""A large JSON object read in pieces: one list of it is yielded element by element, the rest is small.

The standard library parses whole texts only. A log of 50,000 samples is one text, so its scanner is called here on
a window that grows until one value fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from keelwright.core.errors import DataError, UnsafeInputError

_CHUNK = 1 << 16
_SPACE = " \t\n\r"
_AFTER = frozenset(",]}:" + _SPACE)
"""What can follow a value."""


def iterate_list(path: Path, key: str, *, largest: int) -> Iterator[Any]:
    """Yield the elements of the list `key` of the JSON object in a file, in order.

    Args:
        path: A UTF-8 file that holds one JSON object.
        key: Name of the list; nothing is yielded where the object has none, or null.
        largest: Characters of one element; more are refused.

    Raises:
        DataError: The text is not JSON, and where.
        UnsafeInputError: An element is too large.
    """
    with path.open(encoding="utf-8-sig") as stream:
        window = _Window(stream, path, largest)
        for name in window.names():
            if name == key and window.peek() == "[":
                yield from window.elements()
            else:
                window.value()


def read_without_list(path: Path, key: str, *, enough: frozenset[str], largest: int) -> dict[str, Any]:
    """Return the JSON object in a file without its list `key`.

    Args:
        path: A UTF-8 file that holds one JSON object.
        key: Name of the list that is left out.
        enough: When all of these keys were seen, the file is not read beyond the beginning of the list.
        largest: Characters of one value.

    Raises:
        DataError: The text is not JSON, and where.
        UnsafeInputError: A value is too large.
    """
    found: dict[str, Any] = {}
    with path.open(encoding="utf-8-sig") as stream:
        window = _Window(stream, path, largest)
        for name in window.names():
            if name == key and window.peek() == "[":
                if enough <= found.keys():
                    break
                for _ in window.elements():
                    pass
            else:
                found[name] = window.value()
    return found


class _Window:
    """The part of the text that is being looked at."""

    def __init__(self, stream: IO[str], path: Path, largest: int) -> None:
        self._stream = stream
        self._path = path
        self._largest = largest
        self._text = ""
        self._at = 0
        self._before = 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    def names(self) -> Iterator[str]:
        """Yield the keys of the object; the caller takes each value before it asks for the next key."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            name = self.value()
            if not isinstance(name, str):
                raise self._wrong("a key in quotation marks", repr(name))
            self._take(":")
            yield name
            if self.peek() == "}":
                self._take("}")
                return
            self._take(",")

    def elements(self) -> Iterator[Any]:
        """Yield the elements of the list that begins here."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield self.value()
            if self.peek() == "]":
                self._take("]")
                return
            self._take(",")

    def peek(self) -> str:
        """Return the next character that is not white space; the empty string at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Take one value."""
        self.peek()
        step = _CHUNK
        while True:
            try:
                found, stop = self._decoder.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self._wrong("values inside each other to a sensible depth", "too many levels") from error
            except ValueError as error:
                stop = len(self._text)
                if self._ended:
                    raise self._wrong("JSON", str(error)) from error
            else:
                # A number may go on behind the window: "12." reads as 12 and a point.
                if self._ended or self._text[stop : stop + 1] in _AFTER:
                    self._require_size(stop)
                    self._at = stop
                    return found
            self._require_size(stop)
            # Twice as much each time, so that a large value is scanned a few times only.
            self._more(step)
            step *= 2

    def _require_size(self, stop: int) -> None:
        if stop - self._at > self._largest:
            raise UnsafeInputError(
                f"'{self._path}': one value is too large.",
                expected=f"at most {self._largest} characters",
                found=f"more, from character {self._before + self._at} on",
                fix="write the log again without what made the sample so large, such as images",
            )

    def _take(self, wanted: str) -> None:
        found = self.peek()
        if found != wanted:
            raise self._wrong(f"'{wanted}'", f"'{found}'" if found else "the end of the file")
        self._at += 1

    def _more(self, size: int = _CHUNK) -> bool:
        """Read on, and forget what was taken; False at the end."""
        try:
            piece = self._stream.read(size)
        except UnicodeDecodeError as error:
            raise self._wrong("UTF-8 text", str(error)) from error
        self._before += self._at
        self._text = self._text[self._at :] + piece
        self._at = 0
        self._ended = not piece
        return bool(piece)

    def _wrong(self, expected: str, found: str) -> DataError:
        return DataError(
            f"'{self._path}' is not a whole JSON document: character {self._before + self._at}.",
            expected=expected,
            found=found,
            fix="copy the file again from where it was written",
        )
