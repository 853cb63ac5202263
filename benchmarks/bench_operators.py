"""smooseg_loss, pair_energy, assign and a whole head step in every implementation; how smooseg_loss grows with sizes.

Implementations of a cell run one after the other, because a machine drifts.
"""

from dataclasses import replace

import problems
import pytest
import torch
from floors import PairProblem, Problem

CARD = torch.cuda.is_available()
FORMS = ["dense", "torch", "triton"]
OBJECTIVES = {**problems.SMALL, **problems.TRAINED, "p16384": Problem(B=1, P=16384)}
# 11 x 11 points an image (STEGO's sampling) or all patches: on a card as many pictures as fit dense matrices in 24 GB
PAIRS = {"stego_b32": PairProblem(P=121)} | (
    {"all_784": PairProblem(), "all_1600": PairProblem(P=1600), "all_4096": PairProblem(B=8, P=4096)}
    if CARD
    else {"all_784_b8": PairProblem(B=8), "all_1600_b4": PairProblem(B=4, P=1600), "all_4096_b1": PairProblem(1, 4096)}
)
FUNCTIONS = {("objective", shape): problem for shape, problem in OBJECTIVES.items()}
FUNCTIONS |= {("pairs", shape): problem for shape, problem in PAIRS.items()}
# compiled in the default run: each takes seconds, or on a card minutes
COMPILED = ("cityscapes_s8", "heads16", *list(PAIRS)[:2]) if CARD else (*problems.SMALL, *list(PAIRS)[:2])
STEPS = {**problems.STEPS, "cityscapes_s8": problems.TRAINED["cityscapes_s8"]}
# S/8 at 320 px; a CPU evaluates fewer pictures at a time
EVALUATIONS = {"eval320_b4": Problem(B=4, P=1600), "eval320": problems.TRAINED["eval320"]}
BASE = {"P": Problem(B=8), "H": Problem(B=4), "K": Problem(B=4), "B": Problem()}
DEFAULT = {"P": (196, 784, 1568, 3136, 6272, 12544, 32768), "H": (1, 4, 16, 64), "K": (3, 27, 243), "B": (2, 8, 32)}
FULL = {"P": (392,), "H": (2, 8, 32), "K": (9, 81), "B": (4, 16)}  # more points, with --bench-full
SIZES = [(letter, size) for letter in DEFAULT for size in sorted(DEFAULT[letter] + FULL[letter])]


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("mode", ["forward", "forward + backward", "graph"])
@pytest.mark.parametrize(("subject", "shape"), FUNCTIONS)
def bench_function(subject, shape, mode, impl, bench):
    bench.time(subject, shape, FUNCTIONS[subject, shape], impl, mode, peak=mode == "forward + backward")


@pytest.mark.parametrize("impl", ["dense + compile", "torch + compile"])
@pytest.mark.parametrize("mode", ["graph", "forward + backward"])
@pytest.mark.parametrize(("subject", "shape"), FUNCTIONS)
def bench_compiled(subject, shape, mode, impl, bench):
    bench.unless_full(shape not in COMPILED)
    bench.time(subject, shape, FUNCTIONS[subject, shape], impl, mode)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def bench_pairs_of_a_whole_picture(impl, bench):
    bench.time("pairs", "p16384", PairProblem(B=1, P=16384), impl, "forward + backward", peak=True)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("shape", EVALUATIONS)
def bench_assign(shape, impl, bench):
    bench.unless_full(shape == "eval320" and not CARD)
    bench.time("assign", shape, EVALUATIONS[shape], impl, "forward", peak=True, pixels=20 if bench.smoke else 320)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("mode", ["step", "captured step"])
@pytest.mark.parametrize("dtype", ["bfloat16"] if CARD else ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", STEPS)
def bench_head_step(shape, dtype, mode, impl, bench):
    bench.time("head step", shape, STEPS[shape], impl, mode, dtype=dtype, peak=True)


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("mode", ["step", "captured step"])
def bench_head_step_of_many_heads(mode, impl, bench):
    bench.time("head step", "heads64", Problem(H=64), impl, mode)


@pytest.mark.parametrize("impl", ["torch", "dense", "triton"])
@pytest.mark.parametrize(("letter", "size"), SIZES)
def bench_scaling(letter, size, impl, bench):
    """Time and peak memory as one size grows; the dense form stops where its matrices no longer fit."""
    if bench.smoke and size != DEFAULT[letter][1]:
        pytest.skip("one size in smoke form")
    bench.unless_full(size in FULL[letter])
    problem, case = replace(BASE[letter], **{letter: size}), f"scaling {letter}"
    bench.time("objective", f"{letter}{size}", problem, impl, "forward + backward", case=case, peak=letter == "P")
