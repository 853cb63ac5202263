"""smooseg_loss in every implementation at the trained sizes: forward, forward + backward, and on a card that from a CUDA graph."""

import problems
import pytest
import torch

GPU = torch.cuda.is_available()
SHAPES = {**problems.SMALL, **problems.TRAINED}
IMPLS = ["dense", "torch", *(["triton"] if GPU else [])]
GRADIENT = "graph" if GPU else "forward + backward"
COMPILED = (
    ("cityscapes_s8", "heads16") if GPU else tuple(problems.SMALL)
)  # in the default run: each takes seconds to compile, or minutes


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["forward", "forward + backward", *(["graph"] if GPU else [])])
@pytest.mark.parametrize("shape", SHAPES)
def bench_objective(shape, mode, impl, bench):
    bench.time("objective", shape, SHAPES[shape], impl, mode, peak=mode == "forward + backward")


@pytest.mark.parametrize("impl", ["dense + compile", "torch + compile"])
@pytest.mark.parametrize("mode", [*(["graph"] if GPU else []), "forward + backward"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_compiled(shape, mode, impl, bench):
    bench.unless_full(shape not in COMPILED)
    bench.time("objective", shape, SHAPES[shape], impl, mode)


def bench_keops(bench):
    """Every pair without a matrix: minutes, so one size."""
    bench.unless_full(True)
    bench.time("objective", "b8_p784", SHAPES["b8_p784"], "keops", "forward + backward")
