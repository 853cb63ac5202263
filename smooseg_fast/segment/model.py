"""The model: a projection from features to codes, and prototypes with their slow teacher.

Imports torch and smooseg_kernels alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smooseg_kernels.dispatch import fused_projection
from smooseg_kernels.products import add_product, product, products

from .kmeans import principal_directions, spherical_kmeans

# size of a block's hidden layers; with 2 MB, which two cores' caches hold, starting operations costs more than it saves
BLOCK_BYTES = 1 << 23


class Layer(nn.Module):
    """A linear layer of H heads: weight [H,out,in] and bias [H,out]."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)


class Projections(nn.Module):
    """The projections of H heads. layers: (weight, bias) of W1, W2 and W3."""

    def __init__(self, layers: Iterable[tuple[Tensor, Tensor]]):
        super().__init__()
        self.linear, self.hidden, self.outer = (Layer(weight, bias) for weight, bias in layers)


def codes_of(
    features: Tensor,
    projection: Projection,
    linear_mask: Tensor | None = None,
    hidden_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """W1 (f * m1) + b1 + W3 SiLU(W2 (f * m2) + b2) + b3 for H heads at once. Lan et al. 2023, section 3.2.

    features [B,P,D] and masks [B,D] are common to the heads; the projection's weights are [H,.,D], its biases [H,.].
    -> [H,B,P,Z]. The heads' W1 and W2 lie side by side, so that each is one matrix product. On a card
    `impl="triton"` takes fused kernels where they serve; "auto" does not, as no card has measured them yet.
    """
    linear, hidden, outer = projection.linear, projection.hidden, projection.outer
    if features.device.type == "cpu" and not torch.compiler.is_compiling():
        weights = (linear.weight, linear.bias + outer.bias, hidden.weight, hidden.bias, outer.weight)
        return InBlocks.apply(features, linear_mask, hidden_mask, *weights, torch.is_grad_enabled())
    if features.device.type == "cuda" and not torch.compiler.is_compiling():
        weights = (linear.weight, linear.bias + outer.bias, hidden.weight, hidden.bias, outer.weight)
        fused = fused_projection(features, outer.weight.shape[1]) if impl == "triton" else None
        return (fused or Whole).apply(features, linear_mask, hidden_mask, *weights)
    (B, P), (H, Z) = features.shape[:2], linear.bias.shape
    weight = linear.weight.flatten(0, 1)  # the mask rides on it, because it is smaller than the features
    straight = features @ (weight if linear_mask is None else weight * linear_mask[:, None, :]).mT
    masked = features if hidden_mask is None else features * hidden_mask[:, None, :].to(features.dtype)
    curved = F.silu(F.linear(masked, hidden.weight.flatten(0, 1), hidden.bias.flatten()))
    straight, curved = (x.reshape(B * P, H, -1).transpose(0, 1) for x in (straight, curved))
    codes = torch.baddbmm(straight, curved, outer.weight.mT) + (linear.bias + outer.bias)[:, None]
    return codes.view(H, B, P, Z)


class Whole(torch.autograd.Function):
    """`codes_of` for a card: biases ride on the matrix products, forward, and are products with ones, backward.

    PyTorch's own sum over the rows of a bf16 gradient takes 38 us where that product takes 15 (25,088 x 384, H200).
    Products have 16 bits if the features have, as bf16. Gradients go to the weights alone.
    """

    @staticmethod
    def forward(ctx, features, linear_mask, hidden_mask, linear, bias, hidden, hidden_bias, outer):
        (B, P, _), (H, Z, _) = features.shape, outer.shape
        dtype = torch.bfloat16 if features.dtype.itemsize == 2 else features.dtype
        f, of_weights = features.to(dtype), linear.flatten(0, 1).to(dtype)
        # the mask of W1 rides on its weights, which are smaller than the features
        linear_weight = (
            of_weights.expand(B, -1, -1) if linear_mask is None else of_weights * linear_mask[:, None].to(dtype)
        )
        masked = f if hidden_mask is None else f * hidden_mask[:, None].to(dtype)
        hidden_weight, outer_weight, bias = hidden.flatten(0, 1).to(dtype), outer.to(dtype), bias.to(dtype)
        before = torch.addmm(hidden_bias.flatten().to(dtype), masked.flatten(0, 1), hidden_weight.mT)
        curved = F.silu(before)
        if H == 1:
            codes = torch.addmm(bias[0], curved, outer_weight[0].mT)
            codes.view(B, P, Z).baddbmm_(f, linear_weight.mT)
        else:
            codes = torch.baddbmm(bias[:, None], _by_head(curved, H), outer_weight.mT)
            codes += _by_head(f @ linear_weight.mT, H)
        ctx.save_for_backward(f, linear_mask, masked, before, curved, outer_weight)
        ctx.dtype = outer.dtype
        return codes.view(H, B, P, Z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_codes):
        f, linear_mask, masked, before, curved, outer = ctx.saved_tensors
        (B, P, D), (H, Z, N), dtype = f.shape, outer.shape, ctx.dtype
        d = d_codes.to(f.dtype).flatten(1, 2)
        side_by_side = d.transpose(0, 1).reshape(B * P, H * Z)
        ones = f.new_ones(1, B * P)
        d_linear = side_by_side.view(B, P, H * Z).mT @ f
        d_linear = (d_linear if linear_mask is None else d_linear * linear_mask[:, None]).sum(0, dtype=dtype)
        d_outer, d_bias = d.mT @ _by_head(curved, H), ones @ side_by_side
        d_curved = torch.empty_like(before)
        for d_head, weight, place in zip(d, outer, _by_head(d_curved, H)):
            torch.mm(d_head, weight, out=place)
        d_before = torch.ops.aten.silu_backward(d_curved, before)
        d_hidden, d_hidden_bias = d_before.mT @ masked.flatten(0, 1), ones @ d_before
        gradients = (
            d_linear.view(H, Z, D),
            d_bias.view(H, Z),
            d_hidden.view(H, N, D),
            d_hidden_bias.view(H, N),
            d_outer,
        )
        return None, None, None, *(gradient.to(dtype) for gradient in gradients)


class InBlocks(torch.autograd.Function):
    """`codes_of` for a CPU: it works on a few images at a time, so that their intermediate values stay in the cache.

    Products have the features' dtype, and their sums over blocks the weights'. Only the output of W2 is kept for the
    backward, which recomputes masked features and SiLU in memory that all blocks share. Gradients go to the weights
    alone.
    """

    @staticmethod
    def forward(ctx, features, linear_mask, hidden_mask, linear, bias, hidden, hidden_bias, outer, keep):
        (B, P, D), (H, Z, _), dtype = features.shape, outer.shape, features.dtype
        linear_weight, bias = linear.flatten(0, 1).to(dtype), bias.to(dtype)
        hidden_t, hidden_bias = hidden.flatten(0, 1).to(dtype).mT, hidden_bias.flatten().to(dtype)
        outer_t = outer.to(dtype).mT
        step = images_a_block(features, H)
        before, codes = features.new_empty(B if keep else step, P, H * D), features.new_empty(H, B, P, Z)
        scratch = features.new_empty(step * P, H * D)
        for block in blocks(B, step):
            f = features[block]
            weight = linear_weight if linear_mask is None else linear_weight * linear_mask[block, None].to(dtype)
            straight = f @ weight.mT if linear_mask is None else products(f, weight)
            place = before[block if keep else slice(len(f))].flatten(0, 1)
            product(_times(f, hidden_mask, block, scratch), hidden_t, out=place, bias=hidden_bias)
            curved = torch.ops.aten.silu.out(place, out=scratch[: len(place)])
            of_heads = codes[:, block], bias, outer_t, _by_head(straight, H), _by_head(curved, H)
            for out, b, w, rows, wide in zip(*of_heads):
                product(wide, w, out=out.flatten(0, 1), bias=b).add_(rows)
        if keep:
            ctx.save_for_backward(features, linear_mask, hidden_mask, before, outer)
        return codes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_codes):
        features, linear_mask, hidden_mask, before, outer = ctx.saved_tensors
        (B, P, D), (H, Z, _), weight = features.shape, outer.shape, outer.to(features.dtype)
        d_linear, d_hidden = outer.new_zeros(H * Z, D), outer.new_zeros(H * D, D)
        d_outer, d_hidden_bias = torch.zeros_like(outer), outer.new_zeros(H * D)
        step = images_a_block(features, H)
        scratch, masked = features.new_empty(step * P, H * D), features.new_empty(step, P, D)
        for block in blocks(B, step):
            f, d = features[block], d_codes[:, block].flatten(1, 2)
            d_side = d.transpose(0, 1).reshape(*f.shape[:2], H * Z).mT
            d_rows = products(d_side, f.mT)
            d_linear += (d_rows if linear_mask is None else d_rows * linear_mask[block, None]).sum(0)
            rows = before[block].flatten(0, 1)
            curved = torch.ops.aten.silu.out(rows, out=scratch[: len(rows)])
            d_outer += products(d.mT, _by_head(curved, H).mT)
            for d_head, weight_head, place in zip(d, weight, _by_head(curved, H)):
                product(d_head, weight_head, out=place)
            d_before = torch.ops.aten.silu_backward.grad_input(curved, rows, grad_input=curved)
            add_product(d_hidden, d_before.mT, _times(f, hidden_mask, block, masked))
            d_hidden_bias += d_before.sum(0)
        d_straight = d_linear.view(H, Z, D), d_codes.sum((1, 2), dtype=outer.dtype)
        return None, None, None, *d_straight, d_hidden.view(H, D, D), d_hidden_bias.view(H, D), d_outer, None


def images_a_block(features: Tensor, H: int) -> int:
    """Images whose hidden layers of H heads take about BLOCK_BYTES together; at least one."""
    return max(1, BLOCK_BYTES // (H * features[0].nbytes))


def blocks(B: int, step: int) -> Iterator[slice]:
    return (slice(n, min(n + step, B)) for n in range(0, B, step))


def _times(f: Tensor, mask: Tensor | None, block: slice, memory: Tensor) -> Tensor:
    """[b,P,D] times mask [B,D], at the start of `memory` -> [b*P,D]."""
    if mask is not None:
        f = torch.mul(f, mask[block, None].to(f.dtype), out=memory.view(-1)[: f.numel()].view(f.shape))
    return f.flatten(0, 1)


def _by_head(rows: Tensor, H: int) -> Tensor:
    """[...,H*N] -> [H,rows,N]."""
    return rows.reshape(-1, H, rows.shape[-1] // H).transpose(0, 1)


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

    teacher: Tensor
    basis: Tensor | None

    def __init__(self, dim: int, prototypes: int, code_dim: int = 64, seed: int = 0, *, basis: Tensor | None = None):
        """The paper's start: PyTorch's default projection, Xavier-normal prototypes made unit, teacher = student.

        dim: D of the features. basis: [N,D], for a projection that sees N channels of the features, see `basis_of`.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = Projection(dim if basis is None else len(basis), code_dim)
            rows = F.normalize(nn.init.xavier_normal_(torch.empty(prototypes, code_dim)), dim=-1)
        self.student = nn.Parameter(rows)
        self.register_buffer("teacher", rows.clone())
        self.register_buffer("basis", basis)

    @property
    def dim(self) -> int:
        """D of the features."""
        return self.projection.linear.in_features if self.basis is None else self.basis.shape[1]

    @torch.no_grad()
    def start_from_features(self, rows: Tensor, seed: int = 0) -> None:
        """The steadier start: W1 = leading singular vectors of feature rows [N,D], W3 = 0, prototypes = their k-means.

        Seeds then end closer to each other than from random starts. N is at least K. K-means is spherical, the best of
        4, and runs on the codes.
        """
        rows = channels_of(rows, self.basis)
        directions = principal_directions(rows, self.student.shape[1])
        self.projection.linear.weight.copy_(directions)
        self.projection.linear.bias.zero_()
        self.projection.outer.weight.zero_()
        self.projection.outer.bias.zero_()
        codes = rows.float() @ directions.T.to(rows.device)
        centres = spherical_kmeans(codes, len(self.student), starts=4, seed=seed).centres
        self.student.copy_(centres)
        self.teacher.copy_(centres)


class Heads(nn.Module):
    """H heads of one shape, trained side by side on the same features. The state has a head's names, each [H,...].

    They see the same channels of the features.
    """

    teacher: Tensor
    basis: Tensor | None

    def __init__(self, heads: Sequence[Head]):
        super().__init__()
        states = [head.state_dict() for head in heads]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self.projection = deepcopy(heads[0].projection)
        for name, parameter in self.projection.named_parameters():
            parameter.data = stacked[f"projection.{name}"]
        self.student = nn.Parameter(stacked["student"])
        self.register_buffer("teacher", stacked["teacher"])
        self.register_buffer("basis", stacked.get("basis"))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Heads:
        """The heads whose `state_dict` this is. RuntimeError or KeyError where names or shapes do not fit."""
        (H, K, Z), D, basis = state["student"].shape, state["projection.linear.weight"].shape[2], state.get("basis")
        heads = cls([Head(D, K, Z, basis=None if basis is None else basis[0])] * H)
        heads.load_state_dict(state)
        return heads

    def __len__(self) -> int:
        return len(self.student)

    @property
    def dim(self) -> int:
        """D of the features."""
        return (self.projection.linear.weight if self.basis is None else self.basis).shape[2]

    def __getitem__(self, index: int) -> Head:
        """A copy of one head, on the same device."""
        H, K, Z = self.student.shape
        if not 0 <= index < H:
            raise IndexError(f"head {index} of {H}")
        basis = None if self.basis is None else self.basis[index].cpu()
        head = Head(self.projection.linear.weight.shape[2], K, Z, basis=basis)
        head.load_state_dict({name: value[index] for name, value in self.state_dict().items()})
        return head.to(self.student.device)

    def codes(
        self,
        features: Tensor,
        linear_mask: Tensor | None = None,
        hidden_mask: Tensor | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """features [B,P,D]; masks [B,D] multiply an image's channels on the way into W1 and W2 -> [H,B,P,Z].

        Where the heads see N channels, the first N numbers of the masks count.
        """
        if self.basis is not None:
            features = channels_of(features, self.basis[0])
            linear_mask, hidden_mask = (
                None if mask is None else mask[:, : self.basis.shape[1]] for mask in (linear_mask, hidden_mask)
            )
        return codes_of(features, self.projection, linear_mask, hidden_mask, impl)

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """teacher <- decay * teacher + (1 - decay) * student."""
        self.teacher.lerp_(self.student, 1.0 - decay)


@torch.no_grad()
def project(head: Head, features: Tensor) -> Tensor:
    """Codes [B,P,Z] of features [B,P,D] of any float type, without masks."""
    return head.projection(channels_of(features.to(head.student.dtype), head.basis))


def basis_of(rows: Tensor, count: int) -> Tensor:
    """[N,D] orthonormal directions that keep the cosines of feature rows [M,D] best; N = `count`, below D.

    They span the leading singular vectors, and are turned at random (always alike), so that every channel carries about
    as much as any other and dropout hides a like share of each patch.
    """
    g = torch.Generator().manual_seed(count)
    turned = torch.linalg.qr(torch.randn(count, count, generator=g, dtype=torch.float64)).Q
    return (turned @ principal_directions(rows, count).cpu().double()).float()


def channels_of(features: Tensor, basis: Tensor | None) -> Tensor:
    """[...,D] -> [...,N] of the channels that a projection sees."""
    return features if basis is None else features @ basis.to(features.dtype).mT
