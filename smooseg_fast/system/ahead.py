"""Work done in threads, a bounded number of items before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], *, threads: int, waiting: int) -> Iterator[Result]:
    """`work(item)` of each of `items`, in their order; at most `waiting` results (1 or more) are begun and not yet taken."""
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) == waiting:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # a reader that stops early must not wait for what nobody wants
