"""A whole head step on cached features: draws, batch, projection, objective, gradients, teacher, Adam; on a card also from a CUDA graph.

On a CPU in both precisions of the projection, each beside the same step with the dense objective and beside its own matrix products.
"""

import problems
import pytest
import torch

CARD = torch.cuda.is_available()
IMPLS = ["dense", "torch", *(["triton"] if CARD else [])]
MODES = ["step", *(["captured step"] if CARD else [])]
DTYPES = ["bfloat16"] if CARD else ["float32", "bfloat16"]
SHAPES = {**problems.STEPS, "cityscapes_s8": problems.TRAINED["cityscapes_s8"]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_head_step(shape, dtype, impl, mode, bench):
    bench.time("head step", shape, SHAPES[shape], impl, mode, dtype=dtype, peak=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_step_products(shape, dtype, bench):
    bench.time("step products", shape, SHAPES[shape], "products alone", "step", case="head step", dtype=dtype)


@pytest.mark.skipif(CARD, reason="a card's memory has an allocator of its own")
@pytest.mark.parametrize("dtype", DTYPES)
def bench_dense_step_as_shipped(dtype, bench):
    bench.time_as_shipped("head step", "cityscapes_s8", SHAPES["cityscapes_s8"], "dense", "step", dtype)
