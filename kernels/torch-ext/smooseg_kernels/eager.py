"""Probs, their moments and the data term in eager PyTorch on a CPU, with the gradient written out.

Besides its products, the cost of a step on a CPU is the number of operations and of arrays that they leave behind.
Autograd would keep and visit some thirty of [B,P,K] and [B,P,Z]. The formulas are those of `moments`, whose form traces
and compiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .derivatives import refuse_second
from .rows import inverse_norms, invert_norms

BLOCK_ELEMENTS = 1 << 19  # features that are scaled or converted at a time: 2 MB


def serves(*tensors: Tensor) -> bool:
    """Tells whether this form takes the tensors: on a CPU, not traced, no transform of torch.func, no forward mode."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return plain and not traced and forward_ad._current_level < 0


class Constants(NamedTuple):
    """Inputs of `LabelMoments` without gradient; tensors have the accumulation dtype."""

    temperature: float | Tensor  # a number or []
    channel_scale: Tensor | None  # [B,D]
    shares: Tensor | None  # [B,P] weights that add up to 1 over a present image
    data_shares: Tensor | None  # [B,P] weights that add up to 1 over the batch
    feature_norms: Tensor | None  # [B,P]


class LabelMoments(torch.autograd.Function):
    """Computes g [B,H*K,D], u [B,D] and s [H,B,K] of `moments`, and the data term [H].

    Takes features [B,P,D] and codes [H,B,P,Z] of any float dtype; student and teacher are unit rows [H,K,Z] in the
    accumulation dtype. The codes get the gradients of g and s, the student that of the data term; there are no second
    derivatives.
    """

    @staticmethod
    def forward(ctx, features, codes, student, teacher, constants):
        temperature, channel_scale, shares, data_shares, feature_norms = constants
        (H, B, P, _), K = codes.shape, teacher.shape[1]
        for_codes, for_student = ctx.needs_input_grad[1:3]
        z = codes.to(teacher.dtype)
        inverse = inverse_norms(z)
        cosines = by_prototype(z, teacher).mul_(inverse)
        top, nearest = cosines.max(-1, keepdim=True)  # twice as fast as argmax; of equals the lowest
        data, d_student = data_term(z, inverse, student, nearest, data_shares, gradient=for_student)
        # the softmax scaled to length 1: the softmax's own denominator cancels
        c = cosines.sub_(top).mul_(1 / temperature).exp_()
        c.mul_(torch.linalg.vector_norm(c, dim=-1, keepdim=True).reciprocal_())
        s = c.mean(2) if shares is None else (shares[:, None] @ c)[:, :, 0]
        norms = row_norms(features, channel_scale, teacher.dtype) if feature_norms is None else feature_norms
        scaled = invert_norms(norms).mul_(1 / P if shares is None else shares)
        # norms and shares ride on the probs, which are smaller than the features; u is a group that is 1 everywhere
        sides = teacher.new_empty(B, P, H * K + 1)
        torch.mul(c, scaled[..., None], out=sides[..., :-1].unflatten(-1, (H, K)).permute(2, 0, 1, 3))
        sides[..., -1] = scaled
        sums = products(sides.mT, features)
        if channel_scale is not None:
            sums.mul_(channel_scale[:, None, :])
        g, u = sums[:, :-1], sums[:, -1].clone()
        ctx.mark_non_differentiable(u, *([] if for_codes else [g, s]), *([] if for_student else [data]))
        ctx.set_materialize_grads(False)
        ctx.temperature, given = (None, temperature) if isinstance(temperature, Tensor) else (temperature, None)
        kept = (c, scaled, inverse) if for_codes else (None, None, None)
        ctx.save_for_backward(features, codes, teacher, channel_scale, shares, d_student, given, *kept)
        return g, u, s, data

    @staticmethod
    def backward(ctx, d_g, _, d_s, d_data):
        refuse_second("smooseg_loss", "torch")
        features, codes, teacher, channel_scale, shares, d_student, given, c, scaled, inverse = ctx.saved_tensors
        d_student = None if d_data is None else d_student * d_data[:, None, None]
        if c is None or (d_g is None and d_s is None):
            return None, None, d_student, None, None
        H, P, K = len(codes), codes.shape[2], teacher.shape[1]
        if d_g is None:  # the distance depends on s alone
            d = torch.zeros_like(c)
        else:
            d_g = d_g if channel_scale is None else d_g * channel_scale[:, None, :]
            d = products(features, d_g.mT).unflatten(-1, (H, K)).permute(2, 0, 1, 3).mul_(scaled[..., None])
        if d_s is not None:
            d.add_(d_s[:, :, None] * (1 / P if shares is None else shares[..., None]))
        # with c = softmax / |softmax| both backwards are one, c (d - c (c . d)); where c is peaked the difference
        # cancels, so the rounding that is left along c is taken out once more
        for _ in range(2):
            d.addcmul_(c, (d * c).sum(-1, keepdim=True), value=-1.0)
        d = d.mul_(c).reshape(H, -1, K) @ (teacher / (ctx.temperature if given is None else given))
        z, d = codes.to(teacher.dtype), d.view(codes.shape)
        along = (d * z).sum(-1, keepdim=True).mul_(inverse).mul_(inverse)
        d_codes = d.addcmul_(z, along, value=-1.0).mul_(inverse)
        return None, d_codes.to(codes.dtype), d_student, None, None


def by_prototype(z: Tensor, prototypes: Tensor) -> Tensor:
    """Takes [H,B,P,Z] and [H,K,Z] to [H,B,P,K]."""
    return (z.flatten(1, 2) @ prototypes.mT).unflatten(1, z.shape[1:3])


def data_term(
    z: Tensor, inverse: Tensor, student: Tensor, nearest: Tensor, shares: Tensor | None, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the cross-entropy [H] and its gradient to the student. Cosines are at most 1: exp needs no shift."""
    B, P = z.shape[1:3]
    logits = by_prototype(z, student).mul_(inverse)
    chosen = logits.gather(-1, nearest)
    odds = logits.exp_()
    total = odds.sum(-1, keepdim=True)
    loss = (total.log() - chosen)[..., 0]
    data = loss.mean((1, 2)) if shares is None else (loss * shares).sum((1, 2))
    if not gradient:
        return data, None
    weight = inverse / (B * P) if shares is None else inverse * shares[..., None]
    odds.mul_(weight / total).scatter_add_(-1, nearest, -weight)
    return data, odds.flatten(1, 2).mT @ z.flatten(1, 2)


def block_images(features: Tensor) -> int:
    """Returns how many images are scaled or converted at a time."""
    return max(1, BLOCK_ELEMENTS // features[0].numel())


def row_norms(features: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Takes [B,P,D] times scale [B,D] to [B,P]. A few images are scaled at a time, so that they stay in the cache."""
    if scale is None:
        return torch.linalg.vector_norm(features, dim=-1, dtype=dtype)
    norms, step = scale.new_empty(features.shape[:2]), block_images(features)
    for n in range(0, len(features), step):
        norms[n : n + step] = torch.linalg.vector_norm(features[n : n + step] * scale[n : n + step, None], dim=-1)
    return norms


def products(a: Tensor, b: Tensor) -> Tensor:
    """Multiplies image by image. The features may have 16 bits, and are then converted a few images at a time."""
    if a.dtype == b.dtype:
        return torch.bmm(a, b)
    dtype, step = torch.promote_types(a.dtype, b.dtype), block_images(a if a.dtype.itemsize < b.dtype.itemsize else b)
    out = a.new_empty(
        len(a), a.shape[1], b.shape[2], dtype=dtype
    )  # on the inputs' device, whatever the default device is
    for n in range(0, len(a), step):
        torch.bmm(a[n : n + step].to(dtype), b[n : n + step].to(dtype), out=out[n : n + step])
    return out
