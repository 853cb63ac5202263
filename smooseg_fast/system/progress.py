"""Lines on the terminal: how far a command is, and what it has to tell meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from .terminal import one_line

PLAIN_S, IMAGES_S = 30.0, 1.0  # between lines in a log file, at least; and of one that counts many images
SILENT_S = 2.0  # that a phase may last before a line or a bar shows it


def in_notebook() -> bool:
    """Whether this process serves a notebook."""
    return "ipykernel" in sys.modules


class Bar(tqdm):
    """tqdm's bar on a terminal, and its widget in a notebook; elsewhere, as in a log file, a plain line every `plain_s`
    seconds, PLAIN_S by default."""

    def __new__(cls, *args: Any, plain_s: float | None = None, **options: Any) -> Any:
        if in_notebook():
            from tqdm.auto import tqdm as widget  # a plain bar without ipywidgets

            return widget(*args, **options)
        return super().__new__(cls, *args, **options)

    def __init__(self, *, plain_s: float | None = None, **options: Any):
        if sys.stderr is None and options.get("file") is None:  # as under pythonw
            options["disable"] = True
        super().__init__(dynamic_ncols=True, **options)
        if not self.disable and not self.fp.isatty():
            self.mininterval = self.maxinterval = PLAIN_S if plain_s is None else plain_s

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        if file.isatty():
            return tqdm.status_printer(file)

        def line(text: str) -> None:
            if text.strip():
                file.write(text.strip() + "\n")
                file.flush()

        return line


def say(line: str) -> None:
    """Print `line` to stderr, above a bar instead of through it."""
    if sys.stderr is not None:
        tqdm.write(one_line(line), file=sys.stderr)


@contextmanager
def announced(line: str) -> Iterator[None]:
    """Say `line` once the block has lasted SILENT_S; a shorter block is silent."""
    timer = threading.Timer(SILENT_S, say, (line,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # no line after the block
