"""The objective and the whole head step on a CPU, dense against torch, each gated on correctness first.

    pytest --benchmark-only --benchmark-group-by=group

Groups share inputs, so the ratio within a group is a ratio of one run.
"""

import pytest
import torch
import torch.nn.functional as F

import smooseg_kernels as sk
from smooseg_fast.model import Head
from smooseg_fast.objective import Schedule, Settings, make_optimizer, train_step

CPU = torch.device("cpu")
OBJECTIVE = {"B8-P784": dict(B=8, P=784, D=384, K=27), "B4-P1600": dict(B=4, P=1600, D=384, K=27)}
STEP = {
    "filterbank-B16-P784-D104-K16": dict(B=16, P=784, D=104, K=16),
    "ViT-S-B16-P784-D384-K27": dict(B=16, P=784, D=384, K=27),
    "CamVid-B16-P784-D432-K11": dict(B=16, P=784, D=432, K=11),
}


def inputs(B, P, D, K, Z=64):
    """Clustered features and codes near the prototypes, so that the softmax is peaked as in training."""
    g = torch.Generator().manual_seed(0)
    group = torch.randint(0, K, (B, P), generator=g)
    features = torch.randn(K, D, generator=g)[group] + 0.7 * torch.randn(B, P, D, generator=g)
    teacher = F.normalize(torch.randn(K, Z, generator=g), dim=-1)
    codes = 2 * teacher[group] + 0.3 * torch.randn(B, P, Z, generator=g)
    student = teacher + 0.05 * torch.randn(K, Z, generator=g)
    return features, codes.requires_grad_(), student.requires_grad_(), teacher


def objective(x, impl):
    partners = ["self", torch.arange(len(x[0])).roll(1)]
    loss = sk.smooseg_loss(*x, partners, [-0.02, 0.5], impl=impl)
    return loss.total, *torch.autograd.grad(loss.total, x[1:3], torch.tensor(1.7))


@pytest.mark.parametrize("impl", ["dense", "torch"])
@pytest.mark.parametrize("shape", OBJECTIVE)
def bench_objective(shape, impl, benchmark, percentiles):
    benchmark.group = f"smooseg_loss forward + backward, T=2, {shape}, fp32"
    x = inputs(**OBJECTIVE[shape])
    for got, truth in zip(objective(x, impl), objective(x, "dense")):
        torch.testing.assert_close(got, truth, rtol=2e-4, atol=1e-6 * float(truth.detach().abs().max()) + 1e-8)
    percentiles(lambda: objective(x, impl), rounds=7 if impl == "dense" else 15)


@pytest.mark.parametrize("impl", ["dense", "torch"])
@pytest.mark.parametrize("shape", STEP)
def bench_head_step(shape, impl, benchmark, percentiles):
    benchmark.group = f"head step: projection, objective, Adam, teacher, {shape}, fp32"
    sizes = STEP[shape]
    features = inputs(**sizes)[0]
    settings = Settings((-0.02, 0.5), relative=False, impl=impl)
    head = Head(sizes["D"], sizes["K"])
    optimizer, schedule = make_optimizer(head, 1e-4, 5e-4), Schedule(1000, sizes["B"], 0)
    thresholds = torch.tensor(settings.thresholds)

    def step():
        draws = schedule.draws(0, sizes["P"], sizes["D"], settings, CPU)
        return train_step(head, optimizer, features, draws, thresholds, settings)

    reference = Head(sizes["D"], sizes["K"])
    draws = schedule.draws(0, sizes["P"], sizes["D"], settings, CPU)
    truth = train_step(
        reference, make_optimizer(reference, 1e-4, 5e-4), features, draws, thresholds, Settings((-0.02, 0.5), False, impl="dense")
    )
    torch.testing.assert_close(step().total, truth.total, rtol=1e-5, atol=1e-5)
    percentiles(step, rounds=5 if impl == "dense" else 15)
