"""Quantities that must not grow: launches and counted bytes of the fused kernels, operations and tensors of the
moment form.

A change that lowers a number here lowers it in the table too.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import counting
import floors
import problems
import pytest
import torch

MODE = "forward + backward"
# H and K: launches of a step, bytes they move in all over those that must move (bf16, B 32, P 784, D 384, Z 64)
LAUNCHES = {(1, 27): (4, 1.60), (16, 27): (6, 1.68), (1, 100): (6, 2.29)}


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "sm_100"])
@pytest.mark.parametrize(("H", "K"), LAUNCHES)
def test_fused_launches_and_their_bytes(H, K, target, monkeypatch):
    pytest.importorskip("triton")
    from smooseg_kernels.triton import launch, objective

    started = []
    package = [module for name, module in sys.modules.items() if name.startswith("smooseg_kernels.triton")]
    for module in [module for module in package if getattr(module, "launch", None) is launch.launch]:
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: started.append(kernel.__name__))
    monkeypatch.setattr(launch, "family", lambda device: target)

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    size = floors.Problem(H=H, K=K)
    features, codes = (
        tensor(size.B, size.P, size.D, dtype=torch.bfloat16),
        tensor(H, size.B, size.P, size.Z, dtype=torch.bfloat16),
    )
    student, teacher = tensor(H, size.K, size.Z), tensor(H, size.K, size.Z)
    common = (
        features,
        codes,
        student,
        teacher,
        tensor(1, size.B, dtype=torch.int64),
        (-1, 0),
        tensor(H, size.T),
        None,
        None,
    )
    out = objective.objective.launcher(*common, None, None, 0.1, False, True, True, True)
    objective.objective_backward.launcher(
        out[0], None, None, None, *common, out[4], list(out[5:]), 0.1, False, True, True, True
    )
    plan = objective.Plan(features, codes, teacher, size.T)
    counted = floors.objective_launches(size, plan)
    assert [name.removesuffix("_kernel") for name in started] == list(counted)
    most, ratio = LAUNCHES[H, K]
    assert len(started) <= most, started
    moved = sum(counted.values())
    assert moved <= ratio * floors.objective_floor(size), (
        f"{moved:,} bytes, {moved / floors.objective_floor(size):.3f} times the floor"
    )


# H: operations PyTorch dispatches (five to spare for its versions), bytes of the largest tensor, of all alive at once
SMALL = problems.of_dtype(floors.Problem(B=4, P=196, D=64, K=11), torch.float32)
COUNTS = {1: (341, 200_704, 611_988), 16: (335, 3_211_264, 9_791_808)}


@pytest.mark.parametrize("H", COUNTS)
def test_operations_and_tensors_of_the_moment_form(H):
    operations, largest, alive = COUNTS[H]
    counts = counting.count(problems.objective(replace(SMALL, H=H), "torch", MODE, torch.float32, "meta").run)
    assert counts.operations <= operations
    assert counts.largest_bytes <= largest
    assert counts.peak_bytes <= alive


def test_no_pair_matrix_at_any_size():
    """The memory of the moment form grows with P, that of dense with its square."""
    held = {}
    for impl in ("torch", "dense"):
        sizes = (replace(SMALL, P=P) for P in (4096, 16384))
        held[impl] = [counting.count(problems.objective(size, impl, MODE, torch.float32, "meta").run) for size in sizes]
    assert held["torch"][1].peak_bytes <= 4 * held["torch"][0].peak_bytes
    assert held["dense"][1].peak_bytes >= 15 * held["dense"][0].peak_bytes


def test_counts_of_known_operations():
    def run():
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000 alive
        del a
        return b.view(10, 100) * 2  # a view is no new tensor; 8000 again

    counts = counting.count(run)
    assert (counts.operations, counts.largest_bytes, counts.peak_bytes) == (4, 4000, 8000)


def test_floors_by_hand():
    size = floors.Problem(B=2, P=3, D=5, Z=7, K=11, element=4)
    assert floors.objective_floor(size, backward=False) == 4 * 6 * (5 + 7)
    assert floors.objective_floor(size) == 4 * 6 * (2 * 5 + 3 * 7)
    # row norms; then forward and backward alike: features with K labels, and codes with prototypes twice
    assert floors.objective_flops(size) == 2 * 6 * 5 + 2 * (2 * 6 * 5 * 11 + 2 * 2 * 6 * 7 * 11)
    assert floors.floor_ms(2000, 3000, bytes_per_s=1e6, flops_per_s=1e6) == 3.0
    assert floors.student_rows_flops(size) == 2 * (2 * 6 * 7 * 11)
    # 21 GFLOP of matrix products in the head
    assert floors.head_step_flops(floors.Problem()) - floors.objective_flops(floors.Problem()) == pytest.approx(
        21e9, rel=0.01
    )
