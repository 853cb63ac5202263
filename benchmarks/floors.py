"""Bytes and floating-point operations, counted: what the objective must move, and what each launch of ours moves.

python benchmarks/floors.py        # the table for the sizes of a COCO-Stuff step
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
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
class Launch:
    name: str
    read: int
    written: int
    flops: int


def objective_floor(problem: Problem) -> int:
    """Forward and backward read features and codes once each; the gradient is written."""
    return 2 * (problem.features + problem.codes) + problem.codes


def assignment_floor(B: int, P: int, Z: int, H: int, W: int, element: int, label_bytes: int) -> int:
    """Codes in, int64 labels out, labels to compare with in."""
    return B * P * Z * element + B * H * W * (8 + label_bytes)


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
