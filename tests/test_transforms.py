"""PyTorch's transforms of a function must not change it: torch.compile(fullgraph=True), torch.export, activation
checkpointing, autocast.

One table of every public function and layer, values and gradients against plain calls. A new public name needs a line
in ENTRIES; a name without one fails.
"""

from __future__ import annotations

import importlib.util
import inspect
import typing
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import smooseg_kernels as sk

D, Z, K = 11, 7, 5
# B, h, w; the first sizes and all that follows from them are different, as a compiler takes equal ones for one
SIZES = [(4, 9, 6), (3, 7, 5)]
SCALARS = [0.1, 0.2, 0.35]  # thresholds and temperatures, another one at every call


def inputs_of(size: tuple[int, int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Makes what the entries name, for one size of batch and grid."""
    B, h, w = size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    planes = {"features_map": normal(B, D, h, w), "codes_map": normal(B, Z, h, w)}
    planes |= {"probs_map": normal(B, K, h, w).softmax(1), "other_map": normal(B, D, h + 1, w)}
    planes["places_map"], planes["color_map"] = normal(B, 2, h, w), normal(B, 3, h, w)
    planes["other_codes_map"] = normal(B, Z, h + 1, w)
    rows = {name.removesuffix("_map"): x.flatten(2).mT.contiguous() for name, x in planes.items()}
    numbers = {"partner": torch.arange(B).roll(1), "partners": torch.stack([torch.arange(B).roll(n) for n in (1, 2)])}
    planes["image"] = torch.rand(B, 2 * h, 2 * w, 3, generator=generator)
    planes["fine_probs"] = torch.rand(B, K, 2 * h, 2 * w, generator=generator).softmax(1)
    numbers["histogram"] = torch.arange(h * w).view(1, -1)
    prototypes = {"student": normal(K, Z), "teacher": normal(K, Z), "scale": normal(B, D).abs()}
    return {**planes, **rows, **numbers, **prototypes, "weight": normal(B, h * w).abs(), "shifts": normal(B)}


class Entry(NamedTuple):
    """A call: a function of (impl, a scalar, *tensors), which tensors get a gradient, and the others."""

    function: Callable
    leaves: str = ""
    constants: str = ""
    impls: tuple[str, ...] = ("torch", "triton")

    @property
    def names(self) -> list[str]:
        return [*self.leaves.split(), *self.constants.split()]


def assigned(impl, _, codes, teacher):
    (h, w), rows = codes.shape[2:], codes.flatten(2).mT
    return (sk.assign(rows, teacher, grid=(h, w), size=(2 * h, 3 * w), impl=impl),)


def clamped_means(impl, b, codes, shifts, features, partners, weight):
    options = dict(partner=partners, means=True, clamp=(0.0, 0.8), weight_i=weight, weight_j=weight, impl=impl)
    return sk.pair_energy(features, codes, features, codes, b + shifts, **options)[:3]


def hinged_rows(impl, b, codes, other_codes, features, other):
    options = dict(mean=b / 2, hinge=True, reduction="none", impl=impl)
    return sk.pair_energy(features, codes, other, other_codes, b, **options)[:2]


def smoothness_terms(impl, b, probs, features):
    set_when_built = Smoothness(b, b + 0.3, impl=impl)(features, probs)
    return (*set_when_built[:2], *Smoothness(0.1, 0.4, impl=impl)(features, probs, within=b, across=b / 2)[2:])


def refined(impl, b, probs, image):
    kernels = dict(gaussian=(b + 1, b + 3), bilateral=(b + 60, b + 3, b + 4))
    return (sk.dense_crf(probs, (255 * image).byte(), iterations=2, method="exact", impl=impl, **kernels),)


Smoothness, Correlation = sk.layers.SmoothnessLoss, sk.layers.CorrelationLoss
# public name, and after a space what is special: one line (or few) for each
ENTRIES = {
    "smooseg_loss": Entry(
        lambda impl, b, z, s, f, t, j, c: sk.smooseg_loss(
            f, z, s, t, ["self", j], [b, 0.4], temperature=b, relative=True, channel_scale=c, impl=impl
        ),
        "codes student",
        "features teacher partner scale",
    ),
    "smoothness_energy": Entry(
        lambda impl, b, p, f, j: sk.smoothness_energy(f, p, ["self", j, "all"], [b, 0.4, 0.2], impl=impl)[:2],
        "probs",
        "features partner",
    ),
    "prototype_probabilities": Entry(
        lambda impl, b, z, t: (sk.prototype_probabilities(z, t, temperature=b, impl=impl),), "codes teacher"
    ),
    "prototype_loss": Entry(
        lambda impl, _, s, z, t: (sk.prototype_loss(z, s, t, impl=impl),), "student", "codes teacher"
    ),
    "assign": Entry(assigned, "", "codes_map teacher"),
    "similarity_statistics": Entry(
        lambda impl, _, f, j: sk.similarity_statistics(f, ["self", j], bins=16, neighbours=3, impl=impl),
        "",
        "features partner",
    ),
    "histogram_quantiles": Entry(
        lambda impl, b, h: (sk.histogram_quantiles(h, [b, 0.5], (-1.0, b)),), "", "histogram", ("torch",)
    ),
    "pair_energy same": Entry(
        lambda impl, b, c, f: sk.pair_energy(f, c, f, c, b, clamp=(0.0, None), impl=impl)[:2], "codes", "features"
    ),
    "pair_energy options": Entry(clamped_means, "codes shifts", "features partners weight"),
    "pair_energy rows": Entry(
        hinged_rows,
        "codes other_codes",
        "features other",
    ),
    "pair_energy bins": Entry(
        lambda impl, b, c, f: sk.pair_energy(f, c, f, c, b, bins=8, impl=impl)[::4], "codes", "features"
    ),
    # draws its partners, the same after the same seed
    "SmoothnessLoss": Entry(smoothness_terms, "probs_map", "features_map"),
    "CorrelationLoss": Entry(
        lambda impl, b, c, d, f, g: Correlation(b, (-0.2, 0.6), means=True, impl=impl)(f, g, c, d, mean=b / 2)[:3],
        "codes_map other_codes_map",
        "features_map other_map",
    ),
    "CorrelationLoss same": Entry(
        lambda impl, b, c, f: Correlation(0.1, (0.0, None), impl=impl)(f, f, c, c, threshold=b)[:2],
        "codes_map",
        "features_map",
        ("torch",),
    ),
    "contrastive_loss": Entry(
        lambda impl, b, c, f: sk.contrastive_loss(
            c, c, features_i=f, features_j=f, threshold=b, negative_threshold=b / 3, temperature=b / 2, impl=impl
        )[:1],
        "codes",
        "features",
    ),
    "crf_energy": Entry(
        lambda impl, b, p, x, y: (
            sk.crf_energy(x, y, p, gaussian=(b + 1, b), bilateral=(b + 2, b + 1, b + 4), shift=b, impl=impl),
        ),
        "probs",
        "places color",
    ),
    "CRFLoss": Entry(
        lambda impl, b, p, x: (
            sk.layers.CRFLoss((b + 1, b), (b + 2, b + 1, b + 4), shift=b, samples=None, impl=impl)(x, p),
        ),
        "probs_map",
        "color_map",
    ),
    "gaussian_sums": Entry(
        lambda impl, b, v, x: (sk.gaussian_sums(x, v, tolerance=b / 1000, impl=impl),), "probs places"
    ),
    "dense_crf": Entry(
        refined,
        "",
        "fine_probs image",
    ),
    "guided_filter": Entry(
        lambda impl, b, p, x: (sk.guided_filter(p, x, radius=2, eps=b),), "fine_probs", "image", ("torch",)
    ),
    "joint_upsample": Entry(
        lambda impl, b, p, x: (sk.joint_upsample(p, x, sigma_position=b + 0.4, sigma_colour=90 * b),),
        "probs_map",
        "image",
        ("torch",),
    ),
    "draw_partners": Entry(
        lambda impl, _, f: (sk.layers.draw_partners(f.shape[0], device=f.device),), "", "features", ("torch",)
    ),
}
WITHOUT_TENSORS = {"resolve_impl"}
HAS_TRITON = importlib.util.find_spec("triton") is not None
CALLS = [(name, impl) for name, entry in ENTRIES.items() for impl in entry.impls if impl == "torch" or HAS_TRITON]
# kernels whose own numbers change; the others are compiled in their own tests, with shapes that change
CHANGED_KERNELS = ("assign", "smooseg_loss", "gaussian_sums")
COMPILED = [(name, impl) for name, impl in CALLS if impl == "torch" or name in CHANGED_KERNELS]
BINS = "counts by different limits do not add up: other limits are another histogram"
CLAMP = "operators take a clamp as it is, because whether 0 lies outside of it decides which kernel serves"
# numbers that compiled code takes as constants, and why
CONSTANT_NUMBERS = {
    ("pair_energy", "clamp"): CLAMP,
    ("CorrelationLoss.__init__", "clamp"): CLAMP,
    ("pair_energy", "limits"): BINS,
    ("similarity_statistics", "limits"): BINS,
}
LEARNT = [(name, impl) for name, impl in CALLS if ENTRIES[name].leaves]


def public_names() -> set[str]:
    functions = {name for name in sk.__all__ if inspect.isfunction(getattr(sk, name))}
    return (functions | set(sk.layers.__all__)) - WITHOUT_TENSORS


def test_every_public_function_and_layer_has_an_entry():
    assert {name.split()[0] for name in ENTRIES} == public_names()


def takes_numbers(hint) -> bool:
    return hint is float or any(map(takes_numbers, typing.get_args(hint)))


def signatures() -> dict[str, tuple[object, str]]:
    """Every public function and method of a layer: the object that has it, and its name there."""
    table = {}
    for name in sorted(public_names()):
        place = sk if hasattr(sk, name) else sk.layers
        if inspect.isfunction(getattr(place, name)):
            table[name] = (place, name)
        else:
            table |= {f"{name}.{method}": (getattr(place, name), method) for method in ("__init__", "forward")}
    return table


def recorded(function, name: str, seen: dict[tuple[str, str], list[str]]):
    """Wraps a public function so that `seen` gets what its numbers are at every call."""
    hints = typing.get_type_hints(inspect.unwrap(function))
    numbers = [parameter for parameter, hint in hints.items() if parameter != "return" and takes_numbers(hint)]
    seen.update({(name, parameter): [] for parameter in numbers})

    def run(*args, **kwargs):
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        for parameter in numbers:
            seen[name, parameter].append(repr(given.get(parameter)))
        return function(*args, **kwargs)

    return run


def test_every_number_of_a_signature_changes_between_compiled_calls(monkeypatch):
    seen: dict[tuple[str, str], list[str]] = {}
    for name, (place, attribute) in signatures().items():
        monkeypatch.setattr(place, attribute, recorded(getattr(place, attribute), name, seen))
    constant = set(seen)
    for entry in ENTRIES.values():
        inputs, runs = inputs_of(SIZES[0]), []
        for scalar in SCALARS[:2]:
            for values in seen.values():
                values.clear()
            entry.function("torch", scalar, *(inputs[each] for each in entry.names))
            runs.append({number: list(values) for number, values in seen.items()})
        constant -= {number for number in seen if runs[0][number] != runs[1][number]}
    assert constant == CONSTANT_NUMBERS.keys()


def value_and_grad(function, name, size=SIZES[0], scalar=SCALARS[0], seed=0):
    """All outputs, and the gradients under an upstream gradient that differs between them."""
    inputs, leaves = inputs_of(size, seed), ENTRIES[name].leaves.split()
    tensors = [inputs[each].clone().requires_grad_(each in leaves) for each in ENTRIES[name].names]
    torch.manual_seed(0)
    outputs = tuple(function(scalar, *tensors))
    smooth = [x for x in outputs if x.requires_grad]
    if not smooth:
        return outputs
    upstream = [torch.linspace(0.5, 1.5, x.numel()).view(x.shape) * (n + 1) for n, x in enumerate(smooth)]
    gradients = torch.autograd.grad(smooth, tensors[: len(leaves)], upstream)
    return (*(x.detach() for x in outputs), *gradients)


def plain(name, impl):
    function = ENTRIES[name].function
    return lambda scalar, *tensors: function(impl, scalar, *tensors)


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype
        # traced code may sum in another order than eager CPU code: 2.5 eps of the largest were seen
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0.0, atol=16 * torch.finfo(torch.float32).eps * scale, equal_nan=True)


@pytest.mark.parametrize(("name", "impl"), COMPILED)
def test_compiles_whole_and_once_for_all_sizes_and_scalars(name, impl):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(plain(name, impl), backend="aot_eager", fullgraph=True, dynamic=True)
    for size, scalar in zip(SIZES, SCALARS):
        assert_equal(
            value_and_grad(compiled, name, size, scalar), value_and_grad(plain(name, impl), name, size, scalar)
        )
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("attribute", ["threshold", "within"])
def test_a_threshold_that_decays_compiles_once(attribute):
    torch._dynamo.reset()
    counters.clear()
    inputs = inputs_of(SIZES[0])
    if attribute == "threshold":
        layer, arguments = Correlation(0.1, (0.0, None)), [inputs[f"{x}_map"] for x in ("features", "codes")]
        arguments = [arguments[0], arguments[0], arguments[1], arguments[1]]
    else:
        layer, arguments = Smoothness(0.1, 0.3), [inputs["features_map"], inputs["probs_map"], inputs["partner"]]
    compiled, graphs = torch.compile(layer, backend="eager", fullgraph=True), []
    for scalar in SCALARS:
        setattr(layer, attribute, scalar)
        assert torch.equal(compiled(*arguments)[0], layer(*arguments)[0])
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs[1:])) == 1, f"compiled again: {graphs} graphs"
    setattr(layer, attribute, torch.tensor(SCALARS[0]))
    torch.testing.assert_close(compiled(*arguments)[0], layer(*arguments)[0])


@pytest.mark.parametrize("impl", ["torch", *(["triton"] if HAS_TRITON else [])])
def test_a_temperature_that_falls_compiles_twice(impl):
    """First with the number in the code, then for all numbers; the same as a temperature in a tensor."""
    torch._dynamo.reset()
    counters.clear()
    inputs, graphs = inputs_of((2, 3, 3)), []
    codes, teacher = inputs["codes"].requires_grad_(), inputs["teacher"]

    def probs_and_gradient(function, temperature):
        probs = function(codes, teacher, temperature=temperature, impl=impl)
        return probs.detach(), *torch.autograd.grad(probs[..., 0].sum(), codes)

    compiled = torch.compile(sk.prototype_probabilities, backend="aot_eager", fullgraph=True)
    for temperature in (0.1, 0.2, 0.04):  # kernels have a form of their own below 0.05
        expected = probs_and_gradient(sk.prototype_probabilities, temperature)
        assert_equal(probs_and_gradient(compiled, temperature), expected)
        assert_equal(probs_and_gradient(sk.prototype_probabilities, torch.tensor(temperature)), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2]


class Module(torch.nn.Module):
    def __init__(self, name, impl):
        super().__init__()
        self.function = plain(name, impl)

    def forward(self, *inputs):
        return tuple(self.function(SCALARS[0], *inputs))


@pytest.mark.parametrize(("name", "impl"), CALLS)
def test_exports_with_any_batch_and_grid(name, impl):
    """The exported program takes gradients too."""
    inputs, leaves = inputs_of(SIZES[0]), ENTRIES[name].leaves.split()
    tensors = tuple(inputs[each].requires_grad_(each in leaves) for each in ENTRIES[name].names)
    shapes = (tuple({n: torch.export.Dim.AUTO for n in range(x.dim())} for x in tensors),)
    program = torch.export.export(Module(name, impl), tensors, dynamic_shapes=shapes).module()
    # another size than the program was made with
    got = value_and_grad(lambda _, *tensors: program(*tensors), name, SIZES[1], seed=1)
    assert_equal(got, value_and_grad(plain(name, impl), name, SIZES[1], seed=1))


@pytest.mark.parametrize(("name", "impl"), LEARNT)
def test_checkpointing(name, impl):
    function = plain(name, impl)
    recomputed = value_and_grad(lambda *inputs: checkpoint(function, *inputs, use_reentrant=False), name, SIZES[1])
    assert_equal(recomputed, value_and_grad(function, name, SIZES[1]))


def inside_autocast(function):
    def run(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*arguments)

    return run


@pytest.mark.parametrize("impl", ["torch", "dense"])
@pytest.mark.parametrize("name", ENTRIES)
def test_autocast_changes_nothing(name, impl):
    """Sums in 16 bits would lose energies that nearly cancel, so a region of autocast has no say inside.

    The front door leaves the region, before it picks an implementation.
    """
    function = plain(name, impl)
    assert_equal(value_and_grad(inside_autocast(function), name, SIZES[1]), value_and_grad(function, name, SIZES[1]))


def test_autocast_changes_nothing_where_it_is_compiled():
    torch._dynamo.reset()
    function = plain("SmoothnessLoss", "torch")
    compiled = torch.compile(inside_autocast(function), backend="aot_eager", fullgraph=True)
    assert_equal(value_and_grad(compiled, "SmoothnessLoss"), value_and_grad(function, "SmoothnessLoss"))


@pytest.mark.parametrize("impl", ["dense", "torch"])
def test_codes_made_under_autocast(impl):
    """A projection in bf16 in front, as in training: losses are fp32, its weights get fp32 gradients."""
    x = inputs_of(SIZES[0])
    weight = torch.randn(Z, D, generator=torch.Generator().manual_seed(6)).requires_grad_()
    objective, rest = (x["student"], x["teacher"], ["self", x["partner"]], [0.1, 0.4]), {"impl": impl}
    with torch.autocast("cpu", torch.bfloat16):
        codes = x["features"] @ weight.T
        loss = sk.smooseg_loss(x["features"], codes, *objective, **rest)
    assert codes.dtype == torch.bfloat16
    outside = sk.smooseg_loss(x["features"], codes.detach(), *objective, **rest)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(loss, outside))
    (gradient,) = torch.autograd.grad(loss.total, weight)
    assert gradient.dtype == torch.float32
    assert gradient.any()
