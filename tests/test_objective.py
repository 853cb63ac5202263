"""The objective: the dense oracle against autograd's finite differences, the moment form against the oracle."""

import pytest
import torch
from objective_inputs import assert_same_direction, assert_within_budget, make_inputs, pull_and_push, value_and_grad

import smooseg_kernels as sk

# every value of P {1, 17, 97, 784}, D {5, 70, 384}, K {1, 3, 27, 64}, Z {5, 64}, T {1, 2, 5}, H {none, 1, 3} appears
SHAPES = [
    dict(B=1, P=1, D=5, K=1, Z=5, T=1),
    dict(B=3, P=17, D=70, K=3, Z=5, T=2),
    dict(B=3, P=97, D=70, K=27, Z=64, T=5, H=3),
    dict(B=2, P=784, D=384, K=27, Z=64, T=2),
    dict(B=3, P=17, D=5, K=64, Z=64, T=2, H=1),
    dict(B=4, P=1, D=384, K=3, Z=5, T=5, H=3),
]
CASES = [(shape, center, structured) for shape in SHAPES for center in (True, False) for structured in (True, False)]


def name(value):
    return "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("option", ["plain", "relative", "weights", "channel_scale", "uncentred", "mean", "all"])
def test_gradcheck_of_the_oracle(option):
    x = make_inputs(B=3, P=4, D=6, K=3, Z=5, T=2)
    options = {
        "relative": dict(relative=True),
        "weights": dict(patch_weight=torch.rand(3, 4, dtype=torch.float64)),
        "channel_scale": dict(channel_scale=torch.rand(3, 6, dtype=torch.float64)),
        "uncentred": dict(center=False),
        "mean": dict(mean=torch.tensor([0.1, 0.2], dtype=torch.float64)),
    }.get(option, {})
    partners = ["self", "all"] if option == "all" else x.partners

    def function(codes, student):
        out = sk.smooseg_loss(x.features, codes, student, x.teacher, partners, x.thresholds, impl="dense", **options)
        return out.total, out.energy, out.data, out.distance

    def energies_alone(probs):
        return sk.smoothness_energy(x.features, probs, partners, x.thresholds, impl="dense", **options)[:2]

    # the data term's gradient is cut at the codes on purpose, so total and data are checked towards the student
    codes, student = x.codes.requires_grad_(), x.student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: function(x.codes.detach(), s)[2], (student,))
    assert torch.autograd.gradcheck(lambda z: function(z, x.student.detach())[1::2], (codes,))
    assert torch.autograd.gradcheck(energies_alone, (torch.rand(3, 4, 3, dtype=torch.float64, requires_grad=True),))


def test_the_oracle_is_the_formula_in_loops():
    x = make_inputs(B=3, P=5, D=4, K=3, Z=4, T=2)
    j = x.partners[1]
    out = sk.smooseg_loss(x.features, x.codes, x.student, x.teacher, x.partners, x.thresholds, impl="dense")
    cos = torch.nn.functional.cosine_similarity
    probs = [[torch.softmax(cos(z[None], x.teacher, dim=-1) / 0.1, 0) for z in image] for image in x.codes]
    for t, partner in enumerate(([0, 1, 2], j.tolist())):
        s = torch.tensor(
            [[[cos(a, b, dim=0) for b in x.features[partner[n]]] for a in x.features[n]] for n in range(3)]
        )
        w = s - s.mean(2, keepdim=True) + s.mean()
        d = torch.tensor([[[1 - cos(a, b, dim=0) for b in probs[partner[n]]] for a in probs[n]] for n in range(3)])
        torch.testing.assert_close(out.energy[t], ((w - x.thresholds[t]) * d).mean(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(out.distance[t], d.mean(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(out.mean[t], s.mean(), rtol=1e-12, atol=1e-14)
    logits = torch.stack([torch.stack([cos(z[None], x.student, dim=-1) for z in image]) for image in x.codes])
    labels = torch.tensor([[int(p.argmax()) for p in image] for image in probs])
    data = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.data, data, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.total, out.energy.sum() + data, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("shape", "center", "structured"), CASES, ids=name)
def test_moments_equal_the_oracle_in_float64(shape, center, structured):
    x = make_inputs(**shape, structured=structured, center=center)
    got, truth = value_and_grad(x, "torch"), value_and_grad(x, "dense")
    sizes, grad_sizes = pull_and_push(x)
    for key in ("energy", "distance", "mean"):
        assert (got.values[key] - truth.values[key]).abs().max() <= 1e-10 * sizes.max()
    torch.testing.assert_close(got.values["data"], truth.values["data"], rtol=1e-10, atol=1e-12)
    assert (got.grads["codes"] - truth.grads["codes"]).abs().max() <= 1e-10 * grad_sizes.max()
    torch.testing.assert_close(got.grads["student"], truth.grads["student"], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "center", "structured"), [c for c in CASES if c[2] or c[0]["P"] == 97], ids=name)
def test_moments_within_the_error_budget(shape, center, structured, dtype):
    x = make_inputs(**shape, structured=structured, center=center, dtype=dtype)
    x = x._replace(thresholds=x.thresholds.float())
    got, same, truth = (
        value_and_grad(x, "torch"),
        value_and_grad(x, "dense"),
        value_and_grad(x.to(torch.float64), "dense"),
    )
    sizes, grad_sizes = pull_and_push(x)
    eps = torch.finfo(torch.float32).eps  # both accumulate in fp32: the inputs' own rounding is in the truth too
    for key in ("energy", "distance", "mean", "data"):
        assert got.values[key].dtype == torch.float32
        assert_within_budget(got.values[key], same.values[key], truth.values[key], eps, sizes.clamp(min=1.0), key)
    for key, size in (("codes", grad_sizes), ("student", truth.grads["student"].abs())):
        assert got.grads[key].dtype == dtype
        assert_within_budget(
            got.grads[key], same.grads[key], truth.grads[key], torch.finfo(dtype).eps, size, f"gradient of {key}"
        )
        if dtype == torch.float32 and key == "codes":
            cancellation = grad_sizes.norm().item() / max(truth.grads[key].norm().item(), 1e-30)
            assert_same_direction(got.grads[key], truth.grads[key], 4 * eps * cancellation + 1e-5, key)


OPTIONS = {
    "weights": lambda: dict(patch_weight=torch.rand(3, 17, dtype=torch.float64)),
    "an image without weight": lambda: dict(
        patch_weight=torch.rand(3, 17, dtype=torch.float64) * torch.tensor([[1.0], [0.0], [2.0]])
    ),
    "no weight at all": lambda: dict(patch_weight=torch.zeros(3, 17, dtype=torch.float64)),
    "channel_scale": lambda: dict(channel_scale=(torch.rand(3, 70) < 0.8).double() / 0.8),
    "relative": lambda: dict(relative=True),
    "mean": lambda: dict(mean=torch.tensor([0.3, -0.2, 0.1, 0.0, 0.2], dtype=torch.float64)),
    "mean, relative, not centred": lambda: dict(
        mean=torch.full((5,), 0.3, dtype=torch.float64), relative=True, center=False
    ),
    "temperature": lambda: dict(temperature=0.7),
    "weights, channel_scale, relative": lambda: dict(
        patch_weight=torch.rand(3, 17, dtype=torch.float64),
        channel_scale=torch.rand(3, 70, dtype=torch.float64),
        relative=True,
    ),
}


@pytest.mark.parametrize("H", [None, 3])
@pytest.mark.parametrize("option", OPTIONS)
def test_moments_equal_the_oracle_with_options(option, H):
    torch.manual_seed(1)
    x = make_inputs(T=5, H=H, **OPTIONS[option]())
    got, truth = value_and_grad(x, "torch"), value_and_grad(x, "dense")
    for key in got.values:
        torch.testing.assert_close(got.values[key], truth.values[key], rtol=1e-10, atol=1e-13)
    for key in got.grads:
        torch.testing.assert_close(got.grads[key], truth.grads[key], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_heads_equal_single_calls(impl):
    x = make_inputs(T=5, H=3)
    table = torch.randn(3, 5, dtype=torch.float64)
    whole = value_and_grad(x._replace(thresholds=table), impl)
    for h in range(3):
        one = x._replace(codes=x.codes[h], student=x.student[h], teacher=x.teacher[h], thresholds=table[h])
        out = sk.smooseg_loss(*one[:6], impl=impl)
        for key in ("total", "energy", "data", "distance"):
            torch.testing.assert_close(whole.values[key][h], getattr(out, key), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(whole.values["mean"], out.mean, rtol=1e-12, atol=1e-14)
    assert whole.values["mean"].shape == (5,)


@pytest.mark.parametrize("impl", ["torch", "dense"])
@pytest.mark.parametrize("center", [True, False])
def test_all_is_every_ordered_pair(impl, center):
    x = make_inputs(B=4, T=1)
    z, b = x.codes, [0.2]
    whole = sk.smoothness_energy(x.features, z.abs(), ["all"], b, center=center, impl=impl)
    shifts = [(torch.arange(4) + r) % 4 for r in (1, 2, 3)]
    parts = sk.smoothness_energy(
        x.features, z.abs(), shifts, b * 3, center=center, mean=whole.mean.expand(3), impl=impl
    )
    torch.testing.assert_close(whole.energy[0], parts.energy.mean())
    torch.testing.assert_close(whole.distance[0], parts.distance.mean())
    torch.testing.assert_close(
        whole.mean[0], sk.smoothness_energy(x.features, z.abs(), shifts, b * 3, impl=impl).mean.mean()
    )


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_weight_zero_is_absence(impl):
    x = make_inputs(B=3, T=2)
    weight = torch.ones(3, 17, dtype=torch.float64)
    weight[:, 11:] = 0.0
    few = x._replace(features=x.features[:, :11], codes=x.codes[:, :11])
    a = sk.smooseg_loss(*x[:6], patch_weight=weight, impl=impl)
    b = sk.smooseg_loss(*few[:6], impl=impl)
    for left, right in zip(a, b):
        torch.testing.assert_close(left, right)
    # an image without any weight counts as absent
    weight = torch.ones(3, 17, dtype=torch.float64)
    weight[2] = 0.0
    two = x._replace(features=x.features[:2], codes=x.codes[:2])
    a = sk.smooseg_loss(*x[:4], ["self", "all"], x.thresholds, patch_weight=weight, impl=impl)
    b = sk.smooseg_loss(*two[:4], ["self", "all"], x.thresholds, impl=impl)
    for left, right in zip(a, b):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_zero_rows_have_cosine_and_gradient_zero(impl):
    x = make_inputs()
    x.features[1, 3] = 0.0
    x.features[1, 4] = 1e-12
    x.codes[2, 5] = 0.0
    x.codes[0, 1] = 1e-12
    x.student[1] = 0.0
    result = value_and_grad(x, impl)
    truth = value_and_grad(x, "dense")
    assert all(torch.isfinite(v).all() for v in (*result.values.values(), *result.grads.values()))
    assert (result.grads["codes"][2, 5] == 0).all()
    assert (result.grads["codes"][0, 1] == 0).all()
    assert (result.grads["student"][1] == 0).all()
    torch.testing.assert_close(result.grads["codes"], truth.grads["codes"], rtol=1e-9, atol=1e-13)
    # features along the zero row do not matter at all
    terms = sk.smoothness_energy(torch.zeros(1, 3, 4), torch.rand(1, 3, 2), ["self"], [0.0], impl=impl)
    assert terms.energy.item() == 0.0


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_feature_norms_and_scale_equal_scaled_features(impl):
    x = make_inputs()
    scale = torch.rand(3, 70, dtype=torch.float64)
    plain = sk.smooseg_loss(*x[:6], impl=impl)
    with_norms = sk.smooseg_loss(*x[:6], feature_norms=x.features.norm(dim=-1), impl=impl)
    torch.testing.assert_close(plain.energy, with_norms.energy)
    scaled = sk.smooseg_loss(x.features * scale[:, None], *x[1:6], impl=impl)
    by_argument = sk.smooseg_loss(*x[:6], channel_scale=scale, impl=impl)
    torch.testing.assert_close(scaled.energy, by_argument.energy)


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_non_contiguous_inputs(impl):
    x = make_inputs(H=3)
    strided = x._replace(
        features=x.features.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        codes=x.codes.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        student=x.student.mT.contiguous().mT,
        teacher=x.teacher.mT.contiguous().mT,
    )
    a, b = value_and_grad(x, impl), value_and_grad(strided, impl)
    for key in a.values:
        torch.testing.assert_close(a.values[key], b.values[key], rtol=1e-12, atol=1e-14)
    for key in a.grads:
        torch.testing.assert_close(a.grads[key], b.grads[key], rtol=1e-11, atol=1e-14)


def test_gradient_cuts():
    x = make_inputs()
    codes, student = x.codes.requires_grad_(), x.student.requires_grad_()
    out = sk.smooseg_loss(x.features, codes, student, *x[3:6])
    assert torch.autograd.grad(out.data, codes, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(out.energy.sum(), student, retain_graph=True, allow_unused=True)[0] is None
    # each subset of inputs that needs a gradient
    assert sk.smooseg_loss(x.features, codes.detach(), student, *x[3:6]).total.requires_grad
    assert not sk.smooseg_loss(x.features, codes.detach(), student.detach(), *x[3:6]).total.requires_grad


@pytest.mark.parametrize("H", [None, 3])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("output", ["total", "energy", "distance", "data"])
def test_each_output_alone_has_its_gradient(output, center, H):
    x = make_inputs(T=5, H=H, channel_scale=torch.rand(3, 70, dtype=torch.float64), center=center)
    results = []
    for impl in ("torch", "dense"):
        codes, student = x.codes.detach().requires_grad_(), x.student.detach().requires_grad_()
        value = getattr(sk.smooseg_loss(x.features, codes, student, *x[3:6], impl=impl, **x.options), output)
        weight = torch.linspace(0.5, 2.0, value.numel(), dtype=torch.float64).view(value.shape)
        results.append(torch.autograd.grad(value, (codes, student), weight, allow_unused=True))
    for got, truth in zip(*results):
        assert (got is None) == (truth is None)
        if got is not None:
            torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-13)


def test_the_written_gradient_is_that_of_the_form_that_traces():
    """torch.func takes the form that traces; autocast changes neither form; a second derivative raises an error."""
    x = make_inputs(H=3, dtype=torch.float32, patch_weight=torch.rand(3, 17))
    whole = lambda z: sk.smooseg_loss(x.features, z, *x[2:6], **x.options).total.sum()  # noqa: E731
    codes = x.codes.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total = whole(codes)
    (gradient,) = torch.autograd.grad(total, codes, retain_graph=True)
    torch.testing.assert_close(gradient, torch.func.grad(whole)(x.codes.detach()), rtol=1e-4, atol=1e-7)
    with pytest.raises(RuntimeError, match='smooseg_loss: impl="torch" has no gradient of its gradient'):
        torch.autograd.grad(total, codes, create_graph=True)


def test_a_second_derivative_of_the_data_term_is_refused():
    """Its upstream gradient is a constant, so PyTorch would take the missing derivative for zero."""
    x = make_inputs()
    student = x.student.requires_grad_()
    loss = sk.smooseg_loss(x.features, x.codes, student, *x[3:6]).data
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_prototypes_alone_in_float64(impl):
    """fp64 prototypes make weights, thresholds and all sums fp64."""
    x = make_inputs(patch_weight=torch.rand(3, 17, dtype=torch.float64)).to(torch.float32)
    x = x._replace(student=x.student.double(), teacher=x.teacher.double())
    got, truth = value_and_grad(x, impl), value_and_grad(x.to(torch.float64), "dense")
    for name, value in truth.values.items():
        torch.testing.assert_close(got.values[name], value, rtol=0, atol=1e-12)
    loss = sk.prototype_loss(x.codes, x.student.float(), x.teacher, patch_weight=x.options["patch_weight"], impl=impl)
    torch.testing.assert_close(
        loss, sk.prototype_loss(x.codes.double(), x.student.float(), x.teacher, patch_weight=x.options["patch_weight"])
    )


@pytest.mark.parametrize("impl", ["torch", "dense"])
@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_weights_of_any_size(impl, size):
    """Products of weights leave the range of fp32; shares of them do not."""
    x = make_inputs(T=3, dtype=torch.float32)
    weight = torch.rand(3, 17, generator=torch.Generator().manual_seed(2))
    got, truth = (sk.smooseg_loss(*x[:6], patch_weight=weight * factor, impl=impl) for factor in (size, 1.0))
    torch.testing.assert_close(tuple(got), tuple(truth))


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_the_measured_mean_keeps_no_graph(impl):
    """A training loop logs the mean; a graph behind it would keep every step's arrays."""
    x = make_inputs()
    codes = x.codes.requires_grad_()
    assert not sk.smooseg_loss(x.features, codes, *x[2:6], impl=impl).mean.requires_grad
    assert not sk.smoothness_energy(x.features, codes, *x[4:6], impl=impl).mean.requires_grad


def test_another_default_device():
    """Intermediate tensors are on the inputs' device."""
    x = make_inputs(dtype=torch.float32, channel_scale=torch.rand(3, 70))
    x = x._replace(features=x.features.half())
    truth = value_and_grad(x, "torch")
    torch.set_default_device("meta")
    try:
        codes = x.codes.detach().requires_grad_()
        total = sk.smooseg_loss(x.features, codes, *x[2:6], impl="torch", **x.options).total
        total.backward()
        weighted = torch.ones(3, 17, device="cpu")
        sk.smooseg_loss(x.features.float(), codes, *x[2:6], patch_weight=weighted, impl="torch")
    finally:
        torch.set_default_device(None)
    assert torch.equal(total.detach(), truth.values["total"])
    assert codes.grad.device.type == "cpu"


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_vmap_over_partners_and_weights(impl):
    """Values of batched tensors cannot be read, so partners are clamped."""
    x = make_inputs(T=1, dtype=torch.float32)
    partners, weights = (
        torch.tensor([[1, 2, 0], [0, 0, 1]]),
        torch.rand(2, 3, 17, generator=torch.Generator().manual_seed(0)),
    )

    def total(j, w):
        return sk.smooseg_loss(*x[:4], ["self", j], [0.1, 0.3], patch_weight=w, impl=impl).total

    expected = torch.stack([total(j, w) for j, w in zip(partners, weights)])
    torch.testing.assert_close(torch.func.vmap(total)(partners, weights), expected)


def test_reruns_are_bit_equal():
    x = make_inputs(P=97, dtype=torch.float32)
    a, b = value_and_grad(x, "torch"), value_and_grad(x, "torch")
    assert all(torch.equal(a.values[k], b.values[k]) for k in a.values)
    assert all(torch.equal(a.grads[k], b.grads[k]) for k in a.grads)


def test_mixed_dtypes():
    x = make_inputs(dtype=torch.float32)
    out = sk.smooseg_loss(x.features.half(), x.codes.bfloat16(), *x[2:6])
    assert all(v.dtype == torch.float32 for v in out)
    reference = sk.smooseg_loss(x.features.half().float(), x.codes.bfloat16().float(), *x[2:6])
    torch.testing.assert_close(out.total, reference.total)


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_probabilities_and_data_term(impl):
    x = make_inputs()
    codes, prototypes = x.codes.requires_grad_(), x.teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, t: sk.prototype_probabilities(z, t, temperature=0.5, impl=impl), (codes[:1, :3], prototypes)
    )
    probs = sk.prototype_probabilities(codes, prototypes, impl=impl)
    cosines = torch.nn.functional.cosine_similarity(codes[:, :, None], prototypes[None, None], dim=-1)
    torch.testing.assert_close(probs, torch.softmax(cosines / 0.1, -1))
    weight = torch.rand(3, 17, dtype=torch.float64)
    loss = sk.prototype_loss(codes, x.student, x.teacher.detach(), patch_weight=weight, impl=impl)
    logits = torch.nn.functional.cosine_similarity(codes[:, :, None], x.student[None, None], dim=-1)
    per_patch = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), cosines.argmax(-1).flatten(), reduction="none"
    ).view(3, 17)
    torch.testing.assert_close(loss, (per_patch * weight).sum() / weight.sum())


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_fullgraph_compile_and_fake_tensors(impl):
    x = make_inputs(T=3, H=2, dtype=torch.float32, relative=True)
    function = torch.compile(
        lambda z, s: sk.smooseg_loss(x.features, z, s, *x[3:6], relative=True, impl=impl).total.sum(),
        backend="aot_eager",
        fullgraph=True,
    )
    codes, student = x.codes.requires_grad_(), x.student.requires_grad_()
    compiled = torch.autograd.grad(function(codes, student), (codes, student))
    eager = torch.autograd.grad(
        sk.smooseg_loss(x.features, codes, student, *x[3:6], relative=True, impl=impl).total.sum(), (codes, student)
    )
    torch.testing.assert_close(compiled, eager)
    mode = torch._subclasses.FakeTensorMode()
    fake = [mode.from_tensor(t.detach()) for t in x[:4]]
    partners = [p if isinstance(p, str) else mode.from_tensor(p) for p in x.partners]
    with mode:
        out = sk.smooseg_loss(*fake, partners, [0.1, 0.2, 0.3], impl=impl)
        assert out.energy.shape == (2, 3)


@pytest.mark.parametrize("name", ["channel_scale", "patch_weight", "feature_norms"])
def test_smoothness_alone_takes_the_options_as_the_oracle_does(name):
    """Tests the form that traces; `smooseg_loss` on a CPU takes another."""
    g = torch.Generator().manual_seed(0)
    features, probs = (torch.rand(*shape, generator=g, dtype=torch.float64) for shape in ((3, 17, 20), (3, 17, 5)))
    options = {
        name: torch.rand(*((3, 20) if name == "channel_scale" else (3, 17)), generator=g, dtype=torch.float64) + 0.5
    }
    results = []
    for impl in ("torch", "dense"):
        rows = probs.clone().requires_grad_()
        out = sk.smoothness_energy(
            features, rows, ["self", torch.tensor([1, 1, 0]), "all"], [0.1, -0.2, 0.3], impl=impl, **options
        )
        results.append(
            (*out, *torch.autograd.grad((out.energy * torch.tensor([1.7, -0.3, 0.5])).sum() + out.distance.sum(), rows))
        )
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_the_data_term_of_patches_without_weight_is_zero():
    codes, rows = torch.rand(2, 5, 4), torch.rand(3, 4, requires_grad=True)
    for impl in ("torch", "dense"):
        loss = sk.prototype_loss(codes, rows, rows.detach(), patch_weight=torch.zeros(2, 5), impl=impl)
        assert loss == 0
        assert not torch.autograd.grad(loss, rows)[0].any()
