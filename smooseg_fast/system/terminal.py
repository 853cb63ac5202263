"""stdout and stderr of a command: harmless whatever a name holds, and no end of a run whatever becomes of them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
import unicodedata
import warnings
from collections.abc import Iterator
from typing import Any

PLAIN = str.maketrans({"±": "+-", "×": "x", "…": "...", "–": "-"})  # for terminals without these characters
CURSOR = re.compile(r"(\x1b\[A)+")  # alone in a write: tqdm moves between its bars
_about = threading.local()  # `file`: what this thread reads, for the warnings of decoders


def one_line(text: str) -> str:
    """`text` as one line that a terminal shows as it is: line breaks, escapes, right-to-left marks, and bytes that are
    not text, become Python's escapes, such as \\n and \\u202e."""
    return text if text.isprintable() else "".join(map(_shown, text))


def printable(text: str) -> str:
    """`text` as one line for an error; lines are joined."""
    return one_line(re.sub(r"\s*\n\s*", " ", text.strip()))


def _shown(c: str) -> str:
    plain = c.isprintable() or unicodedata.category(c) == "Zs"  # such as the narrow blank in macOS's names
    return c if plain else c.encode("unicode_escape").decode()


class Terminal(io.TextIOBase):
    """A stream that escapes what a terminal might obey and what its encoding lacks; lines end and tabs stay.

    Where the stream takes nothing more (a full disk, a reader that has gone), the rest is dropped and the first
    `failure` kept, so that work continues. A `breaks` stream raises BrokenPipeError instead: `smooseg X | head` ends.
    """

    def __init__(self, stream: Any, *, breaks: bool):
        self._stream, self._breaks, self.failure = stream, breaks, None if stream is not None else OSError("closed")

    def __getattr__(self, name: str) -> Any:  # such as fileno
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self.failure is None:
            with self._kept_alive():
                self._stream.write(self._safe(text))
        return len(text)

    def flush(self) -> None:
        if self.failure is None:
            with self._kept_alive():
                self._stream.flush()

    @contextlib.contextmanager
    def _kept_alive(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            if self._breaks:
                raise
            self._give_up(error)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.failure = error
        discard(self._stream)

    def _safe(self, text: str) -> str:
        if not text.isprintable() and not CURSOR.fullmatch(text):
            start = "\r" if text.startswith("\r") else ""  # where tqdm begins a bar
            text = start + re.sub(r"[^\n\t]+", lambda part: one_line(part[0]), text[len(start) :])
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            text = text.translate(PLAIN).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return text


def discard(stream: Any) -> None:
    """Send what `stream` still holds to nowhere, or Python would fail over it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def terminals() -> Iterator[tuple[Terminal, Terminal]]:
    """Put a Terminal in place of sys.stdout and of sys.stderr, and lines for people in place of Python's warnings."""
    if isinstance(sys.stdout, Terminal) and isinstance(sys.stderr, Terminal):  # of the frame around this one
        yield sys.stdout, sys.stderr
        return
    occupy_closed()
    plain, show = (sys.stdout, sys.stderr), warnings.showwarning
    out, err = Terminal(sys.stdout, breaks=True), Terminal(sys.stderr, breaks=False)
    sys.stdout, sys.stderr = out, err

    def shown(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        read = getattr(_about, "file", None)
        if read is None:
            show(message, category, filename, lineno, file, line)
        else:
            from tqdm import tqdm  # takes a while

            tqdm.write(one_line(f"warning: {read}: {printable(str(message))}"), file=sys.stderr)

    warnings.showwarning = shown
    try:
        yield out, err
    finally:
        warnings.showwarning = show
        sys.stdout, sys.stderr = plain


def occupy_closed() -> None:
    """Open nowhere for each of stdin, stdout and stderr that is closed, or the next file opened would be taken for
    it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)


@contextlib.contextmanager
def about(file: object) -> Iterator[None]:
    """Name `file` in the warnings of decoders inside, in this thread."""
    before = getattr(_about, "file", None)
    _about.file = file
    try:
        yield
    finally:
        _about.file = before
