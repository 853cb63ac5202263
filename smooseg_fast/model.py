"""What is learnt: the projection from features to codes, and the prototypes with their slow teacher. Imports torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kmeans import principal_directions, spherical_kmeans


def codes_of(features: Tensor, projection: nn.Module, linear_mask: Tensor | None = None, hidden_mask: Tensor | None = None) -> Tensor:
    """W1 (f * m1) + b1 + W3 SiLU(W2 (f * m2) + b2) + b3 for H heads at once. Lan et al. 2023, section 3.2.

    features [B,P,D] and masks [B,D] are common to the heads; `projection` has linear, hidden and outer with weights [H,.,D] and biases
    [H,.]. -> [H,B,P,Z]. The heads' W1 and W2 lie side by side, so that each is one matrix product.
    """
    linear, hidden, outer = projection.linear, projection.hidden, projection.outer
    if features.device.type == "cpu" and not torch.compiler.is_compiling():
        weights = (linear.weight, linear.bias + outer.bias, hidden.weight, hidden.bias, outer.weight)
        return ImageByImage.apply(features, linear_mask, hidden_mask, *weights, torch.is_grad_enabled())
    (B, P), (H, Z) = features.shape[:2], linear.bias.shape
    if linear_mask is None:
        straight = features @ linear.weight.flatten(0, 1).mT
    else:  # the mask rides on the weights, which are smaller than the features
        straight = features @ (linear.weight.flatten(0, 1) * linear_mask[:, None, :]).mT
    masked = features if hidden_mask is None else features * hidden_mask[:, None, :].to(features.dtype)
    curved = F.silu(F.linear(masked, hidden.weight.flatten(0, 1), hidden.bias.flatten()))
    straight, curved = (x.reshape(B * P, H, -1).transpose(0, 1) for x in (straight, curved))
    codes = torch.baddbmm(straight, curved, outer.weight.mT) + (linear.bias + outer.bias)[:, None]
    return codes.view(H, B, P, Z)


class ImageByImage(torch.autograd.Function):
    """`codes_of` for a CPU, whose cost beside its matrix products is memory: what one image needs between them stays in the cache.

    Only what W2 gives is kept for the backward; masked features and SiLU are made again there. Gradients go to the weights alone.
    """

    @staticmethod
    def forward(ctx, features, linear_mask, hidden_mask, linear, bias, hidden, hidden_bias, outer, keep):
        (B, P, D), (H, Z, _) = features.shape, outer.shape
        linear_t, hidden_t, outer_t = linear.flatten(0, 1).mT, hidden.flatten(0, 1).mT, outer.mT
        before, codes = features.new_empty(B if keep else 1, P, H * D), features.new_empty(H, B, P, Z)
        for n in range(B):
            straight = torch.mm(features[n], linear_t if linear_mask is None else linear_t * linear_mask[n, :, None])
            curved = F.silu(torch.addmm(hidden_bias.flatten(), _times(features, hidden_mask, n), hidden_t, out=before[n if keep else 0]))
            codes[:, n] = torch.baddbmm(_by_head(straight, H), _by_head(curved, H), outer_t).add_(bias[:, None])
        if keep:
            ctx.save_for_backward(features, linear_mask, hidden_mask, before, outer)
        return codes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_codes):
        features, linear_mask, hidden_mask, before, outer = ctx.saved_tensors
        (B, P, D), (H, Z, _) = features.shape, outer.shape
        d_linear, d_hidden = features.new_zeros(H * Z, D), features.new_zeros(H * D, D)
        d_outer, d_hidden_bias = torch.zeros_like(outer), features.new_zeros(H * D)
        for n in range(B):
            d = d_codes[:, n]
            d_side = d.transpose(0, 1).reshape(P, H * Z).mT
            if linear_mask is None:
                d_linear.addmm_(d_side, features[n])
            else:
                d_linear.addcmul_(torch.mm(d_side, features[n]), linear_mask[n])
            d_outer.baddbmm_(d.mT, _by_head(F.silu(before[n]), H))
            d_curved = torch.bmm(d, outer).transpose(0, 1).reshape(P, H * D)
            d_before = torch.ops.aten.silu_backward(d_curved, before[n])
            d_hidden.addmm_(d_before.mT, _times(features, hidden_mask, n))
            d_hidden_bias += d_before.sum(0)
        d_bias = d_codes.sum((1, 2))
        return None, None, None, d_linear.view(H, Z, D), d_bias, d_hidden.view(H, D, D), d_hidden_bias.view(H, D), d_outer, None


def _times(features: Tensor, mask: Tensor | None, n: int) -> Tensor:
    return features[n] if mask is None else features[n] * mask[n]


def _by_head(rows: Tensor, H: int) -> Tensor:
    """[P,H*N] -> [H,P,N]."""
    return rows.view(len(rows), H, -1).transpose(0, 1)


class Projection(nn.Module):
    """Features [B,P,D] -> codes [B,P,Z] of one head, without masks."""

    def __init__(self, dim: int, code_dim: int = 64):
        super().__init__()
        self.linear = nn.Linear(dim, code_dim)
        self.hidden = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, code_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features) + self.outer(F.silu(self.hidden(features)))


class Head(nn.Module):
    """Projection, student prototypes [K,Z] and their exponential moving average, the teacher [K,Z]."""

    def __init__(self, dim: int, prototypes: int, code_dim: int = 64, seed: int = 0):
        """Random start as in the paper: PyTorch's default for the projection, Xavier-normal prototypes made unit, teacher = student."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = Projection(dim, code_dim)
            rows = F.normalize(nn.init.xavier_normal_(torch.empty(prototypes, code_dim)), dim=-1)
        self.student = nn.Parameter(rows)
        self.register_buffer("teacher", rows.clone())

    @torch.no_grad()
    def start_from_features(self, rows: Tensor, seed: int = 0) -> None:
        """The steadier start: W1 = the leading singular vectors of feature rows [N,D], W3 = 0, prototypes = k-means of those codes.

        Seeds then end closer to each other than from random starts. N is at least K; k-means is spherical, the best of 4.
        """
        directions = principal_directions(rows, self.student.shape[1])
        self.projection.linear.weight.copy_(directions)
        self.projection.linear.bias.zero_()
        self.projection.outer.weight.zero_()
        self.projection.outer.bias.zero_()
        centres = spherical_kmeans(rows.float() @ directions.T.to(rows.device), len(self.student), starts=4, seed=seed).centres
        self.student.copy_(centres)
        self.teacher.copy_(centres)


class Heads(nn.Module):
    """H heads of one shape, trained side by side on the same features. Its state has a head's names, each with a leading [H]."""

    def __init__(self, heads: Sequence[Head]):
        super().__init__()
        states = [head.state_dict() for head in heads]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self.projection = nn.Module()
        for part in ("linear", "hidden", "outer"):
            layer = nn.Module()
            layer.weight = nn.Parameter(stacked[f"projection.{part}.weight"])
            layer.bias = nn.Parameter(stacked[f"projection.{part}.bias"])
            self.projection.add_module(part, layer)
        self.student = nn.Parameter(stacked["student"])
        self.register_buffer("teacher", stacked["teacher"])

    def __len__(self) -> int:
        return len(self.student)

    def __getitem__(self, index: int) -> Head:
        """A copy of one head, on the same device."""
        H, K, Z = self.student.shape
        if not 0 <= index < H:
            raise IndexError(f"head {index} of {H}")
        head = Head(self.projection.linear.weight.shape[2], K, Z)
        head.load_state_dict({name: value[index] for name, value in self.state_dict().items()})
        return head.to(self.student.device)

    def codes(self, features: Tensor, linear_mask: Tensor | None = None, hidden_mask: Tensor | None = None) -> Tensor:
        """features [B,P,D]; masks [B,D] multiply an image's channels on the way into W1 and W2 -> [H,B,P,Z]."""
        return codes_of(features, self.projection, linear_mask, hidden_mask)

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """teacher <- decay * teacher + (1 - decay) * student."""
        self.teacher.lerp_(self.student, 1.0 - decay)
