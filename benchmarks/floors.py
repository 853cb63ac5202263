"""Bytes and floating-point operations, counted: what must move and be computed, and what each launch of ours moves.

A floor has the inputs read once a pass, the results written once, and the products of the linear form. Values that
could stay on chip do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


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
    B: int = 32
    P: int = 784
    D: int = 384
    Z: int = 70
    element: int = 2
    H: ClassVar[int] = 1


def objective_floor(problem: Problem, backward: bool = True) -> int:
    """Forward and backward read features and codes once each; the gradient is written."""
    once = problem.features + problem.codes
    return 2 * once + problem.codes if backward else once


def objective_flops(problem: Problem, backward: bool = True) -> int:
    """Products alone. Forward: row norms, cosines to prototypes, moments. Backward: A^T f, to codes and student."""
    B, P, D, Z, K, H = problem.B, problem.P, problem.D, problem.Z, problem.K, problem.H
    norms, moments, cosines = 2 * B * P * D, 2 * H * B * P * D * K, 2 * H * B * P * Z * K
    return norms + moments + 2 * cosines + (moments + 2 * cosines if backward else 0)


def pairs_floor(problem: PairProblem, backward: bool = True) -> int:
    """Both sides' features and codes read once a pass; both gradients are written."""
    rows = 2 * problem.B * problem.P * problem.element
    return rows * (problem.D + problem.Z) * (2 if backward else 1) + (rows * problem.Z if backward else 0)


def pairs_flops(problem: PairProblem, backward: bool = True) -> int:
    """Products alone: both similarities of every pair once, and a gradient row to each side."""
    return 2 * problem.B * problem.P**2 * (problem.D + (3 if backward else 1) * problem.Z)


def head_step_floor(problem: Problem) -> int:
    """Features read forward and backward; Adam reads and writes fp32 parameters and two moments, the teacher itself."""
    D, Z, K = problem.D, problem.Z, problem.K
    parameters = D * D + D + 2 * (D * Z + Z) + K * Z  # W1, W2, W3 with their biases, and the student
    return 2 * problem.features + 4 * (6 * parameters + 2 * K * Z)


def head_step_flops(problem: Problem) -> int:
    """The projection forward, its weights' gradients, the gradient through W3, and the objective."""
    B, P, D, Z = problem.B, problem.P, problem.D, problem.Z
    return 2 * B * P * (2 * (D * D + 2 * D * Z) + D * Z) + objective_flops(problem)


def assignment_floor(problem: Problem, pixels: int) -> int:
    """Codes in, int64 labels out, uint8 labels to compare with in; `pixels` of one picture."""
    return problem.codes + problem.B * pixels * (8 + 1)


def assignment_flops(problem: Problem, pixels: int) -> int:
    """Numerators, and one interpolation (three operations) a pixel and prototype; that along columns costs less."""
    return problem.B * problem.K * (2 * problem.P * problem.Z + 3 * pixels)


def floor_ms(floor_bytes: int, flops: int, bytes_per_s: float, flops_per_s: float) -> float:
    """The slower of moving and computing, at the ceilings of the same run."""
    return 1e3 * max(floor_bytes / bytes_per_s, flops / flops_per_s)


def objective_launches(problem: Problem, plan: Any) -> dict[str, int]:
    """Bytes that every launch moves, as if nothing stayed in the cache between launches, and everything within one.

    `plan` is the launchers' own (smooseg_kernels.triton.plan). Partial sums have the element size of their summands.
    """
    B, P, D, Z, K, H = problem.B, problem.P, problem.D, problem.Z, problem.K, problem.H
    columns, element = H * plan.columns, problem.element
    norms, sides, students = 4 * B * P, B * P * columns * element, H * K * Z * 4
    means = B * plan.parts * columns * 4
    data = B * plan.parts * (H * 4 + H * K * Z * element)  # cross-entropy, and sums for the student
    sums, pull = plan.splits * B * D * columns * element, B * columns * (D * element + 4)
    norms_apart = H > 1 or element == 4
    launches = {"row_norms": problem.features + norms} if norms_apart else {}
    if plan.prepared:
        launches["prepare"] = 3 * students
    label_rows = problem.codes + (0 if norms_apart else problem.features) + norms + sides + means
    if plan.student:  # the teacher's labels, int16, go from one launch to the next
        labels = H * B * P * 2
        launches |= {"label_rows": label_rows + labels, "student_rows": problem.codes + labels + data}
    else:
        launches["label_rows"] = label_rows + data
    return launches | {
        "row_products": problem.features + sides + sums,
        "pair_sums": sums + means + data + pull + students,
        "energy_gradient": problem.features + 2 * problem.codes + pull + norms + students,
    }


def student_rows_flops(problem: Problem) -> int:
    """Products of the data term's own launch, which large prototypes have: cosines, and sums for the student."""
    return 4 * problem.H * problem.B * problem.P * problem.Z * problem.K
