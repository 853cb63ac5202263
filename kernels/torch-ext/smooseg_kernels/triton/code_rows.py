"""Probs and the data term alone: one pass over the codes, one more for the gradient, then the sums over patches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..derivatives import refuse_second, refuse_second_of
from ..operators import either
from . import labels
from .labels import (
    LN2,
    LOG2E,
    codes_backward,
    column_bias,
    inverse_norms,
    load_rows,
    product,
    read_sharpness,
    soft_labels,
    store_prototype_gradient,
    unit_parts,
)
from .launch import (
    block_k,
    block_z,
    config,
    contiguous,
    launch,
    narrow,
    operator,
    or_nothing,
    precision,
    softmax_arguments,
    with_rows_together,
)


@triton.jit
def probabilities_kernel(
    # in
    codes_ptr,  # [H,B,P,Z]
    prototypes_ptr,  # [H,K,Z]
    # out; with GRADIENT in
    out_ptr,  # [H,B,P,K] fp32: probs; with GRADIENT their upstream gradient
    # out, with GRADIENT
    d_codes_ptr,  # [H,B,P,Z], contiguous
    partial_ptr,  # [H,B*TILES,K,Z] fp32: sum_p (gradient to the cosine) code_p / |code_p| of a tile
    # sizes
    P, sharpness, stride_h, stride_b, stride_p, K: tl.constexpr, Z: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    BOUNDED: tl.constexpr, BY_POINTER: tl.constexpr, GRADIENT: tl.constexpr, CODE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, b, h = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    B, start = tl.num_programs(1), tile * BLOCK_P
    sharpness = read_sharpness(sharpness, BY_POINTER)
    row, k, z = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Z)
    high, low = unit_parts(prototypes_ptr + h * K * Z, CODE, K, Z, BLOCK_K, BLOCK_Z)
    codes = load_rows(
        codes_ptr + h * stride_h + b * stride_b, start, P, stride_p, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z
    ).to(CODE)
    inverse = inverse_norms(codes)
    toward = product(codes, high, low, PRECISION)
    e = soft_labels(toward, inverse * sharpness, k, sharpness, K, BOUNDED)[1]
    probability = e * (1.0 / tl.sum(e, 1))[:, None]
    first_row = (h * B + b) * P + start
    tile_ptr = out_ptr + first_row * K + row[:, None] * K + k[None, :]
    inside = (start + row < P)[:, None]
    if GRADIENT:
        d_probability = tl.load(tile_ptr, mask=inside & (k < K)[None, :], other=0.0)
        mean = tl.sum(probability * d_probability, 1)
        d_cosine = probability * (d_probability - mean[:, None]) * (sharpness * LN2)
        # relative to the largest of the tile: upstream gradients may be far from 1, and codes 16 bits wide
        largest = tl.max(tl.abs(d_cosine))
        largest = tl.where(largest > 0, largest, 1.0)
        d_cosine = d_cosine * (1.0 / largest)
        cosine = toward * inverse[:, None]
        d_codes = codes_backward(d_cosine, cosine, codes, inverse, high, OPERAND=CODE, PRECISION=PRECISION) * largest
        d_ptr = d_codes_ptr + first_row * Z + row[:, None] * Z + z[None, :]
        tl.store(d_ptr, d_codes.to(d_codes_ptr.dtype.element_ty), mask=inside & (z < Z)[None, :])
        unit_codes = (codes.to(tl.float32) * inverse[:, None]).to(CODE)
        sums = tl.dot(tl.trans(unit_codes), d_cosine.to(CODE), input_precision=PRECISION) * largest
        part_ptr = partial_ptr + ((h * B + b) * tl.num_programs(0) + tile) * K * Z
        tl.store(part_ptr + k[None, :] * Z + z[:, None], sums, mask=(k < K)[None, :] & (z < Z)[:, None])
    else:
        tl.store(tile_ptr, probability, mask=inside & (k < K)[None, :])


@triton.jit
def data_term_kernel(
    # in
    codes_ptr,  # [H,B,P,Z]
    student_ptr,  # [H,K,Z]
    teacher_ptr,  # [H,K,Z]
    weight_ptr,  # [B,P] fp32
    # out
    losses_ptr,  # [H,2,B*TILES] fp32: weighted cross-entropy and weight of a tile
    # out, with GRADIENT
    partial_ptr,  # [H,B*TILES,K,Z] fp32: sum_p w_p (gradient to the cosine) code_p / |code_p|, over the largest w_p
    largest_ptr,  # [B*TILES] fp32: the tile's largest weight
    # sizes
    P, stride_h, stride_b, stride_p, K: tl.constexpr, Z: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    HAS_WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, b, h = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, parts = tile * BLOCK_P, tl.num_programs(1) * tl.num_programs(0)
    row, k, z = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Z)
    part = b * tl.num_programs(0) + tile
    weight = tl.where(start + row < P, 1.0, 0.0)
    if HAS_WEIGHT:
        weight *= tl.load(weight_ptr + b * P + start + row, mask=start + row < P, other=0.0)
    codes = load_rows(
        codes_ptr + h * stride_h + b * stride_b, start, P, stride_p, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z
    ).to(CODE)
    inverse = inverse_norms(codes)
    scale = inverse * LOG2E
    # one product after the other: registers do not hold both
    high, low = unit_parts(teacher_ptr + h * K * Z, CODE, K, Z, BLOCK_K, BLOCK_Z)
    logits = product(codes, high, low, PRECISION) * scale[:, None] + column_bias(k, 0.0, K)[None, :]
    label = labels.likeliest(logits, k, BLOCK_K)
    high, low = unit_parts(student_ptr + h * K * Z, CODE, K, Z, BLOCK_K, BLOCK_Z)
    loss, d_cosine = labels.data_term(product(codes, high, low, PRECISION), label, scale, k, LOG2E, K=K)
    # rows to one number in two steps: Triton 3.6 fails on one for sm_100, where products lie in tensor memory
    tl.store(losses_ptr + h * 2 * parts + part, tl.sum(tl.reshape(loss * weight, (16, BLOCK_P // 16))))
    tl.store(losses_ptr + h * 2 * parts + parts + part, tl.sum(weight, 0))
    if GRADIENT:
        largest = tl.max(weight, 0)
        relative = weight / tl.where(largest > 0, largest, 1.0)
        unit_codes = (codes.to(tl.float32) * inverse[:, None]).to(CODE)
        sums = tl.dot(tl.trans(unit_codes), (d_cosine * relative[:, None]).to(CODE), input_precision=PRECISION)
        out_ptr = partial_ptr + (h * parts + part) * K * Z + k[None, :] * Z + z[:, None]
        tl.store(out_ptr, sums, mask=(k < K)[None, :] & (z < Z)[:, None])
        if h == 0:
            tl.store(largest_ptr + part, largest)


@triton.jit
def prototype_gradient_kernel(
    # in
    partial_ptr,  # [H,parts,K,Z] fp32
    share_ptr,  # [parts] fp32: the weight of a part's sums
    losses_ptr,  # [H,2,parts] fp32, with MEAN: weighted losses and weights
    prototypes_ptr,  # [H,K,Z]
    # out
    d_prototypes_ptr,  # [H,K,Z], with GRADIENT
    mean_ptr,  # [H] fp32, with MEAN
    # sizes
    parts, K: tl.constexpr, Z: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_N: tl.constexpr,
    # switches
    MEAN: tl.constexpr,  # divide the gradient by the sum of the weights
    GRADIENT: tl.constexpr,
):  # fmt: skip
    k, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total_weight = tl.zeros((), tl.float32) + 1.0
    if MEAN:
        i = tl.arange(0, 1024)
        loss, weight = tl.zeros((1024,), tl.float32), tl.zeros((1024,), tl.float32)
        for start in range(0, parts, 1024):
            loss += tl.load(losses_ptr + h * 2 * parts + start + i, mask=start + i < parts, other=0.0)
            weight += tl.load(losses_ptr + (h * 2 + 1) * parts + start + i, mask=start + i < parts, other=0.0)
        total_weight = tl.maximum(tl.sum(weight, 0), 1e-38)
        if k == 0:
            tl.store(mean_ptr + h, tl.sum(loss, 0) / total_weight)
    if GRADIENT:
        store_prototype_gradient(
            out_ptr=d_prototypes_ptr + h * K * Z, partial_ptr=partial_ptr + h * parts * K * Z, share_ptr=share_ptr,
            prototypes_ptr=prototypes_ptr + h * K * Z, k=k, parts=parts, total_share=total_weight, PARTS_PER_SHARE=1,
            K=K, Z=Z,
            BLOCK_Z=BLOCK_Z, BLOCK_N=BLOCK_N, HAS_SHARE=MEAN,
        )  # fmt: skip


def settings_for(codes: Tensor, K: int) -> dict[str, int]:
    settings = narrow({**config("rows", codes), "BLOCK_D": 16}, 1, block_k(K))
    return {name: value for name, value in settings.items() if name not in ("BLOCK_D", "HEADS")}


def code_arguments(codes: Tensor, K: int) -> dict[str, Any]:
    """Returns the arguments that both kernels over codes [H,B,P,Z] share."""
    P, Z = codes.shape[2:]
    stride_h, stride_b, stride_p, _ = codes.stride()
    return dict(
        codes_ptr=codes,
        P=P,
        stride_h=stride_h,
        stride_b=stride_b,
        stride_p=stride_p,
        K=K,
        Z=Z,
        BLOCK_K=block_k(K),
        BLOCK_Z=block_z(Z),
        # fp32 operands for codes of any dtype: these operators are not the hot path, and from 16-bit operands the
        # assembler of Triton 3.6 made a wrong gradient of the data term (benchmarks/binaries.py: unset_registers)
        CODE=tl.float32,
        PRECISION=precision(codes.device),
        settings=settings_for(codes, K),
    )


@operator("probabilities")
def probabilities(
    codes: Tensor, prototypes: Tensor, temperature: float | None, temperature_tensor: Tensor | None = None
) -> Tensor:
    """Takes codes [H,B,P,Z] and prototypes [H,K,Z] to softmax_k(cos / temperature) [H,B,P,K] fp32."""
    (H, B, P, _), K = codes.shape, prototypes.shape[1]
    codes, prototypes = with_rows_together(codes), prototypes.contiguous()
    out = torch.empty(H, B, P, K, dtype=torch.float32, device=codes.device)
    arguments = code_arguments(codes, K)
    arguments |= softmax_arguments(either(temperature, temperature_tensor), K)
    with torch.cuda.device_of(codes):
        launch(
            probabilities_kernel, (triton.cdiv(P, arguments["settings"]["BLOCK_P"]), B, H),
            prototypes_ptr=prototypes, out_ptr=out, d_codes_ptr=out, partial_ptr=out,
            GRADIENT=False, **arguments,
        )  # fmt: skip
    return out


@probabilities.register_fake
def _(codes, prototypes, temperature, temperature_tensor=None):
    return torch.empty(*codes.shape[:3], prototypes.shape[1], dtype=torch.float32, device=codes.device)


@operator("probabilities_backward")
def probabilities_backward(
    d_out: Tensor,
    codes: Tensor,
    prototypes: Tensor,
    temperature: float | None,
    temperature_tensor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of codes and prototypes, in their dtypes."""
    (H, B, P, Z), K = codes.shape, prototypes.shape[1]
    d_codes = torch.empty(codes.shape, dtype=codes.dtype, device=codes.device)
    d_prototypes = torch.empty_like(prototypes.contiguous())
    codes, prototypes, d_out = with_rows_together(codes), prototypes.contiguous(), d_out.contiguous()
    arguments = code_arguments(codes, K)
    arguments |= softmax_arguments(either(temperature, temperature_tensor), K)
    tiles = triton.cdiv(P, arguments["settings"]["BLOCK_P"])
    partial = torch.empty(H, B * tiles, K, Z, dtype=torch.float32, device=codes.device)
    with torch.cuda.device_of(codes):
        launch(
            probabilities_kernel, (tiles, B, H),
            prototypes_ptr=prototypes, out_ptr=d_out, d_codes_ptr=d_codes, partial_ptr=partial,
            GRADIENT=True, **arguments,
        )  # fmt: skip
        finish(partial, prototypes, d_prototypes, gradient=True)
    return d_codes, d_prototypes


@probabilities_backward.register_fake
def _(d_out, codes, prototypes, temperature, temperature_tensor=None):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (codes, prototypes))


class MeanLoss(NamedTuple):
    """A weighted mean over tiles, which the gradient is divided by."""

    losses: Tensor  # [H,2,tiles] fp32: weighted losses and weights
    largest: Tensor  # [tiles] fp32: the largest weight
    mean: Tensor  # [H] fp32, to be filled


def finish(
    partial: Tensor, prototypes: Tensor, d_prototypes: Tensor, mean_loss: MeanLoss | None = None, *, gradient: bool
) -> None:
    """Launches the sums over the tiles' partial gradients [H,tiles,K,Z], and the mean loss."""
    H, K, Z = prototypes.shape
    losses, largest, mean = mean_loss or (partial, partial, partial)
    launch(
        prototype_gradient_kernel, (K if gradient else 1, H), settings={},
        partial_ptr=partial, share_ptr=largest, losses_ptr=losses, prototypes_ptr=prototypes,
        d_prototypes_ptr=d_prototypes, mean_ptr=mean,
        parts=partial.shape[1] if mean_loss is None else losses.shape[-1], K=K, Z=Z, BLOCK_Z=block_z(Z), BLOCK_N=16,
        MEAN=mean_loss is not None, GRADIENT=gradient,
    )  # fmt: skip


def setup_probabilities(ctx, inputs, output):
    codes, prototypes, ctx.temperature, temperature_tensor = inputs
    ctx.save_for_backward(codes, prototypes, temperature_tensor)


def backward_probabilities(ctx, d_out):
    codes, prototypes, temperature_tensor = ctx.saved_tensors
    d_codes, d_prototypes = probabilities_backward(d_out, codes, prototypes, ctx.temperature, temperature_tensor)
    return d_codes, d_prototypes, None, None


refuse_second_of(probabilities_backward, "prototype_probabilities")
probabilities.register_autograd(backward_probabilities, setup_context=setup_probabilities)


@operator("data_term")
def data_term(
    codes: Tensor, student: Tensor, teacher: Tensor, patch_weight: Tensor | None, student_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Returns the mean cross-entropy [H] and its gradient to the student [H,K,Z], fp32 (empty where not asked for)."""
    (H, B, P, Z), K = codes.shape, student.shape[1]
    codes, student, teacher = with_rows_together(codes), student.contiguous(), teacher.contiguous()
    patch_weight = contiguous(patch_weight)
    loss, d_student = empty_data_term(student, student_gradient)
    arguments = code_arguments(codes, K)
    tiles = triton.cdiv(P, arguments["settings"]["BLOCK_P"])
    losses, largest = loss.new_empty(H, 2, B * tiles), loss.new_empty(B * tiles)
    partial = loss.new_empty(H, B * tiles, K, Z) if student_gradient else losses
    with torch.cuda.device_of(codes):
        launch(
            data_term_kernel, (tiles, B, H),
            student_ptr=student, teacher_ptr=teacher, weight_ptr=or_nothing(patch_weight, losses),
            losses_ptr=losses, partial_ptr=partial, largest_ptr=largest,
            HAS_WEIGHT=patch_weight is not None, GRADIENT=student_gradient, **arguments,
        )  # fmt: skip
        finish(partial, student, d_student, MeanLoss(losses, largest, loss), gradient=student_gradient)
    return loss, d_student


def empty_data_term(student: Tensor, student_gradient: bool) -> tuple[Tensor, Tensor]:
    shape = student.shape if student_gradient else (0,)
    return (
        torch.empty(student.shape[0], dtype=torch.float32, device=student.device),
        torch.empty(shape, dtype=torch.float32, device=student.device),
    )


@data_term.register_fake
def _(codes, student, teacher, patch_weight, student_gradient):
    return empty_data_term(student, student_gradient)


def setup_data_term(ctx, inputs, output):
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(output[1])


def backward_data_term(ctx, d_loss, _):
    refuse_second("prototype_loss", "triton")
    (unit,) = ctx.saved_tensors
    return None, (d_loss[:, None, None] * unit).to(ctx.dtype), None, None, None


data_term.register_autograd(backward_data_term, setup_context=setup_data_term)
