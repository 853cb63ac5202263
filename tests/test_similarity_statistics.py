"""Means, histograms and neighbours of the closeness: every implementation against the definition in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

import smooseg_kernels as sk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = ["triton"] if importlib.util.find_spec("triton") else []
IMPLS = ["dense", "torch", *TRITON]
HALVES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
LIMITS = (-1.5, 1.5)
EPS = {
    torch.float64: 1e-13,
    torch.float32: 4e-6,
    torch.float16: 4e-6,
    torch.bfloat16: 4e-6,
}  # inputs are rounded alike; sums are in fp32


def make_features(B, P, D, dtype=torch.float32, seed=0) -> Tensor:
    """Makes features with a mean for each image and one for all, a row of 0 and one that is too short."""
    g = torch.Generator().manual_seed(seed)
    features = (
        torch.randn(B, P, D, generator=g) + torch.randn(B, 1, D, generator=g) + 0.5 * torch.randn(1, 1, D, generator=g)
    ).to(dtype)
    features[0, 0] = 0.0
    features[-1, -1] = 1e-12
    return features.to(DEVICE)


def make_weight(B, P) -> Tensor:
    """Makes weights with some patches at 0, and one image of three or more."""
    weight = torch.rand(B, P, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    weight[:, ::3] = 0.0
    if B > 2:
        weight[1] = 0.0
    return weight.to(DEVICE)


class Truth:
    """One pair set by the definition, in float64: `blocks` has (image, partner, W [P,P], row means [P]) in turn."""

    def __init__(self, features: Tensor, entry, center=True, weight=None, mean=None):
        f = features.double().cpu()
        norms = f.norm(dim=-1, keepdim=True)
        f = torch.where(norms < 1e-10, 0.0, f / norms.clamp(min=1e-10))
        self.B, self.P, _ = f.shape
        w = torch.ones(self.B, self.P, dtype=torch.float64) if weight is None else weight.double().cpu()
        pairs = [
            (n, j)
            for n in range(self.B)
            for j in (
                [n]
                if entry == "self"
                else [j for j in range(self.B) if j != n]
                if isinstance(entry, str)
                else [int(entry[n])]
            )
        ]
        present = [(n, j) for n, j in pairs if w[n].sum() > 0 and w[j].sum() > 0]
        means = [torch.einsum("i,j,ij", w[n], w[j], f[n] @ f[j].T) / w[n].sum() / w[j].sum() for n, j in present]
        measured = sum(means) / max(len(means), 1)
        self.mean = torch.tensor(float(measured if mean is None else mean), dtype=torch.float64)
        self.blocks, values, rows = [], [], [[] for _ in range(self.B)]
        for n, j in pairs:
            s = f[n] @ f[j].T
            row = s @ w[j] / w[j].sum() if w[j].sum() > 0 else torch.zeros(self.P, dtype=torch.float64)
            if w[j].sum() > 0:
                rows[n].append(row)
            closeness = s - row[:, None] + self.mean if center else s
            self.blocks.append((n, j, closeness, w[j] > 0))
            values.append(closeness[(w[n] > 0)[:, None] & (w[j] > 0)[None]])
        self.row_mean = torch.stack(
            [sum(each) / len(each) if each else torch.zeros(self.P, dtype=torch.float64) for each in rows]
        )
        self.values = torch.cat(values).sort().values

    def check(self, got: sk.SimilarityStatistics, t: int, eps: float, bins: int = 512, limits=LIMITS) -> None:
        torch.testing.assert_close(got.mean[t].double().cpu(), self.mean, rtol=0, atol=eps)
        torch.testing.assert_close(got.row_mean[t].double().cpu(), self.row_mean, rtol=0, atol=eps)
        self.check_histogram(got.histogram[t].cpu(), eps, bins, limits)
        self.check_neighbours(got.neighbour_values[t].double().cpu(), got.neighbour_indices[t].cpu(), eps)

    def check_histogram(self, histogram: Tensor, eps: float, bins: int, limits) -> None:
        """Allows rounding by eps: counts up to an edge lie between those up to edge - eps and edge + eps."""
        assert histogram.shape == (bins,)
        assert int(histogram.sum()) == len(self.values)
        edges = limits[0] + torch.arange(1, bins, dtype=torch.float64) * (limits[1] - limits[0]) / bins
        below = histogram.cumsum(0)[:-1]
        assert (below >= torch.searchsorted(self.values, edges - eps)).all()
        assert (below <= torch.searchsorted(self.values, edges + eps)).all()

    def check_neighbours(self, values: Tensor, indices: Tensor, eps: float) -> None:
        """Values are the largest and match their indices; no index repeats, is the patch itself or lacks weight."""
        k = values.shape[-1]
        table = torch.full((self.B, self.P, self.B * self.P), -torch.inf, dtype=torch.float64)
        for n, j, closeness, weighted in self.blocks:
            table[n, :, j * self.P : (j + 1) * self.P] = torch.where(weighted, closeness, -torch.inf)
            if n == j:
                table[n, range(self.P), range(n * self.P, (n + 1) * self.P)] = -torch.inf
        kept = min(k, self.B * self.P)
        truth = table.topk(kept, dim=2).values
        torch.testing.assert_close(values[..., :kept], truth, rtol=0, atol=eps)
        none = values == -torch.inf
        assert (none[..., kept:]).all()
        assert torch.equal(indices == -1, none)
        indexed = table.gather(2, indices.clamp(min=0))
        torch.testing.assert_close(indexed[~none], values[~none], rtol=0, atol=eps)
        ordered = torch.where(none, -1 - torch.arange(k), indices).sort(2).values
        assert (ordered.diff(dim=2) != 0).all()


def partners_for(B):
    repeated = torch.zeros(B, dtype=torch.int64)  # image 0 for every image, so image 0 meets itself
    return ["self", torch.arange(B).roll(1).to(DEVICE), repeated.to(DEVICE), *(["all"] if B > 1 else [])]


def statistics_of(features, partners, impl, weight=None, **options):
    weight = None if weight is None else weight.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    return sk.similarity_statistics(features, partners, patch_weight=weight, impl=impl, **options)


FORMS = [("dense", torch.float64), ("torch", torch.float64), ("torch", torch.float32)]
FORMS += [(impl, dtype) for impl in TRITON for dtype in (torch.float32, *HALVES)]
SMALL = [((3, 17, 5), center, weighted) for center in (True, False) for weighted in (False, True)]


@pytest.mark.parametrize(
    ("shape", "center", "weighted"), [*SMALL, ((2, 97, 70), True, True), ((1, 1, 5), True, False)], ids=str
)
@pytest.mark.parametrize(("impl", "dtype"), FORMS, ids=str)
def test_against_the_definition(shape, center, weighted, impl, dtype):
    B, P, D = shape
    features, weight = make_features(B, P, D, dtype), make_weight(B, P) if weighted else None
    partners = partners_for(B)
    got = statistics_of(features, partners, impl, weight, center=center, neighbours=5)
    assert (
        got.mean.dtype == got.row_mean.dtype == got.neighbour_values.dtype == torch.promote_types(dtype, torch.float32)
    )
    assert got.histogram.dtype == got.neighbour_indices.dtype == torch.int64
    weight = None if weight is None else weight.to(got.mean.dtype)
    for t, entry in enumerate(partners):
        Truth(features, entry, center, weight).check(got, t, EPS[dtype])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_given_mean_moves_everything_by_the_same(impl):
    features, mean = make_features(3, 17, 5), torch.tensor([0.3, -0.2], device=DEVICE)
    got = statistics_of(features, ["self", "all"], impl, mean=mean, neighbours=3)
    for t, entry in enumerate(("self", "all")):
        Truth(features, entry, mean=mean[t]).check(got, t, EPS[torch.float32])
    plain = statistics_of(features, ["self", "all"], impl, mean=mean, center=False, neighbours=3)
    assert torch.equal(plain.mean, mean)  # and without centring W is the cosine, whatever M is
    Truth(features, "all", center=False, mean=-0.2).check(plain, 1, EPS[torch.float32])
    got.mean.add_(1.0)
    assert mean.tolist() == pytest.approx([0.3, -0.2])  # the result is a copy


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("bins", "limits"), [(1, (-1.0, 1.0)), (7, (-0.25, 0.4)), (100, (0.5, 0.75))], ids=str)
def test_bins_and_limits(impl, bins, limits):
    """Values beyond the limits are in the end bins."""
    features = make_features(2, 33, 6)
    got = statistics_of(features, ["self"], impl, bins=bins, limits=limits)
    truth = Truth(features, "self")
    truth.check_histogram(got.histogram[0].cpu(), EPS[torch.float32], bins, limits)
    assert got.neighbour_values.shape == (1, 2, 33, 0)
    if bins == 100:
        assert got.histogram[0, 0] > 200  # values beyond the limits
        assert got.histogram[0, -1] > 10


@pytest.mark.parametrize("impl", IMPLS)
def test_a_value_on_an_edge_is_of_the_upper_bin(impl):
    """Puts edges at the exact cosines -1, 0 and 1; 1 is the upper limit and stays in the last bin."""
    features = torch.tensor([[[2.0, 0.0], [0.0, 4.0], [-8.0, 0.0]]], device=DEVICE)
    got = statistics_of(features, ["self"], impl, center=False, bins=4, limits=(-1.0, 1.0))
    assert got.histogram.tolist() == [[2, 0, 4, 3]]
    got = statistics_of(features, ["self"], impl, center=False, bins=3, limits=(0.0, 1.5))
    assert got.histogram.tolist() == [[6, 0, 3]]


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lowest_index(impl):
    features = torch.tensor([1.0, 2.0, -1.0, 3.0], device=DEVICE)[None, :, None].expand(2, 4, 1).contiguous()
    got = statistics_of(features, ["self", "all"], impl, center=False, neighbours=3)
    assert got.neighbour_indices[0, 0].tolist() == [[1, 3, 2], [0, 3, 2], [0, 1, 3], [0, 1, 2]]
    assert got.neighbour_indices[0, 1].tolist() == [[5, 7, 6], [4, 7, 6], [4, 5, 7], [4, 5, 6]]
    assert got.neighbour_indices[1, 0].tolist() == [[4, 5, 7], [4, 5, 7], [6, 4, 5], [4, 5, 7]]
    zero = statistics_of(torch.zeros(2, 40, 3, device=DEVICE), ["all"], impl, neighbours=4)  # -0 and 0 too
    assert (zero.neighbour_indices[0, 1] == torch.arange(4, device=DEVICE)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [1, 32, 64])
def test_many_neighbours_and_fewer_than_asked_for(impl, k):
    features = make_features(2, 37, 6)
    got = statistics_of(features, ["self", "all"], impl, bins=0, neighbours=k)
    assert got.histogram.shape == (2, 0)
    for t, entry in enumerate(("self", "all")):
        Truth(features, entry).check_neighbours(
            got.neighbour_values[t].double().cpu(), got.neighbour_indices[t].cpu(), EPS[torch.float32]
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_zero_is_absence(impl):
    features = make_features(3, 20, 6)
    weight = torch.ones(3, 20, dtype=torch.float64, device=DEVICE)
    weight[:, 13:] = 0.0
    whole = statistics_of(features, ["self", "all"], impl, weight, neighbours=4)
    few = statistics_of(features[:, :13], ["self", "all"], impl, neighbours=4)
    torch.testing.assert_close(whole.mean, few.mean)
    torch.testing.assert_close(whole.row_mean[:, :, :13], few.row_mean, rtol=0, atol=1e-6)
    assert torch.equal(whole.histogram.sum(1), few.histogram.sum(1))
    assert torch.equal(whole.neighbour_indices[0, :, :13] % 20, few.neighbour_indices[0] % 13)
    empty = statistics_of(features, ["self", "all"], impl, torch.zeros_like(weight), neighbours=4)
    assert not empty.mean.any()
    assert not empty.histogram.any()
    assert (empty.neighbour_indices == -1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_means_are_those_of_the_energy(impl):
    features, partner = make_features(3, 17, 5), torch.tensor([2, 2, 0], device=DEVICE)
    probs = torch.rand(3, 17, 4, device=DEVICE)
    for weight in (None, make_weight(3, 17).float()):
        terms = sk.smoothness_energy(
            features, probs, ["self", partner, "all"], [0.0] * 3, patch_weight=weight, impl="torch"
        )
        got = sk.similarity_statistics(features, ["self", partner, "all"], patch_weight=weight, bins=0, impl=impl)
        torch.testing.assert_close(got.mean, terms.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", *TRITON])
def test_strides_and_blocks(impl, monkeypatch):
    """Takes features in any memory order, in blocks smaller than an image."""
    from smooseg_kernels import similarity_blocks

    for name in ("BLOCK_ROWS", "BLOCK_COLUMNS", "LARGE_ROWS", "LARGE_COLUMNS"):
        monkeypatch.setattr(similarity_blocks, name, 7 if "ROWS" in name else 11)
    features = make_features(2, 33, 6)
    strided = features.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    plain = statistics_of(features, ["self", "all"], impl, neighbours=6)
    got = statistics_of(strided, ["self", "all"], impl, neighbours=6)
    for t, entry in enumerate(("self", "all")):
        for result in (plain, got):
            Truth(features, entry).check(result, t, EPS[torch.float32])


@pytest.mark.parametrize("impl", ["torch", *TRITON])
def test_reruns_are_bit_equal(impl):
    features, partners = make_features(2, 70, 20), ["self", "all"]
    first, second = (statistics_of(features, partners, impl, neighbours=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_block_is_all_that_is_kept_of_a_large_image():
    """No allocation exceeds a block, by the profiler; [P,P] would."""
    from torch.profiler import ProfilerActivity, profile

    features = torch.randn(1, 3000, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        sk.similarity_statistics(features, ["self"], impl="torch")
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert 0 < largest <= 2 * 4 * 1024 * 1024 < 4 * 3000**2


def test_quantiles_of_a_histogram():
    g = torch.Generator().manual_seed(3)
    values = torch.randn(2, 5001, generator=g, dtype=torch.float64) * 0.3
    bins, limits = 64, (-1.0, 1.0)
    place = ((values - limits[0]) * bins / 2).floor().long().clamp(0, bins - 1)
    histogram = torch.zeros(2, bins, dtype=torch.int64).scatter_add_(1, place, torch.ones_like(place))
    shares = [0.0, 0.01, 0.3, 0.5, 0.99, 1.0]
    got = sk.histogram_quantiles(histogram, shares, limits)
    ordered = values.sort(1).values
    rank = torch.tensor([max(0, -(-round(q * 10**6) * 5001 // 10**6) - 1) for q in shares])
    exact = ordered[:, rank]
    bin_of = ((exact - limits[0]) * bins / 2).floor().clamp(0, bins - 1)
    assert torch.equal(((got - limits[0]) * bins / 2).floor(), bin_of)  # the bin of the exact quantile
    assert (got.diff(dim=1) >= 0).all()
    assert sk.histogram_quantiles(torch.tensor([0, 4, 0, 0]), [0.0, 0.25, 1.0], (0.0, 4.0)).tolist() == [
        1.125,
        1.125,
        1.875,
    ]
    assert sk.histogram_quantiles(torch.tensor([3, 0, 7]), [0.3, 0.31], (0.0, 3.0)).tolist() == pytest.approx(
        [5 / 6, 2 + 1 / 14]
    )
    assert 0.07 * 100 > 7  # by rounding: still the seventh of 100
    assert sk.histogram_quantiles(torch.tensor([7, 93]), [0.07], (0.0, 2.0)) < 1
    assert sk.histogram_quantiles(torch.zeros(3, dtype=torch.int64), [0.5]).isnan().all()


BAD = [
    (dict(features=torch.ones(2, 3)), ValueError, r"features must have shape \[B, P, D\]"),
    (dict(features=torch.ones(2, 3, 4, requires_grad=True)), ValueError, "features is a constant"),
    (dict(features=torch.ones(1, 3, 4), partners=["all"]), ValueError, "at least 2 images, got 1"),
    (dict(partners=["both"]), ValueError, r'partners\[0\] must be "self", "all"'),
    (dict(partners=torch.tensor([[0, 2]])), ValueError, "must hold image numbers 0 to 1, got 0 to 2"),
    (dict(bins=-1), ValueError, "bins must be 0 or more, got -1"),
    (dict(bins=4.0), TypeError, "bins must be an integer, got float"),
    (dict(neighbours=-2), ValueError, "neighbours must be 0 or more, got -2"),
    (dict(limits=(1.0, -1.0)), ValueError, r"limits must be two finite numbers, the lower first, got \(1.0, -1.0\)"),
    (dict(limits=(0.0, float("inf"))), ValueError, "limits must be two finite numbers"),
    (dict(limits=0.5), TypeError, "limits must be two numbers"),
    (dict(patch_weight=-torch.ones(2, 3)), ValueError, "patch_weight must be 0 or more"),
    (dict(mean=torch.ones(2)), ValueError, r"mean must have shape \[1\]"),
    (dict(impl="cuda"), ValueError, "impl must be"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
def test_errors_name_the_argument(changes, error, message):
    arguments = dict(features=torch.ones(2, 3, 4), partners=["self"]) | changes
    with pytest.raises(error, match=message):
        sk.similarity_statistics(**arguments)


def test_errors_of_quantiles():
    with pytest.raises(TypeError, match="histogram must be an integer tensor"):
        sk.histogram_quantiles(torch.ones(3), [0.5])
    with pytest.raises(ValueError, match="q must be a sequence of shares"):
        sk.histogram_quantiles(torch.ones(3, dtype=torch.int64), [1.5])


def test_no_gradient():
    got = sk.similarity_statistics(torch.randn(2, 3, 4), ["self"])
    assert not any(value.requires_grad for value in got)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    features, weight = make_features(2, 17, 5), make_weight(2, 17).float()

    def statistics(features, weight):
        return sk.similarity_statistics(
            features, ["self", "all"], patch_weight=weight, neighbours=3, bins=32, impl=impl
        )

    compiled = torch.compile(statistics, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(features, weight), statistics(features, weight)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_fake_tensors(impl):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        got = sk.similarity_statistics(torch.empty(3, 17, 20, device=DEVICE), ["self", "all"], neighbours=4, impl=impl)
        assert [tuple(value.shape) for value in got] == [(2,), (2, 3, 17), (2, 512), (2, 3, 17, 4), (2, 3, 17, 4)]


@pytest.mark.skipif(not TRITON, reason="needs triton")
def test_operator_passes_opcheck():
    from torch.library import opcheck

    from smooseg_kernels.triton import similarity

    features = make_features(3, 17, 5).mT.contiguous().mT  # not contiguous
    table, weight = torch.tensor([[2, 0, 0]], device=DEVICE), make_weight(3, 17).float()
    opcheck(similarity.similarity_statistics, (features, table, [-1, 0, -2], weight, None, True, 16, -1.5, 1.5, 3))
    opcheck(
        similarity.similarity_statistics,
        (features, None, [-1], None, torch.tensor([0.1], device=DEVICE), False, 0, -1.5, 1.5, 0),
    )


@pytest.mark.skipif(not TRITON, reason="needs triton")
def test_what_the_kernels_do_not_hold():
    features = make_features(2, 5, 3)
    with pytest.raises(
        ValueError, match=r'impl="triton" keeps at most 64 neighbours, got neighbours=65: use impl="torch"'
    ):
        statistics_of(features, ["self"], "triton", neighbours=65)
    with pytest.raises(ValueError, match=r'impl="triton" counts at most 2048 bins, got bins=3000'):
        statistics_of(features, ["self"], "triton", bins=3000)
    assert statistics_of(features, ["self"], "auto", bins=3000, neighbours=65).histogram.sum() == 50
    with pytest.raises(TypeError, match="fp64"):
        statistics_of(features.double(), ["self"], "triton")
