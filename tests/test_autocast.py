"""Inside torch.autocast, with arguments by keyword, public functions compute the same as outside of it, to the bit."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch

import smooseg_kernels as sk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["dense", "torch", *(["triton"] if importlib.util.find_spec("triton") else [])]
B, P, D, Z, K = 3, 70, 24, 16, 9


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def positive(*shape):
    return normal(*shape).abs() + 0.1


PARTNERS = torch.tensor([[1, 2, 0], [0, 0, 1]])
ENERGY = dict(
    partners=PARTNERS.to(DEVICE),
    thresholds=torch.tensor([0.1, 0.3], device=DEVICE),
    relative=True,
    center=True,
    patch_weight=positive(B, P),
    mean=torch.tensor([0.1, 0.2], device=DEVICE),
)
# every parameter of every public function, but `impl` and those that exclude another
FUNCTIONS = {
    "smooseg_loss": dict(
        features=normal(B, P, D),
        codes=normal(B, P, Z),
        student=normal(K, Z, seed=1),
        teacher=normal(K, Z, seed=2),
        temperature=0.2,
        channel_scale=positive(B, D),
        **ENERGY,
    ),
    "smoothness_energy": dict(
        features=normal(B, P, D), probs=positive(B, P, K), feature_norms=positive(B, P), **ENERGY
    ),
    "pair_energy": dict(
        features_i=normal(B, P, D),
        codes_i=normal(B, P, Z),
        features_j=normal(B, 40, D, seed=1),
        codes_j=normal(B, 40, Z, seed=1),
        threshold=0.1,
        partner=PARTNERS[1].to(DEVICE),
        clamp=(0.0, 0.8),
        hinge=True,
        center=True,
        weight_i=positive(B, P),
        weight_j=positive(B, 40),
        mean=0.1,
        reduction="none",
        means=True,
    ),
    "prototype_probabilities": dict(codes=normal(B, P, Z), prototypes=normal(K, Z, seed=1), temperature=0.2),
    "prototype_loss": dict(
        codes=normal(B, P, Z), student=normal(K, Z, seed=1), teacher=normal(K, Z, seed=2), patch_weight=positive(B, P)
    ),
    "assign": dict(
        codes=normal(B, P, Z),
        prototypes=normal(K, Z, seed=1),
        grid=(7, 10),
        size=(40, 45),
        labels=torch.arange(B * 40 * 45, device=DEVICE).view(B, 40, 45) % 5,
        classes=4,
    ),
    "similarity_statistics": dict(
        features=normal(B, P, D),
        partners=["self", PARTNERS[1].to(DEVICE), "all"],
        center=True,
        bins=300,
        limits=(-1.0, 1.0),
        neighbours=4,
        patch_weight=positive(B, P),
        mean=torch.tensor([0.1, 0.2, 0.3], device=DEVICE),
    ),
    "histogram_quantiles": dict(
        histogram=torch.arange(40, device=DEVICE).view(2, 20), q=torch.tensor([0.1, 0.7]), limits=(0.0, 1.0)
    ),
    "contrastive_loss": dict(
        codes_i=normal(B, P, Z),
        codes_j=normal(B, P, Z, seed=1),
        features_i=normal(B, P, D),
        features_j=normal(B, P, D, seed=1),
        threshold=0.1,
        threshold_j=positive(B, P),
        negative_threshold=torch.tensor(0.05, device=DEVICE),
        temperature=0.2,
        exclude_self=True,
        inside=True,
        reduction="none",
    ),
    "crf_energy": dict(
        positions=normal(B, P, 2),
        colors=normal(B, P, 3),
        probs=positive(B, P, K),
        gaussian=(1.0, 3.0),
        bilateral=(2.0, 1.0, 4.0),
        shift=0.1,
    ),
    "gaussian_sums": dict(points=normal(B, P, 5), values=normal(B, P, K), tolerance=1e-3),
    "dense_crf": dict(
        probabilities=positive(B, K, 6, 7).softmax(1),
        image=(60 * positive(B, 6, 7, 3)).byte(),
        iterations=2,
        gaussian=(1.0, 3.0),
        bilateral=(5.0, 13.0, 4.0),
        method="exact",
    ),
    "guided_filter": dict(
        probabilities=positive(B, K, 12, 14).softmax(1),
        image=(60 * positive(B, 12, 14, 3)).byte(),
        radius=3,
        eps=0.01,
        subsample=2,
        mask=normal(B, 12, 14) > -1,
    ),
    "joint_upsample": dict(
        scores=normal(B, K, 6, 7),
        image=(60 * positive(B, 12, 14, 3)).byte(),
        size=(13, 15),
        window=5,
        sigma_position=0.6,
        sigma_colour=30.0,
    ),
}
DIFFERENTIABLE = ("codes", "student", "probs", "codes_i", "codes_j", "points", "values", "scores")


def evaluate(function, arguments: dict, autocast: bool) -> list[torch.Tensor]:
    """Results and gradients; the backward pass stays outside of the region, as PyTorch asks for."""
    leaves = {name: arguments[name].clone().requires_grad_() for name in DIFFERENTIABLE if name in arguments}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        result = function(**{**arguments, **leaves})
    values = [result] if isinstance(result, torch.Tensor) else [value for value in result if value is not None]
    scored = [value.sum() for value in values if value.requires_grad]
    gradients = torch.autograd.grad(sum(scored), list(leaves.values()), allow_unused=True) if scored else ()
    return [*values, *(gradient for gradient in gradients if gradient is not None)]


def assert_equal_in_autocast(function, arguments):
    outside, inside = (evaluate(function, arguments, autocast) for autocast in (False, True))
    assert len(outside) == len(inside) > 0
    for a, b in zip(outside, inside):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_every_public_function_is_here():
    functions = {name for name in sk.__all__ if inspect.isfunction(getattr(sk, name))}
    assert functions - {"resolve_impl"} == FUNCTIONS.keys()
    for name, arguments in FUNCTIONS.items():
        missing = inspect.signature(getattr(sk, name)).parameters.keys() - arguments.keys()
        assert missing <= {"impl", "feature_norms", "channel_scale", "bins", "limits", "labels_i", "labels_j"}, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_by_keyword(name, impl):
    options = {"impl": impl} if "impl" in inspect.signature(getattr(sk, name)).parameters else {}
    assert_equal_in_autocast(lambda **arguments: getattr(sk, name)(**arguments, **options), FUNCTIONS[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_layers(impl):
    planes, probs = normal(B, D, 6, 7), positive(B, K, 6, 7)
    smoothness = sk.layers.SmoothnessLoss(within=0.1, across=0.3, impl=impl)
    assert_equal_in_autocast(smoothness, dict(features=planes, probs=probs, partners=PARTNERS[0].to(DEVICE)))
    correlation = sk.layers.CorrelationLoss(threshold=0.1, clamp=(0.0, None), impl=impl)
    inputs = dict(features_1=planes, features_2=planes.flip(0), codes_1=probs, codes_2=probs.flip(0))
    assert_equal_in_autocast(correlation, inputs)


def test_autocast_would_change_what_is_computed():
    """The inputs are such that 16-bit products show."""
    codes, prototypes = normal(B, P, Z), normal(K, Z, seed=1)
    function = sk.prototype_probabilities.__wrapped__
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded = function(codes=codes, prototypes=prototypes, impl="torch")
    assert not torch.equal(rounded, function(codes=codes, prototypes=prototypes, impl="torch"))
