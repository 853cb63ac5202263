"""Work in threads, a bounded number of items ahead of the reader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int, waiting: int
) -> Generator[Result, None, None]:
    """Give `work(item)` for each of `items`, in order.

    At most `waiting` results (1 or more) are begun and not yet taken by the reader.
    """
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
            pool.shutdown(cancel_futures=True)  # a reader that stops early does not wait for the rest
