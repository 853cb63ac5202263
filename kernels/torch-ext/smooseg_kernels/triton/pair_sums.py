"""Inner products <g_n, g_n' - u_n' s_n'^T> of the images' moments: the energies of every pair set, and inputs of the
backward pass.

One program holds one image, a slice of D and a head. It looks up the image's partner and the images whose partner it
is, so no program adds to another's results. The last program of a head to arrive adds up the parts, in a fixed order.
The counter of arrivals is the only atomic, and an integer.

All sums are LIFT times as large; u stands in column K of g.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import LIFT
from .pair_sets import ITSELF, OTHERS, count_pairs, load_partner, next_back
from .pair_totals import finish_energies, load_pulls, store_constants
from .student_gradient import student_gradient


@triton.jit
def load_label_sums(ptr, k, K: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Adds up an image's parts [PARTS,BLOCK_K]: s [BLOCK_K], 0 from column K on."""
    if PARTS <= 2:
        s = tl.load(ptr + k)
        if PARTS == 2:
            s += tl.load(ptr + BLOCK_K + k)
    else:
        part = tl.arange(0, BLOCK_PARTS)[:, None]
        s = tl.sum(tl.load(ptr + part * BLOCK_K + k[None, :], mask=part < PARTS, other=0.0), 0)
    return tl.where(k < K, s, 0.0)


@triton.jit
def load_g(row_ptr, d, k, stride_s, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Adds up an image's splits: g [BLOCK_D,BLOCK_K], with any columns from K on."""
    for i in tl.static_range(SPLITS):
        tile_ptr = (row_ptr + i * stride_s)[:, None] + k[None, :]
        if D % BLOCK_D == 0:
            split = tl.load(tile_ptr).to(tl.float32)
        else:
            split = tl.load(tile_ptr, mask=(d < D)[:, None], other=0.0).to(tl.float32)
        if i == 0:
            g = split
        else:
            g += split
    return g


@triton.jit
def load_u(row_ptr, d, stride_s, D: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr):
    """Loads column K once more, which spares a search for it in g: u [BLOCK_D]."""
    u = tl.load(row_ptr + K, mask=d < D, other=0.0).to(tl.float32)
    for i in tl.static_range(1, SPLITS):
        u += tl.load(row_ptr + i * stride_s + K, mask=d < D, other=0.0).to(tl.float32)
    return u


@triton.jit
def as_shown(g, u, s, CENTER: tl.constexpr):
    """Returns g as a partner sees it: g - u s^T, or g without centring."""
    if CENTER:
        g -= u[:, None] * (s * (1.0 / LIFT))[None, :]
    return g


@triton.jit
def crowd_kernel(
    # in
    sums_ptr,  # moments by strides
    label_sums_ptr,  # [H,B,PARTS,BLOCK_K] fp32
    # out
    crowd_ptr,  # [H,2,D,BLOCK_K] fp32: sum_n g_n, with sum_n u_n in column K; sum_n (g_n - u_n s_n^T)
    crowd_labels_ptr,  # [H,BLOCK_K] fp32: sum_n s_n
    # sizes
    B, stride_h, stride_b, stride_s, stride_d,
    D: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    # switches
    CENTER: tl.constexpr,
):  # fmt: skip
    """Adds up one channel over the batch, so that "all" pairs cost no more than one."""
    h, d = tl.program_id(1).to(tl.int64), tl.program_id(0)
    image, k = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_K)
    plain, shown, labels = (tl.zeros((BLOCK_B, BLOCK_K), tl.float32),) * 3
    for first in range(0, B, BLOCK_B):
        n = (first + image).to(tl.int64)[:, None]
        g, s = tl.zeros((BLOCK_B, BLOCK_K), tl.float32), tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
        for i in tl.static_range(SPLITS):
            part_ptr = sums_ptr + h * stride_h + n * stride_b + i * stride_s + d * stride_d + k[None, :]
            g += tl.load(part_ptr, mask=(n < B) & (k <= K)[None, :], other=0.0).to(tl.float32)
        for i in tl.static_range(PARTS):
            part_ptr = label_sums_ptr + ((h * B + n) * PARTS + i) * BLOCK_K + k[None, :]
            s += tl.load(part_ptr, mask=(n < B) & (k < K)[None, :], other=0.0)
        plain += g
        labels += s
        if CENTER:
            u = tl.sum(tl.where(k[None, :] == K, g, 0.0), 1)
            g -= u[:, None] * s * (1.0 / LIFT)
        shown += g
    out_ptr = crowd_ptr + (h * 2 * D + d) * BLOCK_K + k
    tl.store(out_ptr, tl.sum(plain, 0))
    tl.store(out_ptr + D * BLOCK_K, tl.sum(shown, 0))
    if d == 0:
        tl.store(crowd_labels_ptr + h * BLOCK_K + k, tl.sum(labels, 0))


# the two sides of an image's pairs: its partner's g as shown, u and s; the sums of g and s over whose partner it is


@triton.jit
def pair_with_itself(g, shown, u, s):
    return shown, u, s, g, s


@triton.jit
def pair_with_all(
    crowd_ptr, crowd_labels_ptr, g, shown, u, s, d, k, D: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    tile_ptr = crowd_ptr + d[:, None] * BLOCK_K + k[None, :]
    all_g = tl.load(tile_ptr, mask=(d < D)[:, None], other=0.0)
    all_shown = tl.load(tile_ptr + D * BLOCK_K, mask=(d < D)[:, None], other=0.0)
    all_u = tl.load(crowd_ptr + d * BLOCK_K + K, mask=d < D, other=0.0)
    others_s = tl.load(crowd_labels_ptr + k) - s
    return all_shown - shown, all_u - u, others_s, all_g - g, others_s


@triton.jit
def pair_by_index(
    partner, m, rows_ptr, labels_ptr, d, k, B, stride_b, stride_s,
    D: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """m: the first image with this one for its partner, or B. Others come later: they are rare, and loops wait."""
    row_ptr, first_ptr = rows_ptr + partner * stride_b, rows_ptr + tl.minimum(m, B - 1).to(tl.int64) * stride_b
    g = load_g(row_ptr, d, k, stride_s, D, SPLITS, BLOCK_D=BLOCK_D)
    u = load_u(row_ptr, d, stride_s, D, K, SPLITS)
    s = load_label_sums(labels_ptr + partner * PARTS * BLOCK_K, k, K, PARTS, BLOCK_PARTS, BLOCK_K)
    back_g = load_g(first_ptr, d, k, stride_s, D, SPLITS, BLOCK_D=BLOCK_D)
    back_s = load_label_sums(labels_ptr + tl.minimum(m, B - 1) * PARTS * BLOCK_K, k, K, PARTS, BLOCK_PARTS, BLOCK_K)
    return as_shown(g, u, s, CENTER), u, s, tl.where(m < B, back_g, 0.0), tl.where(m < B, back_s, 0.0)


@triton.jit
def pair_share(
    totals_ptr, partners_ptr, B, ENTRY: tl.constexpr, BLOCK_B: tl.constexpr, IMAGE_BLOCKS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Returns B / number of pairs, a constant where it is 1."""
    if HAS_WEIGHT or ENTRY == OTHERS:
        share = B / tl.maximum(
            count_pairs(totals_ptr, partners_ptr, B, ENTRY, BLOCK_B, IMAGE_BLOCKS, HAS_WEIGHT=HAS_WEIGHT), 1.0
        )
    else:
        share = 1.0
    return share


@triton.jit
def pair_sums_kernel(
    # in
    sums_ptr,  # the moments by strides, column K is u
    label_sums_ptr,  # [H,B,PARTS,BLOCK_K] fp32
    entropy_ptr,  # [H,B,PARTS] fp32
    student_sums_ptr,  # [H,B,PARTS,K,Z]
    totals_ptr,  # [B] fp32
    scale_ptr,  # [B,D] fp32
    partners_ptr,  # [rows,B] int64
    crowd_ptr,  # [H,2,D,BLOCK_K] fp32, with "all"
    crowd_labels_ptr,  # [H,BLOCK_K] fp32
    thresholds_ptr,  # [H,T] fp32
    given_mean_ptr,  # [T] fp32
    student_ptr,  # [H,K,Z]
    factors_ptr,  # [H,2,T] fp32: relative upstream gradients to energies and distances, without UNIT
    # scratch
    parts_ptr,  # [H,T,3,B*SLICES] fp32
    label_pull_ptr,  # [H,B,T,BLOCK_K] fp32: s_pi + sum_m s_m
    drift_ptr,  # [H,B,SLICES,BLOCK_K] fp32: sum_t share_t sum_m g_m^T u_n over a slice of D
    arrivals_ptr,  # [H] int32, zero
    # out
    total_ptr,  # [H] fp32
    energy_ptr,  # [H,T] fp32
    data_ptr,  # [H] fp32
    distance_ptr,  # [H,T] fp32
    mean_ptr,  # [T] fp32
    # out, with GRADIENT
    pull_ptr,  # [H,B,D,BLOCK_K]: sum_t share_t (g_pi - u_pi s_pi^T + sum_m g_m), times m_n
    constant_ptr,  # [H,B,BLOCK_K] fp32: sum_t share_t slope_t label_pull_t - drift
    # out, with STUDENT_GRADIENT
    d_student_ptr,  # [H,K,Z] fp32: the student's gradient for an upstream gradient of 1
    # sizes
    B, stride_h, stride_b, stride_s, stride_d, stride_th, stride_tt,
    D: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, T: tl.constexpr, ENTRIES: tl.constexpr, SPLITS: tl.constexpr,
    PARTS: tl.constexpr, SLICES: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_B: tl.constexpr,
    IMAGE_BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    # switches
    RELATIVE: tl.constexpr, CENTER: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_DATA: tl.constexpr, STUDENT_GRADIENT: tl.constexpr,
    GRADIENT: tl.constexpr,  # write the inputs of the backward pass
    UNIT: tl.constexpr,  # for upstream gradients of 1 to every energy; else for the factors
):  # fmt: skip
    h, task = tl.program_id(1).to(tl.int64), tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    if task >= B * SLICES:
        if STUDENT_GRADIENT:
            student_gradient(
                out_ptr=d_student_ptr + h * K * Z, student_sums_ptr=student_sums_ptr + h * B * PARTS * K * Z,
                totals_ptr=totals_ptr, student_ptr=student_ptr + h * K * Z, k=task - B * SLICES, B=B,
                K=K, Z=Z, PARTS=PARTS, BLOCK_N=BLOCK_N, BLOCK_Z=BLOCK_Z, HAS_WEIGHT=HAS_WEIGHT,
            )  # fmt: skip
    else:
        n, slice_ = (task // SLICES).to(tl.int64), task % SLICES
        d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)
        partners, firsts = (), ()  # these loads come first, as others wait for them
        for t in tl.static_range(T):
            if ENTRIES[t] >= 0:
                partners = partners + (load_partner(partners_ptr + ENTRIES[t] * B, n, B),)
                firsts = firsts + (next_back(partners_ptr + ENTRIES[t] * B, n, -1, B, BLOCK_B, IMAGE_BLOCKS),)
            else:
                partners, firsts = partners + (0,), firsts + (0,)
        row_ptr = sums_ptr + h * stride_h + d * stride_d
        labels_ptr = label_sums_ptr + h * B * PARTS * BLOCK_K
        g = load_g(row_ptr + n * stride_b, d, k, stride_s, D, SPLITS, BLOCK_D=BLOCK_D)
        u = load_u(row_ptr + n * stride_b, d, stride_s, D, K, SPLITS)
        s = load_label_sums(labels_ptr + n * PARTS * BLOCK_K, k, K, PARTS, BLOCK_PARTS, BLOCK_K)
        g = tl.where(k[None, :] < K, g, 0.0)
        shown = as_shown(g, u, s, CENTER)
        # all other loads before the first sum over warps, which ends their overlap
        sides = ()
        for t in tl.static_range(T):
            if ENTRIES[t] == ITSELF:
                sides = sides + pair_with_itself(g, shown, u, s)
            elif ENTRIES[t] == OTHERS:
                sides = sides + pair_with_all(
                    crowd_ptr + h * 2 * D * BLOCK_K, crowd_labels_ptr + h * BLOCK_K, g, shown, u, s, d=d, k=k,
                    D=D, K=K, BLOCK_K=BLOCK_K,
                )  # fmt: skip
            else:
                sides = sides + pair_by_index(
                    partners[t], firsts[t], row_ptr, labels_ptr, d, k, B=B, stride_b=stride_b, stride_s=stride_s,
                    D=D, K=K, SPLITS=SPLITS, PARTS=PARTS, BLOCK_PARTS=BLOCK_PARTS, BLOCK_D=BLOCK_D, BLOCK_K=BLOCK_K,
                    CENTER=CENTER,
                )  # fmt: skip
        if GRADIENT and HAS_SCALE:
            scale = tl.load(scale_ptr + n * D + d, mask=d < D, other=0.0)
        for t in tl.static_range(T):
            part_ptr = parts_ptr + (h * T + t) * 3 * B * SLICES + task
            tl.store(part_ptr, tl.sum(g * sides[5 * t]))
            tl.store(part_ptr + B * SLICES, tl.sum(u * sides[5 * t + 1], 0))
            tl.store(part_ptr + 2 * B * SLICES, tl.where(slice_ == 0, tl.sum(s * sides[5 * t + 2], 0), 0.0))
        if GRADIENT:
            for t in tl.static_range(T):
                back_t, back_s = sides[5 * t + 3], sides[5 * t + 4]
                if ENTRIES[t] >= 0:
                    m = next_back(partners_ptr + ENTRIES[t] * B, n, firsts[t], B, BLOCK_B, IMAGE_BLOCKS)
                    while m < B:
                        back_t += load_g(
                            row_ptr + m.to(tl.int64) * stride_b, d, k, stride_s, D, SPLITS, BLOCK_D=BLOCK_D
                        )
                        back_s += load_label_sums(labels_ptr + m * PARTS * BLOCK_K, k, K, PARTS, BLOCK_PARTS, BLOCK_K)
                        m = next_back(partners_ptr + ENTRIES[t] * B, n, m, B, BLOCK_B, IMAGE_BLOCKS)
                share = pair_share(
                    totals_ptr, partners_ptr, B, ENTRIES[t], BLOCK_B, IMAGE_BLOCKS, HAS_WEIGHT=HAS_WEIGHT
                )
                if not UNIT:
                    share *= tl.load(factors_ptr + h * 2 * T + t)
                if t == 0:
                    pull, back = share * (sides[0] + back_t), share * back_t
                else:
                    pull, back = pull + share * (sides[5 * t] + back_t), back + share * back_t
                if slice_ == 0:
                    tl.store(label_pull_ptr + ((h * B + n) * T + t) * BLOCK_K + k, sides[5 * t + 2] + back_s)
            if CENTER:
                drift = tl.sum(back * (u * (1.0 / LIFT))[:, None], 0)
                tl.store(drift_ptr + ((h * B + n) * SLICES + slice_) * BLOCK_K + k, drift)
            if HAS_SCALE:
                pull *= scale[:, None]
            tile_ptr = pull_ptr + (h * B + n) * D * BLOCK_K + d[:, None] * BLOCK_K + k[None, :]
            tl.store(tile_ptr, pull.to(pull_ptr.dtype.element_ty), mask=(d < D)[:, None])
        # every thread's stores come before the count, and the count before the last program's loads
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + h, 1, sem="acq_rel", scope="gpu")
        if arrived == B * SLICES - 1:
            label_pull_ptr += h * B * T * BLOCK_K
            drift_ptr += h * B * SLICES * BLOCK_K
            constant_ptr += h * B * BLOCK_K
            pulls = ()
            if GRADIENT:  # on their way while the energies are added up
                pulls = load_pulls(
                    label_pull_ptr, drift_ptr, 0, B, T, SLICES, BLOCK_ROWS=BLOCK_ROWS, BLOCK_K=BLOCK_K, CENTER=CENTER
                )
            slopes = finish_energies(
                parts_ptr=parts_ptr, entropy_ptr=entropy_ptr, totals_ptr=totals_ptr, partners_ptr=partners_ptr,
                thresholds_ptr=thresholds_ptr, given_mean_ptr=given_mean_ptr, factors_ptr=factors_ptr,
                total_ptr=total_ptr, energy_ptr=energy_ptr, data_ptr=data_ptr, distance_ptr=distance_ptr,
                mean_ptr=mean_ptr,
                h=h, B=B, stride_th=stride_th, stride_tt=stride_tt,
                T=T, ENTRIES=ENTRIES, PARTS=PARTS, SLICES=SLICES, BLOCK_B=BLOCK_B, IMAGE_BLOCKS=IMAGE_BLOCKS,
                RELATIVE=RELATIVE, CENTER=CENTER, HAS_WEIGHT=HAS_WEIGHT, HAS_MEAN=HAS_MEAN, HAS_DATA=HAS_DATA,
                UNIT=UNIT,
            )  # fmt: skip
            if GRADIENT:
                store_constants(constant_ptr, slopes, pulls, 0, B, T, BLOCK_ROWS=BLOCK_ROWS, BLOCK_K=BLOCK_K)
                for first in range(BLOCK_ROWS, B, BLOCK_ROWS):
                    pulls = load_pulls(
                        label_pull_ptr,
                        drift_ptr,
                        first,
                        B,
                        T,
                        SLICES,
                        BLOCK_ROWS=BLOCK_ROWS,
                        BLOCK_K=BLOCK_K,
                        CENTER=CENTER,
                    )
                    store_constants(constant_ptr, slopes, pulls, first, B, T, BLOCK_ROWS=BLOCK_ROWS, BLOCK_K=BLOCK_K)
