"""The kernels of `pair_energy` against the dense oracle, in the interpreter or on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.utils.checkpoint

import smooseg_kernels as sk

pytest.importorskip("triton")
from pair_cases import check, evaluate, make_pairs
from torch.library import opcheck
from triton_cases import EPS, FP32_EPS

from smooseg_kernels.triton import launch, pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
CLAMPS = [(None, None), (0.0, None), (None, 0.3), (0.2, 0.8), (None, -0.1)]
OPTIONS = [dict(clamp=c, hinge=h, center=m) for c, h, m in itertools.product(CLAMPS, (False, True), (False, True))]


def name(value):
    return "-".join(f"{k}{v}" for k, v in value.items()).replace(" ", "") if isinstance(value, dict) else str(value)


def check_against_dense(x):
    return check(x, "triton", max(FP32_EPS, *(EPS[t.dtype] for t in x.tensors)))


@pytest.mark.parametrize(
    "shape",
    [
        dict(B=3, N=4, P_i=17, P_j=97, D=70, Z=9),
        dict(B=1, P_i=1, P_j=1, D=1, Z=1),
        dict(B=2, P_i=65, P_j=1, D=130, Z=70),  # one row more than a block; features in two tiles, codes in two pieces
        dict(B=2, N=1, P_i=1, P_j=64, D=20, Z=150),  # an exact block; codes too wide for one launch
    ],
    ids=name,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_shapes(shape, dtype, poisoned):
    check_against_dense(make_pairs(**shape, dtype=dtype, device=DEVICE, clamp=(0.0, 0.8)))


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_every_combination(options, poisoned):
    check_against_dense(make_pairs(B=2, N=3, P_i=20, P_j=33, D=20, Z=9, dtype=torch.float32, device=DEVICE, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resident", [0, 4])
def test_rows_that_stay_on_chip_and_rows_that_do_not(resident, dtype, monkeypatch):
    monkeypatch.setitem(
        launch.OVERRIDES, "pair_tiles", {"RESIDENT": resident, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 16}
    )
    monkeypatch.setitem(launch.OVERRIDES, "few_pair_tiles", launch.OVERRIDES["pair_tiles"])
    monkeypatch.setitem(launch.OVERRIDES, "wide_pair_tiles", launch.OVERRIDES["pair_tiles"])
    check_against_dense(make_pairs(B=2, P_i=33, P_j=40, D=50, Z=25, dtype=dtype, device=DEVICE, clamp=(0.0, None)))


def test_a_real_row_length():
    check_against_dense(
        make_pairs(B=2, P_i=121, P_j=121, D=384, Z=70, dtype=torch.float16, device=DEVICE, clamp=(0.0, 0.8))
    )


@pytest.mark.parametrize("upstream", [(1.7, None), (None, -0.6)], ids=str)
def test_each_output_alone_takes_an_upstream_gradient(upstream, poisoned):
    x = make_pairs(B=3, N=2, P_i=17, P_j=20, D=20, Z=5, dtype=torch.float32, device=DEVICE, clamp=(0.0, None))

    def gradients(impl):
        codes = [t.detach().requires_grad_() for t in (x.codes_i, x.codes_j)]
        out = sk.pair_energy(x.features_i, codes[0], x.features_j, codes[1], x.threshold, impl=impl, **x.options)
        value, g = next((value, g) for value, g in zip(out, upstream) if g is not None)
        return torch.autograd.grad(g * value, codes)

    for got, want in zip(gradients("triton"), gradients("dense")):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_one_side_alone():
    x = make_pairs(B=2, N=3, P_i=17, P_j=20, D=20, Z=5, dtype=torch.float32, device=DEVICE, clamp=(0.0, None))
    both = evaluate(x, "triton")
    for at, side in ((1, "codes_i"), (3, "codes_j")):
        tensors = [t.detach() for t in x.tensors]
        tensors[at].requires_grad_()
        out = sk.pair_energy(*tensors, x.threshold, impl="triton", **x.options)
        (gradient,) = torch.autograd.grad(1.7 * out.energy - 0.6 * out.similarity, tensors[at])
        assert torch.equal(gradient, both.gradients[side])
    assert not sk.pair_energy(*(t.detach() for t in x.tensors), 0.1, impl="triton", **x.options).energy.requires_grad


@pytest.mark.parametrize("clamp", [(0.0, None), (None, 0.0), (0.0, 1.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_a_bound_the_gradient_passes(clamp, dtype):
    """Codes along axes: cosines are -1, 0 and 1 exactly, in every dtype. Features alike, so that every V is 1."""
    axes = torch.tensor([[[2.0, 0, 0], [0, 4, 0], [-2, 0, 0]]], dtype=dtype, device=DEVICE)
    features, other = torch.ones(1, 3, 4, dtype=dtype, device=DEVICE), axes.roll(1, 1) * 2
    results = []
    for impl in ("triton", "dense"):
        codes = [axes.clone().requires_grad_(), other.clone().requires_grad_()]
        out = sk.pair_energy(features, codes[0], features, codes[1], 0.0, center=False, clamp=clamp, impl=impl)
        results.append(torch.autograd.grad(out.energy, codes))
    assert results[1][0].any()
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=2 * EPS[dtype], atol=EPS[dtype] * float(want.abs().max()))


def test_hinge_at_its_bound():
    features, codes = torch.ones(1, 3, 4, device=DEVICE), torch.rand(1, 3, 5, device=DEVICE).requires_grad_()
    for threshold in (1.0, 2.0):
        out = sk.pair_energy(features, codes, features, codes, threshold, center=False, hinge=True, impl="triton")
        assert out.energy == 0
        assert not torch.autograd.grad(out.energy, codes)[0].any()


def test_rows_without_length():
    x = make_pairs(B=2, N=2, P_i=17, P_j=20, D=20, Z=5, dtype=torch.float32, device=DEVICE, clamp=(0.1, 0.8))
    x.features_i[1, 3], x.features_j[0, :4], x.codes_i[1, 5], x.codes_j[0, 1] = 0.0, 1e-12, 0.0, 1e-12
    got = check_against_dense(x)
    assert not got.gradients["codes_i"][1, 5].any()
    assert not got.gradients["codes_j"][0, 1].any()


def test_inputs_of_different_dtypes_and_strides():
    x = make_pairs(B=2, N=3, P_i=17, P_j=20, D=20, Z=6, dtype=torch.float32, device=DEVICE, clamp=(0.0, 0.8))
    x.features_i, x.features_j = (
        x.features_i.mT.contiguous().mT,
        x.features_j.transpose(0, 1).contiguous().transpose(0, 1),
    )
    x.codes_j = x.codes_j.repeat(1, 2, 2)[:, ::2, :6]
    check_against_dense(x)
    x.features_j = x.features_j.half()
    check_against_dense(x)
    x.features_i, x.threshold = x.features_i.half(), torch.tensor(0.1, device=DEVICE)
    check_against_dense(x)


def test_a_threshold_beyond_sixteen_bits():
    """Forces are carried relative to the largest."""
    x = make_pairs(B=1, P_i=17, P_j=20, D=20, Z=5, dtype=torch.float16, device=DEVICE, threshold=1e6)
    x.codes_i, x.codes_j = x.codes_i.float().half(), x.codes_j.float().half()
    got, want = (evaluate(x, impl, (1e-4, 0.0)) for impl in ("triton", "dense"))
    torch.testing.assert_close(got.gradients["codes_i"], want.gradients["codes_i"], rtol=1e-2, atol=1e-4)


def test_a_partner_that_is_no_image_is_taken_as_the_nearest(monkeypatch):
    """Kernels clamp, as on a GPU, where a check would wait for the device."""
    x = make_pairs(B=3, N=2, P_i=5, P_j=6, D=8, Z=5, dtype=torch.float32, device=DEVICE)
    monkeypatch.setattr(sk.pair_energies.checks, "is_inspectable", lambda tensor: False)
    x.options["partner"] = torch.tensor([-3, 9, 1], device=DEVICE)
    got = evaluate(x, "triton")
    x.options["partner"] = torch.tensor([0, 1, 1], device=DEVICE)
    want = evaluate(x, "triton")
    for part in ("values", "gradients"):
        for key, value in getattr(want, part).items():
            assert torch.equal(getattr(got, part)[key], value)


def test_what_is_no_number_stays_none():
    x = make_pairs(B=1, P_i=5, P_j=6, D=8, Z=5, dtype=torch.float32, device=DEVICE, clamp=(0.0, 0.8), hinge=True)
    x.features_i[0, 2, 3] = float("nan")
    assert evaluate(x, "triton").values["energy"].isnan()
    x = make_pairs(B=1, P_i=5, P_j=6, D=8, Z=5, dtype=torch.float32, device=DEVICE, clamp=(0.0, 0.8))
    x.codes_j[0, 2, 3] = float("nan")
    assert all(value.isnan() for value in evaluate(x, "triton").values.values())


def test_reruns_are_bit_equal():
    x = make_pairs(B=4, N=2, P_i=40, P_j=70, D=20, Z=9, dtype=torch.float32, device=DEVICE, clamp=(0.0, 0.8))
    first, second = evaluate(x, "triton"), evaluate(x, "triton")
    for a, b in ((first.values, second.values), (first.gradients, second.gradients)):
        assert all(torch.equal(a[key], b[key]) for key in a)


def operator_inputs(**options):
    x = make_pairs(B=3, N=2, P_i=17, P_j=20, D=20, Z=9, dtype=torch.float32, device=DEVICE, **options)
    features_i = x.features_i.mT.contiguous().mT  # not contiguous
    return features_i, x.codes_i.requires_grad_(), x.features_j, x.codes_j.requires_grad_(), x.options["partner"]


@pytest.mark.parametrize("with_partner", [True, False])
def test_operators_pass_opcheck(with_partner):
    features_i, codes_i, features_j, codes_j, partner = operator_inputs()
    if not with_partner:
        features_i, codes_i, partner = features_i[:2], codes_i.detach()[:2].requires_grad_(), None
    rows = [features_i, codes_i, features_j, codes_j, torch.tensor(0.1, device=DEVICE), partner]
    for means in (False, True):
        arguments = [*rows, 0.0, None, False, True, means, True]
        opcheck(pairs.pair_energy, arguments)
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        energy, _, clamped, _, *kept = pairs.pair_energy(*plain)
        upstream = (energy, None, clamped if means else None)
        opcheck(pairs.pair_energy_backward, (*upstream, *plain[:6], kept, 0.0, None, False, True, means, True, True))


def energy_of(features_i, codes_i, features_j, codes_j, partner):
    out = sk.pair_energy(
        features_i, codes_i * 1.0, features_j, codes_j * 1.0, 0.1, partner=partner, clamp=(0.0, 0.8), impl="triton"
    )
    return out.energy + 0.3 * out.similarity


def test_compiles_whole_with_dynamic_shapes():
    compiled = torch.compile(energy_of, backend="aot_eager", fullgraph=True, dynamic=True)
    for B, P_i in ((3, 17), (4, 33)):
        x = make_pairs(B=B, N=2, P_i=P_i, P_j=20, D=20, Z=9, dtype=torch.float32, device=DEVICE)
        inputs = [
            x.features_i,
            x.codes_i.requires_grad_(),
            x.features_j,
            x.codes_j.requires_grad_(),
            x.options["partner"],
        ]
        got, want = (f(*inputs) for f in (compiled, energy_of))
        assert torch.equal(got, want)
        for a, b in zip(*(torch.autograd.grad(value, inputs[1:4:2]) for value in (got, want))):
            assert torch.equal(a, b)


def test_exports():
    class Energy(torch.nn.Module):
        def forward(self, *inputs):
            return energy_of(*inputs)

    inputs = operator_inputs()
    program = torch.export.export(Energy(), inputs).module()
    assert torch.equal(program(*inputs), energy_of(*inputs))


def test_autocast_and_checkpointing_change_nothing():
    inputs = operator_inputs()
    want = energy_of(*inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = energy_of(*inputs)
    kept = torch.utils.checkpoint.checkpoint(energy_of, *inputs, use_reentrant=False)
    for value in (cast, kept):
        assert torch.equal(value, want)
        gradients = (torch.autograd.grad(v, inputs[1:4:2], retain_graph=True) for v in (value, want))
        assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_fp64_says_so():
    with pytest.raises(TypeError, match="fp64"):
        evaluate(make_pairs(device=DEVICE), "triton")
