"""Work in threads, a bounded number of items ahead of the reader or behind the writer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

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


@contextmanager
def behind(threads: int) -> Iterator[Callable[..., None]]:
    """Give a function that calls `work(*values)` in one of `threads`, at most as many at once; at its own place for 0.

    All work is done at the end of the block. Raises the first error of the work, there or at a later call.
    """
    begun: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(max(1, threads)) as pool:

        def later(work: Callable[..., Any], *values: Any) -> None:
            if not threads:
                work(*values)
                return
            begun.append(pool.submit(work, *values))
            if len(begun) > threads:
                begun.popleft().result()

        yield later
        while begun:
            begun.popleft().result()
