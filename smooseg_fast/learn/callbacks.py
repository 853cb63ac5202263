"""Callbacks of `fit`: functions that it calls between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import UserError


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps taken, 1 to `steps`.
        steps: number of steps of the whole run.
        epoch: number of complete passes over all squares.
        records: the lines that metrics.jsonl got at this step, one for each head; empty between them.
    """

    step: int
    steps: int
    epoch: int
    records: tuple[Mapping[str, Any], ...] = ()


class Listener(Protocol):
    """An object with one or both of these methods."""

    def on_step(self, progress: Progress) -> Any:
        """Called after every step."""

    def on_epoch(self, progress: Progress) -> Any:
        """Called after the last step of every pass over all squares."""


Callback = Callable[[Progress], Any] | Listener  # a function stands for `on_step`


def checked(callbacks: Iterable[Callback]) -> tuple[Callback, ...]:
    """The callbacks that `fit` got. UserError for what is no list of them."""
    if callable(callbacks) or not isinstance(callbacks, Iterable):
        raise UserError(f"callbacks: give a list of functions, such as [f]; got {callbacks!r:.80}")
    listed = tuple(callbacks)
    Callbacks(listed, 1)
    return listed


class Callbacks:
    """Calls those of a run. A callback runs between two steps, so a slow one slows training; what it raises ends the
    run, and what was saved is kept. UserError for a callback that is neither a function nor a `Listener`."""

    def __init__(self, callbacks: Iterable[Callback], steps_per_epoch: int):
        self._steps_per_epoch = steps_per_epoch
        self._on_step: list[Callable[[Progress], Any]] = []
        self._on_epoch: list[Callable[[Progress], Any]] = []
        for callback in callbacks:
            methods = [getattr(callback, name, None) for name in ("on_step", "on_epoch")]
            if not any(map(callable, methods)):
                methods = [callback, None]
            if not any(map(callable, methods)):
                raise UserError(f"callbacks: must be functions, or have on_step or on_epoch; got {callback!r:.80}")
            for method, listeners in zip(methods, (self._on_step, self._on_epoch)):
                if callable(method):
                    listeners.append(method)

    def tell(self, step: int, steps: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Call them after a step."""
        if not (self._on_step or self._on_epoch):
            return
        epoch, rest = divmod(step, self._steps_per_epoch)
        progress = Progress(step, steps, epoch, tuple(records))
        for listener in self._on_step:
            listener(progress)
        for listener in self._on_epoch if rest == 0 else ():
            listener(progress)
