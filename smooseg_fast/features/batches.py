"""Send batches of squares through a backbone.

On a CUDA or ROCm card copies in and out overlap the arithmetic, one batch ahead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backbones.base import Backbone
from ..backbones.scales import side_by_side
from ..errors import UserError


class Square(NamedTuple):
    name: str  # of its image
    crop: tuple[int, int]  # (top, left) at the squares' scale (cutting.Cutting)
    pixels: np.ndarray  # uint8 [n,side,side,3]: the square with its margins at each of n scales
    valid: np.ndarray | None = None  # bool [P], which patches show data; None where every pixel does


class Flight(NamedTuple):
    """A batch under way."""

    features: Tensor  # [B,P,D] on the CPU, complete after `done`
    extremes: Tensor  # [2] smallest and largest feature, complete after `done`
    names: list[str]  # image of each row
    done: torch.cuda.Event | None


class Batches:
    """Turn squares into features, batch by batch. `seconds` counts the time that the backbone takes.

    Args:
        grid: (h, w) patches of a square without its margins.
        ratios: the scales as shares of the first.
        mirror: mirror the squares on their way in and the columns of the features on their way out.
    """

    def __init__(self, backbone: Backbone, grid: tuple[int, int], mirror: bool, ratios: Sequence[float] = (1.0,)):
        self.backbone, self.grid, self.mirror, self.ratios, self.seconds = backbone, grid, mirror, ratios, 0.0
        self._streams = [torch.cuda.Stream(backbone.device) for _ in "io"] if backbone.device.type == "cuda" else []

    def features(self, squares: Sequence[Square], batch_size: int, show: Callable[[int], None]) -> list[Tensor] | None:
        """Features of squares as parts [n,P,D] on the CPU, in the backbone's own dtype.

        Calls `show` with the number of squares done. None where a batch does not fit into the memory of the device.
        UserError when a feature is NaN or infinite, or the backbone breaks its promise.
        """
        flights: deque[Flight] = deque()
        parts: list[Tensor] = []
        try:
            for start in range(0, len(squares), batch_size):
                flights.append(self._start(squares[start : start + batch_size]))
                if len(flights) > 1:  # one stays in flight while the next is put together
                    parts.append(self._land(flights.popleft()))
                    show(start)
            return parts + [self._land(flight) for flight in flights]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # outside of the handler: an exception holds its frames, and with them the tensors
        flights.clear()
        if self._streams:
            torch.cuda.empty_cache()
        return None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def _start(self, squares: Sequence[Square]) -> Flight:
        images = self._sent([square.pixels for square in squares])
        with self._timed():
            features, grid = self.backbone(images.flip(3) if self.mirror else images)
            side = images.shape[2] // self.backbone.patch
            promised = (len(images), side * side, self.backbone.dim)
            if tuple(features.shape) != promised or tuple(grid) != (side, side):
                raise UserError(
                    f"backbone {self.backbone.name}: gave {tuple(features.shape)} on grid {tuple(grid)} for squares of "
                    f"{images.shape[2]} pixels, not {promised} on {(side, side)} as its patch of {self.backbone.patch} "
                    "pixels says; correct its patch or take another size"
                )
            if (side, side) != self.grid or len(self.ratios) > 1:
                maps = features.view(len(squares), len(self.ratios), side, side, -1).unbind(1)
                features = side_by_side(maps, self.ratios, self.grid)
            if self.mirror:
                features = features.unflatten(1, self.grid).flip(2).flatten(1, 2)
            extremes = torch.stack([features.amin(), features.amax()])  # NaN where any feature is
        return self._fetched(features, extremes, [square.name for square in squares])

    def _land(self, flight: Flight) -> Tensor:
        """Wait for a batch -> [B,P,D]."""
        if flight.done is not None:
            with self._timed():
                flight.done.synchronize()
        if not flight.extremes.isfinite().all():
            finite = flight.features.isfinite().flatten(1).all(dim=1).tolist()
            raise UserError(
                f"backbone {self.backbone.name}: gave NaN or infinity for {flight.names[finite.index(False)]}; "
                "try another device or take the image out"
            )
        return flight.features

    def _sent(self, squares: list[np.ndarray]) -> Tensor:
        """Copy the scales of squares to the device, those of a square in a row -> uint8 [B*n,3,S,S]."""
        if not self._streams:
            images = torch.from_numpy(np.concatenate(squares)).permute(0, 3, 1, 2).contiguous()
            return images.to(self.backbone.device)
        incoming, now = self._streams[0], torch.cuda.current_stream(self.backbone.device)
        count, *shape = squares[0].shape
        pixels = torch.empty(len(squares) * count, *shape, dtype=torch.uint8, pin_memory=True)
        np.concatenate(squares, out=pixels.numpy())
        with torch.cuda.stream(incoming):
            images = pixels.to(self.backbone.device, non_blocking=True).permute(0, 3, 1, 2).contiguous()
        now.wait_stream(incoming)
        images.record_stream(now)
        return images

    def _fetched(self, features: Tensor, extremes: Tensor, names: list[str]) -> Flight:
        """Start the copies back to the CPU."""
        if not self._streams:
            return Flight(features.cpu(), extremes.cpu(), names, None)
        outgoing = self._streams[1]
        outgoing.wait_stream(torch.cuda.current_stream(self.backbone.device))
        hosts = []
        for tensor in (features, extremes):
            hosts.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
            with torch.cuda.stream(outgoing):
                hosts[-1].copy_(tensor, non_blocking=True)
            tensor.record_stream(outgoing)
        return Flight(hosts[0], hosts[1], names, outgoing.record_event())


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a CUDA or ROCm card, an Apple GPU or the machine itself ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory")
    )
