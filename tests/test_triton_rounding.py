"""The objective's kernels in bf16: their error is that of the roundings that rounding.py lists, and no other.

Triton's interpreter truncates to bf16 and cannot multiply it, so kernels read bf16 as fp32 there. Here it learns both.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from rounding import ROUNDINGS, check_rounding, errors, parts_of, rounded_objective
from triton.runtime import interpreter
from triton_cases import evaluate, make_case

from smooseg_kernels.triton import launch, plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def rounds_as_a_card(monkeypatch):
    if not launch.INTERPRETED:
        return
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def to_nearest(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    def wide(builder, operand):
        shape = list(operand.data.shape)
        is_bf16 = operand.dtype.scalar == tl.bfloat16
        return builder.cast_impl(operand, tl.block_type(tl.float32, shape)) if is_bf16 else operand

    monkeypatch.setattr(interpreter, "_convert_float", to_nearest)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda builder, a, b, *rest: dot(builder, wide(builder, a), wide(builder, b), *rest),
    )
    for module in (launch, plan):
        monkeypatch.setattr(module, "operand_dtype", lambda dtype: dtype)


def every_option(B, P, D):
    generator = torch.Generator().manual_seed(3)
    scale = (torch.rand(B, D, generator=generator) > 0.3) * 1.25
    weight = torch.rand(B, P, generator=generator) * (torch.arange(B) != 1)[:, None]
    return {"channel_scale": scale, "patch_weight": weight, "relative": True, "partners": ("self", "index", "all")}


CASES = {
    "small": dict(B=3, P=33, D=20, K=5, Z=6),
    "uncentred": dict(B=3, P=33, D=20, K=5, Z=6, center=False, temperature=0.04),
    "mean": dict(B=3, P=33, D=20, K=5, Z=6, mean=torch.tensor([0.1, -0.2])),
    "options, heads": dict(B=4, P=33, D=20, K=5, Z=6, H=2, **every_option(4, 33, 20)),
    "one head of training": dict(B=2, P=784, D=384, K=27, Z=64),
    "heads of training": dict(B=2, P=196, D=384, K=27, Z=64, H=3, channel_scale=torch.ones(2, 384) * 1.25),
}


def case_of(name):
    return make_case(dtype=torch.bfloat16, device=DEVICE, **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_without_roundings_it_is_the_oracle(name):
    case = case_of(name)
    oracle = evaluate(case.to(torch.float64), "dense")
    assert max(errors(rounded_objective(case, roundings=()), oracle).values()) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_kernels_round_where_the_list_says(name, rounds_as_a_card, poisoned):
    case = case_of(name)
    got, oracle = evaluate(case, "triton"), evaluate(case.to(torch.float64), "dense")
    check_rounding(case, got, oracle)


def test_a_missing_rounding_is_seen(rounds_as_a_card):
    """The check is sharp: a result without one of the large roundings does not pass."""
    case = case_of("one head of training")
    oracle = evaluate(case.to(torch.float64), "dense")
    for missing in ("label rows", "student rows", "logits"):
        rest = [name for name in ROUNDINGS if name != missing]
        with pytest.raises(AssertionError, match="from the rounded one"):
            check_rounding(case, rounded_objective(case, rest, parts_of(case)), oracle)


def test_the_budget():
    """The errors that the format costs at training's sizes, which docs/performance.md has for a whole batch."""
    case = make_case(B=4, P=784, D=384, K=27, Z=64, dtype=torch.bfloat16)
    found = errors(rounded_objective(case), evaluate(case.to(torch.float64), "torch"))
    budget = {"total": 1e-4, "energy": 1e-4, "data": 1e-6, "distance": 1e-6, "mean": 1e-4}
    budget |= {"d_codes": 4.5e-3, "d_student": 1e-3}
    assert all(found[name] <= most for name, most in budget.items()), found
