"""A whole head step on cached features: draws, batch, projection, objective, gradients, teacher, Adam.

A card also replays it from a CUDA graph; a CPU runs it in both precisions of the projection.
"""

import problems
import pytest
import torch
from floors import Problem

DTYPES = ["bfloat16"] if torch.cuda.is_available() else ["float32", "bfloat16"]
SHAPES = {**problems.STEPS, "cityscapes_s8": problems.TRAINED["cityscapes_s8"]}


@pytest.mark.parametrize("impl", ["dense", "torch", "triton"])  # one behind the other: a machine drifts
@pytest.mark.parametrize("mode", ["step", "captured step"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_head_step(shape, dtype, mode, impl, bench):
    bench.time("head step", shape, SHAPES[shape], impl, mode, dtype=dtype, peak=True)


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("mode", ["step", "captured step"])
def bench_many_heads(mode, impl, bench):
    bench.time("head step", "heads64", Problem(H=64), impl, mode)
