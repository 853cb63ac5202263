"""Send batches of squares through a backbone.

On a CUDA or ROCm card copies in and out overlap the arithmetic, one batch ahead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..backbones.base import Backbone
from ..errors import UserError

CPU_BATCH, CARD_BATCH = 16, 64  # squares: a CPU is as fast with any number from 4 on, a card needs many


class TooLarge(Exception):
    """A batch does not fit into the memory of the device."""


@dataclass
class Pace:
    """Count what an extraction makes and the seconds that it takes."""

    squares: int = 0
    images: int = 0
    seconds: float = 0.0
    backbone_seconds: float = 0.0  # the backbone's part of `seconds`

    @contextmanager
    def in_backbone(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.backbone_seconds += time.perf_counter() - start

    def line(self, how: str) -> str:
        """The pace in words; `how` says what worked."""
        seconds = self.seconds or 1.0
        return (
            f"extracted  {self.squares} squares of {self.images} images in {seconds:.1f} s: "
            f"{self.images / seconds:.1f} images/s, "
            f"{100 * self.backbone_seconds / seconds:.0f} % of the time in the backbone; {how}"
        )


@dataclass(frozen=True)
class Flight:
    """A batch under way. `land` it once every batch that is to overlap it has been started."""

    features: Tensor  # [B,P,D] on the CPU, complete after `done`
    extremes: Tensor  # [2] smallest and largest feature, complete after `done`
    names: tuple[str, ...]  # image of each row
    done: torch.cuda.Event | None


class Batches:
    """Turn batches of squares into features, in the order in which they were started.

    Args:
        grid: (h, w) patches that the backbone promises for squares of this size.
        mirror: mirror the squares on their way in and the columns of the features on their way out.
        pace: gets the seconds that the backbone takes.
    """

    def __init__(self, backbone: Backbone, grid: tuple[int, int], mirror: bool, pace: Pace):
        self.backbone, self.grid, self.mirror, self.pace = backbone, grid, mirror, pace
        self._streams = [torch.cuda.Stream(backbone.device) for _ in "io"] if backbone.device.type == "cuda" else []

    def start(self, squares: Sequence[np.ndarray], names: Sequence[str]) -> Flight:
        """Send squares uint8 [S,S,3] of the images `names` to the backbone.

        After TooLarge nothing of them stays in memory.
        """
        try:
            return self._start(squares, tuple(names))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # outside of the handler: an exception holds its frames, and with them the tensors
        if self._streams:
            torch.cuda.empty_cache()
        raise TooLarge

    def land(self, flight: Flight) -> Tensor:
        """Wait for a batch -> [B,P,D] on the CPU, in the backbone's own dtype.

        UserError when a feature is NaN or infinite.
        """
        if flight.done is not None:
            with self.pace.in_backbone():
                flight.done.synchronize()
        if not flight.extremes.isfinite().all():
            finite = flight.features.isfinite().flatten(1).all(dim=1).tolist()
            name = flight.names[finite.index(False)]
            raise UserError(
                f"backbone {self.backbone.name}: gave NaN or infinity for {name}; "
                "try another device or take the image out"
            )
        return flight.features

    def _start(self, squares: Sequence[np.ndarray], names: tuple[str, ...]) -> Flight:
        images = self._sent(squares)
        with self.pace.in_backbone():
            features, grid = self.backbone(images.flip(3) if self.mirror else images)
            promised = (len(squares), self.grid[0] * self.grid[1], self.backbone.dim)
            if tuple(features.shape) != promised or tuple(grid) != self.grid:
                size = squares[0].shape[0]
                raise UserError(
                    f"backbone {self.backbone.name}: gave {tuple(features.shape)} on grid {tuple(grid)} "
                    f"for squares of {size} pixels, not {promised} on {self.grid} as its patch of "
                    f"{self.backbone.patch} pixels says; correct its patch or take another size"
                )
            if self.mirror:
                features = features.unflatten(1, grid).flip(2).flatten(1, 2)
            extremes = torch.stack([features.amin(), features.amax()])  # NaN where any feature is
        return self._fetched(features, extremes, names)

    def _sent(self, squares: Sequence[np.ndarray]) -> Tensor:
        """Copy squares to the device -> uint8 [B,3,S,S]."""
        if not self._streams:
            images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()
            return images.to(self.backbone.device)
        incoming, now = self._streams[0], torch.cuda.current_stream(self.backbone.device)
        pixels = torch.empty(len(squares), *squares[0].shape, dtype=torch.uint8, pin_memory=True)
        np.stack(squares, out=pixels.numpy())
        with torch.cuda.stream(incoming):
            images = pixels.to(self.backbone.device, non_blocking=True).permute(0, 3, 1, 2).contiguous()
        now.wait_stream(incoming)
        images.record_stream(now)
        return images

    def _fetched(self, features: Tensor, extremes: Tensor, names: tuple[str, ...]) -> Flight:
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


def default_batch(device: torch.device) -> int:
    """Squares in a batch by default.

    It depends on the kind of device alone, so the same command makes the same batches.
    """
    return CPU_BATCH if device.type == "cpu" else CARD_BATCH


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a CUDA or ROCm card, an Apple GPU or the machine itself ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory")
    )
