"""Bytes and floating-point operations, counted: what must move and be computed, and what each launch of ours moves.

A floor is what nobody can do without: inputs read once a pass, results written once, the products of the linear form. What could stay on
chip is left out.

python benchmarks/floors.py        # the table for the sizes of a COCO-Stuff step
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest import mock


@dataclass(frozen=True)
class Problem:
    B: int = 32
    P: int = 784
    D: int = 384
    Z: int = 64
    K: int = 27
    T: int = 2
    H: int = 1
    element: int = 2  # bytes of a feature and of a code

    @property
    def features(self) -> int:
        return self.B * self.P * self.D * self.element

    @property
    def codes(self) -> int:
        return self.H * self.B * self.P * self.Z * self.element


@dataclass(frozen=True)
class PairProblem:
    """An energy of pairs: [B,P,.] against [B,P,.]."""

    B: int = 32
    P: int = 784
    D: int = 384
    Z: int = 70
    element: int = 2
    H: ClassVar[int] = 1


@dataclass(frozen=True)
class Launch:
    name: str
    read: int
    written: int
    flops: int


def objective_floor(problem: Problem, backward: bool = True) -> int:
    """Forward and backward read features and codes once each; the gradient is written."""
    once = problem.features + problem.codes
    return 2 * once + problem.codes if backward else once


def objective_flops(problem: Problem, backward: bool = True) -> int:
    """Products alone. Forward: row norms, cosines to teacher and student, moments. Backward: A^T f, then to codes and student."""
    B, P, D, Z, K, H = problem.B, problem.P, problem.D, problem.Z, problem.K, problem.H
    norms, moments, cosines = 2 * B * P * D, 2 * H * B * P * D * K, 2 * H * B * P * Z * K
    return norms + moments + 2 * cosines + (moments + 2 * cosines if backward else 0)


def pairs_floor(problem: PairProblem, backward: bool = True) -> int:
    """Both sides' features and codes read once a pass; both gradients are written."""
    rows = 2 * problem.B * problem.P * problem.element
    return rows * (problem.D + problem.Z) * (2 if backward else 1) + (rows * problem.Z if backward else 0)


def pairs_flops(problem: PairProblem, backward: bool = True) -> int:
    """Products alone: both similarities of every pair once, and a gradient row to each side. A second pass over them is not counted."""
    return 2 * problem.B * problem.P**2 * (problem.D + (3 if backward else 1) * problem.Z)


def head_parameters(problem: Problem) -> int:
    """W1, W2, W3 with their biases, and the student."""
    D, Z, K = problem.D, problem.Z, problem.K
    return D * D + D + 2 * (D * Z + Z) + K * Z


def head_step_floor(problem: Problem) -> int:
    """Features read once forward and once backward; Adam reads and writes parameters and two moments, in fp32; so is the teacher."""
    return 2 * problem.features + 4 * (6 * head_parameters(problem) + 2 * problem.K * problem.Z)


def head_step_flops(problem: Problem) -> int:
    """The projection forward, its weights' gradients, the gradient through W3, and the objective."""
    B, P, D, Z = problem.B, problem.P, problem.D, problem.Z
    return 2 * B * P * (2 * (D * D + 2 * D * Z) + D * Z) + objective_flops(problem)


def assignment_floor(B: int, P: int, Z: int, H: int, W: int, element: int, label_bytes: int) -> int:
    """Codes in, int64 labels out, labels to compare with in."""
    return B * P * Z * element + B * H * W * (8 + label_bytes)


def assignment_flops(B: int, P: int, Z: int, K: int, H: int, W: int) -> int:
    """Numerators, and one interpolation (three operations) a pixel and prototype: the other direction costs less by the enlargement."""
    return 2 * B * P * Z * K + 3 * B * H * W * K


def floor_ms(floor_bytes: int, flops: int, bytes_per_s: float, flops_per_s: float) -> float:
    """The slower of moving and computing, at the ceilings of the same run."""
    return 1e3 * max(floor_bytes / bytes_per_s, flops / flops_per_s)


def objective_launches(problem: Problem, columns: int, splits: int, slices: int, norms_alone: bool) -> list[Launch]:
    """Every launch as if nothing stayed in the cache between launches, and everything within one.

    Partial sums have the size of what they were made of: `problem.element` bytes.
    """
    B, P, D, Z, K, T, H = problem.B, problem.P, problem.D, problem.Z, problem.K, problem.T, problem.H
    sums = H * B * splits * (D * columns * problem.element + columns * 4)
    students = H * B * splits * K * Z * problem.element
    pull = H * B * (D * columns * problem.element + (T + slices) * columns * 4)
    labels = 2 * H * B * P * Z * columns
    launches = []
    if norms_alone:
        launches.append(Launch("row_norms", problem.features, 4 * B * P, 2 * B * P * D))
    launches += [
        Launch(
            "image_moments",
            problem.features + problem.codes + (4 * B * P if norms_alone else 0),
            sums + students + (0 if norms_alone else 4 * B * P),
            2 * H * B * P * D * columns + 5 * labels + (0 if norms_alone else 2 * B * P * D),
        ),
        Launch("pair_sums", sums + students, pull + H * K * Z * 4, (4 + 4 * T) * H * B * D * columns),
        Launch(
            "energy_gradient",
            problem.features + problem.codes + pull + 4 * B * P,
            problem.codes + H * K * Z * 4,
            2 * H * B * P * D * columns + 3 * labels,
        ),
    ]
    return launches


def shipped_launches(problem: Problem, target: str) -> list[Launch]:
    """The launches of the shipped configuration of a GPU family ("sm_90"), from the very plan that the operators follow."""
    import torch

    from smooseg_kernels.triton import launch, objective

    dtype = {2: torch.bfloat16, 4: torch.float32}[problem.element]
    features, codes, teacher = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in (
            (problem.B, problem.P, problem.D),
            (problem.H, problem.B, problem.P, problem.Z),
            (problem.H, problem.K, problem.Z),
        )
    )
    with mock.patch.object(launch, "family", return_value=target):
        plan = objective.Plan(features, codes, teacher, problem.T)
    return objective_launches(problem, plan.columns, int(plan.splits), plan.pair_slices, plan.norms_alone)


def bytes_moved(launches: list[Launch]) -> int:
    return sum(launch.read + launch.written for launch in launches)


def table(problem: Problem, launches: list[Launch], bandwidth: float = 3.0e12) -> str:
    floor = objective_floor(problem)
    lines = [f"{'launch':16s} {'read MB':>9s} {'written MB':>11s} {'GFLOP':>7s} {'us at 3 TB/s':>13s}"]
    for launch in launches:
        moved = launch.read + launch.written
        sizes = f"{launch.read / 1e6:9.1f} {launch.written / 1e6:11.1f} {launch.flops / 1e9:7.2f}"
        lines.append(f"{launch.name:16s} {sizes} {moved / bandwidth * 1e6:13.1f}")
    total = bytes_moved(launches)
    lines.append(
        f"all {total / 1e6:.1f} MB, floor {floor / 1e6:.1f} MB ({floor / bandwidth * 1e6:.1f} us), {total / floor:.2f} times the floor"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels" / "torch-ext"))
    for heads in (1, 16):
        size = Problem(H=heads)
        print(f"H={heads}, as shipped for sm_90")
        print(table(size, shipped_launches(size, "sm_90")))
