"""PyTorch's transforms of a function must not change it: torch.compile(fullgraph=True), torch.export, activation
checkpointing, autocast.

Every public function and layer, values and gradients against plain calls. The functions of the objective and the
statistics are compiled in their own tests, with shapes that change. pair_energy has all of this in its own, for each
implementation: here is its layer.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import smooseg_kernels as sk

B, P, D, Z, K, GRID = 3, 12, 10, 6, 5, (3, 4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FEATURES, CODES, STUDENT, TEACHER = normal(B, P, D), normal(B, P, Z, seed=1), normal(K, Z, seed=2), normal(K, Z, seed=3)
PROBS, PARTNERS, SCALE = normal(B, P, K, seed=4).softmax(-1), torch.tensor([1, 2, 0]), normal(B, D, seed=5).abs()


def planes(rows):
    return rows.mT.unflatten(2, GRID)


# name: the function of (impl, *inputs), the inputs that get a gradient, and the constants
CALLS = {
    "smooseg_loss": (
        lambda impl, z, s, f, t, j: sk.smooseg_loss(
            f, z, s, t, ["self", j], [0.1, 0.4], relative=True, channel_scale=SCALE, impl=impl
        ),
        (CODES, STUDENT),
        (FEATURES, TEACHER, PARTNERS),
    ),
    "smoothness_energy": (
        lambda impl, p, f, j: sk.smoothness_energy(f, p, ["self", j, "all"], [0.1, 0.4, 0.2], impl=impl)[:2],
        (PROBS,),
        (FEATURES, PARTNERS),
    ),
    "prototype_probabilities": (
        lambda impl, z, t: (sk.prototype_probabilities(z, t, impl=impl),),
        (CODES, TEACHER),
        (),
    ),
    "prototype_loss": (lambda impl, s, z, t: (sk.prototype_loss(z, s, t, impl=impl),), (STUDENT,), (CODES, TEACHER)),
    "assign": (lambda impl, z, t: (sk.assign(z, t, grid=GRID, size=(7, 9), impl=impl),), (), (CODES, TEACHER)),
    "similarity_statistics": (
        lambda impl, f, j: sk.similarity_statistics(f, ["self", j], bins=16, neighbours=3, impl=impl),
        (),
        (FEATURES, PARTNERS),
    ),
    "histogram_quantiles": (
        lambda impl, h: (sk.histogram_quantiles(h, [0.1, 0.5]),),
        (),
        (torch.arange(12).view(3, 4),),
    ),
    # draws its partners, the same after the same seed
    "SmoothnessLoss": (
        lambda impl, p, f: sk.layers.SmoothnessLoss(0.1, 0.4, impl=impl)(f, p),
        (planes(PROBS),),
        (planes(FEATURES),),
    ),
    "CorrelationLoss": (
        lambda impl, c, d, f, g: sk.layers.CorrelationLoss(0.1, (-0.2, 0.6), impl=impl)(f, g, c, d),
        (planes(CODES), planes(CODES)[..., 1:] * 2),
        (planes(FEATURES), planes(FEATURES)[..., 1:] + 1),
    ),
}
TRITON = ["triton"] if importlib.util.find_spec("triton") else []
DIFFERENTIABLE = [name for name in CALLS if CALLS[name][1]]
ONE_IMPL = ("CorrelationLoss", "histogram_quantiles")
PAIRS = [(name, impl) for name in CALLS for impl in ["torch", *TRITON] if impl == "torch" or name not in ONE_IMPL]
COMPILED_ELSEWHERE = [
    *(("smooseg_loss", "torch"), ("similarity_statistics", "torch"), ("similarity_statistics", "triton")),
    *((name, "triton") for name in ("smooseg_loss", "prototype_probabilities", "prototype_loss")),
]


def value_and_grad(function, name, impl, inputs=None):
    """All outputs, and the gradients under an upstream gradient that differs between them."""
    _, differentiable, constants = CALLS[name]
    differentiable = [x.detach().clone().requires_grad_() for x in (differentiable if inputs is None else inputs)]
    torch.manual_seed(0)
    outputs = tuple(function(impl, *differentiable, *constants))
    smooth = [x for x in outputs if x.requires_grad]
    if not smooth:
        return outputs
    upstream = [torch.linspace(0.5, 1.5, x.numel()).view(x.shape) * (n + 1) for n, x in enumerate(smooth)]
    return (*(x.detach() for x in outputs), *torch.autograd.grad(smooth, differentiable, upstream))


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype
        # traced code may sum in another order than eager CPU code: 2.5 eps of the largest were seen
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0.0, atol=8 * torch.finfo(torch.float32).eps * scale)


@pytest.mark.parametrize(("name", "impl"), [pair for pair in PAIRS if pair not in COMPILED_ELSEWHERE])
def test_compiles_whole(name, impl):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name][0], backend="aot_eager", fullgraph=True)
    assert_equal(value_and_grad(compiled, name, impl), value_and_grad(CALLS[name][0], name, impl))


class Module(torch.nn.Module):
    def __init__(self, name, impl):
        super().__init__()
        self.name, self.impl = name, impl

    def forward(self, *inputs):
        return tuple(CALLS[self.name][0](self.impl, *inputs))


@pytest.mark.parametrize(("name", "impl"), PAIRS)
def test_exports(name, impl):
    """The exported program takes gradients too, but for energies in blocks, whose autograd function it loses: there it
    gives values.
    """
    function, differentiable, constants = CALLS[name]
    inputs = [x.detach().clone().requires_grad_() for x in differentiable]
    program = torch.export.export(Module(name, impl), (*inputs, *constants)).module()
    if (name, impl) == ("CorrelationLoss", "torch"):
        with torch.no_grad():
            assert_equal(program(*inputs, *constants), tuple(function(impl, *inputs, *constants)))
        return
    got = value_and_grad(lambda impl, *inputs: program(*inputs), name, impl)
    assert_equal(got, value_and_grad(function, name, impl))


@pytest.mark.parametrize(("name", "impl"), [pair for pair in PAIRS if pair[0] in DIFFERENTIABLE])
def test_checkpointing(name, impl):
    function = CALLS[name][0]
    recomputed = value_and_grad(
        lambda impl, *inputs: checkpoint(function, impl, *inputs, use_reentrant=False), name, impl
    )
    assert_equal(recomputed, value_and_grad(function, name, impl))


def inside_autocast(function):
    def run(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*arguments)

    return run


@pytest.mark.parametrize(("name", "impl"), [*PAIRS, *((name, "dense") for name in CALLS)])
def test_autocast_changes_nothing(name, impl):
    """Sums in 16 bits would lose energies that nearly cancel, so a region of autocast has no say inside."""
    function = CALLS[name][0]
    assert_equal(value_and_grad(inside_autocast(function), name, impl), value_and_grad(function, name, impl))


def test_autocast_changes_nothing_where_it_is_compiled():
    torch._dynamo.reset()
    function = CALLS["SmoothnessLoss"][0]
    compiled = torch.compile(inside_autocast(function), backend="aot_eager", fullgraph=True)
    assert_equal(
        value_and_grad(compiled, "SmoothnessLoss", "torch"), value_and_grad(function, "SmoothnessLoss", "torch")
    )


@pytest.mark.parametrize("impl", ["dense", "torch"])
def test_codes_made_under_autocast(impl):
    """A projection in bf16 in front, as in training: losses are fp32, its weights get fp32 gradients."""
    weight = normal(Z, D, seed=6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        codes = FEATURES @ weight.T
        loss = sk.smooseg_loss(FEATURES, codes, STUDENT, TEACHER, ["self", PARTNERS], [0.1, 0.4], impl=impl)
    assert codes.dtype == torch.bfloat16
    outside = sk.smooseg_loss(FEATURES, codes.detach(), STUDENT, TEACHER, ["self", PARTNERS], [0.1, 0.4], impl=impl)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(loss, outside))
    (gradient,) = torch.autograd.grad(loss.total, weight)
    assert gradient.dtype == torch.float32
    assert gradient.any()
