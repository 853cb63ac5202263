"""The energies as stateless modules for training loops with NCHW tensors: scalars out, nothing to train or save."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import checks
from .contrast_layers import CRFLoss
from .energies import smoothness_energy
from .pair_energies import pair_energy
from .rows import accumulation_dtype
from .types import PairEnergy, SmoothnessLossTerms

__all__ = ["CRFLoss", "CorrelationLoss", "SmoothnessLoss", "draw_partners"]


def draw_partners(
    B: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draws another image of the batch for each image.

    The partners are a random permutation in which an image that drew itself takes the next number modulo B. Two images
    can therefore share a partner (Lan et al. 2023, arXiv 2310.17874). The draw is that of `torch.randperm(B)`. It never
    waits for a GPU, and a CUDA graph can capture it.

    Args:
        B: number of images, at least 2.
        device: where to draw. Default: the generator's device, or PyTorch's default device without a generator.
        generator: source of the randomness, on `device`. Default: PyTorch's global generator.

    Returns:
        int64 [B] image numbers, none equal to its own position.

    Raises:
        ValueError: B is below 2.
    """
    if B < 2:
        raise ValueError(f"B must be at least 2, because every image needs another one as its partner, got {B}")
    if device is None and generator is not None:
        device = generator.device
    # compilers take a changing B only without the argument
    if generator is None:
        return partners_of(torch.randperm(B, device=device))
    return partners_of(torch.randperm(B, device=device, generator=generator))


def partners_of(order: Tensor) -> Tensor:
    """int64 [...,B] permutations of image numbers -> partners: an image that drew itself takes the next number."""
    B = order.shape[-1]
    itself = torch.arange(B, device=order.device)
    return torch.where(order == itself, (order + 1) % B, order)


class SmoothnessLoss(nn.Module):
    """Computes SmooSeg's smoothness energies within every image and across to another one, for NCHW tensors.

    E = mean over (image, i, j) of (W_ij - b) (1 - cos(p_i, p_j)), as in `smooseg_kernels.smoothness_energy` (Lan et al.
    2023, arXiv 2310.17874). Cost and memory are linear in h * w. Minimise the sum of the two energies.

    Args:
        within: threshold b of the pairs inside an image, a finite number or a tensor []. Pairs with W > b are pulled
            together, the others pushed apart. Like `across` an attribute that a trainer may set at any step; a call can
            also be given its own.
        across: threshold of the pairs with another image of the batch, a finite number or a tensor [].
        center: W_ij = cos(f_i, f_j) less its mean over j, plus the mean over all pairs; else W_ij = cos(f_i, f_j).
        relative: thresholds are an excess over the measured mean closeness.
        impl: "auto", "triton", "torch" or "dense".

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
    """

    def __init__(
        self,
        within: float | Tensor,
        across: float | Tensor,
        center: bool = True,
        *,
        relative: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        self.within, self.across = checks.threshold("within", within), checks.threshold("across", across)
        self.center, self.relative, self.impl = bool(center), bool(relative), impl

    def extra_repr(self) -> str:
        return settings(self, ("within", "across", "center", "relative", "impl"))

    def forward(
        self,
        features: Tensor,
        probs: Tensor,
        partners: Tensor | str | None = None,
        *,
        within: float | Tensor | None = None,
        across: float | Tensor | None = None,
        mean: Tensor | None = None,
    ) -> SmoothnessLossTerms:
        """Computes the terms of one batch.

        Args:
            features: [B,D,h,w], frozen (no gradient), B >= 2.
            probs: [B,K,h,w] label distributions, or rows of any positive length. Get gradients.
            partners: int64 [B], the other image of each image, or "all" for every ordered pair of different images.
                None draws them with `draw_partners` from PyTorch's global generator.
            within: the threshold of this call, a number or a tensor [], a constant. None takes that of the layer.
            across: the same for the pairs with another image.
            mean: [2] takes the place of the measured mean closeness, within and across.
        """
        checks.float_tensor("features", features, ("B", "D", "h", "w"), constant=True)
        B, _, h, w = features.shape
        checks.float_tensor("probs", probs, (B, "K", h, w), features)
        if B < 2:
            raise ValueError("features holds 1 image, but the energy across images needs a batch of at least 2")
        if partners is None:
            partners = draw_partners(B, device=features.device)
        partners = checks.partner_entry("partners", partners, B, features.device, clamp=False)
        dtype, pair = accumulation_dtype(features, probs), (("within", within), ("across", across))
        thresholds = torch.stack(
            [
                checks.constant(name, getattr(self, name) if given is None else given, dtype, features.device)
                for name, given in pair
            ]
        )
        terms = smoothness_energy(
            patch_rows(features),
            patch_rows(probs),
            ["self", partners],
            thresholds,
            relative=self.relative,
            center=self.center,
            mean=mean,
            impl=self.impl,
        )
        energy_within, energy_across = terms.energy.unbind()
        distance_within, distance_across = terms.distance.unbind()
        return SmoothnessLossTerms(energy_within, distance_within, energy_across, distance_across)


class CorrelationLoss(nn.Module):
    """Computes the clamped correlation energy of two batches of feature maps and their codes, for NCHW tensors.

    energy = mean over (image, i, j) of -clamp(cos(c_i, c_j), low, high) (W_ij - b), as in `smooseg_kernels.pair_energy`
    and in STEGO (Hamilton et al., ICLR 2022, arXiv 2203.08414), whose intra, nearest-neighbour and random terms are
    three of these with different shifts b.

    Args:
        threshold: b, a finite number, or a tensor [] or [B]. Pairs with W > b are pulled together, the others pushed
            apart. An attribute that a trainer may set at any step; a call can also be given its own.
        clamp: (low, high) of the codes' similarity, each a number or None for no bound; STEGO's is (0, None).
        center: W_ij = cos(f_i, f_j) less its mean over j, plus the mean over all pairs; else W_ij = cos(f_i, f_j).
        hinge: max(W_ij - b, 0) in place of W_ij - b.
        means: also return the means of the clamped similarity, with gradients, and of cos(f_i, f_j).
        impl: "auto", "triton", "torch" or "dense".

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
    """

    def __init__(
        self,
        threshold: float | Tensor,
        clamp: tuple[float | None, float | None] = (None, None),
        center: bool = True,
        *,
        hinge: bool = False,
        means: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        self.threshold, self.clamp = checks.threshold("threshold", threshold), checks.bounds("clamp", clamp)
        self.center, self.hinge, self.means, self.impl = bool(center), bool(hinge), bool(means), impl

    def extra_repr(self) -> str:
        return settings(self, ("threshold", "clamp", "center", "hinge", "means", "impl"))

    def forward(
        self,
        features_1: Tensor,
        features_2: Tensor,
        codes_1: Tensor,
        codes_2: Tensor,
        *,
        threshold: float | Tensor | None = None,
        partner: Tensor | None = None,
        mean: float | Tensor | None = None,
    ) -> PairEnergy:
        """Computes the energy of one batch and the mean similarity of the codes before the clamp.

        Args:
            features_1: [B,D,h,w], frozen (no gradient).
            features_2: [N,D,h',w'], frozen; its grid may differ.
            codes_1: [B,Z,h,w]. Get gradients.
            codes_2: [N,Z,h',w']. Get gradients.
            threshold: that of this call, as in `pair_energy`. None takes that of the layer.
            partner: int64 [B] or [M,B], the images of features_2 that each image meets, as in `pair_energy`. None pairs
                images of the same number.
            mean: takes the place of the measured mean closeness, as in `pair_energy`.
        """
        checks.float_tensor("features_1", features_1, ("B", "D", "h", "w"), constant=True)
        B, D, h, w = features_1.shape
        checks.float_tensor("codes_1", codes_1, (B, "Z", h, w), features_1)
        N = B if partner is None else "N"
        checks.float_tensor("features_2", features_2, (N, D, "h'", "w'"), features_1, constant=True)
        checks.float_tensor(
            "codes_2", codes_2, (features_2.shape[0], codes_1.shape[1], *features_2.shape[2:]), features_1
        )
        # one tensor on both sides stays one, so that its unit rows are computed once
        f_1, c_1 = patch_rows(features_1), patch_rows(codes_1)
        f_2 = f_1 if features_2 is features_1 else patch_rows(features_2)
        c_2 = c_1 if codes_2 is codes_1 else patch_rows(codes_2)
        return pair_energy(
            f_1,
            c_1,
            f_2,
            c_2,
            self.threshold if threshold is None else threshold,
            partner=partner,
            clamp=self.clamp,
            hinge=self.hinge,
            center=self.center,
            mean=mean,
            means=self.means,
            impl=self.impl,
        )


def settings(layer: nn.Module, names: tuple[str, ...]) -> str:
    """Lists settings as the constructor takes them."""
    values = {name: getattr(layer, name) for name in names}
    return ", ".join(
        f"{name}={value.tolist() if isinstance(value, Tensor) else repr(value)}" for name, value in values.items()
    )


def patch_rows(planes: Tensor) -> Tensor:
    """Takes [B,C,h,w] to [B,h*w,C], without a copy of channels-last planes, nor of any on a CPU."""
    rows = planes.flatten(2).mT
    # kernels read rows whose elements are adjacent: one copy here spares one in every pass
    return rows.contiguous() if planes.is_cuda else rows
