"""The layers against training loops of dense NCHW formulas, step by step; their draws and their errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smooseg_kernels as sk

STEPS = 6


def dense_smoothness(features: Tensor, probs: Tensor, partners: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Returns energy and mean label distance of images and partners, by the equations, from P x P cosines."""
    f, c = F.normalize(features.flatten(2), dim=1), F.normalize(probs.flatten(2), dim=1)
    closeness = torch.einsum("ncp,ncq->npq", f, f[partners])
    centred = closeness - closeness.mean(2, keepdim=True) + closeness.mean()
    distance = 1 - torch.einsum("nkp,nkq->npq", c, c[partners])
    return ((centred - threshold) * distance).mean(), distance.mean()


def dense_correlation(
    features_1, features_2, codes_1, codes_2, threshold: float, low: float, center: bool
) -> tuple[Tensor, Tensor]:
    """Returns energy and mean similarity of two batches, by the equations, from [B,h,w,h',w'] tensors."""
    closeness, similarity = (
        torch.einsum("nchw,ncij->nhwij", F.normalize(x, dim=1), F.normalize(y, dim=1))
        for x, y in ((features_1, features_2), (codes_1, codes_2))
    )
    if center:
        mean = closeness.mean()
        closeness = closeness - closeness.mean((3, 4), keepdim=True)
        closeness = closeness - closeness.mean() + mean
    return (-similarity.clamp(low) * (closeness - threshold)).mean(), similarity.mean()


class Loop:
    """Learns a projection of fixed features to codes, and prototypes, with a loss of (features, codes, probs)."""

    def __init__(self, dtype: torch.dtype, B=4, D=20, Z=8, K=5, h=6, w=5):
        torch.manual_seed(0)
        place = torch.randint(0, K, (B, h, w))
        self.features = (torch.randn(K, D)[place].permute(0, 3, 1, 2) + 0.5 * torch.randn(B, D, h, w)).to(dtype)
        self.projection = nn.Conv2d(D, Z, 1, dtype=dtype)
        self.prototypes = nn.Parameter(torch.randn(K, Z, dtype=dtype))
        self.optimizer = torch.optim.Adam([*self.projection.parameters(), self.prototypes], lr=1e-2)

    def step(self, loss) -> list[float]:
        codes = self.projection(self.features)
        cosines = torch.einsum("nchw,kc->nkhw", F.normalize(codes, dim=1), F.normalize(self.prototypes, dim=1))
        terms = loss(self.features, codes, torch.softmax(cosines / 0.1, 1))
        self.optimizer.zero_grad()
        sum(terms[::2]).backward()  # the energies; the terms between them are only reported
        self.optimizer.step()
        return torch.stack(list(terms)).tolist()


def train(loss, dtype):
    loop = Loop(dtype)
    steps = []
    for step in range(STEPS):
        torch.manual_seed(step)  # both draw the same partners
        steps.append(loop.step(loss))
    return torch.tensor(steps, dtype=torch.float64), torch.cat(
        [p.detach().flatten() for p in loop.projection.parameters()]
    ).double()


def assert_same_losses(layers, written_out, dtype, tolerance):
    expected, weights = train(written_out, dtype)
    got, got_weights = train(layers, dtype)
    assert (expected[0] - expected[-1]).abs().max() > 0.01  # it learns something
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(got_weights, weights, rtol=0, atol=tolerance)


# off by at most 2.3e-16 and 1.2e-7 when measured
EXACT = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)


@EXACT
@pytest.mark.parametrize("impl", ["auto", "dense"])
def test_a_training_loop_has_the_same_smoothness_losses(impl, dtype, tolerance):
    layer = sk.layers.SmoothnessLoss(within=0.05, across=0.4, impl=impl)

    def written_out(features, codes, probs):
        partners = sk.layers.draw_partners(len(features))
        own = torch.arange(len(features))
        return *dense_smoothness(features, probs, own, 0.05), *dense_smoothness(features, probs, partners, 0.4)

    assert_same_losses(lambda features, codes, probs: layer(features, probs), written_out, dtype, tolerance)


@EXACT
@pytest.mark.parametrize("impl", ["auto", "dense"])
@pytest.mark.parametrize("center", [True, False])
def test_a_training_loop_has_the_same_correlation_losses(center, impl, dtype, tolerance):
    """Pairs each image with itself, and with a smaller grid of another image."""
    within = sk.layers.CorrelationLoss(0.2, clamp=(0.0, None), center=center, impl=impl)
    across = sk.layers.CorrelationLoss(0.4, clamp=(0.0, None), center=center, impl=impl)

    def run(first, second):
        def loss(features, codes, probs):
            partners = sk.layers.draw_partners(len(features))
            other, other_codes = features[partners][..., 1:5, ::2], codes[partners][..., 1:5, ::2]
            return *first(features, features, codes, codes)[:2], *second(features, other, codes, other_codes)[:2]

        return loss

    written_out = [lambda *x, b=b: dense_correlation(*x, b, 0.0, center) for b in (0.2, 0.4)]
    assert_same_losses(run(within, across), run(*written_out), dtype, tolerance)


def test_options_reach_the_energy():
    torch.manual_seed(0)
    features, probs, partners = torch.randn(3, 10, 4, 5), torch.rand(3, 6, 4, 5), torch.tensor([1, 2, 0])
    rows = [x.flatten(2).mT for x in (features, probs)]
    for options in ({"center": False}, {"relative": True}, {"center": False, "relative": True}, {}):
        for entry in (partners, "all"):
            got = sk.layers.SmoothnessLoss(0.1, 0.3, **options)(features, probs, entry)
            want = sk.smoothness_energy(*rows, ["self", entry], [0.1, 0.3], **options)
            expected = [want.energy[0], want.distance[0], want.energy[1], want.distance[1]]
            assert all(torch.equal(a, b) for a, b in zip(got, expected))
    memory = [x.to(memory_format=torch.channels_last) for x in (features, probs)]
    torch.testing.assert_close(
        sk.layers.SmoothnessLoss(0.1, 0.3)(*memory, partners),
        sk.layers.SmoothnessLoss(0.1, 0.3)(features, probs, partners),
    )


@pytest.mark.parametrize(
    "options", [{"clamp": (-0.1, 0.3)}, {"hinge": True}, {"center": False, "clamp": (None, 0.2)}, {}], ids=str
)
def test_options_reach_the_pairs(options):
    torch.manual_seed(0)
    planes = [torch.randn(3, C, *grid) for C, grid in ((10, (4, 5)), (10, (2, 3)), (6, (4, 5)), (6, (2, 3)))]
    f_1, f_2, c_1, c_2 = (x.flatten(2).mT for x in planes)
    got, want = sk.layers.CorrelationLoss(0.1, **options)(*planes), sk.pair_energy(f_1, c_1, f_2, c_2, 0.1, **options)
    assert torch.equal(got.energy, want.energy)
    assert torch.equal(got.similarity, want.similarity)


@pytest.mark.parametrize(
    "layer",
    [sk.layers.SmoothnessLoss(0.1, 0.3), sk.layers.CorrelationLoss(0.1, (0.0, 0.8))],
    ids=["smoothness", "pairs"],
)
def test_nothing_to_train_or_save(layer):
    assert not layer.state_dict()
    assert not list(layer.parameters())


def test_partners_are_a_permutation_whose_fixed_points_move_on():
    outcomes = {
        tuple(sk.layers.draw_partners(3, generator=torch.Generator().manual_seed(seed)).tolist()) for seed in range(100)
    }
    expected = {
        tuple((n + 1) % 3 if n == m else m for n, m in enumerate(order)) for order in itertools.permutations(range(3))
    }
    assert outcomes == expected
    for seed in range(50):
        partners = sk.layers.draw_partners(7, generator=torch.Generator().manual_seed(seed))
        assert partners.dtype == torch.int64
        assert not (partners == torch.arange(7)).any()
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        own = torch.arange(7)
        assert torch.equal(partners, torch.where(order == own, (order + 1) % 7, order))
        assert partners.device == torch.device("cpu")
    assert sk.layers.draw_partners(2).tolist() == [1, 0]


def test_drawn_partners_come_from_the_global_generator():
    features, probs, layer = torch.randn(9, 4, 3, 3), torch.rand(9, 5, 3, 3), sk.layers.SmoothnessLoss(0.1, 0.3)
    torch.manual_seed(3)
    drawn = layer(features, probs)
    torch.manual_seed(3)
    given = layer(features, probs, sk.layers.draw_partners(9))
    assert all(torch.equal(a, b) for a, b in zip(drawn, given))


ones = torch.ones
SMOOTHNESS_BAD = [
    (
        lambda layer: layer(ones(2, 5, 3), ones(2, 4, 3, 3)),
        ValueError,
        r"features must have shape \[B, D, h, w\], got \[2, 5, 3\]",
    ),
    (
        lambda layer: layer(ones(2, 5, 3, 3), ones(2, 4, 3, 2)),
        ValueError,
        r"probs must have shape \[2, K, 3, 3\], got \[2, 4, 3, 2\]",
    ),
    (lambda layer: layer(ones(1, 5, 3, 3), ones(1, 4, 3, 3)), ValueError, "features holds 1 image.* at least 2"),
    (
        lambda layer: layer(ones(2, 5, 3, 3, requires_grad=True), ones(2, 4, 3, 3)),
        ValueError,
        r"features is a constant.*features\.detach",
    ),
    (
        lambda layer: layer(ones(2, 5, 3, 3), ones(2, 4, 3, 3), torch.tensor([0, 2])),
        ValueError,
        "partners must hold image numbers 0 to 1",
    ),
    (
        lambda layer: layer(ones(2, 5, 3, 3), ones(2, 4, 3, 3), torch.tensor([0.0, 1])),
        TypeError,
        "partners must be int64",
    ),
    (lambda layer: sk.layers.SmoothnessLoss(None, 0.3), TypeError, "within must be a number or a tensor, got NoneType"),
    (lambda layer: sk.layers.SmoothnessLoss(0.3, float("nan")), ValueError, "across must be finite, got nan"),
    (lambda layer: sk.layers.draw_partners(1), ValueError, "B must be at least 2.* got 1"),
]


CORRELATION_BAD = [
    (
        lambda layer: layer(*[ones(2, 5, 3)] * 4),
        ValueError,
        r"features_1 must have shape \[B, D, h, w\], got \[2, 5, 3\]",
    ),
    (
        lambda layer: correlate(layer, features_2=ones(3, 5, 4, 4)),
        ValueError,
        r"features_2 must have shape \[2, 5, h', w'\], got \[3, ",
    ),
    (
        lambda layer: correlate(layer, features_2=ones(2, 6, 4, 4)),
        ValueError,
        r"features_2 must have shape \[2, 5, h', w'\]",
    ),
    (lambda layer: correlate(layer, codes_1=ones(2, 7, 3, 4)), ValueError, r"codes_1 must have shape \[2, Z, 3, 3\]"),
    (
        lambda layer: correlate(layer, codes_2=ones(2, 7, 3, 3)),
        ValueError,
        r"codes_2 must have shape \[2, 7, 4, 4\], got \[2, 7, 3, 3\]",
    ),
    (
        lambda layer: correlate(layer, features_2=ones(2, 5, 4, 4, requires_grad=True)),
        ValueError,
        r"features_2\.detach\(\)",
    ),
    (lambda layer: sk.layers.CorrelationLoss("0.3"), TypeError, "threshold must be a number or a tensor, got str"),
    (lambda layer: sk.layers.CorrelationLoss(0.3, 0.0), TypeError, r"clamp must be a pair \(low, high\)"),
    (lambda layer: sk.layers.CorrelationLoss(0.3, (1, 0)), ValueError, "clamp must be .* low <= high"),
]


def correlate(layer, **changes):
    inputs = dict(
        features_1=ones(2, 5, 3, 3), features_2=ones(2, 5, 4, 4), codes_1=ones(2, 7, 3, 3), codes_2=ones(2, 7, 4, 4)
    )
    return layer(**{**inputs, **changes})


CASES = [(sk.layers.SmoothnessLoss(0.1, 0.3), *case) for case in SMOOTHNESS_BAD]
CASES += [(sk.layers.CorrelationLoss(0.1), *case) for case in CORRELATION_BAD]


@pytest.mark.parametrize(("layer", "call", "error", "message"), CASES, ids=[case[-1][:40] for case in CASES])
def test_errors_name_the_argument(layer, call, error, message):
    with pytest.raises(error, match=message):
        call(layer)
