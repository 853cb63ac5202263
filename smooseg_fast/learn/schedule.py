"""What a training step draws at random: batches, partners, masks and patches. Imports torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What the step needs of a configuration."""

    relative: bool
    temperature: float = 0.1
    teacher_decay: float = 0.998
    dropout: float = 0.2
    patches: int | None = None
    impl: str = "auto"


@dataclass(frozen=True)
class Draws:
    """The random choices of one step. They depend on (data_seed, step) alone, so a run continues where it stopped with nothing saved.

    B is the batch's size, or that of the one part that was drawn.
    """

    rows: Tensor  # int64 [B] squares of the store
    partner: Tensor  # int64 [B] each one's partner in the batch
    masks: Tensor | None  # [3,B,D] channel masks of closeness, linear and hidden path, scaled by 1 / (1 - p)
    patches: Tensor | None  # int64 [B,n] sampled patches


class Schedule:
    """Batches in shuffled epochs whose short last batch is dropped, partners and masks.

    Args:
        rows: squares of the store, at least `parts`.
        batch_size: of the whole batch; fewer where there are not as many rows.
        parts: equal slices of a batch, in each of which partners stay. Rows, masks and patches do not depend on it.
        part: the one slice that is drawn, with partners numbered within it; all of them when None.
    """

    def __init__(self, rows: int, batch_size: int, data_seed: int, parts: int = 1, part: int | None = None):
        self.rows, self.batch_size, self.data_seed = rows, min(batch_size, rows) // parts * parts, data_seed
        self.parts, self.part = parts, part
        self.steps_per_epoch = rows // self.batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def generator(self, *key: int) -> torch.Generator:
        seed = self.data_seed
        for part in key:  # splitmix-like: neighbouring seeds and steps give unrelated streams
            seed = (seed * 6364136223846793005 + part * 1442695040888963407 + 1) & 0x7FFFFFFFFFFFFFFF
        return torch.Generator().manual_seed(seed ^ (seed >> 29))

    def rows_of(self, step: int) -> Tensor:
        """int64 [B] of the whole batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(self.rows, generator=self.generator(1, epoch))
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def ready(self, step: int) -> bool:
        """Whether a step can be drawn at once."""
        return True

    def draws(self, step: int, P: int, D: int, settings: Settings, device: torch.device) -> Draws:
        rows = self.rows_of(step)
        B, g = self.batch_size, self.generator(2, step)
        each = B // self.parts
        # the ranks within each part of a permutation are a permutation of that part; with one part they are the permutation itself
        partner = torch.randperm(B, generator=g).view(self.parts, each).argsort(1).argsort(1)
        partner = torch.where(partner == torch.arange(each), (partner + 1) % each, partner)
        if self.part is None:
            mine, partner = slice(B), (partner + torch.arange(0, B, each)[:, None]).flatten()
        else:
            mine, partner = slice(self.part * each, (self.part + 1) * each), partner[self.part]
        masks = patches = None
        if settings.dropout > 0:
            masks = (torch.rand(3, B, D, generator=g) >= settings.dropout).float() / (1 - settings.dropout)
            masks = masks[:, mine].to(device, non_blocking=True)
        if settings.patches is not None and settings.patches < P:
            patches = torch.rand(B, P, generator=g)[mine].argsort(1)[:, : settings.patches].to(device)
        return Draws(rows[mine], partner.to(device), masks, patches)
