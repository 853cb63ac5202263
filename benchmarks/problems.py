"""The measured problems: named sizes, structured inputs, the calls that are timed, and the gate that each passes first.

Inputs are clustered features and codes near prototypes, so that the softmax is peaked as in training. The oracle is the
dense form in float64. Where its P x P matrices would be too large, the patches are those of a smaller image, repeated
and shuffled: every mean over patches is then the smaller image's, and a patch's gradient is its share of it.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT / "kernels" / "torch-ext", ROOT):  # measure this checkout
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import floors  # noqa: E402
import measure  # noqa: E402
import pair_cases  # noqa: E402
import torch  # noqa: E402
from floors import PairProblem, Problem  # noqa: E402
from rounding import check_rounding  # noqa: E402
from torch import Tensor  # noqa: E402
from triton_cases import (  # noqa: E402
    EPS,
    FP32_EPS,
    Case,
    Result,
    check,
    evaluate,
    gradient_term_size,
    make_case,
    term_size,
)

import smooseg_kernels as sk  # noqa: E402

# sizes of training: batch of 32, 224 px (320 px to evaluate, or one picture of 1024 x 2048) at a patch of 8
TRAINED = {
    "cityscapes_s8": Problem(),
    "potsdam_b8": Problem(D=768, K=3),
    "eval320": Problem(P=1600),
    "fullres": Problem(B=1, P=32768),
    "heads16": Problem(H=16),
}
# work of two cores in a second
SMALL = {"b8_p784": Problem(B=8), "b4_p1600": Problem(B=4, P=1600)}
STEPS = {"filterbank_b16": Problem(B=16, D=104, K=16), "vit_s_b16": Problem(B=16)}
STEPS |= {"camvid_b16": Problem(B=16, D=432, K=11)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ORACLE_PAIRS = 5_000_000  # heads x images x P x P that the oracle may have, a second or two on a CPU
STEP_ORACLE_PAIRS = 1 << 25  # for a head step, whose inputs are no copies of smaller ones
WITHIN, ACROSS = -0.02, 0.5
SHIFT, CLAMP = 0.2, (0.0, 0.8)  # for an energy of pairs
UPSTREAM = 1.7


def of_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    return replace(problem, element=dtype.itemsize)


def letters(problem: Problem) -> dict[str, int]:
    """B, P, D, Z, K, T, H as a line of results has them."""
    return {name: value for name, value in asdict(problem).items() if name != "element"}


def shrunk(problem: Problem | PairProblem) -> Problem | PairProblem:
    """The same kind of problem at a size that takes no time."""
    groups = {} if isinstance(problem, PairProblem) else {"K": min(problem.K, 5), "H": min(problem.H, 2)}
    return replace(problem, B=min(problem.B, 2), P=36, D=20, Z=6, **groups)


@dataclass
class Inputs:
    case: Case
    small: Case  # the case's patches are copies of its patches
    index: Tensor  # int64 [P]: patch p of the case is patch index[p] of `small`


def make_inputs(problem: Problem, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    B, D, Z, K = problem.B, problem.D, problem.Z, problem.K
    P = oracle_patches(problem)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    heads = () if problem.H == 1 else (problem.H,)
    group = torch.randint(0, K, (B, P), generator=generator)
    features = normal(K, D)[group] + 0.7 * normal(B, P, D) + 0.3 * normal(1, 1, D)
    teacher = normal(*heads, K, Z)
    student = teacher + 0.3 * normal(*heads, K, Z)
    codes = 2.0 * (teacher[..., group, :] + 0.5 * normal(*heads, B, P, Z))
    index = torch.randperm(problem.P, generator=generator) % P if P < problem.P else torch.arange(P)
    index, teacher, student = index.to(device), teacher.to(device), student.to(device)
    features, codes = features.to(device, dtype), codes.to(device, dtype)
    partners = ["self", *(torch.arange(B).roll(shift).to(device) for shift in range(1, problem.T))]
    thresholds = torch.tensor([WITHIN] + [ACROSS] * (problem.T - 1)).to(device)
    small = Case(features, codes, student, teacher, partners, thresholds)
    if P == problem.P:
        return Inputs(small, small, index)
    return Inputs(replace(small, features=features[:, index], codes=codes[..., index, :]), small, index)


def oracle_patches(problem: Problem) -> int:
    """The largest divisor of P with which the oracle's matrices are small enough."""
    most = math.isqrt(ORACLE_PAIRS // (problem.H * problem.B))
    return max(part for part in range(1, problem.P + 1) if problem.P % part == 0 and part <= max(1, most))


@functools.lru_cache(maxsize=2)
def truth(problem: Problem, dtype: torch.dtype, device: str, same: str) -> tuple[Result, Result, float, float]:
    """The oracle, form `same` in the inputs' own dtype, and the sizes of the terms; all at the problem's own P."""
    inputs = make_inputs(problem, dtype, device)
    copies = problem.P / inputs.small.codes.shape[-2]

    def at_full_size(result: Result) -> Result:
        codes = result.gradients["codes"][..., inputs.index, :] / copies
        return Result({"total": result.values["total"]}, {**result.gradients, "codes": codes})

    oracle = at_full_size(evaluate(inputs.small.to(torch.float64), "dense"))
    size = gradient_term_size(inputs.small) / math.sqrt(copies)
    return oracle, at_full_size(evaluate(inputs.small, same)), term_size(inputs.small), size


@dataclass
class Subject:
    """One call to be timed."""

    run: Callable[[], Any]
    check: Callable[[Any], None]  # takes the outputs of a run; AssertionError where they are wrong
    floor_bytes: int
    floor_flops: int
    loop: Any = None  # of a head step


def total_of(form: str, features, codes, student, teacher, partners, thresholds) -> Tensor:
    return sk.smooseg_loss(features, codes, student, teacher, partners, thresholds, impl=form).total


def pair_energy_of(form: str, features_i, codes_i, features_j, codes_j, partner) -> sk.PairEnergy:
    return sk.pair_energy(features_i, codes_i, features_j, codes_j, SHIFT, partner=partner, clamp=CLAMP, impl=form)


FUNCTIONS = {"objective": total_of, "pairs": pair_energy_of}  # the functions that torch.compile gets


def function_of(subject: str, impl: str, device: str, quick_compile: bool = False) -> Callable[..., Any]:
    """FUNCTIONS[subject] without its first argument; `impl` is a form, or "torch + compile"."""
    form, _, compiled = impl.partition(" + ")
    if not compiled:
        return functools.partial(FUNCTIONS[subject], form)
    torch.compiler.reset()  # otherwise a second size gets a program for any size
    options = {"mode": "max-autotune-no-cudagraphs"} if device == "cuda" else {}
    options = {"backend": "aot_eager"} if quick_compile else options
    return functools.partial(torch.compile(FUNCTIONS[subject], dynamic=False, **options), form)


def objective(problem: Problem, impl: str, mode: str, dtype, device: str, seed: int = 0, function=None) -> Subject:
    """smooseg_loss, and in every `mode` but "forward" its gradients to codes and student.

    Several seeds share a `function`, so that it is compiled once.
    """
    case = make_inputs(problem, dtype, device, seed).case
    backward = mode != "forward"
    codes, student = case.codes.requires_grad_(backward), case.student.clone().requires_grad_(backward)
    upstream = torch.full(codes.shape[:-3], UPSTREAM, device=device)
    function = function or function_of("objective", impl, device)
    call = functools.partial(function, case.features, codes, student, case.teacher, case.partners)

    def run():
        total = call(case.thresholds)
        return (total.detach(), *(torch.autograd.grad(total, [codes, student], upstream) if backward else ()))

    def check_outputs(outputs):
        # a form's own rounding would excuse anything that it does
        oracle, same, size, gradient_size = truth(problem, dtype, device, "torch" if impl == "dense" else "dense")
        if not backward:
            oracle, same = Result(oracle.values, {}), Result(same.values, {})
        got = Result({"total": outputs[0]}, dict(zip(("codes", "student"), outputs[1:])))
        check(got, same, oracle, max(FP32_EPS, EPS[dtype]), size, gradient_size)

    counts = floors.objective_floor(problem, backward), floors.objective_flops(problem, backward)
    return Subject(run, check_outputs, *counts)


def gate(problem: Problem, impl: str, mode: str, dtype: torch.dtype, device: str, seed: int = 0) -> Subject:
    """Every output and gradient against the dense form in float64, and in bf16 on a card against rounding.py.

    With three pair sets every option of a call.
    """
    sizes = {name: value for name, value in letters(problem).items() if name != "T"}
    sizes["H"], generator = None if problem.H == 1 else problem.H, torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"partners": ("self", "index")}
    if problem.T == 3:
        scale = (torch.rand(problem.B, problem.D, generator=generator) > 0.2) * 1.25
        weight = torch.rand(problem.B, problem.P, generator=generator)
        options = {"partners": ("self", "index", "all"), "channel_scale": scale, "patch_weight": weight}
        options["relative"] = True
    case = make_case(**sizes, dtype=dtype, device=device, seed=seed, **options)

    def check_outputs(got):
        same, oracle = evaluate(case, "dense"), evaluate(case.to(torch.float64), "dense")
        check(got, same, oracle, max(FP32_EPS, EPS[dtype]), term_size(case), gradient_term_size(case))
        if dtype == torch.bfloat16 and device == "cuda":  # the interpreter does not round operands
            check_rounding(case, got, oracle)

    counts = floors.objective_floor(problem), floors.objective_flops(problem)
    return Subject(lambda: evaluate(case, impl), check_outputs, *counts)


def head_step(
    problem: Problem, impl: str, mode: str, dtype: torch.dtype, device: str, seed: int = 0, patches: int | None = None
) -> Subject:
    """A whole iteration on cached features: draws, projection, objective, gradients, teacher, Adam.

    `patches`: how many of each image take part. Only its first run can be checked. As in training, features are
    resident on a card, and on a CPU in an fp16 store.
    """
    from smooseg_fast.learn.loop import Loop
    from smooseg_fast.learn.schedule import Schedule, Settings
    from smooseg_fast.segment.model import Head, Heads

    features = make_inputs(problem, dtype, device, seed).case.features
    rows_in = features.to if device == "cuda" else stored(features)
    thresholds = torch.tensor([[WITHIN, ACROSS]] * problem.H)

    def make(form: str, dtype: torch.dtype, capture: bool = False):
        """-> the loop, its next step, and its parameters by name; every call starts alike."""
        heads = Heads([Head(problem.D, problem.K, problem.Z, seed) for seed in range(problem.H)])
        heads = heads.to(device, torch.promote_types(dtype, torch.float32))
        settings, steps = Settings(relative=False, impl=form, patches=patches), iter(range(10**9))
        sizes, schedule = (problem.P, problem.D), Schedule(problem.B, problem.B, 0)
        options = {"lr": 1e-4, "lr_prototypes": 5e-4, "capture": capture}
        loop = Loop(heads, rows_in(dtype), sizes, schedule, thresholds, settings, **options)
        return loop, lambda: loop.step(next(steps)), dict(heads.named_parameters())

    def result(loss: sk.SmooSegLoss, parameters: dict) -> Result:
        return Result({"total": loss.total}, {name: parameter.grad for name, parameter in parameters.items()})

    def reference(form: str, dtype: torch.dtype) -> Result:
        _, step, parameters = make(form, dtype)
        return result(step(), parameters)

    loop, step, parameters = make(impl, dtype, capture=mode == "captured step")

    def check_outputs(loss):
        got = result(loss, parameters)
        dense_fits = problem.B * problem.P**2 <= STEP_ORACLE_PAIRS
        oracle = reference("dense" if dense_fits else "torch", torch.float64)
        same = reference("torch" if impl == "dense" or not dense_fits else "dense", dtype)
        # 16-bit features make the projection's products bf16; in fp32, weights' gradients sum over patches that cancel
        eps = EPS[torch.bfloat16] if dtype.itemsize == 2 else 16 * EPS[torch.float32]
        check(got, same, oracle, eps, 1.0 + 2.0 * ACROSS)

    taken = problem if patches is None else replace(problem, P=patches)
    return Subject(step, check_outputs, floors.head_step_floor(taken), floors.head_step_flops(taken), loop)


def stored(features: Tensor) -> Callable[[torch.dtype], Callable[[Tensor], Tensor]]:
    """Features [N,P,D] as a store keeps them -> a function from a dtype to a reader of rows."""
    from smooseg_fast.features.store import Contents, FeatureStore, Shard, to_storage

    N, P, _ = features.shape
    contents = Contents((0, 0), (N, 0), (1, P), ("",) * N, ((0, 0),) * N, ())
    store = FeatureStore([Shard(contents, to_storage(features), 0)])
    return lambda dtype: functools.partial(store.rows, dtype=dtype)


def assignment(problem: Problem, impl: str, mode: str, dtype, device: str, seed: int = 0, pixels: int = 320) -> Subject:
    """Labels at `pixels` x `pixels` from a square grid of patches, and the counts against labels to compare with."""
    side = math.isqrt(problem.P)
    case = make_inputs(replace(problem, D=1), dtype, device, seed).case
    generator, shape = torch.Generator().manual_seed(seed), (problem.B, pixels, pixels)
    labels = torch.randint(0, problem.K, shape, dtype=torch.uint8, generator=generator).to(device)
    sizes = {"grid": (side, side), "size": (pixels, pixels), "labels": labels, "classes": problem.K}

    def run():
        return sk.assign(case.codes, case.teacher, impl=impl, **sizes)

    def check_outputs(outputs):
        assigned, counts = outputs
        for n in range(problem.B):  # one picture at a time: the oracle's codes are 64 doubles a pixel
            part = {**sizes, "labels": labels[n : n + 1]}
            want, _ = sk.assign(case.codes[n : n + 1].double(), case.teacher.double(), impl="dense", **part)
            wrong = (assigned[n : n + 1] != want).float().mean().item()
            assert wrong < 1e-4, f"{wrong:.2%} of the pixels of picture {n} differ from float64"
        wanted = torch.bincount((assigned * problem.K + labels).flatten(), minlength=problem.K**2)
        assert torch.equal(counts, wanted.view(problem.K, problem.K)), "wrong counts"

    counts = floors.assignment_floor(problem, pixels**2), floors.assignment_flops(problem, pixels**2)
    return Subject(run, check_outputs, *counts)


def pairs(problem: PairProblem, impl: str, mode: str, dtype, device: str, seed: int = 0, function=None) -> Subject:
    """pair_energy with the next image as partner, centred and clamped on both sides; gradients to both codes."""
    inputs, oracle = pair_inputs(problem, dtype, device, seed)
    backward = mode != "forward"
    codes = [x.detach().requires_grad_(backward) for x in (inputs.codes_i, inputs.codes_j)]
    function, upstream = function or function_of("pairs", impl, device), torch.full((), UPSTREAM, device=device)
    rows = (inputs.features_i, codes[0], inputs.features_j, codes[1], inputs.options["partner"])

    def run():
        out = function(*rows)
        gradients = torch.autograd.grad(out.energy, codes, upstream) if backward else ()
        return (out.energy.detach(), out.similarity.detach(), *gradients)

    def check_outputs(outputs):
        values, gradients = zip(("energy", "similarity"), outputs), zip(("codes_i", "codes_j"), outputs[2:])
        got = pair_cases.Result(dict(values), dict(gradients))
        pair_cases.compare(got, *oracle(impl), max(FP32_EPS, EPS[dtype]))

    return Subject(run, check_outputs, floors.pairs_floor(problem, backward), floors.pairs_flops(problem, backward))


def pair_inputs(problem: PairProblem, dtype: torch.dtype, device: str, seed: int) -> tuple[pair_cases.Pairs, Callable]:
    """-> inputs, and a function from an implementation to another form in their dtype, the truth and term sizes."""
    B, D, Z, P = problem.B, problem.D, problem.Z, oracle_patches(problem)
    options = {"partner": torch.arange(B).roll(1).to(device), "clamp": CLAMP}
    sizes = dict(B=B, P_i=P, P_j=P, D=D, Z=Z)
    small = pair_cases.make_pairs(**sizes, dtype=dtype, device=device, seed=seed, threshold=SHIFT, **options)
    generator = torch.Generator().manual_seed(seed)
    indices = [(torch.randperm(problem.P, generator=generator) % P).to(device) for _ in "ij"]
    i, j = indices
    rows = (x[:, index] for x, index in zip(small.tensors, (i, i, j, j)))
    copies = problem.P / P

    def at_full_size(gradients: dict) -> dict:
        return {name: gradients[name][:, index] / copies for name, index in zip(("codes_i", "codes_j"), indices)}

    @functools.lru_cache(maxsize=2)
    def oracle(impl: str):
        # a form's own rounding would excuse anything that it does
        same = pair_cases.evaluate(small, "torch" if impl == "dense" else "dense", (UPSTREAM, 0.0))
        truth = pair_cases.evaluate(small.to(torch.float64), "dense", (UPSTREAM, 0.0))
        sizes = pair_cases.sizes_of(small, max(FP32_EPS, EPS[dtype]))
        sizes = pair_cases.Sizes(sizes.energy, at_full_size(sizes.gradients), at_full_size(sizes.undecided))
        results = (pair_cases.Result(result.values, at_full_size(result.gradients)) for result in (same, truth))
        return (*results, sizes)

    return pair_cases.Pairs(*rows, SHIFT, options), oracle


SUBJECTS = {"pairs": pairs, "objective": objective, "head step": head_step, "assign": assignment, "gate": gate}


def rotation(subject: str, problem: Problem, impl: str, mode: str, dtype: str, device: str, **extra) -> list[Subject]:
    """One call on as many sets of inputs as a card's cache cannot hold; the first has run and passed its check."""
    build = functools.partial(SUBJECTS[subject], problem, impl, mode, DTYPES[dtype], device, **extra)
    first = build()
    first.check(first.run())
    copies = measure.copies_beyond_cache(impl, first.floor_bytes, device)
    return [first, *(build(seed=seed) for seed in range(1, copies))]
