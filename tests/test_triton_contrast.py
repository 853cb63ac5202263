"""The kernels of `contrastive_loss` against the dense oracle, in the interpreter or on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
from contrast_cases import KINDS, check, evaluate, make_contrast
from torch.library import opcheck
from triton_cases import EPS, FP32_EPS

import smooseg_kernels as sk
from smooseg_kernels.triton import contrast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def check_against_dense(case, **options):
    return check(case, "triton", max(FP32_EPS, EPS[case.codes_i.dtype]), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_positives(kind, dtype, poisoned):
    """Checks both forms at sizes that are no multiples of a block."""
    check_against_dense(make_contrast(kind, N=67, M=29, dtype=dtype, device=DEVICE))
    check_against_dense(make_contrast(kind, N=19, M=19, dtype=dtype, device=DEVICE, inside=True, exclude_self=True))


@pytest.mark.parametrize("shape", [dict(N=1, M=3, D=2, Z=2), dict(N=5, M=65, D=150, Z=150)], ids=str)
def test_small_rows_and_rows_too_wide_for_a_chip(shape, poisoned):
    check_against_dense(make_contrast("threshold", dtype=torch.float32, device=DEVICE, reduction="none", **shape))


@pytest.mark.parametrize("inside", [False, True])
def test_small_temperature_and_huge_logits(inside):
    check_against_dense(make_contrast(dtype=torch.float32, device=DEVICE, temperature=0.01, inside=inside))
    got = evaluate(make_contrast(dtype=torch.float32, device=DEVICE, temperature=1e-5, inside=inside), "triton", (1.0,))
    assert all(x.isfinite().all() for x in itertools.chain(got.values.values(), got.gradients.values()))


def test_no_positives_and_nobody_to_compare_with(poisoned):
    x = make_contrast("threshold", dtype=torch.float32, device=DEVICE, reduction="none")
    got = evaluate(x, "triton", (1.0,), threshold=1.5)
    assert not got.values["loss"].any()
    assert not got.values["count"].any()
    assert not got.gradients["codes_i"].any()
    alone = evaluate(make_contrast(N=1, M=1, dtype=torch.float32, device=DEVICE, exclude_self=True), "triton", (1.0,))
    assert not alone.values["log_sum"].any()
    assert not alone.gradients["codes_j"].any()


def test_tiny_gradients_in_sixteen_bits():
    """Weights of pairs reach the matrix unit lifted over the largest that arrives, not as fp16's subnormals."""
    x = make_contrast(dtype=torch.float16, device=DEVICE)
    codes = [c.detach().float().requires_grad_() for c in (x.codes_i, x.codes_j)]
    gradients = []
    for impl in ("triton", "dense"):
        loss = (
            sk.contrastive_loss(*(c.half() for c in codes), impl=impl, **x.options).loss if impl == "triton" else None
        )
        loss = sk.contrastive_loss(*codes, impl=impl, **x.options).loss if loss is None else loss
        gradients.append(torch.autograd.grad(loss * 1e-2, codes))
    for got, want in zip(*gradients):
        assert (got - want).norm() < 2e-3 * want.norm()


def test_operators_pass_opcheck():
    x = make_contrast("either side", N=5, M=7, dtype=torch.float32, device=DEVICE)
    codes = [c.requires_grad_() for c in (x.codes_i, x.codes_j)]
    option = x.options
    arguments = (*codes, torch.tensor(0.2, device=DEVICE), None, None, option["features_i"], option["features_j"])
    arguments += (option["threshold"], option["threshold_j"], None, False, True)
    opcheck(contrast.contrast, arguments)


def test_compiles_whole():
    x = make_contrast("threshold", N=7, M=9, dtype=torch.float32, device=DEVICE)

    def function(*codes):
        return sk.contrastive_loss(*codes, impl="triton", **x.options).loss

    codes = [c.requires_grad_() for c in (x.codes_i, x.codes_j)]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(*(torch.autograd.grad(f(*codes), codes) for f in (compiled, function)))
