"""The objective as registered operators: three launches forward and backward, for any number of heads.

Forward: the row norms where one program cannot hold whole rows, the moments of every image, and the sums over pairs
together with all that the backward pass needs for an upstream gradient to the total. Backward: the gradients; other
upstream gradients first take the sums over pairs once more. Shapes: features [B,P,D]; rows are codes [H,B,P,Z] with a
teacher, else probs [H,B,P,K]; student and teacher [H,K,Z]; thresholds [H,T].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .energy_gradient import energy_gradient_kernel
from .image_moments import image_moments_kernel
from .launch import config, contiguous, launch, narrow, operand, operator, or_nothing, precision, with_rows_together
from .pair_sums import ALL, crowd_kernel, pair_sums_kernel
from .plan import Outputs, Plan, Scratch, partial_dtype
from .row_norms import row_norms_kernel

STUDENT_BLOCK = 16  # rows of partial student gradients added at a time


class PairSets(NamedTuple):
    """Inputs of the sums over pairs, next to the moments."""

    partners: Tensor | None  # int64 [rows,B]
    entries: Sequence[int]  # for each pair set SELF, ALL or its row in partners
    thresholds: Tensor  # [H,T]
    channel_scale: Tensor | None  # [B,D]
    mean: Tensor | None  # [T]
    relative: bool
    center: bool


class Forward(NamedTuple):
    """Further tensors of the sums over pairs in the forward pass."""

    outputs: Outputs
    student: Tensor | None  # [H,K,Z]
    entropy: Tensor  # [H,B,S]
    student_sums: Tensor  # [H,B,S,K,Z] with a gradient to the student
    arrivals: Tensor  # int32 [H]


class Upstream(NamedTuple):
    """Gradients that arrive in the backward pass."""

    total: Tensor | None  # [H]
    energy: Tensor | None  # [H,T]
    distance: Tensor | None  # [H,T]


NO_UPSTREAM = Upstream(None, None, None)


@operator("objective")
def objective(
    features: Tensor,
    rows: Tensor,
    student: Tensor | None,
    teacher: Tensor | None,
    partners: Tensor | None,
    entries: Sequence[int],
    thresholds: Tensor,
    channel_scale: Tensor | None,
    patch_weight: Tensor | None,
    feature_norms: Tensor | None,
    mean: Tensor | None,
    temperature: float,
    relative: bool,
    center: bool,
    rows_gradient: bool,
    student_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the Outputs, then the Scratch. entries: for each pair set SELF, ALL or its row in partners [rows,B]."""
    plan = Plan(features, rows, teacher, len(entries))
    outputs = plan.outputs(features)
    scratch = plan.scratch(features, feature_norms is not None, rows_gradient, student_gradient)
    totals = scratch.totals
    B, H, K, Z, S = plan.B, plan.H, plan.K, plan.Z, plan.splits
    features, rows = with_rows_together(features), with_rows_together(rows)
    student, teacher, channel_scale = contiguous(student), contiguous(teacher), contiguous(channel_scale)
    patch_weight, feature_norms = contiguous(patch_weight), contiguous(feature_norms)
    pair_sets = PairSets(
        contiguous(partners), entries, thresholds, channel_scale, contiguous(mean), relative=relative, center=center
    )
    entropy, arrivals = totals.new_empty(H, B, S), totals.new_empty(H, dtype=torch.int32)
    student_sums = totals.new_empty(H, B, S, K, Z, dtype=partial_dtype(rows)) if student_gradient else totals
    with torch.cuda.device_of(features):
        if plan.norms_alone and feature_norms is None:
            measure_norms(plan, features, channel_scale, scratch)
        launch(
            image_moments_kernel, (H // plan.sums["HEADS"], B, plan.slices * S), settings=plan.sums,
            # in
            features_ptr=features, rows_ptr=rows,
            student_ptr=or_nothing(student, totals), teacher_ptr=or_nothing(teacher, totals),
            scale_ptr=or_nothing(channel_scale, totals), weight_ptr=or_nothing(patch_weight, totals),
            norms_ptr=or_nothing(feature_norms, scratch.norms),
            # out
            sums_ptr=scratch.sums, prob_sums_ptr=scratch.prob_sums, entropy_ptr=entropy, student_sums_ptr=student_sums,
            totals_ptr=totals, arrivals_ptr=arrivals,
            # sizes
            B=B, P=plan.P, temperature=temperature, **strides(features, "fb", "fp"), **strides(rows, "rh", "rb", "rp"),
            D=plan.D, K=K, Z=Z, SPLITS=S, BLOCK_K=plan.columns, BLOCK_Z=plan.code_columns,
            # switches
            FROM_CODES=teacher is not None, NORMS_GIVEN=plan.norms_alone or feature_norms is not None,
            HAS_SCALE=channel_scale is not None, HAS_WEIGHT=patch_weight is not None, STUDENT_GRADIENT=student_gradient,
            UNIT_FEATURES=features.dtype == torch.float16,
            FEATURE=operand(features.dtype), CODE=operand(rows.dtype), PRECISION=precision(features.device),
        )  # fmt: skip
        add_up_pairs(
            plan,
            scratch,
            pair_sets,
            forward=Forward(outputs, student, entropy, student_sums, arrivals),
            rows_gradient=rows_gradient,
            student_gradient=student_gradient,
        )
    return (*outputs, *scratch)


def strides(tensor: Tensor, *names: str) -> dict[str, int]:
    """Names the strides of the leading axes as the kernels' parameters."""
    return {f"stride_{name}": stride for name, stride in zip(names, tensor.stride())}


def measure_norms(plan: Plan, features: Tensor, channel_scale: Tensor | None, scratch: Scratch) -> None:
    settings = config("row_norms", features)
    launch(
        row_norms_kernel, (triton.cdiv(plan.P, settings["BLOCK_P"]), plan.B), settings=settings,
        features_ptr=features, scale_ptr=or_nothing(channel_scale, scratch.totals), norms_ptr=scratch.norms,
        P=plan.P, **strides(features, "fb", "fp"), D=plan.D, HAS_SCALE=channel_scale is not None,
    )  # fmt: skip


def add_up_pairs(
    plan: Plan,
    scratch: Scratch,
    pair_sets: PairSets,
    *,
    forward: Forward | None = None,
    upstream: Upstream = NO_UPSTREAM,
    rows_gradient: bool,
    student_gradient: bool = False,
) -> None:
    """Launches the sums over pairs: forward to fill the outputs, backward for more than the total's gradient."""
    totals, T, SLICES = scratch.totals, plan.T, plan.pair_slices
    crowd, crowd_probs = add_up_crowd(plan, scratch, pair_sets.center) if ALL in pair_sets.entries else (totals, totals)
    nothing = Forward(Outputs(*[totals] * 5), None, totals, totals, totals)
    outputs, student, entropy, student_sums, arrivals = forward or nothing
    programs = plan.B * SLICES + (plan.K if student_gradient else 0)
    launch(
        pair_sums_kernel, (programs, plan.H), settings=plan.pairs,
        # in
        sums_ptr=scratch.sums, prob_sums_ptr=scratch.prob_sums, entropy_ptr=entropy, student_sums_ptr=student_sums,
        totals_ptr=totals, scale_ptr=or_nothing(pair_sets.channel_scale, totals),
        partners_ptr=or_nothing(pair_sets.partners, totals), crowd_ptr=crowd, crowd_probs_ptr=crowd_probs,
        thresholds_ptr=pair_sets.thresholds, given_mean_ptr=or_nothing(pair_sets.mean, totals),
        student_ptr=or_nothing(student, totals), d_total_ptr=or_nothing(upstream.total, totals),
        d_energy_ptr=or_nothing(upstream.energy, totals), d_distance_ptr=or_nothing(upstream.distance, totals),
        # scratch
        parts_ptr=totals.new_empty(plan.H, T, 3, plan.B * SLICES) if forward else totals, arrivals_ptr=arrivals,
        # out
        total_ptr=outputs.total, energy_ptr=outputs.energy, data_ptr=outputs.data, distance_ptr=outputs.distance,
        mean_ptr=outputs.mean, pull_ptr=scratch.pull, prob_pull_ptr=scratch.prob_pull, drift_ptr=scratch.drift,
        d_student_ptr=scratch.d_student,
        # sizes
        B=plan.B, **strides(pair_sets.thresholds, "th", "tt"), stride_total=first_stride(upstream.total),
        D=plan.D, K=plan.K, Z=plan.Z, T=T, ENTRIES=tuple(pair_sets.entries), SPLITS=plan.splits, SLICES=SLICES,
        BLOCK_B=triton.next_power_of_2(plan.B), BLOCK_K=plan.columns, BLOCK_Z=plan.code_columns, BLOCK_N=STUDENT_BLOCK,
        # switches
        RELATIVE=pair_sets.relative, CENTER=pair_sets.center, HAS_SCALE=pair_sets.channel_scale is not None,
        HAS_MEAN=pair_sets.mean is not None, HAS_DATA=student is not None, STUDENT_GRADIENT=student_gradient,
        ENERGIES=forward is not None, GRADIENT=rows_gradient, UNIT=forward is not None,
        HAS_TOTAL=upstream.total is not None, HAS_ENERGY=upstream.energy is not None,
        HAS_DISTANCE=upstream.distance is not None,
    )  # fmt: skip


def first_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def add_up_crowd(plan: Plan, scratch: Scratch, center: bool) -> tuple[Tensor, Tensor]:
    """Launches the sums over the batch that pair sets of all images need."""
    totals, settings = scratch.totals, config("crowd", scratch.totals)
    settings["BLOCK_D"] = min(settings["BLOCK_D"], max(1, 2048 // plan.columns))
    crowd, crowd_probs = totals.new_empty(plan.H, 2, plan.D, plan.columns), totals.new_empty(plan.H, plan.columns)
    launch(
        crowd_kernel, (triton.cdiv(plan.D, settings["BLOCK_D"]), plan.H), settings=settings,
        sums_ptr=scratch.sums, prob_sums_ptr=scratch.prob_sums, crowd_ptr=crowd, crowd_probs_ptr=crowd_probs,
        B=plan.B, D=plan.D, K=plan.K, SPLITS=plan.splits, BLOCK_K=plan.columns, CENTER=center,
    )  # fmt: skip
    return crowd, crowd_probs


@objective.register_fake
def _(
    features, rows, student, teacher, partners, entries, thresholds, channel_scale, patch_weight, feature_norms, mean,
    temperature, relative, center, rows_gradient, student_gradient,
):  # fmt: skip
    plan = Plan(features, rows, teacher, len(entries))
    scratch = plan.scratch(features, feature_norms is not None, rows_gradient, student_gradient)
    return (*plan.outputs(features), *scratch)


@operator("objective_backward")
def objective_backward(
    d_total: Tensor | None,
    d_energy: Tensor | None,
    d_data: Tensor | None,
    d_distance: Tensor | None,
    features: Tensor,
    rows: Tensor,
    student: Tensor | None,
    teacher: Tensor | None,
    partners: Tensor | None,
    entries: Sequence[int],
    thresholds: Tensor,
    channel_scale: Tensor | None,
    patch_weight: Tensor | None,
    mean: Tensor,
    scratch: Sequence[Tensor],
    temperature: float,
    relative: bool,
    center: bool,
    rows_gradient: bool,
    student_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of rows and student in their dtypes; empty where not asked for. `scratch` is a Scratch."""
    plan, kept = Plan(features, rows, teacher, len(entries)), Scratch(*scratch)
    totals = kept.totals
    d_rows, d_student = empty_gradients(rows, student, rows_gradient, student_gradient)
    features, rows = with_rows_together(features), with_rows_together(rows)
    teacher, patch_weight, partners = contiguous(teacher), contiguous(patch_weight), contiguous(partners)
    upstream = Upstream(d_total, contiguous(d_energy), contiguous(d_distance))
    unit = d_total is not None and d_energy is None and d_distance is None
    with torch.cuda.device_of(features):
        if rows_gradient and not unit:
            kept = kept._replace(
                pull=torch.empty_like(kept.pull),
                prob_pull=torch.empty_like(kept.prob_pull),
                drift=torch.empty_like(kept.drift),
            )
            channel_scale = contiguous(channel_scale)
            pair_sets = PairSets(partners, entries, thresholds, channel_scale, None, relative=relative, center=center)
            add_up_pairs(plan, kept, pair_sets, upstream=upstream, rows_gradient=True)
        settings = narrow(config("energy_gradient", features, plan.H), plan.H, plan.columns)
        settings["BLOCK_D"] = min(settings["BLOCK_D"], max(16, triton.next_power_of_2(plan.D)))
        head_blocks = plan.H // settings["HEADS"]
        grid = (head_blocks * triton.cdiv(plan.P, settings["BLOCK_P"]), plan.B)
        launch(
            energy_gradient_kernel, grid if rows_gradient else (head_blocks, 1), settings=settings,
            # in
            features_ptr=features, rows_ptr=rows, teacher_ptr=or_nothing(teacher, totals),
            weight_ptr=or_nothing(patch_weight, totals), norms_ptr=kept.norms, totals_ptr=totals,
            partners_ptr=or_nothing(partners, totals), thresholds_ptr=thresholds, mean_ptr=mean,
            pull_ptr=kept.pull, prob_pull_ptr=kept.prob_pull, drift_ptr=kept.drift, unit_d_student_ptr=kept.d_student,
            d_total_ptr=or_nothing(d_total, totals), d_energy_ptr=or_nothing(upstream.energy, totals),
            d_distance_ptr=or_nothing(upstream.distance, totals), d_data_ptr=or_nothing(d_data, totals),
            # out
            d_rows_ptr=d_rows, d_student_ptr=d_student,
            # sizes
            B=plan.B, P=plan.P, head_blocks=head_blocks, temperature=temperature,
            **strides(features, "fb", "fp"), **strides(rows, "rh", "rb", "rp"), **strides(thresholds, "th", "tt"),
            stride_total=first_stride(d_total), stride_data=first_stride(d_data),
            D=plan.D, K=plan.K, Z=plan.Z, T=plan.T, ENTRIES=tuple(entries), SLICES=plan.pair_slices,
            BLOCK_B=triton.next_power_of_2(plan.B), BLOCK_K=plan.columns, BLOCK_Z=plan.code_columns,
            # switches
            FROM_CODES=teacher is not None, RELATIVE=relative, CENTER=center, HAS_WEIGHT=patch_weight is not None,
            ROWS_GRADIENT=rows_gradient, STUDENT_GRADIENT=student_gradient, UNIT=unit,
            HAS_TOTAL=d_total is not None, HAS_ENERGY=d_energy is not None, HAS_DISTANCE=d_distance is not None,
            HAS_DATA=d_data is not None,
            FEATURE=operand(features.dtype), CODE=operand(rows.dtype), PRECISION=precision(features.device),
        )  # fmt: skip
    return d_rows, d_student


def empty_gradients(
    rows: Tensor, student: Tensor | None, rows_gradient: bool, student_gradient: bool
) -> tuple[Tensor, Tensor]:
    like = rows if student is None else student
    return (
        torch.empty(rows.shape if rows_gradient else (0,), dtype=rows.dtype, device=rows.device),
        torch.empty(like.shape if student_gradient else (0,), dtype=like.dtype, device=rows.device),
    )


@objective_backward.register_fake
def _(
    d_total, d_energy, d_data, d_distance, features, rows, student, teacher, partners, entries, thresholds,
    channel_scale, patch_weight, mean, scratch, temperature, relative, center, rows_gradient, student_gradient,
):  # fmt: skip
    return empty_gradients(rows, student, rows_gradient, student_gradient)


def setup_context(ctx, inputs, output):
    (features, rows, student, teacher, partners, ctx.entries, thresholds, channel_scale, patch_weight, feature_norms, _,
     ctx.temperature, ctx.relative, ctx.center, _, _) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    outputs, scratch = Outputs(*output[:5]), Scratch(*output[5:])
    if feature_norms is not None:
        scratch = scratch._replace(norms=feature_norms.contiguous())
    ctx.save_for_backward(
        features, rows, student, teacher, partners, thresholds, channel_scale, patch_weight, outputs.mean, *scratch
    )


def backward(ctx, d_total, d_energy, d_data, d_distance, *_):
    features, rows, student, teacher, partners, thresholds, channel_scale, patch_weight, mean, *scratch = (
        ctx.saved_tensors
    )
    rows_gradient = ctx.needs_input_grad[1] and any(g is not None for g in (d_total, d_energy, d_distance))
    student_gradient = student is not None and ctx.needs_input_grad[2] and (d_total is not None or d_data is not None)
    gradients: list[Tensor | None] = [None] * 16  # one for each input
    if rows_gradient or student_gradient:
        d_rows, d_student = objective_backward(
            d_total=d_total, d_energy=d_energy, d_data=d_data, d_distance=d_distance,
            features=features, rows=rows, student=student, teacher=teacher, partners=partners, entries=ctx.entries,
            thresholds=thresholds, channel_scale=channel_scale, patch_weight=patch_weight, mean=mean, scratch=scratch,
            temperature=ctx.temperature, relative=ctx.relative, center=ctx.center,
            rows_gradient=rows_gradient, student_gradient=student_gradient,
        )  # fmt: skip
        gradients[1], gradients[2] = d_rows if rows_gradient else None, d_student if student_gradient else None
    return tuple(gradients)


objective.register_autograd(backward, setup_context=setup_context)
