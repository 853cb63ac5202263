"""Bad arguments of the public functions: each error names the argument, what came and what was expected."""

import subprocess
import sys

import pytest
import torch
from objective_inputs import make_inputs

import smooseg_kernels as sk


def call(**changes):
    x = make_inputs(dtype=torch.float32)
    arguments = dict(zip(("features", "codes", "student", "teacher", "partners", "thresholds"), x[:6]))
    arguments.update(changes)
    return sk.smooseg_loss(**arguments)


ones = torch.ones
BAD = [
    (dict(features=ones(3, 17)), ValueError, r"features must have shape \[B, P, D\], got \[3, 17\]"),
    (
        dict(features=ones(3, 17, 70, dtype=torch.int64)),
        TypeError,
        "features must be fp32, fp16, bf16 or fp64, got torch.int64",
    ),
    (dict(features=[1.0]), TypeError, "features must be a tensor"),
    (dict(features=ones(3, 17, 70, requires_grad=True)), ValueError, r"features is a constant.*features\.detach\(\)"),
    (dict(codes=ones(3, 16, 8)), ValueError, r"codes must have shape \[3, 17, Z\], got \[3, 16, 8\]"),
    (dict(codes=ones(3, 17, 8, device="meta")), ValueError, "codes is on meta, but the other inputs are on cpu"),
    (dict(student=ones(5, 9)), ValueError, r"student must have shape \[K, 8\]"),
    (dict(student=ones(0, 8)), ValueError, r"student must have shape"),
    (dict(student=ones(2, 5, 8)), ValueError, r"student must have shape \[K, 8\], got \[2, 5, 8\]"),
    (dict(teacher=ones(4, 8)), ValueError, r"teacher must have shape \[5, 8\], got \[4, 8\]"),
    (dict(teacher=ones(5, 8, requires_grad=True)), ValueError, "teacher is a constant"),
    (dict(partners="self"), TypeError, "partners must be an int64 tensor"),
    (dict(partners=[]), ValueError, "partners is empty"),
    (dict(partners=["self", "none"]), ValueError, r'partners\[1\] must be "self", "all"'),
    (dict(partners=["self", torch.zeros(3)]), TypeError, r"partners\[1\] must be int64"),
    (dict(partners=["self", torch.zeros(4, dtype=torch.int64)]), ValueError, r"partners\[1\] must have shape \[3\]"),
    (
        dict(partners=["self", torch.tensor([0, 1, 3])]),
        ValueError,
        r"partners\[1\] must hold image numbers 0 to 2, got 0 to 3",
    ),
    (dict(partners=torch.zeros(3, dtype=torch.int64)), ValueError, r"partners must have shape \[T, 3\]"),
    (dict(thresholds=[0.1]), ValueError, r"thresholds must have shape \[2\]"),
    (dict(thresholds=ones(2, requires_grad=True)), ValueError, "thresholds is a constant"),
    (dict(temperature=0.0), ValueError, "temperature must be a finite number above 0, got 0.0"),
    (dict(channel_scale=ones(3, 69)), ValueError, r"channel_scale must have shape \[3, 70\]"),
    (
        dict(patch_weight=-ones(3, 17)),
        ValueError,
        "patch_weight must be 0 or more everywhere and finite, got -1.0 to -1.0",
    ),
    (
        dict(feature_norms=ones(3, 17), channel_scale=ones(3, 70)),
        ValueError,
        "feature_norms cannot be used with channel_scale",
    ),
    (dict(mean=ones(3)), ValueError, r"mean must have shape \[2\]"),
    (dict(impl="cuda"), ValueError, 'impl must be "auto", "triton", "torch" or "dense", got \'cuda\''),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_all_needs_two_images():
    x = make_inputs(B=1, T=1)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        sk.smooseg_loss(*x[:4], ["all"], [0.1])


def test_import_needs_torch_alone():
    """In a process where Triton, NumPy, SciPy and the trainer cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('triton', 'numpy', 'scipy', 'smooseg_fast'):\n    sys.modules[name] = None\n"
        "import torch, smooseg_kernels as sk\n"
        "features, codes, rows = torch.rand(2, 3, 4), torch.rand(2, 3, 5), torch.rand(2, 5)\n"
        "out = sk.smooseg_loss(features, codes, rows, rows.clone(), ['self', 'all'], [0.0, 0.5])\n"
        "print(float(out.total))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout)) < 10


ASSIGN_BAD = [
    (dict(grid=(3, 4)), ValueError, "grid and size go together"),
    (dict(grid=(3, 4), size=(9, 9)), ValueError, r"grid \(3, 4\) has 12 patches, but codes has 6"),
    (dict(grid=(2, 3), size=(0, 9)), ValueError, "size must be two positive integers"),
    (dict(labels=torch.zeros(1, 6, dtype=torch.int64)), ValueError, "labels and classes go together"),
    (dict(labels=torch.zeros(1, 6), classes=2), TypeError, "labels must be an integer tensor"),
    (dict(labels=torch.zeros(1, 5, dtype=torch.int64), classes=2), ValueError, r"labels must have shape \[1, 6\]"),
    (dict(labels=torch.zeros(1, 6, dtype=torch.int64), classes=0), ValueError, "classes must be at least 1"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ASSIGN_BAD, ids=[m[:40] for _, _, m in ASSIGN_BAD])
def test_errors_of_assign(changes, error, message):
    with pytest.raises(error, match=message):
        sk.assign(torch.ones(1, 6, 4), torch.ones(2, 4), **changes)


CONSTANT = torch.tensor(0.1, requires_grad=True)
CONSTANTS = [
    (dict(thresholds=[CONSTANT, 0.2]), ValueError, "thresholds is a constant"),
    (dict(thresholds="ab"), TypeError, r"thresholds must be numbers, \[2\], got 'ab'"),
    (dict(thresholds=[0.1, None]), TypeError, "thresholds must be numbers"),
    (
        dict(temperature=CONSTANT),
        ValueError,
        r"temperature is a constant of this function and gets no gradient: pass temperature.detach\(\)",
    ),
    (
        dict(temperature=torch.full((2,), 0.1)),
        ValueError,
        r"temperature must be a number or a tensor of shape \[\], got shape \[2\]",
    ),
    (dict(temperature="0.1"), TypeError, "temperature must be a number"),
    (
        dict(patch_weight=torch.full((3, 17), torch.inf)),
        ValueError,
        "patch_weight must be 0 or more everywhere and finite, got inf",
    ),
    (
        dict(codes=ones(0, 3, 17, 8), student=ones(0, 5, 8), teacher=ones(0, 5, 8)),
        ValueError,
        r"codes must have shape \[H, 3, 17, Z\]",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), CONSTANTS, ids=[m[:40] for _, _, m in CONSTANTS])
def test_what_would_be_lost_without_a_word_is_an_error(changes, error, message):
    """A number in a list or a scalar tensor loses its gradient as it becomes a number."""
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"), [(dict(grid=3, size=(2, 2)), "grid must be two"), (dict(labels=1, classes="x"), "classes")]
)
def test_assign_names_what_is_no_number(changes, message):
    if "labels" in changes:
        changes = {**changes, "labels": torch.zeros(1, 6, dtype=torch.int64)}
    with pytest.raises((TypeError, ValueError), match=message):
        sk.assign(ones(1, 6, 4), ones(2, 4), **changes)


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_statistics_of_what_is_not_finite_name_the_features(impl):
    features = ones(2, 3, 4)
    features[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="features must be finite"):
        sk.similarity_statistics(features, ["self"], impl=impl)
