"""The objective's kernels against the dense oracle, in the interpreter or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from smooseg_kernels import smooseg_loss, smoothness_energy

pytest.importorskip("triton")
from torch.library import opcheck
from triton_cases import EPS, FP32_EPS, check, check_against_dense, evaluate, make_case, term_size

from smooseg_kernels import dispatch
from smooseg_kernels.triton import SELF, launch, objective

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize("P", [1, 17, 64, 97])  # one row, below a block, exact, ragged
@pytest.mark.parametrize(
    ("D", "K", "Z"), [(5, 3, 6), (70, 27, 64)]
)  # K below the matrix unit's 16; never a power of two
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_shapes(P, D, K, Z, dtype, poisoned):
    check_against_dense(make_case(B=3, P=P, D=D, K=K, Z=Z, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_row_length_and_many_patches(dtype):
    check_against_dense(make_case(B=2, P=784, D=384, K=27, Z=64, dtype=dtype, device=DEVICE))


def random_upstream(case, *names):
    heads, T = case.codes.shape[:-3], case.thresholds.shape[-1]
    generator = torch.Generator().manual_seed(7)
    shapes = {"total": heads, "data": heads, "energy": (*heads, T), "distance": (*heads, T)}
    return {name: torch.randn(shapes[name], generator=generator).to(case.codes.device) for name in names}


@pytest.mark.parametrize(
    "names", ["total", "energy", "distance", "data", "total energy", "energy distance data total", "total data"]
)
def test_every_output_takes_an_upstream_gradient(names, poisoned):
    case = make_case(B=3, P=17, D=20, K=5, H=2, partners=("self", "index", "all"), device=DEVICE)
    check_against_dense(case, random_upstream(case, *names.split()))


OPTIONS = {
    "relative": lambda B, P, D: dict(relative=True),
    "uncentred": lambda B, P, D: dict(center=False),
    "uncentred relative": lambda B, P, D: dict(center=False, relative=True),
    "mean": lambda B, P, D: dict(mean=torch.tensor([0.1, -0.2, 0.3])),
    "uncentred mean": lambda B, P, D: dict(mean=torch.tensor([0.1, -0.2, 0.3]), center=False, relative=True),
    "scale": lambda B, P, D: dict(channel_scale=(torch.rand(B, D) > 0.3).float() * 1.25),
    "weight": lambda B, P, D: dict(patch_weight=torch.rand(B, P) * 7),
    "an image without weight": lambda B, P, D: dict(patch_weight=torch.rand(B, P) * (torch.arange(B) != 1)[:, None]),
    "one image with weight": lambda B, P, D: dict(patch_weight=torch.rand(B, P) * (torch.arange(B) == 1)[:, None]),
    "no weight at all": lambda B, P, D: dict(patch_weight=torch.zeros(B, P), relative=True),
    "scale weight relative": lambda B, P, D: dict(
        channel_scale=torch.rand(B, D), patch_weight=(torch.rand(B, P) > 0.4).float(), relative=True
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype, poisoned):
    torch.manual_seed(3)
    options = OPTIONS[name](4, 33, 20)
    check_against_dense(
        make_case(B=4, P=33, D=20, K=5, dtype=dtype, device=DEVICE, partners=("self", "index", "all"), **options)
    )


def test_feature_norms_are_used():
    case = make_case(B=2, P=17, D=20, device=DEVICE)
    case.options["feature_norms"] = case.features.norm(dim=-1)
    check_against_dense(case)
    case.options["feature_norms"] = case.features.norm(dim=-1) * 2
    check_against_dense(case)


@pytest.mark.parametrize("H", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_equal_single_calls(H, dtype, poisoned):
    """Covers rows whole in one program and in slices, a block of heads and one at a time."""
    case = make_case(B=2, P=40, D=150, K=7, H=H, dtype=dtype, device=DEVICE, channel_scale=torch.rand(2, 150))
    got = check_against_dense(case)  # every head
    alone = make_case(
        B=2, P=40, D=150, K=7, H=H, dtype=dtype, device=DEVICE, channel_scale=case.options["channel_scale"]
    )
    for name in ("codes", "student", "teacher", "thresholds"):
        setattr(alone, name, getattr(alone, name)[-1])
    single = evaluate(alone, "triton")
    eps = EPS[dtype]
    for name in ("total", "energy", "data", "distance"):
        assert (single.values[name] - got.values[name][-1]).abs().max() <= 2 * eps * term_size(case)
    # one head and several have other tiles: 6.2 eps apart in float32 on an H200
    assert (single.gradients["codes"] - got.gradients["codes"][-1]).norm() <= 8 * eps * single.gradients["codes"].norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_channel_that_outweighs_all_others_is_dropped(dtype, poisoned):
    """Rows are unit after the mask: a dropped channel of 5,000, far above the norms, must leave no trace in 16 bits."""
    case = make_case(
        B=3,
        P=33,
        D=20,
        K=5,
        dtype=dtype,
        device=DEVICE,
        channel_scale=(torch.arange(20) != 4).float().expand(3, 20) * 1.25,
    )
    case.features[..., 4] = 5000.0
    check_against_dense(case)


@pytest.mark.parametrize(("K", "Z"), [(1, 1), (16, 16), (31, 5), (32, 5), (63, 100), (127, 64)])
def test_label_columns(K, Z, poisoned):
    check_against_dense(make_case(B=2, P=20, D=12, K=K, Z=Z, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_data_term_in_a_launch_of_its_own(dtype, poisoned, monkeypatch):
    """Large prototypes and fp32 on a card. Its tiles may differ from those of the label rows."""
    monkeypatch.setitem(launch.OVERRIDES, "student_rows", {"BLOCK_P": 16})
    weight = torch.rand(3, 41, generator=torch.Generator().manual_seed(1))
    check_against_dense(make_case(B=3, P=41, D=20, K=5, H=2, dtype=dtype, device=DEVICE, patch_weight=weight))
    check_against_dense(make_case(B=3, P=41, D=20, K=5, dtype=dtype, device=DEVICE, temperature=0.02))


def test_rows_without_length():
    """Zero features and zero codes: cosine 0, gradient 0."""
    case = make_case(B=2, P=17, D=20, K=5, device=DEVICE, partners=("self", "index", "all"))
    case.features[0, 3], case.features[1], case.codes[0, 5], case.codes[1, :4] = 0, 0, 0, 0
    got = check_against_dense(case)
    assert not got.gradients["codes"][0, 5].any()


def test_inputs_of_different_dtypes_and_strides():
    case = make_case(B=3, P=33, D=20, K=5, device=DEVICE)
    case.features = case.features.half()
    check_against_dense(case)
    case.features = make_case(B=3, P=20, D=33, device=DEVICE).features.mT  # the elements of a row are not adjacent
    case.codes = case.codes.repeat(1, 2, 2)[:, ::2, :6]
    case.teacher = case.teacher.t().contiguous().t()
    case.thresholds = case.thresholds[:1].expand(2)
    check_against_dense(case)


@pytest.mark.parametrize("center", [True, False])
def test_label_rows_of_any_length(center, poisoned):
    torch.manual_seed(0)
    features, rows = torch.randn(3, 33, 20, device=DEVICE), torch.rand(3, 33, 5, device=DEVICE) * 9
    rows[1, 2] = 0
    partner, thresholds = torch.tensor([1, 1, 0], device=DEVICE), torch.tensor([0.1, -0.2, 0.3], device=DEVICE)

    def run(impl, dtype=torch.float32):
        probs = rows.to(dtype).requires_grad_()
        out = smoothness_energy(
            features.to(dtype), probs, ["self", partner, "all"], thresholds.to(dtype), center=center, impl=impl
        )
        (g,) = torch.autograd.grad(
            (out.energy * out.energy.new_tensor([1.7, -0.3, 0.5])).sum() + 0.3 * out.distance.sum(), probs
        )
        from triton_cases import Result

        return Result({name: value.detach() for name, value in out._asdict().items()}, {"probs": g})

    check(run("triton"), run("dense"), run("dense", torch.float64), FP32_EPS, 2.0)


def test_a_loss_scale_does_not_meet_fp16():
    """Gradients are carried relative to the largest: 2^-12 and 2^12 upstream give the same rounding."""
    case = make_case(B=2, P=33, D=20, K=5, dtype=torch.float16, device=DEVICE)
    case.codes = case.codes.float()
    results = [
        evaluate(case, "triton", {"energy": torch.tensor([s, -s])}).gradients["codes"] / s
        for s in (1.0, 2.0**-12, 2.0**12)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=0)


def test_reruns_are_bit_equal():
    case = make_case(B=4, P=97, D=70, K=27, device=DEVICE, partners=("self", "index", "all"))
    first, second = evaluate(case, "triton"), evaluate(case, "triton")
    for a, b in ((first.values, second.values), (first.gradients, second.gradients)):
        assert all(torch.equal(a[name], b[name]) for name in a)


def operator_arguments(**options):
    case = make_case(B=3, P=17, D=20, K=5, H=2, device=DEVICE, partners=("index",), **options)
    features = case.features.mT.contiguous().mT  # not contiguous
    return [
        features,
        case.codes.requires_grad_(),
        case.student.requires_grad_(),
        case.teacher,
        torch.stack(case.partners),
        [SELF, 0, -2],
        case.thresholds.expand(2, 3),
        options.get("channel_scale"),
        None,
        None,
        None,
        0.1,
        False,
        True,
        True,
        True,
    ]


def test_operators_pass_opcheck():
    arguments = operator_arguments()
    opcheck(objective.objective, arguments)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out = objective.objective(*plain)
    opcheck(
        objective.objective_backward,
        (out[0], out[1], out[2], None, *plain[:9], out[4], list(out[5:]), 0.1, False, True, True, True),
    )


def loss_of(features, codes, student, teacher, partner, thresholds, temperature):
    sets = (["self", partner], thresholds)
    out = smooseg_loss(features, codes * 1.0, student, teacher, *sets, temperature=temperature, impl="triton")
    return out.total + out.energy[0]


def test_compiles_whole_with_dynamic_shapes():
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=True)
    for B, P, temperature in ((3, 17, 0.1), (4, 33, 0.04)):
        case = make_case(B=B, P=P, D=20, K=5, device=DEVICE, partners=("self", "index"))
        arguments = [
            case.features,
            case.codes.requires_grad_(),
            case.student.requires_grad_(),
            case.teacher,
            case.partners[1],
            case.thresholds,
        ]
        # to a compiler a number that changes is a tensor
        got, want = compiled(*arguments, temperature), loss_of(*arguments, torch.tensor(temperature, device=DEVICE))
        assert torch.equal(got, want)
        for a, b in zip(*(torch.autograd.grad(value, arguments[1:3]) for value in (got, want))):
            assert torch.equal(a, b)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        codes = torch.empty(2, 3, 17, 6, device=DEVICE, requires_grad=True)
        student = torch.empty(2, 5, 6, device=DEVICE, requires_grad=True)
        out = smooseg_loss(
            torch.empty(3, 17, 20, device=DEVICE),
            codes,
            student,
            student.detach(),
            ["self", "all"],
            torch.empty(2, device=DEVICE),
            impl="triton",
        )
        out.total.sum().backward()
        assert out.energy.shape == (2, 2)
        assert codes.grad.shape == codes.shape


def test_too_many_prototypes_say_so():
    case = make_case(B=2, P=3, K=300, Z=64, device=DEVICE)
    with pytest.raises(ValueError, match=r"impl=\"triton\".*300 prototypes"):
        evaluate(case, "triton")


def test_fp64_says_so():
    with pytest.raises(TypeError, match="fp64"):
        evaluate(make_case(device=DEVICE).to(torch.float64), "triton")


def test_narrow_keeps_blocks_within_registers():
    settings = {"HEADS": 2, "TILES": 3, "BLOCK_P": 64, "BLOCK_D": 128}
    assert launch.narrow(settings, heads=3, columns=32)["HEADS"] == 1
    wide = launch.narrow(settings, heads=2, columns=128)
    assert (wide["HEADS"], wide["TILES"], wide["BLOCK_P"], wide["BLOCK_D"]) == (1, 1, 32, 64)


def test_without_triton_an_explicit_choice_says_so(monkeypatch):
    case = make_case(device=DEVICE)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    evaluate(case, "auto")
    with pytest.raises(RuntimeError, match="not installed"):
        evaluate(case, "triton")


def test_a_fresh_process_says_what_is_missing():
    """Runs on a CPU without the interpreter."""
    code = """
import sys, torch
import smooseg_kernels as sk
f, c, p = torch.randn(2, 5, 4), torch.randn(2, 5, 3), torch.randn(3, 3)
sk.smooseg_loss(f, c, p, p, ["self"], [0.1])
try:
    sk.smooseg_loss(f, c, p, p, ["self"], [0.1], impl="triton")
except RuntimeError as error:
    assert "TRITON_INTERPRET=1" in str(error), error
else:
    raise SystemExit("no error")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
