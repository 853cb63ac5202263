"""Ctrl-C, SIGTERM and SIGHUP: a request that a loop answers between two steps, an exception everywhere else."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

ENDS = [signal.SIGTERM, *[getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name)]]
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
def terminable(ending: Callable[[], bool]) -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise Interrupted inside, as Ctrl-C raises KeyboardInterrupt.

    They do nothing while the program is `ending`.
    """

    def stop(number: int, _frame: Any) -> None:
        if not ending():
            raise Interrupted(number)

    with _handled_by(stop, *ENDS):
        yield


@contextmanager
def importing() -> Iterator[None]:
    """Raise KeyboardInterrupt after a Ctrl-C inside even where imported code hides it: NumPy's turns it into another
    error, and others continue half imported."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    try:
        with _handled_by(note, signal.SIGINT):
            yield
    except Exception:
        if not received:
            raise
    if received:
        raise KeyboardInterrupt


class StopRequest:
    """Ctrl-C, SIGTERM or SIGHUP as a `number` that a loop acts on between two steps; None until one comes."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once = False
        # as if the signal came once more: Python runs the handler in the main thread
        self._timer = threading.Timer(PATIENCE_S, self._again)
        self._timer.daemon = True

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _again(self) -> None:
        if self.number is not None:
            _thread.interrupt_main(signal.Signals(self.number))

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal cut short what is inside; the loop continues after it."""
        self._at_once = True
        try:
            with suppress(Interrupted):
                yield
        finally:
            self._at_once = False

    def _note(self, number: int, _frame: Any) -> None:
        if self.number is not None or self._at_once:
            self.number = self.number or number
            raise Interrupted(self.number)
        self.number = number
        self._timer.start()


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note Ctrl-C, SIGTERM and SIGHUP in a StopRequest.

    Raises Interrupted for a second signal, for the first one inside `at_once`, and when a step takes PATIENCE_S longer.
    """
    request = StopRequest()
    with _handled_by(request._note, signal.SIGINT, *ENDS):
        try:
            yield request
        finally:
            request._timer.cancel()


@contextmanager
def _handled_by(handler: Any, *numbers: int) -> Iterator[None]:
    """Do nothing outside the main thread, where Python delivers no signals, or about those that nohup ignores."""
    numbers = tuple(n for n in numbers if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
