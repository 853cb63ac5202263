"""The contrastive loss: the oracle against loops, published formulas and finite differences; blocks against it."""

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from contrast_cases import KINDS, check, evaluate, make_contrast

import smooseg_kernels as sk
from smooseg_kernels import contrast_blocks

IMPLS = ["dense", "torch"]
EPS = torch.finfo(torch.float32).eps
WAYS = [dict(inside=i, exclude_self=e, reduction=r) for i, e, r in itertools.product((0, 1), (0, 1), ("mean", "none"))]


def name(value):
    return "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_is_the_formula_in_loops(kind, inside):
    x = make_contrast(kind, B=2, N=5, M=5, exclude_self=True)
    option = x.options
    got = sk.contrastive_loss(x.codes_i, x.codes_j, impl="dense", inside=inside, reduction="none", **option)
    per_row = option.get("threshold", torch.zeros(())).expand(2, 5)
    for b, i in itertools.product(range(2), range(5)):
        positives, candidates = [], []
        for j in set(range(5)) - {i}:
            s = float(F.cosine_similarity(x.codes_i[b, i], x.codes_j[b, j], dim=0)) / option["temperature"]
            if kind == "labels":
                mine, theirs = option["labels_i"][b, i], option["labels_j"][b, j]
                positive, negative = mine == theirs >= 0, theirs >= 0
            else:
                closeness = F.cosine_similarity(option["features_i"][b, i], option["features_j"][b, j], dim=0)
                positive = closeness > per_row[b, i]
                if "threshold_j" in option:
                    positive |= closeness > option["threshold_j"][b, j]
                negative = closeness < option.get("negative_threshold", torch.inf)
            positives += [s] * bool(positive)
            candidates += [s] * bool(positive or negative)
        log_sum = math.log(sum(map(math.exp, candidates))) if candidates else 0.0
        mean = 0.0
        if positives:
            mean = sum(positives) / len(positives)
            mean = math.log(sum(map(math.exp, positives)) / len(positives)) if inside else mean
        assert got.count[b, i] == len(positives)
        loss = log_sum - mean if positives else 0.0
        assert [float(v[b, i]) for v in (got.log_sum, got.positive, got.loss)] == pytest.approx([log_sum, mean, loss])


@pytest.mark.parametrize("impl", IMPLS)
def test_one_positive_is_the_cross_entropy_of_a_query(impl):
    """InfoNCE of two views: patch i of one belongs to patch i of the other. Also EAGLE's patches and centroids."""
    x = make_contrast(N=17, M=17)
    label = torch.arange(17).expand(2, 17)
    got = sk.contrastive_loss(x.codes_i, x.codes_j, labels_i=label, labels_j=label, temperature=0.07, impl=impl)
    logits = F.normalize(x.codes_i, dim=-1) @ F.normalize(x.codes_j, dim=-1).mT / 0.07
    torch.testing.assert_close(got.loss, F.cross_entropy(logits.flatten(0, 1), label.flatten()))
    chosen, centroids = torch.randint(0, 5, (2, 17)), x.codes_j[:, :5]
    object_ = torch.arange(5).expand(2, 5)
    got = sk.contrastive_loss(x.codes_i, centroids, labels_i=chosen, labels_j=object_, temperature=0.07, impl=impl)
    torch.testing.assert_close(got.loss, F.cross_entropy(logits[:, :, :5].flatten(0, 1), chosen.flatten()))


@pytest.mark.parametrize("way", WAYS, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_equal_the_oracle_in_float64(kind, way, monkeypatch):
    for pairs in (100, 1 << 20) if kind != "band" else (1, 100):
        monkeypatch.setattr(contrast_blocks, "CPU_PAIRS", pairs)
        check(make_contrast(kind, B=3, N=17, M=17 if way["exclude_self"] else 29, **way), "torch", 2.0**-52)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.2, 10.0])
def test_blocks_within_the_error_budget(dtype, temperature):
    for kind in KINDS:
        check(make_contrast(kind, dtype=dtype, temperature=temperature), "torch", EPS)
        check(make_contrast(kind, N=1, M=3, D=2, Z=2, dtype=dtype, temperature=temperature, seed=2), "torch", EPS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["labels", "band"])
def test_gradcheck(impl, kind):
    x = make_contrast(kind, N=5, M=4, Z=3)
    for way in (dict(inside=True, reduction="none"), dict(reduction="mean")):

        def function(*codes, way=way):
            return tuple(sk.contrastive_loss(*codes, impl=impl, **x.options, **way)[:3])

        assert torch.autograd.gradcheck(function, (x.codes_i.requires_grad_(), x.codes_j.requires_grad_()))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_positives_and_nothing_but_positives(impl):
    x = make_contrast("threshold")
    none = sk.contrastive_loss(x.codes_i.requires_grad_(), x.codes_j, impl=impl, **x.options | {"threshold": 1.5})
    assert none.loss == 0
    assert not none.count.any()
    assert not torch.autograd.grad(none.loss, x.codes_i)[0].any()
    every = sk.contrastive_loss(x.codes_i, x.codes_j, impl=impl, inside=True, **x.options | {"threshold": -1.5})
    assert (every.count == 29).all()
    torch.testing.assert_close(every.loss, torch.tensor(math.log(29), dtype=torch.float64))
    # rows that nobody is left to compare with
    alone = make_contrast(N=1, M=1, exclude_self=True, reduction="none")
    got = evaluate(alone, impl)
    assert not got.values["log_sum"].any()
    assert not got.gradients["codes_i"].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_huge_logits_and_nan(impl):
    x = make_contrast(dtype=torch.float32, temperature=1e-5)
    for inside in (False, True):
        got = evaluate(x, impl, (1.0,), inside=inside)
        assert got.values["loss"].isfinite()
        assert all(d.isfinite().all() for d in got.gradients.values())
    x.codes_i[0, 0, 0] = torch.nan
    assert evaluate(x, impl, (1.0,)).values["log_sum"][0, 0].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_tensor_on_both_sides_and_one_side_alone(impl):
    x = make_contrast("threshold", N=17, M=17)
    x.options |= dict(features_j=x.options["features_i"], exclude_self=True)
    x.codes_j = x.codes_i.clone()
    apart = evaluate(x, impl, (1.7,))
    codes = x.codes_i.detach().requires_grad_()
    loss = sk.contrastive_loss(codes, codes, impl=impl, **x.options).loss
    both = torch.autograd.grad(1.7 * loss, codes)[0]
    torch.testing.assert_close(both, apart.gradients["codes_i"] + apart.gradients["codes_j"])
    loss = sk.contrastive_loss(codes.detach(), codes, impl=impl, **x.options).loss
    torch.testing.assert_close(torch.autograd.grad(1.7 * loss, codes)[0], apart.gradients["codes_j"])


def loss_of(codes, features, impl="torch"):
    out = sk.contrastive_loss(
        codes, codes, features_i=features, features_j=features, threshold=0.1, exclude_self=True, impl=impl
    )
    return out.loss + 0.1 * out.log_sum.mean()


def example(B, P):
    generator = torch.Generator().manual_seed(B * P)
    return torch.randn(B, P, 6, generator=generator).requires_grad_(), torch.randn(B, P, 5, generator=generator)


@pytest.mark.parametrize("impl", IMPLS)
def test_exports_for_all_sizes_with_gradients(impl):
    class Loss(torch.nn.Module):
        def forward(self, codes, features):
            return loss_of(codes, features, impl)

    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("P")}
    program = torch.export.export(Loss(), tuple(x.detach() for x in example(3, 9)), dynamic_shapes=(sizes, sizes))
    codes, features = example(2, 12)
    got, want = (torch.autograd.grad(f(codes, features), codes)[0] for f in (program.module(), loss_of))
    torch.testing.assert_close(got, want)


def test_operators_pass_opcheck():
    x = make_contrast("band", N=5, M=7, dtype=torch.float32)
    codes = [F.normalize(c, dim=-1).requires_grad_() for c in (x.codes_i, x.codes_j)]
    features = [F.normalize(x.options[f"features_{side}"], dim=-1) for side in "ij"]
    thresholds = [x.options[k].float().expand(2, 5) for k in ("threshold", "negative_threshold")]
    common = (*codes, torch.tensor(0.2), None, None, *features, thresholds[0], None, thresholds[1], False, False)
    torch.library.opcheck(contrast_blocks.contrast_blocks, (*common, True, True))


def test_gradients_of_gradients_are_refused_where_blocks_are_gone():
    codes, features = example(2, 5)
    with pytest.raises(RuntimeError, match='use impl="dense"'):
        torch.autograd.grad(loss_of(codes, features), codes, create_graph=True)


WRONG = {
    "codes_i must have shape \\[B, N, Z\\]": dict(codes_i=torch.zeros(3, 4)),
    "codes_j must have shape \\[2, M, 5\\], got \\[2, 3, 6\\]": dict(codes_j=torch.zeros(2, 3, 6)),
    "positives come from labels_i and labels_j or from features_i and features_j, got neither": dict(labels_i=None),
    "got both": dict(features_i=torch.zeros(2, 3, 4)),
    "labels_i must be an integer tensor \\[2, 3\\], got torch.float32": dict(labels_i=torch.zeros(2, 3)),
    "labels_j must have shape \\[2, 3\\]": dict(labels_j=torch.zeros(2, 4, dtype=torch.int64)),
    "threshold applies to features": dict(threshold=0.1),
    "temperature must be a finite number above 0, got 0": dict(temperature=0),
    "temperature must be a number or a tensor of shape \\[\\]": dict(temperature=torch.ones(2)),
    'reduction must be "mean" or "none", got \'sum\'': dict(reduction="sum"),
    "exclude_self needs as many keys as queries, got 4 keys and 3 queries": dict(
        exclude_self=True, codes_j=torch.zeros(2, 4, 5)
    ),
    'impl must be "auto"': dict(impl="cuda"),
}
BY_FEATURES = {
    "threshold must say": dict(threshold=None),
    "threshold must be a number, or a tensor of shape \\[\\] or \\[2, 3\\], got \\[3\\]": dict(
        threshold=torch.zeros(3)
    ),
    "threshold must have shape \\[2, 3\\], got \\[2, 4\\]": dict(threshold=torch.zeros(2, 4)),
    "threshold is a constant": dict(threshold=torch.zeros(2, 3, requires_grad=True)),
    "threshold_j must have shape \\[2, 3\\]": dict(threshold_j=torch.zeros(2, 2)),
    "features_j must have shape \\[2, 3, 4\\], got \\[2, 3, 5\\]": dict(features_j=torch.zeros(2, 3, 5)),
    "features_i is a constant": dict(features_i=torch.zeros(2, 3, 4, requires_grad=True)),
    "labels_j needs labels_i": dict(labels_j=torch.zeros(2, 3, dtype=torch.int64)),
}


@pytest.mark.parametrize("message", [*WRONG, *BY_FEATURES])
def test_wrong_arguments_are_named(message):
    codes, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    options = dict(codes_i=codes, codes_j=codes)
    if message in WRONG:
        options |= dict(labels_i=labels, labels_j=labels) | WRONG[message]
    else:
        features = torch.zeros(2, 3, 4)
        options |= dict(features_i=features, features_j=features, threshold=0.1) | BY_FEATURES[message]
    with pytest.raises((ValueError, TypeError), match=message):
        sk.contrastive_loss(**options)
