"""Sums over pairs of given moments against their formulas in float64, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from smooseg_kernels.triton import ALL, SELF, moment_pairs
from smooseg_kernels.triton.plan import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIFT = 64.0


def moments_views(plan, scratch):
    """Returns the sums [S,B,D,H,BLOCK_K] and the label sums [H,B,PARTS,BLOCK_K]."""
    sums = scratch.sums.view(plan.splits, plan.B, plan.D, plan.H, plan.columns)
    return sums, scratch.label_sums.view(plan.H, plan.B, plan.parts, plan.columns)


def make_moments(plan, scratch, generator):
    """Fills moments of magnitudes as in training, with numbers that must not matter beyond column K."""

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    sums, label_sums = moments_views(plan, scratch)
    sums.copy_((LIFT / plan.splits * 0.1) * (uniform(*sums.shape) - 0.3))
    sums[..., plan.K] = sums[..., :1, plan.K]  # u is that of the features, whatever the head
    label_sums.copy_((LIFT / plan.parts) * uniform(*label_sums.shape))
    scratch.totals.copy_(uniform(plan.B) + 0.5)


def moments_of(plan, scratch):
    """Returns g [H,B,D,K], u [H,B,D] and s [H,B,K] in float64."""
    sums, label_sums = (x.double() for x in moments_views(plan, scratch))
    both, s = sums.sum(0).permute(2, 0, 1, 3), label_sums.sum(2)[..., : plan.K]
    return both[..., : plan.K] / LIFT, both[..., plan.K] / LIFT, s / LIFT


def matrix_of(entry, partners, present):
    """Returns the pairs of images as a matrix of 0 and 1, [B,B]; an image without weight has no pairs."""
    B = len(present)
    pairs = torch.eye(B, dtype=torch.float64) if entry == SELF else 1 - torch.eye(B, dtype=torch.float64)
    if entry >= 0:
        pairs = torch.nn.functional.one_hot(partners[entry].cpu(), B).double()
    return pairs * (present[:, None] & present)


def expected(plan, scratch, pair_sets, entropy, factors):
    """Returns energy and distance [H,T], data [H], pull [H,B,D,K] and constant [H,B,K]."""
    g, u, s = (x.cpu() for x in moments_of(plan, scratch))
    totals = scratch.totals.cpu().double()
    shown = g - u[..., None] * s[..., None, :] if pair_sets.center else g
    energies, distances, pull, constant = [], [], 0.0, 0.0
    for t, entry in enumerate(pair_sets.entries):
        pairs = matrix_of(entry, pair_sets.partners, totals > 0)
        count = pairs.sum().clamp(min=1.0)
        inner = torch.einsum("hndk,hmdk,nm->h", g, shown, pairs) / count
        likeness = torch.einsum("hnd,hmd,nm->h", u, u, pairs)[0] / count
        distance = (pairs.sum() - torch.einsum("hnk,hmk,nm->h", s, s, pairs)) / count
        bias = pair_sets.thresholds[:, t].cpu().double() + (likeness if pair_sets.relative else 0.0)
        slope = (likeness if pair_sets.center else 0.0) - bias
        energies.append(slope * distance - inner + (0.0 if pair_sets.center else likeness))
        distances.append(distance)
        share, (to_energy, to_distance) = plan.B / count, factors[:, :, t].cpu().double().unbind(1)
        back = torch.einsum("hmdk,mn->hndk", g, pairs)
        share_h = (share * to_energy)[:, None, None]
        pull = pull + share_h[..., None] * (torch.einsum("hmdk,nm->hndk", shown, pairs) + back)
        met = torch.einsum("hmk,nm->hnk", s, pairs + pairs.T)
        constant = constant + (share * (slope * to_energy + to_distance))[:, None, None] * met
        if pair_sets.center:
            constant = constant - share_h * torch.einsum("hndk,hnd->hnk", back, u)
    if pair_sets.channel_scale is not None:
        pull = pull * pair_sets.channel_scale.cpu().double()[:, :, None]
    data = (entropy.cpu().double().sum(2) * totals).sum(1) / totals.sum().clamp(min=1e-38) / LIFT
    return torch.stack(energies, 1), torch.stack(distances, 1), data, pull, constant


CASES = {
    "one of each": dict(entries=[SELF, 0, ALL]),
    "several rows of partners, one of them alike for all": dict(entries=[0, 1, 2]),
    "not centred": dict(entries=[SELF, 1, ALL], center=False),
    "relative, scaled": dict(entries=[2, ALL], relative=True, scaled=True),
    "images without weight": dict(entries=[SELF, 0, 1, ALL], weighted=True),
    "other upstream gradients": dict(entries=[SELF, 0, ALL], upstream=True),
}


@pytest.mark.parametrize("blocks", [False, True], ids=["whole batch", "blocks of images"])
@pytest.mark.parametrize("name", CASES)
def test_energies_pull_and_constant(name, blocks, poisoned, monkeypatch):
    """A program looks at two images at a time with blocks, as it does at a thousand in a batch of many thousands."""
    if blocks:
        monkeypatch.setattr(moment_pairs, "LARGEST_BLOCK_B", 2)
        monkeypatch.setattr(moment_pairs, "image_rows", lambda B, columns: 2)
    case = {"center": True, "relative": False, "scaled": False, "weighted": False, "upstream": False} | CASES[name]
    B, H, K, D, T, generator = 5, 2, 3, 70, len(case["entries"]), torch.Generator().manual_seed(1)
    features, rows = torch.zeros(B, 40, D, device=DEVICE), torch.zeros(H, B, 40, 6, device=DEVICE)
    student = torch.randn(H, K, 6, generator=generator).to(DEVICE)
    plan = Plan(features, rows, student, T)
    scratch = plan.scratch(features, rows, False, True, True)
    make_moments(plan, scratch, generator)
    if case["weighted"]:
        scratch.totals[torch.tensor([1, 3])] = 0.0
        for tensor in moments_views(plan, scratch):
            tensor.index_fill_(1, torch.tensor([1, 3], device=DEVICE), 0.0)
    else:
        scratch.totals.fill_(40.0)
    partners = torch.tensor([[1, 2, 3, 4, 0], [2, 2, 2, 2, 2], [4, 0, 4, 0, 4]], device=DEVICE)
    pair_sets = moment_pairs.PairSets(
        partners, case["entries"], 0.2 * torch.randn(H, T, generator=generator).to(DEVICE),
        torch.rand(B, D, generator=generator).to(DEVICE) if case["scaled"] else None, None,
        relative=case["relative"], center=case["center"],
    )  # fmt: skip
    entropy = (LIFT * torch.rand(H, B, plan.parts, generator=generator)).to(DEVICE)
    student_sums = torch.randn(H, B, plan.parts, K, 6, generator=generator).to(DEVICE)
    factors = torch.ones(H, 2, T, device=DEVICE)
    factors[:, 1] = 0.0
    if case["upstream"]:
        factors.copy_(2 * torch.rand(H, 2, T, generator=generator) - 1)
    outputs = plan.outputs(features)
    moment_pairs.add_up_pairs(
        plan, scratch, pair_sets, outputs, torch.zeros(H, dtype=torch.int32, device=DEVICE),
        data_term=moment_pairs.DataTerm(student, entropy, student_sums), rows_gradient=True, student_gradient=True,
        factors=factors if case["upstream"] else None, weighted=case["weighted"],
    )  # fmt: skip
    energy, distance, data, pull, constant = expected(plan, scratch, pair_sets, entropy, factors)
    present = scratch.totals.cpu() > 0
    got = [
        outputs.energy,
        outputs.distance,
        outputs.data,
        scratch.pull[..., :K] / LIFT,
        scratch.constant[..., :K] / LIFT,
    ]
    for name, value, truth in zip(
        ("energy", "distance", "data", "pull", "constant"), got, (energy, distance, data, pull, constant)
    ):
        value = value.cpu().double()
        if name in ("pull", "constant"):  # nothing reads those of an image without weight
            value, truth = value[:, present], truth[:, present]
        error = (value - truth).abs().max()
        assert error <= 2e-6 * truth.abs().max(), f"{name}: off by {error:.1e}"
    torch.testing.assert_close(outputs.total.cpu().double(), (energy.sum(1) + data), rtol=1e-5, atol=1e-6)
    weighted_sums = (student_sums.cpu().double().sum(2) * scratch.totals.cpu().double()[:, None, None]).sum(1)
    unit_gradient = weighted_sums / (LIFT * scratch.totals.cpu().double().sum())
    prototypes = student.cpu().double().requires_grad_()
    torch.nn.functional.normalize(prototypes, dim=-1).backward(unit_gradient)
    torch.testing.assert_close(scratch.d_student.cpu().double(), prototypes.grad, rtol=1e-5, atol=1e-6)
