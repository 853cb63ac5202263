"""Ctrl-C and SIGTERM: a request that a loop answers between two steps, an exception everywhere else."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_S = 0.8  # for a step under way to end; saving, and ending the process, take up to one second more


class Interrupted(KeyboardInterrupt):
    """A signal to stop; `kept` says in words what is kept, once that is known."""

    def __init__(self, number: int = signal.SIGINT, kept: str = ""):
        super().__init__(kept)
        self.number, self.kept = number, kept


def with_kept(stop: KeyboardInterrupt, kept: str) -> Interrupted:
    """Return `stop` with a word on what is kept; an earlier word stands."""
    return Interrupted(getattr(stop, "number", signal.SIGINT), getattr(stop, "kept", "") or kept)


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM raise Interrupted inside, as Ctrl-C raises KeyboardInterrupt, instead of ending without a word."""

    def stop(number: int, _frame: Any) -> None:
        raise Interrupted(number)

    before = _handle((signal.SIGTERM,), stop)
    try:
        yield
    finally:
        _give_back(before)


class StopRequest:
    """Notes Ctrl-C and SIGTERM in `number` while entered, for the loop to act on between two steps.

    Raises Interrupted for a second signal, for the first one inside `at_once`, and when a step takes PATIENCE_S longer.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        self._at_once = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StopRequest:
        self._before = _handle((signal.SIGINT, signal.SIGTERM), self._note)
        return self

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal cut short what is inside; the loop continues after it."""
        self._at_once = True
        try:
            yield
        except Interrupted:
            pass
        finally:
            self._at_once = False

    def _note(self, number: int, _frame: Any) -> None:
        if self.number is not None or self._at_once:
            self.number = self.number or number
            raise Interrupted(self.number)
        self.number = number
        # raise the signal once more: Python runs the handler in the main thread
        self._timer = threading.Timer(PATIENCE_S, _thread.interrupt_main, (number,))
        self._timer.daemon = True
        self._timer.start()

    def __exit__(self, *_exception: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        _give_back(self._before)


def _handle(numbers: tuple[int, ...], handler: Any) -> dict[int, Any]:
    """Set `handler` -> the earlier ones; does nothing outside the main thread, where Python delivers no signals."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}


def _give_back(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
