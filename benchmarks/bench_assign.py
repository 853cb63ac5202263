"""Evaluation: labels of every pixel from a grid of patches, and their counts against labels to compare with."""

import problems
import pytest
import torch
from floors import Problem

# S/8 at 320 px; a CPU evaluates fewer pictures at a time
SHAPES = {"eval320_b4": Problem(B=4, P=1600), "eval320": problems.TRAINED["eval320"]}


@pytest.mark.parametrize("impl", ["dense", "torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_assign(shape, impl, bench):
    bench.unless_full(shape == "eval320" and not torch.cuda.is_available())
    bench.time("assign", shape, SHAPES[shape], impl, "forward", peak=True, pixels=20 if bench.smoke else 320)
