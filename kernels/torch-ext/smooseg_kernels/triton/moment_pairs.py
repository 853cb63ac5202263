"""Launches of the sums over pairs: the batch's sums for pairs of all images, energies, and what the gradient needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launch import config, first_stride, launch, or_nothing, strides
from .pair_sets import ALL
from .pair_sums import crowd_kernel, pair_sums_kernel
from .pair_totals import upstream_kernel
from .plan import Outputs, Plan, Scratch

LARGEST_BLOCK_B = 1024  # images whose partners a program looks through at a time


class PairSets(NamedTuple):
    """Inputs of the sums over pairs, next to the moments."""

    partners: Tensor | None  # int64 [rows,B]
    entries: Sequence[int]  # for each pair set SELF, ALL or its row in partners
    thresholds: Tensor  # [H,T]
    channel_scale: Tensor | None  # [B,D]
    mean: Tensor | None  # [T]
    relative: bool
    center: bool


class DataTerm(NamedTuple):
    """Further inputs of the sums over pairs in the forward pass."""

    student: Tensor | None  # [H,K,Z]; none for probs, which have no data term
    entropy: Tensor  # [H,B,PARTS]
    student_sums: Tensor  # [H,B,PARTS,K,Z] with a gradient to the student


def add_up_pairs(
    plan: Plan,
    scratch: Scratch,
    pair_sets: PairSets,
    outputs: Outputs,
    arrivals: Tensor,
    *,
    data_term: DataTerm | None = None,
    factors: Tensor | None = None,
    rows_gradient: bool,
    student_gradient: bool = False,
    weighted: bool,
) -> None:
    """Launches the sums over pairs: outputs, pull, constant. factors [H,2,T]: for other upstream gradients than 1."""
    totals, B, H, C, T, SLICES = scratch.totals, plan.B, plan.H, plan.columns, plan.T, plan.pair_slices
    crowd, crowd_labels = totals, totals
    if ALL in pair_sets.entries:
        crowd, crowd_labels = add_up_crowd(plan, scratch, pair_sets.center)
    student, entropy, student_sums = data_term or (None, totals, totals)
    N = B if rows_gradient else 0
    block_b = min(triton.next_power_of_2(B), LARGEST_BLOCK_B)
    launch(
        pair_sums_kernel, (B * SLICES + (plan.K if student_gradient else 0), H), settings=plan.pairs,
        # in
        sums_ptr=scratch.sums, label_sums_ptr=scratch.label_sums, entropy_ptr=entropy, student_sums_ptr=student_sums,
        totals_ptr=totals, scale_ptr=or_nothing(pair_sets.channel_scale, totals),
        partners_ptr=or_nothing(pair_sets.partners, totals), crowd_ptr=crowd, crowd_labels_ptr=crowd_labels,
        thresholds_ptr=pair_sets.thresholds, given_mean_ptr=or_nothing(pair_sets.mean, totals),
        student_ptr=or_nothing(student, totals),
        factors_ptr=or_nothing(factors, totals),
        # scratch
        parts_ptr=totals.new_empty(H, T, 3, B * SLICES), label_pull_ptr=totals.new_empty(H, N, T, C),
        drift_ptr=totals.new_empty(H, N, SLICES, C), arrivals_ptr=arrivals,
        # out
        total_ptr=outputs.total, energy_ptr=outputs.energy, data_ptr=outputs.data, distance_ptr=outputs.distance,
        mean_ptr=outputs.mean, pull_ptr=scratch.pull, constant_ptr=scratch.constant, d_student_ptr=scratch.d_student,
        # sizes
        B=B, **plan.sum_strides(), **strides(pair_sets.thresholds, "th", "tt"),
        D=plan.D, K=plan.K, Z=plan.Z, T=T, ENTRIES=tuple(pair_sets.entries),
        SPLITS=plan.splits, PARTS=plan.parts, SLICES=SLICES, BLOCK_PARTS=triton.next_power_of_2(plan.parts),
        BLOCK_B=block_b, IMAGE_BLOCKS=triton.cdiv(B, block_b), BLOCK_K=C, BLOCK_Z=plan.code_columns,
        BLOCK_N=max(1, min(triton.next_power_of_2(B * plan.parts), 8192 // plan.code_columns)),
        BLOCK_ROWS=image_rows(B, C if T < 3 else 4 * C),  # more would not stay in registers next to the sums
        # switches
        RELATIVE=pair_sets.relative, CENTER=pair_sets.center, HAS_SCALE=pair_sets.channel_scale is not None,
        HAS_WEIGHT=weighted, HAS_MEAN=pair_sets.mean is not None, HAS_DATA=student is not None,
        STUDENT_GRADIENT=student_gradient, GRADIENT=rows_gradient, UNIT=factors is None,
    )  # fmt: skip


def image_rows(B: int, columns: int) -> int:
    """Returns how many images' rows of BLOCK_K numbers a program holds at a time."""
    return min(triton.next_power_of_2(B), max(1, 2048 // columns))


def add_up_crowd(plan: Plan, scratch: Scratch, center: bool) -> tuple[Tensor, Tensor]:
    """Launches the sums over the batch that pair sets of all images need."""
    totals, C = scratch.totals, plan.columns
    crowd, crowd_labels = totals.new_empty(plan.H, 2, plan.D, C), totals.new_empty(plan.H, C)
    launch(
        crowd_kernel, (plan.D, plan.H), settings=config("crowd", totals),
        sums_ptr=scratch.sums, label_sums_ptr=scratch.label_sums, crowd_ptr=crowd, crowd_labels_ptr=crowd_labels,
        B=plan.B, **plan.sum_strides(), D=plan.D, K=plan.K, SPLITS=plan.splits, PARTS=plan.parts,
        BLOCK_B=image_rows(plan.B, C), BLOCK_K=C, CENTER=center,
    )  # fmt: skip
    return crowd, crowd_labels


def relative_upstream(
    plan: Plan, total: Tensor | None, energy: Tensor | None, distance: Tensor | None, *, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches what takes upstream gradients relative to the largest: factors [H,2,T], largest [H], arrivals [H]."""
    H, T = plan.H, plan.T
    factors, largest = like.new_empty(H, 2, T), like.new_empty(H)
    arrivals = like.new_empty(H, dtype=torch.int32)
    launch(
        upstream_kernel, (H,), settings=config("upstream", like),
        d_total_ptr=or_nothing(total, like), d_energy_ptr=or_nothing(energy, like),
        d_distance_ptr=or_nothing(distance, like),
        factors_ptr=factors, largest_ptr=largest, arrivals_ptr=arrivals,
        stride_total=first_stride(total), T=T, BLOCK_T=triton.next_power_of_2(T),
        HAS_TOTAL=total is not None, HAS_ENERGY=energy is not None,
        HAS_DISTANCE=distance is not None,
    )  # fmt: skip
    return factors, largest, arrivals
