"""How time and peak memory grow with one size at a time, forward + backward; dense stops where its matrices no longer fit."""

from dataclasses import replace

import pytest
import torch
from floors import Problem

IMPLS = ["torch", "dense", *(["triton"] if torch.cuda.is_available() else [])]
BASE = {"P": Problem(B=8), "H": Problem(B=4), "K": Problem(B=4), "B": Problem()}
DEFAULT = {"P": (196, 784, 1568, 3136, 6272, 12544, 32768), "H": (1, 4, 16, 64), "K": (3, 27, 243), "B": (2, 8, 32)}
SIZES = {  # with --bench-full
    "P": (196, 392, 784, 1568, 3136, 6272, 12544, 32768),
    "H": (1, 2, 4, 8, 16, 32, 64),
    "K": (3, 9, 27, 81, 243),
    "B": (2, 4, 8, 16, 32),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("letter", "size"), [(letter, size) for letter in SIZES for size in SIZES[letter]])
def bench_scaling(letter, size, impl, bench):
    if bench.smoke and size != DEFAULT[letter][1]:
        pytest.skip("one size in smoke form")
    bench.unless_full(size not in DEFAULT[letter])
    problem = replace(BASE[letter], **{letter: size})
    bench.time(
        "objective",
        f"{letter}{size}",
        problem,
        impl,
        "forward + backward",
        case=f"scaling {letter}",
        peak=letter == "P",
    )
