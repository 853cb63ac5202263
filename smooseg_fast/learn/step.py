"""One training step. Imports torch and smooseg_kernels alone, so that it runs on a bare machine."""

from __future__ import annotations

import torch
from torch import Tensor

import smooseg_kernels as sk

from ..segment.model import Heads
from .schedule import Draws, Settings


def train_step(
    heads: Heads,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    draws: Draws,
    thresholds: Tensor,
    settings: Settings,
) -> sk.SmooSegLoss:
    """Runs one iteration: losses with the teacher as it stands, then the teacher's update, then the optimiser's step.

    Args:
        heads: H heads, updated in place.
        features: [B,P,D]. 16-bit features on a GPU make the projection's matrix products bf16; on a CPU only bf16
            features do. Other features have the heads' dtype.
        draws: partners, masks and patches of this step, common to the heads.
        thresholds: [H,2] of every head, within images and across.

    Returns:
        The losses as device tensors, [H] or [H,2], detached. The loop decides when to read them.
    """
    if draws.patches is not None:
        features = features.gather(1, draws.patches[..., None].expand(-1, -1, features.shape[-1]))
    masks = None if draws.masks is None else draws.masks.to(torch.promote_types(features.dtype, torch.float32))
    closeness_mask, linear_mask, hidden_mask = (None, None, None) if masks is None else masks.unbind(0)
    # on a CPU the projection casts its weights itself
    narrow = features.dtype.itemsize == 2 and features.device.type != "cpu"
    with torch.autocast(features.device.type, torch.bfloat16, enabled=narrow):
        codes = heads.codes(features, linear_mask, hidden_mask)
    loss = sk.smooseg_loss(
        features,
        codes,
        heads.student,
        heads.teacher,
        partners=["self", draws.partner],
        thresholds=thresholds,
        temperature=settings.temperature,
        relative=settings.relative,
        channel_scale=closeness_mask,
        impl=settings.impl,
    )
    optimizer.zero_grad(set_to_none=True)
    loss.total.sum().backward()
    heads.update_teacher(settings.teacher_decay)
    optimizer.step()
    return sk.SmooSegLoss(*(value.detach() for value in loss))


def make_optimizer(heads: Heads, lr: float, lr_prototypes: float) -> torch.optim.Adam:
    """Adam with a learning rate for the projection and one for the student's prototypes."""
    device = heads.student.device.type
    return torch.optim.Adam(
        [{"params": list(heads.projection.parameters()), "lr": lr}, {"params": [heads.student], "lr": lr_prototypes}],
        fused=device in ("cpu", "cuda"),
        capturable=device == "cuda",
    )
