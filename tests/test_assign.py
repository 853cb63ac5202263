"""Prototype assignment: the moment form's upsampled numerators give the argmax of upsampled codes; counts are exact."""

import pytest
import torch

import smooseg_kernels as sk
from smooseg_kernels import moments


def near_tie(codes, prototypes, grid, size, slack=1e-9):
    """Finds pixels whose two best cosines differ by less than rounding, where either answer is right."""
    planes = codes.double().mT.unflatten(-1, grid)
    fine = torch.nn.functional.interpolate(planes, size=size, mode="bilinear", align_corners=False).flatten(2).mT
    cosines = (
        torch.nn.functional.normalize(fine, dim=-1) @ torch.nn.functional.normalize(prototypes.double(), dim=-1).mT
    )
    best = cosines.topk(min(2, cosines.shape[-1]), -1).values
    return (
        ((best[..., 0] - best[..., -1]) < slack).unflatten(-1, size)
        if cosines.shape[-1] > 1
        else torch.zeros(1, dtype=torch.bool)
    )


@pytest.mark.parametrize(
    ("grid", "size"), [((1, 1), (5, 7)), ((4, 6), (4, 6)), ((5, 3), (17, 40)), ((28, 28), (320, 320)), ((9, 9), (4, 5))]
)
@pytest.mark.parametrize("K", [1, 3, 27])
def test_upsampled_numerators_equal_upsampled_codes(grid, size, K):
    g = torch.Generator().manual_seed(K)
    codes = torch.randn(2, grid[0] * grid[1], 8, generator=g, dtype=torch.float64)
    prototypes = torch.randn(K, 8, generator=g, dtype=torch.float64) * 3
    got = sk.assign(codes, prototypes, grid=grid, size=size, impl="torch")
    truth = sk.assign(codes, prototypes, grid=grid, size=size, impl="dense")
    assert got.dtype == torch.int64
    assert got.shape == (2, *size)
    assert ((got == truth) | near_tie(codes, prototypes, grid, size)).all()


def test_strips_do_not_show(monkeypatch):
    codes, prototypes = torch.randn(2, 30, 8), torch.randn(5, 8)
    whole = sk.assign(codes, prototypes, grid=(5, 6), size=(53, 31))
    monkeypatch.setattr(moments, "STRIP_ELEMENTS", 2 * 5 * 31 * 4)
    assert torch.equal(whole, sk.assign(codes, prototypes, grid=(5, 6), size=(53, 31)))


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_ties_go_to_the_lowest_index(impl):
    prototypes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert sk.assign(torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]), prototypes, impl=impl).tolist() == [[1, 0]]


@pytest.mark.parametrize("impl", ["torch", "dense"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_confusion_counts(impl, dtype):
    codes, prototypes = torch.randn(2, 12, 4), torch.randn(3, 4)
    labels = torch.randint(0, 6, (2, 9, 8))
    labels[0, :2] = 255
    assigned, counts = sk.assign(
        codes, prototypes, grid=(3, 4), size=(9, 8), labels=labels.to(dtype), classes=4, impl=impl
    )
    expected = torch.zeros(3, 4, dtype=torch.int64)
    for cluster, label in zip(assigned.flatten().tolist(), labels.flatten().tolist()):
        if label < 4:
            expected[cluster, label] += 1
    assert torch.equal(counts, expected)
    plain, counts = sk.assign(codes, prototypes, labels=torch.ones(2, 12, dtype=dtype), classes=2, impl=impl)
    assert plain.shape == (2, 12)
    assert counts[:, 1].tolist() == torch.bincount(plain.flatten(), minlength=3).tolist()
