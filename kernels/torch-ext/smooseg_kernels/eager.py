"""Label rows, their moments and the data term in eager PyTorch on a CPU, with the gradient written out.

What a step costs there, beside its products, is the number of operations and of arrays that they leave behind; autograd would keep and
visit some thirty of [B,P,K] and [B,P,Z]. The formulas are those of `moments`, whose form traces and compiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .derivatives import refuse_second
from .rows import inverse_norms, invert_norms

BLOCK = 1 << 19  # elements of features that are scaled or converted at a time: 2 MB


def serves(*tensors: Tensor) -> bool:
    """Whether these run here: real CPU tensors that nothing traces and no transform of torch.func wraps."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return plain and not traced


class LabelMoments(torch.autograd.Function):
    """(g [B,H*K,D], u [B,D], s [H,B,K], data [H]) of `moments`; gradients to codes (of g and s) and student (of data), once.

    features [B,P,D] and codes [H,B,P,Z] of any float type; student and teacher [H,K,Z] unit rows in the accumulation dtype, as are
    channel_scale [B,D], shares [B,P] (which add up to 1 over a present image), data_shares [B,P] (over the batch), feature_norms [B,P];
    these four may be None.
    """

    @staticmethod
    def forward(ctx, features, codes, student, teacher, temperature, channel_scale, shares, data_shares, feature_norms):
        (H, B, P, _), K = codes.shape, teacher.shape[1]
        for_codes, for_student = ctx.needs_input_grad[1:3]
        z = codes.to(teacher.dtype)
        inverse = inverse_norms(z)
        cosines = by_prototype(z, teacher).mul_(inverse)
        top, nearest = cosines.max(-1, keepdim=True)  # twice as fast as argmax; of equals the lowest
        data, d_student = data_term(z, inverse, student, nearest, data_shares, for_student)
        # the softmax over its length: what the softmax divides by cancels
        labels = cosines.sub_(top).mul_(1 / temperature).exp_()
        labels.mul_(torch.linalg.vector_norm(labels, dim=-1, keepdim=True).reciprocal_())
        s = labels.mean(2) if shares is None else (shares[:, None] @ labels)[:, :, 0]
        scaled = invert_norms(
            row_norms(features, channel_scale, teacher.dtype) if feature_norms is None else feature_norms
        )
        scaled.mul_(1 / P if shares is None else shares)
        # norms and shares ride on the label rows, which are smaller than the features; u is a label that is 1 everywhere
        sides = teacher.new_empty(B, P, H * K + 1)
        torch.mul(labels, scaled[..., None], out=sides[..., :-1].unflatten(-1, (H, K)).permute(2, 0, 1, 3))
        sides[..., -1] = scaled
        sums = products(sides.mT, features)
        if channel_scale is not None:
            sums.mul_(channel_scale[:, None, :])
        g, u = sums[:, :-1], sums[:, -1].clone()
        ctx.mark_non_differentiable(u, *([] if for_codes else [g, s]), *([] if for_student else [data]))
        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        kept = (labels, scaled, inverse) if for_codes else (None, None, None)
        ctx.save_for_backward(features, codes, teacher, channel_scale, shares, d_student, *kept)
        return g, u, s, data

    @staticmethod
    def backward(ctx, d_g, _, d_s, d_data):
        refuse_second("smooseg_loss", "torch")
        features, codes, teacher, channel_scale, shares, d_student, labels, scaled, inverse = ctx.saved_tensors
        d_student = None if d_data is None else d_student * d_data[:, None, None]
        if labels is None or (d_g is None and d_s is None):
            return None, None, d_student, *[None] * 6
        H, P, K = len(codes), codes.shape[2], teacher.shape[1]
        if d_g is None:  # the distance alone has s alone
            d = torch.zeros_like(labels)
        else:
            d_g = d_g if channel_scale is None else d_g * channel_scale[:, None, :]
            d = products(features, d_g.mT).unflatten(-1, (H, K)).permute(2, 0, 1, 3).mul_(scaled[..., None])
        if d_s is not None:
            d.add_(d_s[:, :, None] * (1 / P if shares is None else shares[..., None]))
        # with labels c = softmax / |softmax| both backwards are one, c (d - c (c . d)); where c is peaked the difference cancels, and
        # what rounding leaves of it along c is taken out once more
        for _ in range(2):
            d.addcmul_(labels, (d * labels).sum(-1, keepdim=True), value=-1.0)
        d = d.mul_(labels).reshape(H, -1, K) @ (teacher / ctx.temperature)
        z, d = codes.to(teacher.dtype), d.view(codes.shape)
        along = (d * z).sum(-1, keepdim=True).mul_(inverse).mul_(inverse)
        d_codes = d.addcmul_(z, along, value=-1.0).mul_(inverse)
        return None, d_codes.to(codes.dtype), d_student, *[None] * 6


def by_prototype(z: Tensor, prototypes: Tensor) -> Tensor:
    """[H,B,P,Z], [H,K,Z] -> [H,B,P,K]."""
    return (z.flatten(1, 2) @ prototypes.mT).unflatten(1, z.shape[1:3])


def data_term(z, inverse, student, nearest, shares, for_student) -> tuple[Tensor, Tensor | None]:
    """-> the cross-entropy [H] and its gradient to the student. Cosines are at most 1: exp needs no shift."""
    B, P = z.shape[1:3]
    logits = by_prototype(z, student).mul_(inverse)
    chosen = logits.gather(-1, nearest)
    odds = logits.exp_()
    total = odds.sum(-1, keepdim=True)
    loss = (total.log() - chosen)[..., 0]
    data = loss.mean((1, 2)) if shares is None else (loss * shares).sum((1, 2))
    if not for_student:
        return data, None
    weight = inverse / (B * P) if shares is None else inverse * shares[..., None]
    odds.mul_(weight / total).scatter_add_(-1, nearest, -weight)
    return data, odds.flatten(1, 2).mT @ z.flatten(1, 2)


def images_a_block(features: Tensor) -> int:
    return max(1, BLOCK // features[0].numel())


def row_norms(features: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B,P,D] times scale [B,D] -> [B,P]. Scaled features are made a few images at a time, so that they stay in the cache."""
    if scale is None:
        return torch.linalg.vector_norm(features, dim=-1, dtype=dtype)
    norms, step = scale.new_empty(features.shape[:2]), images_a_block(features)
    for n in range(0, len(features), step):
        norms[n : n + step] = torch.linalg.vector_norm(features[n : n + step] * scale[n : n + step, None], dim=-1)
    return norms


def products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, image by image; of the two the features may be of 16 bits, and are converted a few images at a time."""
    if a.dtype == b.dtype:
        return torch.bmm(a, b)
    dtype, step = torch.promote_types(a.dtype, b.dtype), images_a_block(a if a.dtype.itemsize < b.dtype.itemsize else b)
    out = a.new_empty(len(a), a.shape[1], b.shape[2], dtype=dtype)  # where the inputs are, whatever the default device
    for n in range(0, len(a), step):
        torch.bmm(a[n : n + step].to(dtype), b[n : n + step].to(dtype), out=out[n : n + step])
    return out
