"""The objective as registered operators: three launches forward and backward, for any number of heads.

Forward: (row norms, where one program cannot hold whole rows,) the moments of every image, the sums over pairs with all that the backward
needs for an upstream gradient to the total. Backward: the gradients; other upstream gradients first take the sums
over pairs once more. Shapes: features [B,P,D]; rows = codes [H,B,P,Z] with a teacher, else label rows [H,B,P,K]; student, teacher
[H,K,Z]; thresholds [H,T].
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .energy_gradient import energy_gradient_kernel
from .image_moments import image_moments_kernel
from .launch import block_k, block_z, config, launch, narrow, operand, operator, precision, with_rows_together
from .pair_sums import ALL, crowd_kernel, pair_sums_kernel
from .row_norms import row_norms_kernel

STUDENT_BLOCK = 16  # rows of partial student gradients added at a time


def partial_dtype(like: Tensor) -> torch.dtype:
    """Of sums that one launch leaves to the next: means of products of unit rows, so fp16 never overflows and is finer than bf16."""
    return torch.float32 if like.dtype == torch.float32 else torch.float16


class Plan:
    """Block sizes and splits of one problem: the same numbers for the launches and for the fake operators (sizes may be symbolic)."""

    def __init__(self, features: Tensor, rows: Tensor, teacher: Tensor | None, partner_sets: int):
        self.B, self.P = features.shape[:2]
        # kernels are compiled for these, so a symbolic size becomes a number here
        self.D, self.H, width = int(features.shape[2]), int(rows.shape[0]), int(rows.shape[-1])
        self.Z, self.K = (1, width) if teacher is None else (width, int(teacher.shape[1]))
        self.T, self.columns, self.code_columns = partner_sets, block_k(self.K), block_z(self.Z)
        self.sums = narrow(config("image_moments", features, self.H), self.H, self.columns)
        self.sums["BLOCK_D"] = min(self.sums["BLOCK_D"], max(16, triton.next_power_of_2(self.D)))
        tiles = -(-self.D // self.sums["BLOCK_D"])
        self.slices = -(-tiles // self.sums["TILES"])
        self.sums["TILES"] = -(-tiles // self.slices)
        # whole rows in one program: their norms come with the sums, once for each block of heads; else one launch before
        self.norms_alone = self.slices > 1
        programs = self.B * self.slices * (self.H // self.sums["HEADS"])
        most = torch.sym_min(
            self.sums["PROGRAMS"] // programs, (self.P + self.sums["BLOCK_P"] - 1) // self.sums["BLOCK_P"]
        )
        self.splits = torch.sym_max(most, 1)
        self.pairs = dict(config("pair_sums", features, self.H))
        self.pairs["BLOCK_D"] = max(1, min(self.pairs["BLOCK_D"], 4096 // self.columns, triton.next_power_of_2(self.D)))
        self.pair_slices = -(-self.D // self.pairs["BLOCK_D"])

    def scratch(
        self, features: Tensor, feature_norms: Tensor | None, gradient: bool, student_gradient: bool
    ) -> tuple[Tensor, ...]:
        """norms, totals, sums, labels, pull, label_pull, drift, d_student."""
        B, P, D, K, Z, T, H = self.B, self.P, self.D, self.K, self.Z, self.T, self.H
        C, S, N = self.columns, self.splits, B if gradient else 0

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=features.device)

        return (
            empty(B if feature_norms is None else 0, P),
            empty(B),
            empty(H, B, S, D, C, dtype=partial_dtype(features)),
            empty(H, B, S, C),
            empty(H, N, D, C, dtype=features.dtype),
            empty(H, N, T, C),
            empty(H, N, self.pair_slices, C),
            empty(H if student_gradient else 0, K, Z),
        )

    def outputs(self, features: Tensor) -> tuple[Tensor, ...]:
        """total, energy, data, distance, mean."""
        H, T = self.H, self.T
        return tuple(
            torch.empty(s, dtype=torch.float32, device=features.device) for s in ((H,), (H, T), (H,), (H, T), (T,))
        )


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
    """-> total [H], energy [H,T], data [H], distance [H,T], mean [T], then the scratch that the backward reads.

    entries: for each pair set SELF, ALL or its row in partners [rows,B].
    """
    plan = Plan(features, rows, teacher, len(entries))
    outputs = plan.outputs(features)
    scratch = plan.scratch(features, feature_norms, rows_gradient, student_gradient)
    norms, totals, sums, labels, *_ = scratch
    B, P, H, K, Z, S = plan.B, plan.P, plan.H, plan.K, plan.Z, plan.splits
    features, rows = with_rows_together(features), with_rows_together(rows)
    student, teacher, partners, channel_scale, patch_weight, feature_norms, mean = (
        None if x is None else x.contiguous()
        for x in (student, teacher, partners, channel_scale, patch_weight, feature_norms, mean)
    )
    entropy, arrivals = totals.new_empty(H, B, S), totals.new_empty(H, dtype=torch.int32)
    student_sums = totals.new_empty(H, B, S, K, Z, dtype=partial_dtype(rows)) if student_gradient else totals
    with torch.cuda.device_of(features):
        if plan.norms_alone and feature_norms is None:
            settings = config("row_norms", features)
            launch(
                row_norms_kernel,
                (triton.cdiv(P, settings["BLOCK_P"]), B),
                features,
                totals if channel_scale is None else channel_scale,
                norms,
                P,
                *features.stride()[:2],
                D=plan.D,
                HAS_SCALE=channel_scale is not None,
                settings=settings,
            )
        launch(
            image_moments_kernel,
            (H // plan.sums["HEADS"], B, plan.slices * S),
            features,
            rows,
            totals if student is None else student,
            totals if teacher is None else teacher,
            totals if channel_scale is None else channel_scale,
            totals if patch_weight is None else patch_weight,
            norms if feature_norms is None else feature_norms,
            sums,
            labels,
            entropy,
            student_sums,
            totals,
            arrivals,
            B,
            P,
            temperature,
            *features.stride()[:2],
            *rows.stride()[:3],
            D=plan.D,
            K=K,
            Z=Z,
            SPLITS=S,
            FROM_CODES=teacher is not None,
            NORMS_GIVEN=plan.norms_alone or feature_norms is not None,
            HAS_SCALE=channel_scale is not None,
            HAS_WEIGHT=patch_weight is not None,
            STUDENT_GRADIENT=student_gradient,
            UNIT_FEATURES=features.dtype == torch.float16,
            BLOCK_K=plan.columns,
            BLOCK_Z=plan.code_columns,
            FEATURE=operand(features.dtype),
            CODE=operand(rows.dtype),
            PRECISION=precision(features.device),
            settings=plan.sums,
        )
        add_up_pairs(plan, scratch, entries, partners, thresholds, channel_scale, mean, relative, center, student, student_gradient,
                     rows_gradient, outputs=outputs, entropy=entropy, student_sums=student_sums, arrivals=arrivals)  # fmt: skip
    return (*outputs, *scratch)


def add_up_pairs(
    plan, scratch, entries, partners, thresholds, channel_scale, mean, relative, center, student, student_gradient, gradient,
    outputs=None, entropy=None, student_sums=None, arrivals=None, upstream=(None, None, None),
):  # fmt: skip
    """The sums over pairs: forward with `outputs` to fill, backward with the upstream gradients to total, energies and distances."""
    _, totals, sums, labels, pull, label_pull, drift, d_student = scratch
    B, D, H, K, T = plan.B, plan.D, plan.H, plan.K, plan.T
    crowd, crowd_labels = totals, totals
    if ALL in entries:
        crowd, crowd_labels = totals.new_empty(H, 2, D, plan.columns), totals.new_empty(H, plan.columns)
        settings = dict(
            config("crowd", totals), BLOCK_D=min(config("crowd", totals)["BLOCK_D"], max(1, 2048 // plan.columns))
        )
        launch(
            crowd_kernel,
            (triton.cdiv(D, settings["BLOCK_D"]), H),
            sums,
            labels,
            crowd,
            crowd_labels,
            B,
            D=D,
            K=K,
            SPLITS=plan.splits,
            CENTER=center,
            BLOCK_K=plan.columns,
            settings=settings,
        )
    forward = outputs is not None
    total, energy, data, distance, measured = outputs if forward else (totals,) * 5
    d_total, d_energy, d_distance = upstream
    launch(
        pair_sums_kernel,
        (B * plan.pair_slices + (K if forward and student_gradient else 0), H),
        sums,
        labels,
        entropy if forward else totals,
        student_sums if forward else totals,
        totals,
        totals if channel_scale is None else channel_scale,
        totals if partners is None else partners,
        crowd,
        crowd_labels,
        thresholds,
        totals if mean is None else mean,
        totals if student is None else student,
        totals if d_total is None else d_total,
        totals if d_energy is None else d_energy,
        totals if d_distance is None else d_distance,
        totals.new_empty(H, T, 3, B * plan.pair_slices) if forward else totals,
        arrivals if forward else totals,
        total,
        energy,
        data,
        distance,
        measured,
        pull,
        label_pull,
        drift,
        d_student,
        B,
        *thresholds.stride(),
        0 if d_total is None else d_total.stride(0),
        D=D,
        K=K,
        Z=plan.Z,
        T=T,
        ENTRIES=tuple(entries),
        SPLITS=plan.splits,
        SLICES=plan.pair_slices,
        RELATIVE=relative,
        CENTER=center,
        HAS_SCALE=channel_scale is not None,
        HAS_MEAN=mean is not None,
        HAS_DATA=student is not None,
        STUDENT_GRADIENT=forward and student_gradient,
        ENERGIES=forward,
        GRADIENT=gradient,
        UNIT=forward,
        HAS_TOTAL=d_total is not None,
        HAS_ENERGY=d_energy is not None,
        HAS_DISTANCE=d_distance is not None,
        BLOCK_B=triton.next_power_of_2(B),
        BLOCK_K=plan.columns,
        BLOCK_Z=plan.code_columns,
        BLOCK_N=STUDENT_BLOCK,
        settings=plan.pairs,
    )


@objective.register_fake
def _(
    features, rows, student, teacher, partners, entries, thresholds, channel_scale, patch_weight, feature_norms, mean,
    temperature, relative, center, rows_gradient, student_gradient,
):  # fmt: skip
    plan = Plan(features, rows, teacher, len(entries))
    return (*plan.outputs(features), *plan.scratch(features, feature_norms, rows_gradient, student_gradient))


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
    """-> the gradients of rows and of student, in their dtypes; empty where not asked for."""
    plan = Plan(features, rows, teacher, len(entries))
    norms, totals, sums, labels, pull, label_pull, drift, unit_d_student = scratch
    d_rows, d_student = empty_gradients(rows, student, rows_gradient, student_gradient)
    features, rows = with_rows_together(features), with_rows_together(rows)
    teacher, partners, channel_scale, patch_weight, d_energy, d_distance = (
        None if x is None else x.contiguous()
        for x in (teacher, partners, channel_scale, patch_weight, d_energy, d_distance)
    )
    unit = d_total is not None and d_energy is None and d_distance is None
    with torch.cuda.device_of(features):
        if rows_gradient and not unit:
            pull, label_pull, drift = torch.empty_like(pull), torch.empty_like(label_pull), torch.empty_like(drift)
            add_up_pairs(plan, (norms, totals, sums, labels, pull, label_pull, drift, totals), entries, partners, thresholds, channel_scale,
                         None, relative, center, None, False, True, upstream=(d_total, d_energy, d_distance))  # fmt: skip
        settings = narrow(config("energy_gradient", features, plan.H), plan.H, plan.columns)
        settings["BLOCK_D"] = min(settings["BLOCK_D"], max(16, triton.next_power_of_2(plan.D)))
        head_blocks = plan.H // settings["HEADS"]
        grid = (head_blocks * triton.cdiv(plan.P, settings["BLOCK_P"]), plan.B)
        launch(
            energy_gradient_kernel,
            grid if rows_gradient else (head_blocks, 1),
            features,
            rows,
            totals if teacher is None else teacher,
            totals if patch_weight is None else patch_weight,
            norms,
            totals,
            totals if partners is None else partners,
            thresholds,
            mean,
            pull,
            label_pull,
            drift,
            unit_d_student,
            totals if d_total is None else d_total,
            totals if d_energy is None else d_energy,
            totals if d_distance is None else d_distance,
            totals if d_data is None else d_data,
            d_rows,
            d_student,
            plan.B,
            plan.P,
            head_blocks,
            temperature,
            *features.stride()[:2],
            *rows.stride()[:3],
            *thresholds.stride(),
            0 if d_total is None else d_total.stride(0),
            0 if d_data is None else d_data.stride(0),
            D=plan.D,
            K=plan.K,
            Z=plan.Z,
            T=plan.T,
            ENTRIES=tuple(entries),
            SLICES=plan.pair_slices,
            FROM_CODES=teacher is not None,
            RELATIVE=relative,
            CENTER=center,
            HAS_WEIGHT=patch_weight is not None,
            ROWS_GRADIENT=rows_gradient,
            STUDENT_GRADIENT=student_gradient,
            UNIT=unit,
            HAS_TOTAL=d_total is not None,
            HAS_ENERGY=d_energy is not None,
            HAS_DISTANCE=d_distance is not None,
            HAS_DATA=d_data is not None,
            BLOCK_B=triton.next_power_of_2(plan.B),
            BLOCK_K=plan.columns,
            BLOCK_Z=plan.code_columns,
            FEATURE=operand(features.dtype),
            CODE=operand(rows.dtype),
            PRECISION=precision(features.device),
            settings=settings,
        )
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
    d_total, d_energy, d_data, d_distance, features, rows, student, teacher, partners, entries, thresholds, channel_scale, patch_weight,
    mean, scratch, temperature, relative, center, rows_gradient, student_gradient,
):  # fmt: skip
    return empty_gradients(rows, student, rows_gradient, student_gradient)


def setup_context(ctx, inputs, output):
    (features, rows, student, teacher, partners, entries, thresholds, channel_scale, patch_weight, feature_norms, _,
     ctx.temperature, ctx.relative, ctx.center, _, _) = inputs  # fmt: skip
    ctx.entries = entries
    ctx.set_materialize_grads(False)
    mean, scratch = output[4], list(output[5:])
    if feature_norms is not None:
        scratch[0] = feature_norms.contiguous()
    ctx.save_for_backward(
        features, rows, student, teacher, partners, thresholds, channel_scale, patch_weight, mean, *scratch
    )


def backward(ctx, d_total, d_energy, d_data, d_distance, *_):
    features, rows, student, teacher, partners, thresholds, channel_scale, patch_weight, mean, *scratch = (
        ctx.saved_tensors
    )
    want_rows = ctx.needs_input_grad[1] and any(g is not None for g in (d_total, d_energy, d_distance))
    want_student = student is not None and ctx.needs_input_grad[2] and (d_total is not None or d_data is not None)
    d_rows = d_student = None
    if want_rows or want_student:
        d_rows, d_student = objective_backward(
            d_total, d_energy, d_data, d_distance, features, rows, student, teacher, partners, ctx.entries, thresholds, channel_scale,
            patch_weight, mean, scratch, ctx.temperature, ctx.relative, ctx.center, want_rows, want_student,
        )  # fmt: skip
    gradients = [None] * 16
    gradients[1], gradients[2] = d_rows if want_rows else None, d_student if want_student else None
    return tuple(gradients)


objective.register_autograd(backward, setup_context=setup_context)
