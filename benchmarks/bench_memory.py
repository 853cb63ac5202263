"""Peak memory of the objective where it decides: one image of many patches. (The other benchmarks have it beside their times.)"""

import problems
import pytest
import torch
from floors import Problem

IMPLS = ["dense", "torch", *(["triton"] if torch.cuda.is_available() else [])]
SHAPES = {"p16384": Problem(B=1, P=16384), "fullres": problems.TRAINED["fullres"]}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_memory(shape, impl, bench):
    bench.memory(shape, SHAPES[shape], impl)
