"""Probs, the data term and assignment in Triton, against the dense oracle."""

from __future__ import annotations

import pytest
import torch

from smooseg_kernels import assign, prototype_loss, prototype_probabilities

pytest.importorskip("triton")
from torch.library import opcheck
from triton_cases import EPS, FP32_EPS, make_case

from smooseg_kernels.triton import assignment, code_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def relative(got, truth):
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


def differentiate(function, inputs, upstream):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out))]


@pytest.mark.parametrize("P", [1, 64, 97])
@pytest.mark.parametrize(("K", "Z"), [(3, 6), (27, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.7, 1e-5])
def test_probabilities(P, K, Z, dtype, scale):
    case = make_case(B=2, P=P, K=K, Z=Z, dtype=dtype, device=DEVICE)
    upstream = scale * torch.randn(2, P, K, device=DEVICE)
    results = [
        differentiate(
            lambda c, p, impl=impl: prototype_probabilities(c, p, temperature=0.2, impl=impl),
            [x.to(kind) for x in tensors],
            upstream,
        )
        for impl, kind, tensors in (
            ("triton", dtype, (case.codes, case.teacher)),
            ("dense", torch.float64, (case.codes, case.teacher.to(dtype))),
        )
    ]
    got, truth = results
    assert got[0].dtype == torch.float32
    floor = 2.0**-24 if dtype == torch.float16 else 0.0  # fp16 gradients underflow, as documented
    for name, a, b in zip(("probabilities", "codes", "prototypes"), got, truth):
        allowed = (8 if name == "probabilities" else 16) * max(FP32_EPS, EPS[dtype] if name != "probabilities" else 0.0)
        assert (a.double() - b).norm() <= allowed * b.norm() + floor * b.numel() ** 0.5, name


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_data_term(weighted, dtype):
    case = make_case(B=2, P=97, K=27, Z=64, dtype=dtype, device=DEVICE)
    weight = torch.rand(2, 97, device=DEVICE) * 1e3 if weighted else None
    results = [
        differentiate(
            lambda s, impl=impl, kind=kind, prototypes=prototypes: prototype_loss(
                case.codes.to(kind),
                s,
                case.teacher.to(prototypes),
                patch_weight=None if weight is None else weight.to(prototypes),
                impl=impl,
            ),
            [case.student.to(prototypes)],
            torch.tensor(1.7),
        )
        for impl, kind, prototypes in (("triton", dtype, torch.float32), ("dense", torch.float64, torch.float64))
    ]
    (loss, gradient), (loss_truth, gradient_truth) = results
    assert relative(loss, loss_truth) < 1e-6
    assert relative(gradient, gradient_truth) < 4 * max(FP32_EPS, EPS[dtype])


def test_data_term_without_weight():
    case = make_case(B=2, P=9, device=DEVICE)
    student = case.student.requires_grad_()
    loss = prototype_loss(
        case.codes, student, case.teacher, patch_weight=torch.zeros(2, 9, device=DEVICE), impl="triton"
    )
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_prototypes_without_length():
    case = make_case(B=2, P=9, K=5, device=DEVICE)
    case.teacher[2] = 0
    got, truth = (
        differentiate(
            lambda c, p, impl=impl: prototype_probabilities(c, p, impl=impl),
            (case.codes, case.teacher),
            torch.ones(2, 9, 5).cumsum(-1),
        )
        for impl in ("triton", "dense")
    )
    assert not got[2][2].any()
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, truth))


GRIDS = [
    ((2, 3), (7, 5)),
    ((28, 28), (64, 80)),
    ((5, 7), (3, 2)),
    ((1, 4), (9, 9)),
    ((4, 1), (33, 1)),
    ((7, 7), (113, 113)),
    ((6, 6), (6, 6)),
]


@pytest.mark.parametrize(("grid", "size"), GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upsampled_assignment(grid, size, dtype):
    case = make_case(B=2, P=grid[0] * grid[1], K=5, dtype=dtype, device=DEVICE)
    labels = torch.randint(-1, 6, (2, *size), device=DEVICE)
    got, counts = assign(case.codes, case.teacher, grid=grid, size=size, labels=labels, classes=4, impl="triton")
    want, expected = assign(
        case.codes.double(), case.teacher.double(), grid=grid, size=size, labels=labels, classes=4, impl="dense"
    )
    assert got.dtype == counts.dtype == torch.int64
    assert torch.equal(got, want)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize(("patches", "pixels"), [(1, 1), (1, 40), (3, 2), (3, 159), (28, 321), (50, 27)])
def test_every_pixel_belongs_to_one_program(patches, pixels):
    """One side at a time: every pixel has its label, and is counted once."""
    codes, prototypes = (
        torch.ones(1, patches, 6, device=DEVICE),
        torch.tensor([[-1.0], [1.0]], device=DEVICE).expand(2, 6),
    )
    for grid, size in (((patches, 1), (pixels, 1)), ((1, patches), (1, pixels))):
        truth = torch.zeros(1, *size, dtype=torch.uint8, device=DEVICE)
        got, counts = assign(codes, prototypes, grid=grid, size=size, labels=truth, classes=1, impl="triton")
        assert (got == 1).all()
        assert counts.tolist() == [[0], [pixels]]


@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.uint8, torch.int32])
def test_patch_assignment_and_counts(labels_dtype):
    case = make_case(B=2, P=97, K=5, device=DEVICE)
    labels = torch.randint(0, 6, (2, 97), device=DEVICE).to(labels_dtype)
    got, counts = assign(case.codes, case.teacher, labels=labels, classes=4, impl="triton")
    want, expected = assign(case.codes, case.teacher, labels=labels, classes=4, impl="torch")
    assert torch.equal(got, want)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("classes", [1, 2000, 100_000])
@pytest.mark.parametrize("sizes", [{}, {"grid": (5, 8), "size": (11, 9)}], ids=["patches", "pixels"])
def test_copies_of_few_and_of_many_cells(classes, sizes):
    """Fewer copies of more cells; values beyond int32 are no class of the low bits that they share with one."""
    case = make_case(B=1, P=40, K=5, device=DEVICE)
    labels = torch.randint(-1, classes + 1, (1, *sizes.get("size", (40,))), device=DEVICE)
    labels[0, :2] = 1 << 32
    got, want = (
        assign(case.codes, case.teacher, labels=labels, classes=classes, impl=impl, **sizes)
        for impl in ("triton", "torch")
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_counts_of_uniform_ground_truth():
    """Runs of a cell, as pictures have them."""
    case = make_case(B=2, P=12, K=3, device=DEVICE)
    labels = torch.ones(2, 40, 50, dtype=torch.uint8, device=DEVICE)
    labels[1] = 255
    got, counts = assign(case.codes, case.teacher, grid=(3, 4), size=(40, 50), labels=labels, classes=2, impl="triton")
    assert torch.equal(counts[:, 1], torch.bincount(got[0].flatten(), minlength=3))
    assert not counts[:, 0].any()


def test_sides_beyond_32_bits_are_refused():
    codes, prototypes = torch.ones(1, 1, 6, device="meta"), torch.ones(5, 6, device="meta")
    with pytest.raises(ValueError, match="are too large: patches times pixels of a side"):
        assignment.assign.launcher(codes, prototypes, [1, 1], [1, 1 << 31], None, 0)


def test_ties_go_to_the_lowest_index():
    codes, prototypes = torch.ones(1, 4, 6, device=DEVICE), torch.ones(5, 6, device=DEVICE)
    assert not assign(codes, prototypes, impl="triton").any()
    assert not assign(codes, prototypes, grid=(2, 2), size=(9, 9), impl="triton").any()


def test_operators_pass_opcheck():
    case = make_case(B=2, P=6, K=5, H=1, device=DEVICE)
    codes, student = case.codes.requires_grad_(), case.student.requires_grad_()
    opcheck(code_rows.probabilities, (codes, student, 0.1))
    opcheck(code_rows.data_term, (codes.detach(), student, case.teacher, None, True))
    labels = torch.randint(0, 4, (2, 7, 9), device=DEVICE)
    opcheck(assignment.assign, (codes[0].detach(), case.teacher[0], [2, 3], [7, 9], labels, 4))
    opcheck(assignment.assign, (codes[0].detach(), case.teacher[0], None, None, None, 0))


def test_compiles_whole():
    case = make_case(B=2, P=17, K=5, device=DEVICE)

    def rows(codes, student, temperature):
        probs = prototype_probabilities(codes, student, temperature=temperature, impl="triton")
        return (probs * probs).sum() + prototype_loss(codes, student, case.teacher, impl="triton")

    compiled = torch.compile(rows, backend="aot_eager", fullgraph=True, dynamic=True)
    inputs = [case.codes.requires_grad_(), case.student.requires_grad_()]
    # to a compiler a number that changes is a tensor
    losses = compiled(*inputs, 0.1), rows(*inputs, torch.tensor(0.1, device=DEVICE))
    for a, b in zip(*(torch.autograd.grad(loss, inputs) for loss in losses)):
        assert torch.equal(a, b)


def test_derivatives_that_operators_lack_are_refused():
    """PyTorch would return 0 for a second derivative of the data term, and drop tangents."""
    generator = torch.Generator().manual_seed(0)
    codes, student = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((1, 5, 4), (3, 4)))
    loss = prototype_loss(codes, student.requires_grad_(), student.detach(), impl="triton")
    with pytest.raises(RuntimeError, match='prototype_loss: impl="triton" has no gradient of its gradient'):
        torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jacfwd(lambda z: prototype_probabilities(z, student.detach(), impl="triton"))(codes)


def test_prototypes_that_the_kernels_keep_on_chip():
    from smooseg_kernels.triton import fits

    assert all(fits(*sizes) for sizes in ((27, 256), (127, 64), (511, 16)))
    assert not any(fits(*sizes) for sizes in ((15, 257), (32, 256), (128, 64)))
