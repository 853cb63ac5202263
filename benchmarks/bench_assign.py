"""Evaluation: labels of every pixel from a grid of patches, and their counts against labels to compare with."""

import problems
import pytest
import torch
from floors import Problem

GPU = torch.cuda.is_available()
IMPLS = ["dense", "torch", *(["triton"] if GPU else [])]
# S/8 at 320 px; a CPU takes fewer pictures at a time, as its evaluation does
SHAPES = (
    {"eval320": problems.TRAINED["eval320"]}
    if GPU
    else {"eval320_b4": Problem(B=4, P=1600), "eval320": problems.TRAINED["eval320"]}
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_assign(shape, impl, bench):
    bench.unless_full(shape == "eval320" and not GPU)
    bench.time("assign", shape, SHAPES[shape], impl, "forward", peak=True, pixels=20 if bench.smoke else 320)
