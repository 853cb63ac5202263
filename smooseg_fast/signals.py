"""Ctrl-C and SIGTERM as requests that a loop answers between two steps, with everything saved."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal to stop, after everything worth keeping was saved."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__()
        self.number = number


class StopRequest:
    """Within it, Ctrl-C and SIGTERM are noted in `number` for the loop to act on between two steps; a second one stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, _frame: Any) -> None:
        if self.number is not None:
            raise Interrupted(number)
        self.number = number

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
