"""The random draws of a step: batches, partners, masks, patches. Imports torch and smooseg_kernels alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import smooseg_kernels as sk


@dataclass(frozen=True)
class Settings:
    """The part of a configuration that a step needs.

    relative: thresholds are an excess over the measured mean closeness M.
    patches: how many of each square take part; None for all.
    """

    relative: bool
    temperature: float = 0.1
    teacher_decay: float = 0.998
    dropout: float = 0.2
    patches: int | None = None
    impl: str = "auto"


@dataclass(frozen=True)
class Draws:
    """The random choices of one step. They depend on (data_seed, step) alone, so a run resumes with nothing saved."""

    rows: Tensor  # int64 [B] squares of the store
    partner: Tensor  # int64 [B] each one's partner in the batch
    masks: Tensor | None  # [3,B,D] channel masks of closeness, linear and hidden path, scaled by 1 / (1 - p)
    patches: Tensor | None  # int64 [B,n] sampled patches

    def tensors(self) -> list[Tensor]:
        """The fields that are not None, in their order."""
        return [value for value in vars(self).values() if value is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Draws:
        """`function` of every field that is not None."""
        masks, patches = (None if value is None else function(value) for value in (self.masks, self.patches))
        return Draws(function(self.rows), function(self.partner), masks, patches)


class Schedule:
    """Batches in shuffled epochs whose short last batch is dropped, partners and masks.

    Args:
        rows: number of squares in the store, at least 2.
        batch_size: B, at least 2; lowered to `rows` where there are fewer.
        data_seed: seed of everything that is drawn.
    """

    def __init__(self, rows: int, batch_size: int, data_seed: int):
        self.rows, self.batch_size, self.data_seed = rows, min(batch_size, rows), data_seed
        self.steps_per_epoch = rows // self.batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def generator(self, *key: int) -> torch.Generator:
        seed = self.data_seed
        for part in key:  # splitmix-like: neighbouring seeds and steps give unrelated streams
            seed = (seed * 6364136223846793005 + part * 1442695040888963407 + 1) & 0x7FFFFFFFFFFFFFFF
        return torch.Generator().manual_seed(seed ^ (seed >> 29))

    def rows_of(self, step: int) -> Tensor:
        """int64 [B] squares of a step's batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(self.rows, generator=self.generator(1, epoch))
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def ready(self, step: int) -> bool:
        """Return whether a step can be drawn at once."""
        return True

    def draws(self, step: int, P: int, D: int, settings: Settings, device: torch.device) -> Draws:
        """Everything that step `step` draws for features [B,P,D]. Rows stay on the CPU, the rest goes to `device`."""
        rows = self.rows_of(step)
        B, g = self.batch_size, self.generator(2, step)
        partner = sk.layers.draw_partners(B, generator=g)
        masks = patches = None
        if settings.dropout > 0:
            masks = (torch.rand(3, B, D, generator=g) >= settings.dropout).float() / (1 - settings.dropout)
            masks = masks.to(device, non_blocking=True)
        if settings.patches is not None and settings.patches < P:
            patches = torch.rand(B, P, generator=g).argsort(1)[:, : settings.patches].to(device)
        return Draws(rows, partner.to(device), masks, patches)
