"""One training step. Imports torch and smooseg_kernels alone, so that it runs on a bare machine."""

from __future__ import annotations

import torch
from torch import Tensor

import smooseg_kernels as sk

from ..segment.model import Heads
from .schedule import Draws, Settings


def chosen(features: Tensor, draws: Draws) -> Tensor:
    """[N,P,D] -> [B,n,D] of the rows and patches that a step draws, read at once."""
    rows, patches = draws.rows, draws.patches
    if patches is None:
        return features if rows is None else features.index_select(0, rows)  # indexing is slower by a third
    if rows is None:
        rows = torch.arange(len(features), device=patches.device)
    places = torch.add(patches, rows[:, None], alpha=features.shape[1])
    return features.flatten(0, 1).index_select(0, places.flatten()).view(*patches.shape, -1)


def train_step(
    heads: Heads,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    draws: Draws,
    thresholds: Tensor,
    settings: Settings,
    *,
    valid: Tensor | None = None,
) -> sk.SmooSegLoss:
    """Runs one iteration: losses with the teacher as it stands, then the teacher's update, then the optimiser's step.

    Args:
        heads: H heads, updated in place.
        features: [N,P,D], of which the draws choose rows and patches. 16-bit features on a GPU make the projection's
            matrix products bf16; on a CPU only bf16 features do, and others get the heads' dtype.
        draws: rows, partners, masks and patches of this step, common to the heads.
        thresholds: [H,2] of every head, within images and across.
        valid: bool [N,P], which patches show data; the others weigh nothing in the objective. None: all do.

    Returns:
        The losses as device tensors, [H] or [H,2], detached. The loop decides when to read them.
    """
    features = chosen(features, draws)
    weight = None if valid is None else chosen(valid[..., None], draws)[..., 0].float()
    if features.device.type == "cpu" and features.dtype != torch.bfloat16:
        features = features.to(heads.student.dtype)
    masks = None
    if draws.masks is not None:  # dropped channels are 0, the others make up for them
        masks = (draws.masks * (1 / (1 - settings.dropout))).to(torch.promote_types(features.dtype, torch.float32))
    closeness_mask, linear_mask, hidden_mask = (None, None, None) if masks is None else masks.unbind(0)
    # on a CPU the projection casts its weights itself
    narrow = features.dtype.itemsize == 2 and features.device.type != "cpu"
    with torch.autocast(features.device.type, torch.bfloat16, enabled=narrow):
        codes = heads.codes(features, linear_mask, hidden_mask, settings.impl)
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
        patch_weight=weight,
        impl=settings.impl,
    )
    optimizer.zero_grad(set_to_none=True)
    loss.total.sum().backward()
    heads.update_teacher(settings.teacher_decay)
    optimizer.step()
    return sk.SmooSegLoss(*(value.detach() for value in loss))


PIECE = 8192  # numbers that one block of a card's threads updates, at least


class PiecewiseAdam(torch.optim.Adam):
    """Adam whose fused update reaches more of a card: PyTorch gives 65,536 numbers to each block of threads.

    A head of 200,000 parameters keeps seven blocks busy for 39 us on an H200. The state is Adam's own.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
            states = [self.state[parameter] for parameter in parameters]
            torch._foreach_add_([state["step"] for state in states], 1)
            columns: list[list[Tensor]] = [[], [], [], []]
            steps: list[Tensor] = []
            for parameter, state in zip(parameters, states):
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                for column, tensor in zip(columns, tensors):
                    column += tensor.reshape(-1).split(PIECE)
                steps += [state["step"]] * (len(columns[0]) - len(steps))
            beta1, beta2 = group["betas"]
            options = {"weight_decay": group["weight_decay"], "eps": group["eps"], "amsgrad": False, "maximize": False}
            torch._fused_adam_(*columns, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2, **options)  # type: ignore[call-overload]


def make_optimizer(heads: Heads, lr: float, lr_prototypes: float) -> torch.optim.Adam:
    """Adam with a learning rate for the projection and one for the student's prototypes."""
    device = heads.student.device.type
    return (PiecewiseAdam if device == "cuda" else torch.optim.Adam)(
        [{"params": list(heads.projection.parameters()), "lr": lr}, {"params": [heads.student], "lr": lr_prototypes}],
        fused=device in ("cpu", "cuda"),
        capturable=device == "cuda",
    )
