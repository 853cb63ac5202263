"""A whole head step on cached features: draws, projection, objective, gradients, teacher's update, Adam."""

import problems
import pytest
import torch

IMPLS = ["dense", "torch", *(["triton"] if torch.cuda.is_available() else [])]
SHAPES = {**problems.STEPS, **({"cityscapes_s8": problems.TRAINED["cityscapes_s8"]} if torch.cuda.is_available() else {})}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_head_step(shape, impl, bench):
    bench.time("head step", shape, SHAPES[shape], impl, "step", peak=True)
