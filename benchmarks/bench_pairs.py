"""pair_energy: STEGO's sampling (11 x 11 points an image) and all patches, in every implementation."""

import pytest
import torch
from floors import PairProblem

# the dense form has several matrices of pairs: on a CPU fewer pictures, on a card as many as 24 GB hold
CPU = {"all_784_b8": PairProblem(B=8), "all_1600_b4": PairProblem(B=4, P=1600), "all_4096_b1": PairProblem(B=1, P=4096)}
CARD = {"all_784": PairProblem(), "all_1600": PairProblem(P=1600), "all_4096": PairProblem(B=8, P=4096)}
SHAPES = {"stego_b32": PairProblem(P=121), **(CARD if torch.cuda.is_available() else CPU)}
COMPILED = tuple(SHAPES)[:2]  # in the default run: each takes seconds to compile, or minutes


@pytest.mark.parametrize("impl", ["dense", "torch", "triton"])
@pytest.mark.parametrize("mode", ["forward", "forward + backward", "graph"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_pairs(shape, mode, impl, bench):
    bench.time("pairs", shape, SHAPES[shape], impl, mode, peak=mode == "forward + backward")


@pytest.mark.parametrize("impl", ["dense + compile", "torch + compile"])
@pytest.mark.parametrize("mode", ["graph", "forward + backward"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_compiled_pairs(shape, mode, impl, bench):
    bench.unless_full(shape not in COMPILED)
    bench.time("pairs", shape, SHAPES[shape], impl, mode)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def bench_whole_picture(impl, bench):
    """16,384 patches of one image against as many."""
    bench.time("pairs", "p16384", PairProblem(B=1, P=16384), impl, "forward + backward", peak=True)
