"""The moments of every image from one read of its features: sum_p w_p f_p c_p^T [D,K], sum_p w_p f_p [D], sum_p w_p c_p
[K].

One program holds the sums of a part of the patches (a split), a slice of D and a block of heads in registers. It
computes the unit probs that it needs from the codes as it goes, so no probs are ever written. Column K of the probs is
1: its product is sum_p w_p f_p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import cosines, cross_entropy, inverse_norms, invert, load_rows, load_unit_prototypes, split, unit_probs

# weights that add up to 1 over an image are small: a power of two lifts them exactly, out of fp16's subnormal range
LIFT = tl.constexpr(64.0)


@triton.jit
def image_weight(weight_ptr, P, HAS_WEIGHT: tl.constexpr):
    """Adds up an image's patch weights."""
    total = tl.zeros((), tl.float32) + P
    if HAS_WEIGHT:
        i = tl.arange(0, 1024)
        acc = tl.zeros((1024,), tl.float32)
        for start in range(0, P, 1024):
            acc += tl.load(weight_ptr + start + i, mask=start + i < P, other=0.0)
        total = tl.sum(acc, 0)
    return total


@triton.jit
def load_feature_tiles(
    features_ptr, start, last, stride, first,
    D: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Loads TILES adjacent matrices [BLOCK_P, BLOCK_D], from channel `first` on."""
    row, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    tiles = ()
    for i in tl.static_range(TILES):
        d = first + i * BLOCK_D + channel
        inside = (start + row < last)[:, None]
        if D % (TILES * BLOCK_D) != 0:
            inside = inside & (d < D)[None, :]
        offset = tl.cast(start, tl.int64) * stride
        tiles = tiles + (tl.load(features_ptr + offset + row[:, None] * stride + d[None, :], mask=inside, other=0.0),)
    return tiles


@triton.jit
def image_moments_kernel(
    # in
    features_ptr,  # [B,P,D]
    rows_ptr,  # codes [H,B,P,Z], or probs [H,B,P,K] of any length without FROM_CODES
    student_ptr,  # [H,K,Z]
    teacher_ptr,  # [H,K,Z]
    scale_ptr,  # [B,D] fp32
    weight_ptr,  # [B,P] fp32
    # in with NORMS_GIVEN, else out
    norms_ptr,  # [B,P] fp32
    # out
    sums_ptr,  # [H,B,S,D,BLOCK_K]: LIFT times a split's moments, with scaled features; column K is sum_p w_p f_p
    prob_sums_ptr,  # [H,B,S,BLOCK_K] fp32: LIFT sum_p w_p c_p
    entropy_ptr,  # [H,B,S] fp32: LIFT times the weighted cross-entropy
    student_sums_ptr,  # [H,B,S,K,Z]: LIFT sum_p w_p (gradient to the cosine) code_p / |code_p|
    totals_ptr,  # [B] fp32: the sum of the image's patch weights
    arrivals_ptr,  # [H] int32: zero, for the launch that follows
    # sizes
    B, P, temperature, stride_fb, stride_fp, stride_rh, stride_rb, stride_rp,
    D: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr,
    # switches
    FROM_CODES: tl.constexpr, NORMS_GIVEN: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr,
    UNIT_FEATURES: tl.constexpr,  # normalise the features themselves: 1 / |f| on the probs could leave fp16's range
    FEATURE: tl.constexpr,  # the types in which the matrix unit reads features and codes
    CODE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    b, s = tl.program_id(1).to(tl.int64), tl.program_id(2) % SPLITS
    head, slice_ = tl.program_id(0) * HEADS, tl.program_id(2) // SPLITS
    first_slice, channels = slice_ == 0, slice_ * TILES * BLOCK_D
    row, k = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    d, z = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Z)
    features_ptr += b * stride_fb
    total = image_weight(weight_ptr + b * P, P, HAS_WEIGHT)
    unit_weight = tl.where(total > 0, LIFT / tl.where(total > 0, total, 1.0), 0.0)
    # a power of two until the sums are done: a common factor rounded to 16 bits would shift every sum alike
    rough_weight = tl.where(total > 0, tl.exp2(tl.floor(tl.log2(tl.maximum(unit_weight, 1e-30)))), 1.0)
    exact = unit_weight / rough_weight
    per_split = tl.cdiv(tl.cdiv(P, BLOCK_P), SPLITS) * BLOCK_P
    first, last = s * per_split, tl.minimum(P, (s + 1) * per_split)

    sums, prob_sums, student_sums = (), (), ()
    teachers, students = (), ()
    for j in tl.static_range(HEADS):
        prob_sums = prob_sums + (tl.zeros((BLOCK_P, BLOCK_K), tl.float32),)
        student_sums = student_sums + (tl.zeros((BLOCK_Z, BLOCK_K), tl.float32),)
        for _ in tl.static_range(TILES):
            sums = sums + (tl.zeros((BLOCK_D, BLOCK_K), tl.float32),)
        if FROM_CODES:
            offset = (head + j).to(tl.int64) * K * Z
            teachers = teachers + split(load_unit_prototypes(teacher_ptr + offset, K, Z, BLOCK_K, BLOCK_Z)[0], CODE)
            students = students + split(load_unit_prototypes(student_ptr + offset, K, Z, BLOCK_K, BLOCK_Z)[0], CODE)
    entropies = (tl.zeros((BLOCK_P,), tl.float32),) * HEADS

    for start in range(first, last, BLOCK_P):
        inside = start + row < last
        weight = tl.where(inside, rough_weight, 0.0)
        if HAS_WEIGHT:
            weight *= tl.load(weight_ptr + b * P + start + row, mask=inside, other=0.0)

        # the probs first: the features stay in shared memory until then
        sides, new_prob_sums, new_student_sums, new_entropies = (), (), (), ()
        for j in tl.static_range(HEADS):
            head_ptr = rows_ptr + (head + j).to(tl.int64) * stride_rh + b * stride_rb
            if FROM_CODES:
                codes = load_rows(head_ptr, start, last, stride_rp, width=Z, BLOCK=BLOCK_P, WIDTH=BLOCK_Z).to(CODE)
                code_inverse = inverse_norms(codes)
                toward_teacher = cosines(codes, code_inverse, teachers[2 * j], teachers[2 * j + 1], CODE, PRECISION)
                toward_student = cosines(codes, code_inverse, students[2 * j], students[2 * j + 1], CODE, PRECISION)
                c = unit_probs(toward_teacher, k, temperature, K)
                loss, d_cosine = cross_entropy(toward_student, toward_teacher, k, K)
                new_entropies = new_entropies + (entropies[j] + loss * weight,)
                student_sum = student_sums[j]
                if STUDENT_GRADIENT:
                    unit_codes = (codes.to(tl.float32) * code_inverse[:, None]).to(CODE)
                    weighted = (d_cosine * weight[:, None]).to(CODE)
                    student_sum = tl.dot(tl.trans(unit_codes), weighted, student_sum, input_precision=PRECISION)
                new_student_sums = new_student_sums + (student_sum,)
            else:
                c = load_rows(head_ptr, start, last, stride_rp, width=K, BLOCK=BLOCK_P, WIDTH=BLOCK_K).to(tl.float32)
                c *= inverse_norms(c)[:, None]
                new_entropies, new_student_sums = new_entropies + (entropies[j],), new_student_sums + (student_sums[j],)
            new_prob_sums = new_prob_sums + (prob_sums[j] + c * weight[:, None],)
            sides = sides + (tl.where(k[None, :] == K, 1.0, c),)

        tiles = load_feature_tiles(
            features_ptr, start, last, stride_fp, channels, D=D, TILES=TILES, BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_D
        )
        if NORMS_GIVEN:
            norms = tl.load(norms_ptr + b * P + start + row, mask=inside, other=0.0)
        else:
            squares = tl.zeros((BLOCK_P,), tl.float32)
            for i in tl.static_range(TILES):
                f = tiles[i].to(tl.float32)
                if HAS_SCALE:
                    channel = channels + i * BLOCK_D + d
                    f *= tl.load(scale_ptr + b * D + channel, mask=channel < D, other=0.0)[None, :]
                squares += tl.sum(f * f, 1)
            norms = tl.sqrt(squares)
            if head == 0:  # every block of heads sees whole rows; one of them tells the backward
                tl.store(norms_ptr + b * P + start + row, norms, mask=inside)
        inverse = invert(norms)
        left, feature_weight = (), weight
        if UNIT_FEATURES:
            for i in tl.static_range(TILES):
                f = tiles[i].to(tl.float32) * inverse[:, None]
                if HAS_SCALE:
                    channel = channels + i * BLOCK_D + d
                    f *= tl.load(scale_ptr + b * D + channel, mask=channel < D, other=0.0)[None, :]
                left = left + (tl.trans(f.to(FEATURE)),)
        else:
            feature_weight = weight * inverse
            for i in tl.static_range(TILES):
                left = left + (tl.trans(tiles[i].to(FEATURE)),)
        new_sums = ()
        for j in tl.static_range(HEADS):
            side = (sides[j] * feature_weight[:, None]).to(FEATURE)
            for i in tl.static_range(TILES):
                new_sums = new_sums + (tl.dot(left[i], side, sums[j * TILES + i], input_precision=PRECISION),)
        sums, prob_sums, student_sums, entropies = new_sums, new_prob_sums, new_student_sums, new_entropies

    for j in tl.static_range(HEADS):
        part = ((head + j).to(tl.int64) * B + b) * SPLITS + s
        for i in tl.static_range(TILES):
            channel = channels + i * BLOCK_D + d
            moments = sums[j * TILES + i] * exact
            if HAS_SCALE and not UNIT_FEATURES:
                moments *= tl.load(scale_ptr + b * D + channel, mask=channel < D, other=0.0)[:, None]
            out_ptr = sums_ptr + part * D * BLOCK_K + channel[:, None] * BLOCK_K + k[None, :]
            tl.store(out_ptr, moments.to(sums_ptr.dtype.element_ty), mask=(channel < D)[:, None])
        if first_slice:
            tl.store(prob_sums_ptr + part * BLOCK_K + k, tl.sum(prob_sums[j], 0) * exact)
            if FROM_CODES:
                tl.store(entropy_ptr + part, tl.sum(entropies[j], 0) * exact)
                if STUDENT_GRADIENT:
                    student_out_ptr = student_sums_ptr + part * K * Z + k[None, :] * Z + z[:, None]
                    student_moments = (student_sums[j] * exact).to(student_sums_ptr.dtype.element_ty)
                    tl.store(student_out_ptr, student_moments, mask=(k < K)[None, :] & (z < Z)[:, None])
            if (b == 0) & (s == 0):
                tl.store(arrivals_ptr + head + j, 0)
    if first_slice & (s == 0) & (head == 0):
        tl.store(totals_ptr + b, total)
