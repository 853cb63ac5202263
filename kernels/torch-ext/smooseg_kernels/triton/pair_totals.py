"""The last program of a head adds up the parts of the sums over pairs, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import LIFT
from .pair_sets import count_pairs

BLOCK = tl.constexpr(512)  # parts that are loaded at a time


@triton.jit
def finish_energies(
    # in
    parts_ptr, entropy_ptr, totals_ptr, partners_ptr, thresholds_ptr, given_mean_ptr, factors_ptr,
    # out
    total_ptr, energy_ptr, data_ptr, distance_ptr, mean_ptr,
    # sizes
    h, B, stride_th, stride_tt, T: tl.constexpr, ENTRIES: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_B: tl.constexpr, IMAGE_BLOCKS: tl.constexpr,
    # switches
    RELATIVE: tl.constexpr, CENTER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_MEAN: tl.constexpr,
    HAS_DATA: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds up a head: energy = (M - b) distance - inner / pairs; not centred uu / pairs instead of M distance.

    Returns, for each pair set, the factor of its labels' pull on an image. Loads come before the sums, which wait.
    """
    scale, total, slopes = 1.0 / (LIFT * LIFT), tl.zeros((), tl.float32), ()
    biases, means = (), ()
    for t in tl.static_range(T):
        biases = biases + (tl.load(thresholds_ptr + h * stride_th + t * stride_tt),)
        if HAS_MEAN:
            means = means + (tl.load(given_mean_ptr + t),)
    count = B * SLICES
    parts_ptr += h * T * 3 * count
    sums = load_parts(parts_ptr, 0, count, 3 * T)
    if HAS_DATA:
        entropy_ptr += h * B * PARTS
        entropy, weight = load_entropy(entropy_ptr, totals_ptr, 0, B * PARTS, PARTS, HAS_WEIGHT)
        for start in range(BLOCK, B * PARTS, BLOCK):
            more_entropy, more_weight = load_entropy(entropy_ptr, totals_ptr, start, B * PARTS, PARTS, HAS_WEIGHT)
            entropy, weight = entropy + more_entropy, weight + more_weight
    for start in range(BLOCK, count, BLOCK):
        more, new_sums = load_parts(parts_ptr, start, count, 3 * T), ()
        for i in tl.static_range(3 * T):
            new_sums = new_sums + (sums[i] + more[i],)
        sums = new_sums
    for t in tl.static_range(T):
        pairs = count_pairs(totals_ptr, partners_ptr, B, ENTRIES[t], BLOCK_B, IMAGE_BLOCKS, HAS_WEIGHT=HAS_WEIGHT)
        divisor = tl.maximum(pairs, 1.0)
        inner, likeness = tl.sum(sums[3 * t], 0) * scale / divisor, tl.sum(sums[3 * t + 1], 0) * scale / divisor
        distance = (pairs - tl.sum(sums[3 * t + 2], 0) * scale) / divisor
        mean = likeness
        if HAS_MEAN:
            mean = means[t]
        bias = biases[t]
        if RELATIVE:
            bias += mean
        if CENTER:
            slope = mean - bias
            energy = slope * distance - inner
        else:
            slope = -bias
            energy = likeness + slope * distance - inner
        tl.store(energy_ptr + h * T + t, energy)
        tl.store(distance_ptr + h * T + t, distance)
        if h == 0:
            tl.store(mean_ptr + t, mean)
        total += energy
        if not UNIT:
            factor_ptr = factors_ptr + h * 2 * T + t
            slope = slope * tl.load(factor_ptr) + tl.load(factor_ptr + T)
        slopes = slopes + (slope * (B / divisor),)
    if HAS_DATA:
        data = tl.sum(entropy, 0) / LIFT
        if HAS_WEIGHT:
            data /= tl.maximum(tl.sum(weight, 0) / PARTS, 1e-38)
        else:
            data /= B
        tl.store(data_ptr + h, data)
        total += data
    tl.store(total_ptr + h, total)
    return slopes


@triton.jit
def load_parts(ptr, start, count, SUMS: tl.constexpr):
    """Loads BLOCK floats of each of SUMS arrays that other programs wrote, past this multiprocessor's cache."""
    i, parts = start + tl.arange(0, BLOCK), ()
    for j in tl.static_range(SUMS):
        parts = parts + (tl.load(ptr + j * count + i, mask=i < count, other=0.0, cache_modifier=".cg"),)
    return parts


@triton.jit
def load_entropy(entropy_ptr, totals_ptr, start, count, PARTS: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """Loads BLOCK parts of a head's cross-entropy as they count, and their images' weights."""
    i = start + tl.arange(0, BLOCK)
    entropy = tl.load(entropy_ptr + i, mask=i < count, other=0.0)
    weight = tl.zeros((BLOCK,), tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(totals_ptr + i // PARTS, mask=i < count, other=0.0)
        entropy *= weight
    return entropy, weight


@triton.jit
def load_pulls(
    label_pull_ptr, drift_ptr, first, B, T: tl.constexpr, SLICES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """Loads for BLOCK_ROWS images from `first` on the labels' pull of each pair set, then the drift."""
    k, image = tl.arange(0, BLOCK_K)[None, :], (first + tl.arange(0, BLOCK_ROWS))[:, None]
    pulls, drift = (), tl.zeros((BLOCK_ROWS, BLOCK_K), tl.float32)
    for t in tl.static_range(T):
        pull_ptr = label_pull_ptr + (image * T + t) * BLOCK_K + k
        pulls = pulls + (tl.load(pull_ptr, mask=image < B, other=0.0, cache_modifier=".cg"),)
    if CENTER:
        for i in tl.static_range(SLICES):
            part_ptr = drift_ptr + (image * SLICES + i) * BLOCK_K + k
            drift += tl.load(part_ptr, mask=image < B, other=0.0, cache_modifier=".cg")
    return pulls + (drift,)


@triton.jit
def store_constants(
    constant_ptr, slopes, pulls, first, B, T: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Writes the part of d_c that all patches of an image share."""
    k, image = tl.arange(0, BLOCK_K)[None, :], (first + tl.arange(0, BLOCK_ROWS))[:, None]
    constant = -pulls[T]
    for t in tl.static_range(T):
        constant += slopes[t] * pulls[t]
    tl.store(constant_ptr + image * BLOCK_K + k, constant, mask=image < B)


@triton.jit
def add_up(ptr, count):
    """Adds up `count` floats that other programs wrote. The loads bypass this multiprocessor's cache."""
    acc = load_parts(ptr, 0, count, 1)[0]
    for start in range(BLOCK, count, BLOCK):
        acc += load_parts(ptr, start, count, 1)[0]
    return tl.sum(acc, 0)


@triton.jit
def upstream_kernel(
    # in
    d_total_ptr,  # [H] fp32
    d_energy_ptr,  # [H,T] fp32
    d_distance_ptr,  # [H,T] fp32
    # out
    factors_ptr,  # [H,2,T] fp32: gradients that arrive at energies and distances, relative to the largest
    largest_ptr,  # [H] fp32: the largest, or 1 for none
    arrivals_ptr,  # [H] int32: zero, for the launch that follows
    # sizes
    stride_total, T: tl.constexpr, BLOCK_T: tl.constexpr,
    # switches
    HAS_TOTAL: tl.constexpr, HAS_ENERGY: tl.constexpr, HAS_DISTANCE: tl.constexpr,
):  # fmt: skip
    """Takes a head's upstream gradients relative to the largest, so that a loss scale meets no 16-bit range."""
    h, t = tl.program_id(0), tl.arange(0, BLOCK_T)
    energy, distance = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    if HAS_TOTAL:
        energy += tl.where(t < T, tl.load(d_total_ptr + h * stride_total), 0.0)
    if HAS_ENERGY:
        energy += tl.load(d_energy_ptr + h * T + t, mask=t < T, other=0.0)
    if HAS_DISTANCE:
        distance += tl.load(d_distance_ptr + h * T + t, mask=t < T, other=0.0)
    largest = tl.max(tl.maximum(tl.abs(energy), tl.abs(distance)), 0)
    largest = tl.where(largest > 0, largest, 1.0)
    tl.store(factors_ptr + h * 2 * T + t, energy / largest, mask=t < T)
    tl.store(factors_ptr + (h * 2 + 1) * T + t, distance / largest, mask=t < T)
    tl.store(largest_ptr + h, largest)
    tl.store(arrivals_ptr + h, 0)
