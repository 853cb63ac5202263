"""The projection that a head trains, W1 (f * m1) + W3 SiLU(W2 (f * m2) + b2) + b, on a card and in 16 bits.

Lan et al. 2023, section 3.2. The two products with W2 are PyTorch's; everything around them takes three launches: one
masks the features and casts the weights, one makes codes of the hidden layer and the features, and one leads the codes'
gradient back to the hidden layer and, in sums over rows, to the other weights. SiLU is computed where it is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .labels import load_tile
from .launch import INTERPRETED, block_z, config, launch, operand, or_nothing
from .row_norms import load_scale

PRODUCTS = torch.bfloat16  # the type of products and of what they leave
WIDEST_CODES = 128  # channels, whose two gradients a program of `projection_gradient` holds
CAST_BLOCK = 2048  # weights that a program casts


@triton.jit
def cast_to(out_ptr, in_ptr, count, block, BLOCK: tl.constexpr):
    """Casts numbers block * BLOCK .. (block + 1) * BLOCK of `count`."""
    place = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(in_ptr + place, mask=place < count, other=0.0), mask=place < count)


@triton.jit
def masked_rows_kernel(
    # in
    features_ptr,  # [B,P,D]
    mask_ptr,  # [B,D] fp32
    linear_ptr, hidden_ptr, hidden_bias_ptr, outer_ptr,
    # out
    masked_ptr,  # [B,P,D]: f * m
    linear_out_ptr, hidden_out_ptr, hidden_bias_out_ptr, outer_out_ptr,
    # sizes
    P, of_linear, of_hidden, of_hidden_bias,
    row_programs,  # those that mask rows; the others cast weights
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    if number < row_programs:
        blocks = tl.cdiv(P, BLOCK_P)
        b, start = (number // blocks).to(tl.int64), (number % blocks) * BLOCK_P
        row, column = start + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
        for first in tl.static_range(0, D, BLOCK_D):
            tile = load_tile(features_ptr + b * P * D, start, P, D, first, width=D, BLOCK=BLOCK_P, WIDTH=BLOCK_D)
            tile = tile.to(tl.float32) * load_scale(mask_ptr + b * D, first, D, BLOCK_D)[None, :]
            inside = (row < P)[:, None] & (first + column < D)[None, :]
            tl.store(masked_ptr + b * P * D + row[:, None] * D + first + column[None, :], tile, mask=inside)
    else:
        block = number - row_programs
        cast_to(linear_out_ptr, linear_ptr, of_linear, block, CAST)
        cast_to(outer_out_ptr, outer_ptr, of_linear, block, CAST)
        cast_to(hidden_out_ptr, hidden_ptr, of_hidden, block, CAST)
        cast_to(hidden_bias_out_ptr, hidden_bias_ptr, of_hidden_bias, block, CAST)


@triton.jit
def projection_codes_kernel(
    # in
    features_ptr,  # [B,P,D]
    mask_ptr,  # [B,D] fp32, with HAS_MASK: m1
    before_ptr,  # [B,P,H,D]: W2 (f * m2) + b2
    linear_ptr,  # [H,Z,D]
    outer_ptr,  # [H,Z,D]
    bias_ptr,  # [H,Z] fp32
    # out
    codes_ptr,  # [H,B,P,Z]
    # sizes
    B, P, H, D: tl.constexpr, Z: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    HAS_MASK: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    start, b, h = tl.program_id(0) * BLOCK_P, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    features_ptr += b * P * D
    before_ptr += (b * P * H + h) * D
    linear_ptr += h * Z * D
    outer_ptr += h * Z * D
    codes = tl.zeros((BLOCK_P, BLOCK_Z), tl.float32)
    for first in range(0, D, BLOCK_D):
        f = load_tile(features_ptr, start, P, D, first, width=D, BLOCK=BLOCK_P, WIDTH=BLOCK_D)
        w = load_tile(linear_ptr, 0, Z, D, first, width=D, BLOCK=BLOCK_Z, WIDTH=BLOCK_D)
        if HAS_MASK:
            w = w.to(tl.float32) * load_scale(mask_ptr + b * D, first, D, BLOCK_D)[None, :]
        codes = tl.dot(f.to(OPERAND), tl.trans(w.to(OPERAND)), codes)
        x = load_tile(before_ptr, start, P, H * D, first, width=D, BLOCK=BLOCK_P, WIDTH=BLOCK_D).to(tl.float32)
        w = load_tile(outer_ptr, 0, Z, D, first, width=D, BLOCK=BLOCK_Z, WIDTH=BLOCK_D)
        codes = tl.dot((x * tl.sigmoid(x)).to(OPERAND), tl.trans(w.to(OPERAND)), codes)
    row, z = start + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_Z)
    codes += tl.load(bias_ptr + h * Z + z, mask=z < Z, other=0.0)[None, :]
    out_ptr = codes_ptr + (h * B + b) * P * Z + row[:, None] * Z + z[None, :]
    tl.store(out_ptr, codes, mask=(row < P)[:, None] & (z < Z)[None, :])


@triton.jit
def projection_gradient_kernel(
    # in
    d_codes_ptr,  # [H,B,P,Z]
    features_ptr,  # [B,P,D]
    mask_ptr,  # [B,D] fp32, with HAS_MASK: m1
    before_ptr,  # [B,P,H,D]
    outer_ptr,  # [H,Z,D]
    # out
    d_before_ptr,  # [B,P,H,D]
    parts_ptr,  # [splits,H * (2 * Z * D + D + Z)] fp32: toward W1, W3 [H,Z,D], b2 [H,D] and b [H,Z]
    # sizes
    B, P, H, D: tl.constexpr, Z: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    HAS_MASK: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """A program has a block of channels, and of all blocks of rows each `splits`-th; b has the last one's channels."""
    first, split, h = tl.program_id(0) * BLOCK_D, tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts_ptr += split.to(tl.int64) * H * (2 * Z * D + D + Z)
    column, z, blocks = first + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Z), tl.cdiv(P, BLOCK_P)
    d_codes_ptr += h * B * P * Z
    if first >= D:
        total = tl.zeros((BLOCK_P, BLOCK_Z), tl.float32)
        for number in range(split, B * blocks, tl.num_programs(1)):
            image, start = tl.cast(number // blocks, tl.int64) * P, (number % blocks) * BLOCK_P
            d = load_tile(d_codes_ptr + image * Z, start, P, Z, 0, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z)
            total += d.to(tl.float32)
        tl.store(parts_ptr + H * (2 * Z * D + D) + h * Z + z, tl.sum(total, 0), mask=z < Z)
    else:
        outer = load_tile(outer_ptr + h * Z * D, 0, Z, D, first, width=D, BLOCK=BLOCK_Z, WIDTH=BLOCK_D).to(OPERAND)
        d_linear = tl.zeros((BLOCK_Z, BLOCK_D), tl.float32)
        d_outer = tl.zeros((BLOCK_Z, BLOCK_D), tl.float32)
        d_bias = tl.zeros((BLOCK_D,), tl.float32)
        for number in range(split, B * blocks, tl.num_programs(1)):
            image, start = tl.cast(number // blocks, tl.int64) * P, (number % blocks) * BLOCK_P
            before = image * H + h
            d = load_tile(d_codes_ptr + image * Z, start, P, Z, 0, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z).to(OPERAND)
            x = load_tile(before_ptr + before * D, start, P, H * D, first, width=D, BLOCK=BLOCK_P, WIDTH=BLOCK_D)
            f = load_tile(features_ptr + image * D, start, P, D, first, width=D, BLOCK=BLOCK_P, WIDTH=BLOCK_D)
            x = x.to(tl.float32)
            gate = tl.sigmoid(x)
            curved = x * gate
            d_before = tl.dot(d, outer) * (gate + curved * (1.0 - gate))
            d_bias += tl.sum(d_before, 0)
            row = start + tl.arange(0, BLOCK_P)
            out_ptr = d_before_ptr + (before + row[:, None] * H) * D + column[None, :]
            tl.store(out_ptr, d_before, mask=(row < P)[:, None] & (column < D)[None, :])
            d_outer = tl.dot(tl.trans(d), curved.to(OPERAND), d_outer)
            if HAS_MASK:
                f = f.to(tl.float32) * load_scale(mask_ptr + (number // blocks) * D, first, D, BLOCK_D)[None, :]
            d_linear = tl.dot(tl.trans(d), f.to(OPERAND), d_linear)
        tile, inside = z[:, None] * D + column[None, :], (z < Z)[:, None] & (column < D)[None, :]
        tl.store(parts_ptr + h * Z * D + tile, d_linear, mask=inside)
        tl.store(parts_ptr + (H + h) * Z * D + tile, d_outer, mask=inside)
        tl.store(parts_ptr + 2 * H * Z * D + h * D + column, d_bias, mask=column < D)


def serves(features: Tensor, Z: int) -> bool:
    """Tells whether `Projection` takes these features."""
    return features.dtype.itemsize == 2 and Z <= WIDEST_CODES and (features.is_cuda or INTERPRETED)


class Projection(torch.autograd.Function):
    """Codes [H,B,P,Z] of features [B,P,D] in 16 bits, for weights in fp32. Gradients go to the weights alone.

    Args:
        features: [B,P,D]. Products are in bf16.
        linear_mask, hidden_mask: m1, m2, fp32 [B,D], or None.
        linear, outer: W1, W3 [H,Z,D].
        bias: b1 + b3, [H,Z].
        hidden, hidden_bias: W2 [H,D,D] and b2 [H,D].
    """

    @staticmethod
    def forward(ctx, features, linear_mask, hidden_mask, linear, bias, hidden, hidden_bias, outer):
        (B, P, D), (H, Z, _) = features.shape, outer.shape
        features = features.contiguous()
        weights = (linear, hidden, hidden_bias, outer)
        with torch.cuda.device_of(features):
            masked, (linear, hidden, hidden_bias, outer) = masked_rows(features, hidden_mask, weights)
            before = torch.addmm(hidden_bias.flatten(), masked.flatten(0, 1), hidden.flatten(0, 1).mT)
            settings, codes = config("projection_codes", features), before.new_empty(H, B, P, Z)
            launch(
                projection_codes_kernel, (triton.cdiv(P, settings["BLOCK_P"]), B, H), settings=settings,
                features_ptr=features, mask_ptr=or_nothing(linear_mask, bias), before_ptr=before, linear_ptr=linear,
                outer_ptr=outer, bias_ptr=bias,
                codes_ptr=codes,
                B=B, P=P, H=H, D=D, Z=Z, BLOCK_Z=block_z(Z),
                HAS_MASK=linear_mask is not None, OPERAND=operand(before.dtype),
            )  # fmt: skip
        ctx.save_for_backward(features, linear_mask, masked, before, outer)
        return codes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_codes):
        features, linear_mask, masked, before, outer = ctx.saved_tensors
        (B, P, D), (H, Z, _) = features.shape, outer.shape
        settings, d_codes = config("projection_gradient", features), d_codes.contiguous()
        blocks, d_before = triton.cdiv(D, settings["BLOCK_D"]) + 1, torch.empty_like(before)
        splits = min(B * triton.cdiv(P, settings["BLOCK_P"]), max(1, settings["PROGRAMS"] // (blocks * H)))
        sizes = (H * Z * D, H * Z * D, H * D, H * Z)
        parts = torch.empty(splits, sum(sizes), dtype=torch.float32, device=features.device)
        with torch.cuda.device_of(features):
            launch(
                projection_gradient_kernel, (blocks, splits, H), settings=settings,
                d_codes_ptr=d_codes, features_ptr=features, mask_ptr=or_nothing(linear_mask, parts), before_ptr=before,
                outer_ptr=outer,
                d_before_ptr=d_before, parts_ptr=parts,
                B=B, P=P, H=H, D=D, Z=Z, BLOCK_Z=block_z(Z),
                HAS_MASK=linear_mask is not None, OPERAND=operand(before.dtype),
            )  # fmt: skip
        d_linear, d_outer, d_hidden_bias, d_bias = parts.sum(0).split(sizes)
        d_hidden = (d_before.mT @ masked.flatten(0, 1)).float()
        return (
            None, None, None, d_linear.view(H, Z, D), d_bias.view(H, Z), d_hidden.view(H, D, D),
            d_hidden_bias.view(H, D), d_outer.view(H, Z, D),
        )  # fmt: skip


def masked_rows(
    features: Tensor, mask: Tensor | None, weights: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns features [B,P,D] times mask [B,D], and W1, W2, b2 and W3, all in bf16, by one launch."""
    (B, P, D), (linear, hidden, hidden_bias, outer) = features.shape, weights
    settings = config("masked_rows", features)
    masked = features.to(PRODUCTS) if mask is None else torch.empty_like(features, dtype=PRODUCTS)
    row_programs = 0 if mask is None else B * triton.cdiv(P, settings["BLOCK_P"])
    cast = tuple(torch.empty_like(weight, dtype=PRODUCTS) for weight in weights)
    launch(
        masked_rows_kernel, (row_programs + triton.cdiv(max(map(torch.numel, weights)), CAST_BLOCK),),
        settings=settings,
        features_ptr=features, mask_ptr=or_nothing(mask, hidden_bias),
        linear_ptr=linear, hidden_ptr=hidden, hidden_bias_ptr=hidden_bias, outer_ptr=outer,
        masked_ptr=masked,
        linear_out_ptr=cast[0], hidden_out_ptr=cast[1], hidden_bias_out_ptr=cast[2], outer_out_ptr=cast[3],
        P=P, of_linear=linear.numel(), of_hidden=hidden.numel(), of_hidden_bias=hidden_bias.numel(),
        row_programs=row_programs, D=D, CAST=CAST_BLOCK,
    )  # fmt: skip
    return masked, cast
