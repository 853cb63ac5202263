"""The random draws of a step: batches, partners, masks, patches. Imports torch and smooseg_kernels alone.

Partners, masks and patches come from a counter that is hashed with integers alone (SplitMix64, Steele et al. 2014). A
CPU and a GPU therefore draw the same numbers, one step at a time or many at once, and a run resumes from (data_seed,
step) with nothing saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import smooseg_kernels as sk

# which patches show data: bool [N,P] on the device, or a function from row numbers int64 [B] to [B,P] on the CPU
Marks = Tensor | Callable[[Tensor], Tensor | None] | None


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
    """The random choices of one step, or of S steps with [S,...] in every field."""

    rows: Tensor | None  # int64 [B] rows of the features; None for all of them in their order
    partner: Tensor  # int64 [B] each one's partner in the batch
    masks: Tensor | None  # bool [3,B,D] channels that closeness, linear and hidden path keep
    patches: Tensor | None  # int64 [B,n] sampled patches, ascending

    def tensors(self) -> list[Tensor]:
        """The fields that are not None, in their order."""
        return [value for value in vars(self).values() if value is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Draws:
        """`function` of every field that is not None, in their order."""
        rows = None if self.rows is None else function(self.rows)
        partner = function(self.partner)
        masks, patches = (None if value is None else function(value) for value in (self.masks, self.patches))
        return Draws(rows, partner, masks, patches)


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

    def seed(self, *key: int) -> int:
        """The data seed and a key as one number below 2^63."""
        seed = self.data_seed
        for part in key:  # splitmix-like: neighbouring seeds and steps give unrelated streams
            seed = (seed * 6364136223846793005 + part * 1442695040888963407 + 1) & 0x7FFFFFFFFFFFFFFF
        return seed ^ (seed >> 29)

    def generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed(*key))

    def rows_of(self, step: int) -> Tensor:
        """int64 [B] squares of a step's batch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(self.rows, generator=self.generator(1, epoch))
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def ready(self, step: int) -> bool:
        """Return whether the rows of a step are known without a wait."""
        return True

    def draws(self, step: int, P: int, D: int, settings: Settings, device: torch.device) -> Draws:
        """Everything that step `step` draws for features [B,P,D], on `device`."""
        makes = device if device.type == "cuda" else torch.device("cpu")  # others may lack whole numbers of 64 bits
        choices = Draws(None, *self.choices(step, 1, P, D, settings, makes))
        return replace(choices.map(lambda value: value[0].to(device)), rows=self.rows_of(step).to(device))

    def choices(
        self, first: int, steps: int, P: int, D: int, settings: Settings, device: torch.device
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Partner, masks and patches of `steps` steps from `first`, made on `device` -> [S,B], [S,3,B,D], [S,B,n].

        A channel is dropped with a probability of round(2^16 dropout) / 2^16. Patches are the n of P with the least
        keys; a key has 32 bits, of which a patch's own number takes the last, so that no two are equal.
        """
        B, masks, patches = self.batch_size, None, None
        mask_words = -(-3 * B * D // 4) if settings.dropout > 0 else 0
        key_words = 0 if settings.patches is None or settings.patches >= P else -(-B * P // 2)
        numbers = torch.arange(first, first + steps, device=device)
        words = random_words(self.seed(2), numbers, B + mask_words + key_words)
        order, mask_part, key_part = words.split((B, mask_words, key_words), 1)
        if mask_words:
            drop = min(round(settings.dropout * 2**16), 2**16 - 1)
            masks = (mask_part.view(torch.int16)[:, : 3 * B * D] >= drop - 2**15).view(steps, 3, B, D)
        if key_words:
            keys = key_part.view(torch.int32)[:, : B * P].reshape(-1, P) & -(1 << (P - 1).bit_length())
            keys |= torch.arange(P, dtype=torch.int32, device=device)
            least = keys.topk(settings.patches, largest=False, sorted=False).indices
            patches = least.sort().values.view(steps, B, -1)
        return sk.layers.partners_of(order.argsort(dim=1, stable=True)), masks, patches


def random_words(seed: int, steps: Tensor, count: int) -> Tensor:
    """int64 [S,count] of 64 random bits each, on the device of the step numbers [S]."""
    starts = mixed((steps + 1) * GOLDEN + seed)
    return mixed(torch.arange(1, count + 1, device=steps.device) * GOLDEN + starts[:, None])


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's mixing of int64 numbers, in place. Products wrap, and shifts fill with zeros."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x ^= (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor != 1:
            x *= factor - 2**64
    return x


GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the step of SplitMix64's counter
