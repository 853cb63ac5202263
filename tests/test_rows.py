"""The rule of short rows and the accumulation dtype, which every implementation takes from one place."""

from __future__ import annotations

import torch

from smooseg_kernels.rows import accumulation_dtype, unit_rows


def test_rows_below_the_shortest_length_are_zero_with_gradient_zero():
    rows = torch.tensor(
        [[0.9e-10, 0.0], [1.1e-10, 0.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True
    )
    unit = unit_rows(rows)
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(unit, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(unit[:, 1].sum() + unit[:, 0].sum(), rows)
    assert not gradient[[0, 2]].any()
    torch.testing.assert_close(gradient[3], torch.tensor([0.032, -0.024], dtype=torch.float64))


def test_one_input_of_64_bits_makes_the_sums_so():
    half, single, double = (torch.zeros(1, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64))
    assert accumulation_dtype(half, single) == accumulation_dtype(half) == torch.float32
    assert accumulation_dtype(half, double, single) == torch.float64
