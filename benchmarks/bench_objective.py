"""smooseg_loss in every implementation at the trained sizes, and peak memory; on a card also from a CUDA graph."""

import problems
import pytest
import torch
from floors import Problem

SHAPES = {**problems.SMALL, **problems.TRAINED, "p16384": Problem(B=1, P=16384)}
# compiled in the default run: each takes seconds, or on a card minutes
COMPILED = ("cityscapes_s8", "heads16") if torch.cuda.is_available() else tuple(problems.SMALL)


@pytest.mark.parametrize("impl", ["dense", "torch", "triton"])
@pytest.mark.parametrize("mode", ["forward", "forward + backward", "graph"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_objective(shape, mode, impl, bench):
    bench.time("objective", shape, SHAPES[shape], impl, mode, peak=mode == "forward + backward")


@pytest.mark.parametrize("impl", ["dense + compile", "torch + compile"])
@pytest.mark.parametrize("mode", ["graph", "forward + backward"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_compiled(shape, mode, impl, bench):
    bench.unless_full(shape not in COMPILED)
    bench.time("objective", shape, SHAPES[shape], impl, mode)
