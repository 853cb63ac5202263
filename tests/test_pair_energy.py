"""Energies of patch pairs: the oracle against loops and finite differences, the tiled form against the oracle."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from pair_cases import check, evaluate, make_pairs

import smooseg_kernels as sk
from smooseg_kernels import pair_blocks

CLAMPS = [(None, None), (0.0, None), (None, -0.1), (0.2, 0.8)]
OPTIONS = [dict(clamp=c, hinge=h, center=m) for c, h, m in itertools.product(CLAMPS, (False, True), (False, True))]
SHAPES = [
    dict(B=3, N=4, P_i=17, P_j=97, D=70, Z=9),
    dict(B=1, P_i=1, P_j=1, D=1, Z=1),
    dict(B=2, P_i=1, P_j=5, D=3, Z=2),
    dict(B=4, N=2, P_i=33, P_j=1, D=5, Z=70),
]


def name(value):
    return "-".join(f"{k}{v}" for k, v in value.items()).replace(" ", "") if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_the_oracle_is_the_formula_in_loops(options):
    x = make_pairs(B=2, N=3, P_i=3, P_j=4, D=5, Z=4).with_options(**options)
    cos = torch.nn.functional.cosine_similarity
    meets = [(n, int(m)) for n, m in enumerate(x.options["partner"])]
    closeness = torch.tensor(
        [[[cos(a, b, dim=0) for b in x.features_j[m]] for a in x.features_i[n]] for n, m in meets]
    ).double()
    likeness = torch.tensor(
        [[[cos(a, b, dim=0) for b in x.codes_j[m]] for a in x.codes_i[n]] for n, m in meets]
    ).double()
    low, high = options["clamp"]
    terms = []
    for n, i, j in itertools.product(range(2), range(3), range(4)):
        w = float(closeness[n, i, j])
        if options["center"]:
            w += float(closeness.mean() - closeness[n, i].mean())
        v = max(w - x.threshold, 0.0) if options["hinge"] else w - x.threshold
        terms.append(
            -min(max(float(likeness[n, i, j]), -9.0 if low is None else low), 9.0 if high is None else high) * v
        )
    got = sk.pair_energy(*x.tensors, x.threshold, impl="dense", **x.options)
    assert got.energy.item() == pytest.approx(sum(terms) / len(terms), rel=1e-12, abs=1e-14)
    assert got.similarity.item() == pytest.approx(float(likeness.mean()), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("impl", ["dense", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_gradcheck(impl, options):
    x = make_pairs(B=2, N=2, P_i=3, P_j=4, D=5, Z=4).with_options(**options)

    def function(codes_i, codes_j):
        return tuple(sk.pair_energy(x.features_i, codes_i, x.features_j, codes_j, x.threshold, impl=impl, **x.options))[
            :2
        ]

    assert torch.autograd.gradcheck(function, (x.codes_i.requires_grad_(), x.codes_j.requires_grad_()))


@pytest.mark.parametrize("pairs_a_block", [1, 200, 4000, 1 << 20])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_tiles_equal_the_oracle_in_float64(shape, pairs_a_block, monkeypatch):
    """Covers blocks of one row, of some rows of an image, of several images, and of all."""
    monkeypatch.setattr(pair_blocks, "CPU_PAIRS", pairs_a_block)
    for options in OPTIONS:
        check(make_pairs(**shape).with_options(**options), "torch", torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_tiles_within_the_error_budget(shape, dtype):
    for options in OPTIONS:
        check(make_pairs(**shape, dtype=dtype).with_options(**options), "torch", torch.finfo(torch.float32).eps)


def on_the_kink(clamp):
    """Makes codes along axes, with cosines of exactly -1, 0 and 1, and equal features, so that every V is 1."""
    axes = torch.tensor([[2.0, 0, 0], [0, 4, 0], [-2, 0, 0]])
    codes_j = torch.tensor([[0.0, 2, 0], [4, 0, 0]])
    feature = torch.ones(1, 1, 4)
    return (feature.expand(1, 3, 4), axes[None], feature.expand(1, 2, 4), codes_j[None]), dict(
        center=False, clamp=clamp
    )


IMPLS = ["dense", "torch"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("clamp", "passes"), [((0.0, None), (0, 1)), ((None, 0.0), (-1, 0)), ((0.0, 1.0), (0, 1)), ((0.0, 0.0), (0,))]
)
def test_at_a_bound_the_gradient_passes_and_beyond_it_does_not(impl, clamp, passes):
    (f_i, c_i, f_j, c_j), options = on_the_kink(clamp)
    c_i, c_j = c_i.requires_grad_(), c_j.requires_grad_()
    out = sk.pair_energy(f_i, c_i, f_j, c_j, 0.0, impl=impl, **options)
    got = torch.autograd.grad(out.energy, (c_i, c_j))
    cos = torch.nn.functional.normalize(c_i, dim=-1) @ torch.nn.functional.normalize(c_j, dim=-1).mT
    kept = sum((cos == value).float() for value in passes)
    want = torch.autograd.grad(-(cos * kept.detach()).mean(), (c_i, c_j))
    assert any(g.any() for g in want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_hinge_at_its_bound(impl):
    (f_i, c_i, f_j, c_j), options = on_the_kink((None, None))
    assert sk.pair_energy(f_i, c_i, f_j, c_j, 1.0, hinge=True, impl=impl, **options).energy == 0
    assert sk.pair_energy(f_i, c_i, f_j, c_j, 2.0, hinge=True, impl=impl, **options).energy == 0
    c_i.requires_grad_()
    for threshold in (1.0, 2.0):  # V is 0, and so is its gradient
        energy = sk.pair_energy(f_i, c_i, f_j, c_j, threshold, hinge=True, impl=impl, **options).energy
        assert not torch.autograd.grad(energy, c_i)[0].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_length_have_cosine_and_gradient_zero(impl):
    x = make_pairs(clamp=(0.0, 0.8))
    x.features_i[1, 3], x.features_j[0, :4], x.codes_i[2, 5], x.codes_j[0, 1] = 0.0, 1e-12, 0.0, 1e-12
    got = check(x, impl, torch.finfo(torch.float64).eps)
    assert not got.gradients["codes_i"][2, 5].any()
    assert not got.gradients["codes_j"][0, 1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_side_alone(impl):
    """The gradient to one side alone equals that of both."""
    x = make_pairs(N=2, clamp=(0.0, None), hinge=True)
    both = evaluate(x, impl)
    for at, side in ((1, "codes_i"), (3, "codes_j")):
        tensors = [t.detach() for t in x.tensors]
        tensors[at].requires_grad_()
        out = sk.pair_energy(*tensors, x.threshold, impl=impl, **x.options)
        (gradient,) = torch.autograd.grad(1.7 * out.energy - 0.6 * out.similarity, tensors[at])
        torch.testing.assert_close(gradient, both.gradients[side], rtol=1e-12, atol=0)
    # an image that is nobody's partner gets nothing
    x.options["partner"] = torch.zeros_like(x.options["partner"])
    assert not evaluate(x, impl).gradients["codes_j"][1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_tensors_on_both_sides(impl):
    x = make_pairs(P_i=17, P_j=17)
    codes = x.codes_i.requires_grad_()
    out = sk.pair_energy(x.features_i, codes, x.features_i, codes, 0.1, clamp=(0.0, None), impl=impl)
    (got,) = torch.autograd.grad(out.energy, codes)
    x = make_pairs(P_i=17, P_j=17, clamp=(0.0, None))
    x.features_j, x.codes_j = x.features_i, x.codes_i
    apart = evaluate(x, "dense", (1.0, 0.0))
    torch.testing.assert_close(got, apart.gradients["codes_i"] + apart.gradients["codes_j"], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_a_threshold_in_a_tensor(impl):
    x = make_pairs(B=3, N=4, dtype=torch.float32, clamp=(0.0, 0.8))
    want = evaluate(x, impl)
    x.features_i, x.codes_j = x.features_i.mT.contiguous().mT, x.codes_j.repeat(1, 2, 2)[:, ::2, :9]
    assert not x.features_i.is_contiguous()
    x.codes_j[:] = make_pairs(B=3, N=4).codes_j
    x.features_j, x.threshold = (
        x.features_j.transpose(0, 1).contiguous().transpose(0, 1),
        torch.tensor(0.1, dtype=torch.float64),
    )
    got = evaluate(x, impl)
    for part in ("values", "gradients"):
        torch.testing.assert_close(getattr(got, part), getattr(want, part), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("center", [True, False])
def test_without_a_clamp_it_is_the_smoothness_energy(impl, center):
    """mean (W - b) (1 - cos) = mean (W - b) + energy, and 1 - mean cos = distance."""
    x = make_pairs(P_i=17, P_j=17, D=20, Z=6)
    partner = torch.tensor([1, 1, 0])
    terms = sk.smoothness_energy(x.features_i, x.codes_i, [partner], [0.1], center=center, impl="torch")
    got = sk.pair_energy(*(2 * (x.features_i, x.codes_i)), 0.1, partner=partner, center=center, impl=impl)
    torch.testing.assert_close(got.energy + terms.mean[0] - 0.1, terms.energy[0])
    torch.testing.assert_close(1 - got.similarity, terms.distance[0])


def energy_of(impl):
    def function(features_i, codes_i, features_j, codes_j, partner):
        out = sk.pair_energy(
            features_i, codes_i * 1.0, features_j, codes_j * 1.0, 0.1, partner=partner, clamp=(0.0, 0.8), impl=impl
        )
        return out.energy + 0.3 * out.similarity

    return function


def arguments(**shape):
    x = make_pairs(B=3, N=4, dtype=torch.float32, **shape)
    return x.features_i, x.codes_i.requires_grad_(), x.features_j, x.codes_j.requires_grad_(), x.options["partner"]


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    compiled = torch.compile(energy_of(impl), backend="aot_eager", fullgraph=True, dynamic=False)
    inputs = arguments()
    got, want = (f(*inputs) for f in (compiled, energy_of(impl)))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(value, inputs[1:4:2]) for value in (got, want)))


@pytest.mark.parametrize("impl", IMPLS)
def test_exports(impl):
    class Energy(torch.nn.Module):
        def forward(self, *inputs):
            return energy_of(impl)(*inputs)

    inputs = arguments()
    program = torch.export.export(Energy(), inputs).module()
    other = make_pairs(B=3, N=4, dtype=torch.float32, seed=1)
    inputs = (*other.tensors, other.options["partner"])
    torch.testing.assert_close(program(*inputs), energy_of(impl)(*inputs))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_and_checkpointing_change_nothing(impl):
    inputs = arguments()
    want = energy_of(impl)(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = energy_of(impl)(*inputs)
    kept = torch.utils.checkpoint.checkpoint(energy_of(impl), *inputs, use_reentrant=False)
    for value in (cast, kept):
        assert torch.equal(value, want)
        gradients = (torch.autograd.grad(v, inputs[1:4:2], retain_graph=True) for v in (value, want))
        assert all(torch.equal(a, b) for a, b in zip(*gradients))


MEMORY = """
import torch, smooseg_kernels as sk
from pathlib import Path
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
def run(P):
    f, c = torch.randn(1, P, 64), torch.randn(1, P, 70, requires_grad=True)
    before = peak()
    torch.autograd.grad(sk.pair_energy(f, c, f.clone(), c * 1.0, 0.1, clamp=(0.0, 0.8), impl="torch").energy, c)
    return peak() - before
run(256)
Path("/proc/self/clear_refs").write_text("5")
print(run(8192))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_of_a_whole_picture():
    """A matrix of 8,192 x 8,192 pairs would take 268 MB, and the dense form has several."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) <= 125e6, f"{int(done.stdout) / 1e6:.0f} MB"


WRONG = {
    "features_i must have shape": dict(features_i=torch.zeros(3, 4)),
    "features_i is a constant": dict(features_i=torch.zeros(2, 3, 4, requires_grad=True)),
    "codes_i must have shape \\[2, 3, Z\\], got \\[2, 4, 5\\]": dict(codes_i=torch.zeros(2, 4, 5)),
    "features_j must have shape \\[N, P_j, 4\\], got \\[2, 3, 5\\]": dict(features_j=torch.zeros(2, 3, 5)),
    "partner must say, int64 \\[2\\], which of the 1 images": dict(features_j=torch.zeros(1, 3, 4)),
    "codes_j must have shape \\[2, 3, 5\\], got \\[2, 3, 6\\]": dict(codes_j=torch.zeros(2, 3, 6)),
    "codes_j must be fp32, fp16, bf16 or fp64, got torch.int64": dict(codes_j=torch.zeros(2, 3, 5, dtype=torch.int64)),
    "partner must have shape \\[2\\], got \\[3\\]": dict(partner=torch.zeros(3, dtype=torch.int64)),
    "partner must be int64, got torch.int32": dict(partner=torch.zeros(2, dtype=torch.int32)),
    "partner must hold image numbers 0 to 1, got 0 to 2": dict(partner=torch.tensor([0, 2])),
    "partner must be an int64 tensor \\[2\\], got list": dict(partner=[0, 1]),
    "threshold must be finite, got nan": dict(threshold=float("nan")),
    "threshold must be a number or a tensor, got str": dict(threshold="auto"),
    "threshold must be a number or a tensor of shape \\[\\], \\[2\\], got shape \\[1\\]": dict(
        threshold=torch.zeros(1)
    ),
    "shape \\[\\], \\[2\\], \\[3, 1\\] or \\[3, 2\\], got shape \\[3\\]": dict(
        threshold=torch.zeros(3), partner=torch.zeros(3, 2, dtype=torch.int64)
    ),
    "threshold must be a number or a tensor of floats, got torch.int64": dict(threshold=torch.tensor(1)),
    "mean must be a number or a tensor of shape \\[\\], got shape \\[2\\]": dict(mean=torch.zeros(2)),
    "mean is a constant": dict(mean=torch.zeros((), requires_grad=True)),
    "weight_j must have shape \\[2, 3\\], got \\[3, 2\\]": dict(weight_j=torch.zeros(3, 2)),
    "weight_i must be 0 or more": dict(weight_i=-torch.ones(2, 3)),
    "reduction must be 'mean' or 'none', got 'sum'": dict(reduction="sum"),
    "bins cannot be used with weight_i": dict(bins=4, weight_i=torch.ones(2, 3)),
    "limits must be two finite numbers": dict(bins=4, limits=(1.0, 0.0)),
    "clamp must be a pair \\(low, high\\), each a number or None, got 0.0": dict(clamp=0.0),
    "clamp must be a pair \\(low, high\\), each a number or None, got \\('0', 1\\)": dict(clamp=("0", 1)),
    "clamp must be \\(low, high\\) with low <= high, got \\(0.8, 0.0\\)": dict(clamp=(0.8, 0)),
    "clamp must not hold NaN": dict(clamp=(float("nan"), None)),
    'impl must be "auto", "triton", "torch" or "dense"': dict(impl="cuda"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    x = dict(
        features_i=torch.zeros(2, 3, 4),
        codes_i=torch.zeros(2, 3, 5),
        features_j=torch.zeros(2, 3, 4),
        codes_j=torch.zeros(2, 3, 5),
    )
    with pytest.raises((ValueError, TypeError), match=message):
        sk.pair_energy(**{**x, "threshold": 0.1, **WRONG[message]})


def test_a_gradient_of_the_gradient_is_refused_where_blocks_are_gone():
    f, c = torch.randn(2, 5, 4), torch.randn(2, 5, 3, requires_grad=True)
    energy = sk.pair_energy(f, c, f, c, 0.1, clamp=(0.0, None), impl="torch").energy
    with pytest.raises(RuntimeError, match='use impl="dense"'):
        torch.autograd.grad(energy, c, create_graph=True)
