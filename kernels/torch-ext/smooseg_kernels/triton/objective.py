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

from ..derivatives import refuse_second_of
from ..operators import either
from .energy_gradient import energy_gradient_kernel
from .label_rows import label_rows_kernel
from .launch import (
    config,
    contiguous,
    first_stride,
    launch,
    operand,
    operator,
    or_nothing,
    precision,
    softmax_arguments,
    strides,
    with_rows_together,
)
from .moment_pairs import DataTerm, PairSets, add_up_pairs, relative_upstream
from .plan import Outputs, Plan, Scratch, partial_dtype
from .row_norms import prepare_kernel, row_norms_kernel
from .row_products import row_products_kernel
from .student_rows import student_rows_kernel


class Constants(NamedTuple):
    """The features and what multiplies or divides them."""

    features: Tensor  # [B,P,D]
    scale: Tensor | None  # [B,D] fp32
    weight: Tensor | None  # [B,P] fp32
    norms: Tensor | None  # [B,P] fp32, where the caller gives them


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
    temperature: float | None,
    relative: bool,
    center: bool,
    rows_gradient: bool,
    student_gradient: bool,
    temperature_tensor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the Outputs, then the Scratch. entries: for each pair set SELF, ALL or its row in partners [rows,B].

    The temperature is a number or a tensor.
    """
    plan = Plan(features, rows, teacher, len(entries))
    outputs = plan.outputs(features)
    scratch = plan.scratch(features, rows, feature_norms is not None, rows_gradient, student_gradient)
    constants = Constants(
        with_rows_together(features), contiguous(channel_scale), contiguous(patch_weight), contiguous(feature_norms)
    )
    rows, student, teacher = with_rows_together(rows), contiguous(student), contiguous(teacher)
    pair_sets = PairSets(
        contiguous(partners), entries, thresholds, constants.scale, contiguous(mean), relative=relative, center=center
    )
    parts, new = (plan.H, plan.B, plan.parts), scratch.totals.new_empty
    arrivals = new(plan.H, dtype=torch.int32)
    data_term = DataTerm(
        student,
        entropy=new(parts),
        student_sums=new(*parts, plan.K, plan.Z, dtype=partial_dtype(rows)) if student_gradient else scratch.totals,
    )
    with torch.cuda.device_of(features):
        add_up_rows(
            plan, scratch, constants, data_term, arrivals, rows, teacher=teacher,
            temperature=either(temperature, temperature_tensor),
        )  # fmt: skip
        add_up_pairs(
            plan, scratch, pair_sets, outputs, arrivals, data_term=data_term, rows_gradient=rows_gradient,
            student_gradient=student_gradient, weighted=patch_weight is not None,
        )  # fmt: skip
    return (*outputs, *scratch)


def add_up_rows(
    plan: Plan,
    scratch: Scratch,
    constants: Constants,
    data_term: DataTerm,
    arrivals: Tensor,
    rows: Tensor,
    teacher: Tensor | None,
    temperature: float | Tensor,
) -> None:
    """Launches the sums over patches: norms and prepared prototypes for several heads, label rows, their moments."""
    (features, scale, weight, norms), totals = constants, scratch.totals
    B, P, H, K, Z, N = plan.B, plan.P, plan.H, plan.K, plan.Z, plan.H * plan.columns
    norms_here = norms is None and H == 1 and features.dtype != torch.float32
    sides = features.new_empty(B, P, N)
    common = {
        "features_ptr": features, "scale_ptr": or_nothing(scale, totals), "norms_ptr": or_nothing(norms, scratch.norms),
        "P": P, **strides(features, "fb", "fp"), "D": plan.D, "HAS_SCALE": scale is not None,
    }  # fmt: skip
    weights = {"weight_ptr": or_nothing(weight, totals), "HAS_WEIGHT": weight is not None}
    switches = {"UNIT_FEATURES": features.dtype == torch.float16, "PRECISION": precision(features.device)}
    if norms is None and not norms_here:
        settings = config("row_norms", features)
        launch(row_norms_kernel, (triton.cdiv(P, settings["BLOCK_P"]), B), settings=settings, **common)
    prototypes = {
        "student_ptr": or_nothing(data_term.student, totals), "teacher_ptr": or_nothing(teacher, totals),
        "prepared_ptr": scratch.prepared, "K": K, "Z": Z, "BLOCK_K": plan.columns, "BLOCK_Z": plan.code_columns,
    }  # fmt: skip
    if plan.prepared:
        launch(prepare_kernel, (H,), settings=config("prepare", rows), **prototypes)
    softmax = softmax_arguments(temperature, plan.K)
    apart = bool(plan.student)
    per_row = {
        "entropy_ptr": data_term.entropy, "student_sums_ptr": data_term.student_sums,
        "labels_ptr": rows.new_empty(H, B, P, dtype=torch.int16) if apart else totals,
        "B": B, **strides(rows, "rh", "rb", "rp"), "PARTS": plan.parts, "sharpness": softmax["sharpness"],
        "BY_POINTER": softmax["BY_POINTER"], "PREPARED": plan.prepared,
        "STUDENT_GRADIENT": data_term.student_sums is not totals,
        "CODE": operand(rows.dtype),
    }  # fmt: skip
    launch(
        label_rows_kernel, (plan.parts, B, H), settings=plan.labels,
        # in and out
        **common, **prototypes, **weights, **switches, **per_row, rows_ptr=rows,
        # out
        sides_ptr=sides, label_sums_ptr=scratch.label_sums, totals_ptr=totals, arrivals_ptr=arrivals,
        # sizes
        H=H,
        # switches
        FROM_CODES=teacher is not None, APART=apart, NORMS=norms_here, BOUNDED=softmax["BOUNDED"],
    )  # fmt: skip
    if apart:
        del prototypes["teacher_ptr"]
        launch(
            student_rows_kernel, (plan.parts, B, H), settings=plan.student,
            **prototypes, **weights, **per_row, rows_ptr=rows, P=P, PRECISION=switches["PRECISION"],
        )  # fmt: skip
    launch(
        row_products_kernel, (*plan.blocks, B * plan.splits), settings=plan.sums,
        **common, **weights, **switches, sides_ptr=sides, sums_ptr=scratch.sums,
        B=B, per_split=plan.per_split, N=N, FEATURE=operand(features.dtype),
    )  # fmt: skip


@objective.register_fake
def _(
    features, rows, student, teacher, partners, entries, thresholds, channel_scale, patch_weight, feature_norms, mean,
    temperature, relative, center, rows_gradient, student_gradient, temperature_tensor=None,
):  # fmt: skip
    plan = Plan(features, rows, teacher, len(entries))
    scratch = plan.scratch(features, rows, feature_norms is not None, rows_gradient, student_gradient)
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
    temperature: float | None,
    relative: bool,
    center: bool,
    rows_gradient: bool,
    student_gradient: bool,
    temperature_tensor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of rows and student in their dtypes; empty where not asked for. `scratch` is a Scratch."""
    plan, kept = Plan(features, rows, teacher, len(entries)), Scratch(*scratch)
    totals = kept.totals
    d_rows, d_student = empty_gradients(rows, student, rows_gradient, student_gradient)
    features, rows = with_rows_together(features), with_rows_together(rows)
    teacher, patch_weight = contiguous(teacher), contiguous(patch_weight)
    unit = d_total is not None and d_energy is None and d_distance is None
    with torch.cuda.device_of(features):
        upstream = d_total
        if rows_gradient and not unit:
            factors, upstream, arrivals = relative_upstream(
                plan, d_total, contiguous(d_energy), contiguous(d_distance), like=totals
            )
            kept = kept._replace(pull=torch.empty_like(kept.pull), constant=torch.empty_like(kept.constant))
            pair_sets = PairSets(
                contiguous(partners), entries, thresholds, contiguous(channel_scale), mean,
                relative=relative, center=center,
            )  # fmt: skip
            add_up_pairs(
                plan, kept, pair_sets, plan.outputs(features), arrivals, factors=factors, rows_gradient=True,
                weighted=patch_weight is not None,
            )  # fmt: skip
        settings = gradient_settings(plan, features)
        groups = plan.H // settings["HEADS"]
        grid = (groups * triton.cdiv(plan.P, settings["BLOCK_P"]), plan.B)
        prepared = kept.prepared.shape[0] > 0
        launch(
            energy_gradient_kernel, grid if rows_gradient else (groups, 1), settings=settings,
            # in
            features_ptr=features, rows_ptr=rows,
            prototypes_ptr=kept.prepared if prepared else or_nothing(teacher, totals),
            weight_ptr=or_nothing(patch_weight, totals), norms_ptr=kept.norms, totals_ptr=totals, pull_ptr=kept.pull,
            constant_ptr=kept.constant, upstream_ptr=or_nothing(upstream, totals),
            d_total_ptr=or_nothing(d_total, totals), d_data_ptr=or_nothing(d_data, totals),
            unit_d_student_ptr=kept.d_student,
            # out
            d_rows_ptr=d_rows, d_student_ptr=d_student,
            # sizes
            B=plan.B, P=plan.P, H=plan.H, **strides(features, "fb", "fp"),
            **strides(rows, "rh", "rb", "rp"), stride_upstream=first_stride(upstream),
            stride_total=first_stride(d_total), stride_data=first_stride(d_data),
            D=plan.D, K=plan.K, Z=plan.Z, BLOCK_K=plan.columns, BLOCK_Z=plan.code_columns,
            # switches
            FROM_CODES=teacher is not None, PREPARED=prepared,
            **softmax_arguments(either(temperature, temperature_tensor), plan.K),
            HAS_WEIGHT=patch_weight is not None, ROWS_GRADIENT=rows_gradient, STUDENT_GRADIENT=student_gradient,
            HAS_TOTAL=d_total is not None, HAS_DATA=d_data is not None,
            FEATURE=operand(features.dtype), CODE=operand(rows.dtype), PRECISION=precision(features.device),
        )  # fmt: skip
    return d_rows, d_student


def gradient_settings(plan: Plan, features: Tensor) -> dict[str, int]:
    """Returns the gradient's settings: blocks of 16 rows a warp, and no more of D than there is or fits."""
    settings = config("energy_gradient", features, plan.H, plan.size)
    settings["BLOCK_D"] = max(16, min(settings["BLOCK_D"], triton.next_power_of_2(plan.D), 8192 // plan.columns))
    heads = settings.get("HEADS", 1) if plan.columns <= 32 else 1
    settings["HEADS"] = next(count for count in (heads, 2, 1) if plan.H % count == 0 and count <= heads)
    return settings


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
    temperature_tensor=None,
):  # fmt: skip
    return empty_gradients(rows, student, rows_gradient, student_gradient)


def setup_context(ctx, inputs, output):
    (features, rows, student, teacher, partners, ctx.entries, thresholds, channel_scale, patch_weight, feature_norms, _,
     ctx.temperature, ctx.relative, ctx.center, _, _, temperature_tensor) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    outputs, scratch = Outputs(*output[:5]), Scratch(*output[5:])
    if feature_norms is not None:
        scratch = scratch._replace(norms=feature_norms.contiguous())
    ctx.save_for_backward(
        features, rows, student, teacher, partners, thresholds, channel_scale, patch_weight, temperature_tensor,
        outputs.mean, *scratch,
    )  # fmt: skip


def backward(ctx, d_total, d_energy, d_data, d_distance, *_):
    (features, rows, student, teacher, partners, thresholds, channel_scale, patch_weight, temperature_tensor, mean,
     *scratch) = ctx.saved_tensors  # fmt: skip
    rows_gradient = ctx.needs_input_grad[1] and any(g is not None for g in (d_total, d_energy, d_distance))
    student_gradient = student is not None and ctx.needs_input_grad[2] and (d_total is not None or d_data is not None)
    gradients: list[Tensor | None] = [None] * 17  # one for each input
    if rows_gradient or student_gradient:
        d_rows, d_student = objective_backward(
            d_total=d_total, d_energy=d_energy, d_data=d_data, d_distance=d_distance,
            features=features, rows=rows, student=student, teacher=teacher, partners=partners, entries=ctx.entries,
            thresholds=thresholds, channel_scale=channel_scale, patch_weight=patch_weight, mean=mean, scratch=scratch,
            temperature=ctx.temperature, relative=ctx.relative, center=ctx.center,
            rows_gradient=rows_gradient, student_gradient=student_gradient, temperature_tensor=temperature_tensor,
        )  # fmt: skip
        gradients[1], gradients[2] = d_rows if rows_gradient else None, d_student if student_gradient else None
    return tuple(gradients)


refuse_second_of(objective_backward, "smooseg_loss")
objective.register_autograd(backward, setup_context=setup_context)
