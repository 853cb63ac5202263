"""torch.func, forward mode and second derivatives: every function has them, or refuses them in one line."""

from __future__ import annotations

import pytest
import torch
from test_transforms import HAS_TRITON, SIZES, assert_equal, inputs_of
from torch.autograd import forward_ad

import smooseg_kernels as sk


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton")
def test_what_torch_func_cannot_take_says_so():
    x = inputs_of(SIZES[0])

    def energy(impl, **options):
        return lambda c: sk.pair_energy(x["features"], c, x["features"], c, 0.1, impl=impl, **options).energy

    for impl, options in (("torch", {"clamp": (0.0, None)}), ("torch", {"hinge": True}), ("triton", {})):
        for transform in (torch.func.grad, torch.func.jacfwd, lambda f: torch.func.vmap(lambda c: f(c))):
            codes = x["codes"][None] if transform not in (torch.func.grad, torch.func.jacfwd) else x["codes"]
            with pytest.raises(RuntimeError, match=r'impl="(torch|triton)".* use impl="dense"'):
                transform(energy(impl, **options))(codes)

    def contrast(c):
        return sk.contrastive_loss(c, c, labels_i=labels, labels_j=labels, impl="torch").loss

    labels = torch.zeros(x["codes"].shape[:2], dtype=torch.int64)
    for function in (contrast, lambda c: sk.gaussian_sums(x["places"], c, impl="torch").sum()):
        for transform in (torch.func.grad, torch.func.jacfwd):
            with pytest.raises(RuntimeError, match=r'impl="torch".* use impl="dense"'):
                transform(function)(x["codes"])
    dense = torch.func.grad(energy("dense", clamp=(0.0, None)))(x["codes"])
    assert_equal((torch.func.grad(energy("torch"))(x["codes"]),), (torch.func.grad(energy("dense"))(x["codes"]),))
    assert dense.any()


def test_what_has_no_dense_form_says_so_too():
    """Registered operators would drop tangents, which are zeros to torch.func.jvp."""
    x = inputs_of((2, 3, 3))
    for function in (
        lambda p: sk.guided_filter(p, x["image"][:, :3, :3], radius=1, eps=0.1).sum(),
        lambda p: sk.joint_upsample(p, x["image"]).sum(),
    ):
        for transform in (torch.func.grad, torch.func.jacfwd):
            with pytest.raises(RuntimeError, match=r"has no forward-mode derivatives .* use torch.autograd.grad"):
                transform(function)(x["probs_map"])
        assert torch.equal(torch.func.vmap(function)(x["probs_map"][None])[0], function(x["probs_map"]))
    with pytest.raises(RuntimeError, match=r"similarity_statistics cannot run inside torch.func"):
        torch.func.vmap(lambda f: sk.similarity_statistics(f, ["self"], bins=4).mean)(x["features"][None])


def test_forward_mode_of_the_objective():
    x = inputs_of((2, 3, 3))

    def total(codes, threshold, impl):
        arguments = (x["features"], codes, x["student"], x["teacher"], ["self"], threshold[None])
        return sk.smooseg_loss(*arguments, impl=impl).total

    def tangent(impl, *towards):
        with forward_ad.dual_level():
            inputs = (x["codes"], torch.tensor(0.1))
            return forward_ad.unpack_dual(total(*map(forward_ad.make_dual, inputs, towards), impl)).tangent

    dense, eager = (tangent(impl, x["codes"].flip(1), torch.tensor(2.0)) for impl in ("dense", "torch"))
    assert dense != 0
    torch.testing.assert_close(eager, dense)
    if HAS_TRITON:
        with pytest.raises(RuntimeError, match='impl="triton" has no forward-mode derivatives'):
            torch.func.jvp(lambda b: total(x["codes"], b, "triton"), (torch.tensor(0.1),), (torch.tensor(1.0),))


@pytest.mark.skipif(not HAS_TRITON, reason="without Triton")
def test_a_second_backward_pass_of_kernels_is_refused():
    x = inputs_of((2, 3, 3))
    codes = x["codes"].requires_grad_()
    loss = sk.smooseg_loss(x["features"], codes, x["student"], x["teacher"], ["self"], [0.1], impl="triton")
    (gradient,) = torch.autograd.grad(loss.total, codes, create_graph=True)
    with pytest.raises(RuntimeError, match='smooseg_loss: impl="triton" has no gradient of its gradient; use impl="d'):
        gradient.square().sum().backward()
