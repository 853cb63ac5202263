"""A whole head step on cached features: draws, batch, projection, objective, gradients, teacher, Adam; on a card also from a CUDA graph."""

import problems
import pytest
import torch

IMPLS = ["dense", "torch", *(["triton"] if torch.cuda.is_available() else [])]
MODES = ["step", *(["captured step"] if torch.cuda.is_available() else [])]
SHAPES = {**problems.STEPS, "cityscapes_s8": problems.TRAINED["cityscapes_s8"]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_head_step(shape, impl, mode, bench):
    bench.time("head step", shape, SHAPES[shape], impl, mode, peak=True)


@pytest.mark.parametrize("shape", SHAPES)
def bench_step_products(shape, bench):
    bench.time("step products", shape, SHAPES[shape], "products alone", "step", case="head step")
