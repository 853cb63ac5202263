"""One training step and what it draws at random. Imports torch and smooseg_kernels alone, so that it runs on a bare machine."""

from __future__ import annotations

import torch
from torch import Tensor

import smooseg_kernels as sk

from ..segment.model import Heads
from ..system.processes import ALONE, Processes
from .schedule import Draws, Settings


def train_step(
    heads: Heads,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    draws: Draws,
    thresholds: Tensor,
    settings: Settings,
    processes: Processes = ALONE,
) -> sk.SmooSegLoss:
    """One iteration: losses with the teacher as it stands, then the teacher's update, then the optimiser's.

    features [B,P,D]: of 16 bits where the projection's matrix products shall be in bf16 (on a CPU they are bf16), else like the heads.
    thresholds [H,T]: every head has its own; batches, partners, masks and patches are common to them.
    processes: each has an equal part of the batch; losses and gradients are those of the whole, and heads stay equal on all.
    -> the losses, [H] or [H,T], as device tensors: the loop, not the step, decides when to read them.
    """
    if draws.patches is not None:
        features = features.gather(1, draws.patches[..., None].expand(-1, -1, features.shape[-1]))
    masks = None if draws.masks is None else draws.masks.to(torch.promote_types(features.dtype, torch.float32))
    closeness_mask, linear_mask, hidden_mask = (None, None, None) if masks is None else masks.unbind(0)
    narrow = (
        features.dtype.itemsize == 2 and features.device.type != "cpu"
    )  # there the projection casts its weights itself
    with torch.autocast(features.device.type, torch.bfloat16, enabled=narrow):
        codes = heads.codes(features, linear_mask, hidden_mask)
    loss = sk.smooseg_loss(
        features,
        codes,
        heads.student,
        heads.teacher,
        ["self", draws.partner],
        thresholds,
        temperature=settings.temperature,
        relative=settings.relative,
        channel_scale=closeness_mask,
        impl=settings.impl,
    )
    if processes.size > 1 and not settings.relative:
        loss = with_mean_of_all(loss, processes)
    optimizer.zero_grad(set_to_none=True)
    loss.total.sum().backward()
    loss = sk.SmooSegLoss(*(value.detach() for value in loss))
    if processes.size > 1:
        loss = averaged(loss, list(heads.parameters()), processes)
    heads.update_teacher(settings.teacher_decay)
    optimizer.step()
    return loss


def with_mean_of_all(loss: sk.SmooSegLoss, processes: Processes) -> sk.SmooSegLoss:
    """The losses of one part of a batch, with M over the whole batch in the place of M over the part.

    For absolute thresholds only: E = (M - b) distance - ... is linear in M, so (M of all - own M) distance is exactly what is missing, and
    T numbers are exchanged; taking M ahead of the step would read the features twice. Relative thresholds move with M, which cancels.
    """
    (mean,) = processes.mean([loss.mean])
    missing = (mean - loss.mean) * loss.distance
    return loss._replace(total=loss.total + missing.sum(-1), energy=loss.energy + missing)


def averaged(loss: sk.SmooSegLoss, parameters: list[Tensor], processes: Processes) -> sk.SmooSegLoss:
    """Over equal parts of a batch, in one exchange: the gradients, in place, and the losses, which are returned."""
    values = processes.mean([*(parameter.grad for parameter in parameters), *loss])
    for parameter, gradient in zip(parameters, values):
        parameter.grad = gradient
    return sk.SmooSegLoss(*values[len(parameters) :])


def make_optimizer(heads: Heads, lr: float, lr_prototypes: float) -> torch.optim.Adam:
    return torch.optim.Adam(
        [{"params": list(heads.projection.parameters()), "lr": lr}, {"params": [heads.student], "lr": lr_prototypes}],
        fused=heads.student.device.type in ("cpu", "cuda"),
        capturable=heads.student.device.type == "cuda",
    )
