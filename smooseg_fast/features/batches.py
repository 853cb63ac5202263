"""Batches of squares through a backbone. On a CUDA or ROCm card copies in and out run beside the arithmetic, one batch ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..backbones.base import Backbone
from ..errors import UserError
from .tally import Tally

CPU_BATCH, CARD_BATCH = 16, 64  # squares: a CPU is as fast with any number from 4 on, a card needs many


class TooLarge(Exception):
    """A batch that does not fit into the memory of the device."""


@dataclass(frozen=True)
class Flight:
    """A batch on its way; `land` may be called once everything that comes behind it has been started."""

    features: Tensor  # [B,P,D] on the CPU, filled when `done` says so
    extremes: Tensor  # [2] of all features, likewise
    names: tuple[str, ...]  # image of each row
    done: torch.cuda.Event | None


class Batches:
    """Squares in, features out, in the order in which they were started.

    Args:
        grid: (h, w) of the features that the backbone promises for squares of this size.
        mirror: whether squares go in mirrored, and the columns of the features come out mirrored back.
    """

    def __init__(self, backbone: Backbone, grid: tuple[int, int], mirror: bool, tally: Tally):
        self.backbone, self.grid, self.mirror, self.tally = backbone, grid, mirror, tally
        self._streams = [torch.cuda.Stream(backbone.device) for _ in "io"] if backbone.device.type == "cuda" else []

    def start(self, squares: Sequence[np.ndarray], names: Sequence[str]) -> Flight:
        """Squares uint8 [S,S,3] with the names of their images, for messages. Raises TooLarge, after which nothing is held of them."""
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
        """[B,P,D] on the CPU, in the backbone's own type. UserError for what is not finite."""
        if flight.done is not None:
            with self.tally.timed("backbone"):
                flight.done.synchronize()
        if not flight.extremes.isfinite().all():
            finite = flight.features.isfinite().flatten(1).all(dim=1).tolist()
            name = flight.names[finite.index(False)]
            raise UserError(
                f"backbone {self.backbone.name}: gave nan or infinity for {name}; try another device or take the image out"
            )
        return flight.features

    def _start(self, squares: Sequence[np.ndarray], names: tuple[str, ...]) -> Flight:
        with self.tally.timed("copy"):
            images = self._sent(squares)
        with self.tally.timed("backbone"):
            features, grid = self.backbone(images.flip(3) if self.mirror else images)
            promised = (len(squares), self.grid[0] * self.grid[1], self.backbone.dim)
            if tuple(features.shape) != promised or tuple(grid) != self.grid:
                size = squares[0].shape[0]
                raise UserError(
                    f"backbone {self.backbone.name}: gave {tuple(features.shape)} on grid {tuple(grid)} for squares of {size} pixels, not "
                    f"{promised} on {self.grid} as its patch of {self.backbone.patch} pixels says; correct its patch or take another size"
                )
            if self.mirror:
                features = features.unflatten(1, grid).flip(2).flatten(1, 2)
            extremes = torch.stack([features.amin(), features.amax()])  # nan where any is
        with self.tally.timed("copy"):
            return self._fetched(features, extremes, names)

    def _sent(self, squares: Sequence[np.ndarray]) -> Tensor:
        """uint8 [B,3,S,S] on the device."""
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
        return Flight(*hosts, names, outgoing.record_event())


def default_batch(device: torch.device) -> int:
    """Squares a batch where nobody says: of the kind of device alone, so that the same command makes the same batches."""
    return CPU_BATCH if device.type == "cpu" else CARD_BATCH


def is_out_of_memory(error: BaseException) -> bool:
    """Of a CUDA or ROCm card, of Apple's, or of the machine itself."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory")
    )
