"""A whole head step on cached features: draws, batch, projection, objective, gradients, teacher, Adam; on a card also from a CUDA graph.

On a CPU in both precisions of the projection, each beside the same step with the dense objective and beside its own matrix products.
"""

import problems
import pytest
import torch

CARD = torch.cuda.is_available()
MODES = ["step", *(["captured step"] if CARD else [])]
RUNS = [(impl, mode) for impl in ("dense", "torch", *(["triton"] if CARD else [])) for mode in MODES]
DTYPES = ["bfloat16"] if CARD else ["float32", "bfloat16"]
SHAPES = {**problems.STEPS, "cityscapes_s8": problems.TRAINED["cityscapes_s8"]}


@pytest.mark.parametrize(
    ("impl", "mode"), [*RUNS, ("products alone", "step")]
)  # one behind the other: a machine drifts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_head_step(shape, dtype, impl, mode, bench):
    if impl == "products alone":
        bench.time("step products", shape, SHAPES[shape], impl, mode, case="head step", dtype=dtype)
    else:
        bench.time("head step", shape, SHAPES[shape], impl, mode, dtype=dtype, peak=True)


@pytest.mark.skipif(CARD, reason="a card's memory has an allocator of its own")
@pytest.mark.parametrize("dtype", DTYPES)
def bench_dense_step_as_shipped(dtype, bench):
    bench.time_as_shipped("head step", "cityscapes_s8", SHAPES["cityscapes_s8"], "dense", "step", dtype)
