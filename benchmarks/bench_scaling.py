"""How time and peak memory grow with one size at a time; dense stops where its matrices no longer fit."""

from dataclasses import replace

import pytest
from floors import Problem

BASE = {"P": Problem(B=8), "H": Problem(B=4), "K": Problem(B=4), "B": Problem()}
DEFAULT = {"P": (196, 784, 1568, 3136, 6272, 12544, 32768), "H": (1, 4, 16, 64), "K": (3, 27, 243), "B": (2, 8, 32)}
FULL = {"P": (392,), "H": (2, 8, 32), "K": (9, 81), "B": (4, 16)}  # more points, with --bench-full
SIZES = [(letter, size) for letter in DEFAULT for size in sorted(DEFAULT[letter] + FULL[letter])]


@pytest.mark.parametrize("impl", ["torch", "dense", "triton"])
@pytest.mark.parametrize(("letter", "size"), SIZES)
def bench_scaling(letter, size, impl, bench):
    if bench.smoke and size != DEFAULT[letter][1]:
        pytest.skip("one size in smoke form")
    bench.unless_full(size in FULL[letter])
    problem, case = replace(BASE[letter], **{letter: size}), f"scaling {letter}"
    bench.time("objective", f"{letter}{size}", problem, impl, "forward + backward", case=case, peak=letter == "P")
