"""A file that is read by ranges, as they are asked for, from where reading costs a request."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

KEPT_BYTES = 2**26  # of blocks


class Ranges(io.RawIOBase):
    """A file of `size` bytes, of which the last blocks that were read stay in memory.

    Args:
        read: gives the bytes from a start to an end, or the whole file where ranges cannot be had.
        block: bytes of a request.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, block: int):
        self._read, self._size, self._block, self._place = read, size, block, 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._whole: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one block goes. OSError where the file ends before its size."""
        view = memoryview(buffer).cast("B")
        if self._place >= self._size or not len(view):
            return 0
        number, start = divmod(self._place, self._block)
        part = self._part(number)[start : start + len(view)]
        view[: len(part)] = part
        self._place += len(part)
        return len(part)

    def _part(self, number: int) -> bytes:
        """The bytes of a block."""
        start, end = number * self._block, min((number + 1) * self._block, self._size)
        if self._whole is not None:
            return self._whole[start:end]
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        content = self._read(start, end)
        if len(content) > end - start:  # a server that sends whole files alone
            self._whole, content = content, content[start:end]
        if len(content) < end - start:
            raise OSError(f"{len(content)} of {end - start} bytes came")
        self._blocks[number] = content
        if len(self._blocks) > max(1, KEPT_BYTES // self._block):
            self._blocks.popitem(last=False)
        return content
