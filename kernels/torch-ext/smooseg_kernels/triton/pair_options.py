"""`pair_energy` with its options: rows, weights, means, thresholds of each image. Pairs in the kernels of `pairs`.

Every output is a row over j; all around it is PyTorch. The clamped similarity takes a launch of its own, which reads no
features. Shapes: features_i [B,P_i,D], unit codes c_i [B,P_i,Z], features_j [N,P_j,D], c_j [N,P_j,Z], partner int64 [B]
or none, bias [B,P_i] fp32, column_weight [B,P_j] fp32 or none. V_ij = cos(f_i, f_j) + bias_i.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derivatives import refuse_second_of
from ..pair_means import Pairing, pair_energies
from ..problem import PairProblem
from ..rows import inverse_norms
from ..types import PairEnergy
from .launch import contiguous, operator, with_rows_together
from .pair_walk import Given, Rule, Side, code_dtype, padded, walk_tiles


def pair_energy(problem: PairProblem) -> list[PairEnergy]:
    """Returns the results of each pair set."""
    return pair_energies(problem, in_blocks)


def in_blocks(problem: PairProblem, x: Pairing, bias: Tensor) -> tuple[Tensor, Tensor | None, None]:
    """Returns the mean of V clamp(c_i . c_j), and where asked for that of the clamped similarity."""
    bias_gradient = torch.is_grad_enabled() and bias.requires_grad
    if bias_gradient and problem.hinge:
        raise ValueError('impl="triton" has no gradient to threshold with hinge=True: use impl="torch"')
    energy, clamped, *_ = pair_rows(
        features_i=problem.features_i,
        inverse_i=inverse_norms(problem.features_i.float())[..., 0],
        c_i=x.i.c,
        features_j=problem.features_j,
        inverse_j=inverse_norms(problem.features_j.float())[..., 0],
        c_j=x.j.c,
        partner=x.pair_set.partner,
        bias=bias,
        column_weight=x.column_weight,
        half=code_dtype(problem.codes_i, problem.codes_j) == torch.float16,
        low=problem.clamp[0],
        high=problem.clamp[1],
        hinge=problem.hinge,
        clamped=problem.means or bias_gradient,
        i_gradient=torch.is_grad_enabled() and x.i.c.requires_grad,
    )
    if x.column_weight is None:
        energy, clamped = energy / x.j.c.shape[1], clamped / x.j.c.shape[1]
    if problem.rows:
        return energy, clamped if problem.means else None, None
    return x.over_i(energy), x.over_i(clamped) if problem.means else None, None


class Sides(NamedTuple):
    """The sides and the rule of a launch."""

    i: Side
    j: Side
    rule: Rule
    bias: Tensor


def sides_of(
    features_i: Tensor, inverse_i: Tensor, c_i: Tensor, features_j: Tensor, inverse_j: Tensor, c_j: Tensor, *,
    partner: Tensor | None, bias: Tensor, half: bool, low: float | None, high: float | None, hinge: bool,
) -> Sides:  # fmt: skip
    def side(features: Tensor, inverse: Tensor, c: Tensor) -> Side:
        unit = F.pad(c.to(torch.float16 if half else torch.float32), (0, padded(c.shape[2]) - c.shape[2]))
        return Side(with_rows_together(features), inverse.contiguous(), unit.contiguous())

    largest = bias.abs().amax(1).clamp(min=1.0)
    rule = Rule(largest, contiguous(partner), low, high, hinge=hinge, center=True)
    return Sides(side(features_i, inverse_i, c_i), side(features_j, inverse_j, c_j), rule, bias.contiguous())


def walk(x: Sides, gradient: Tensor | None, weight: Tensor | None, *, from_i: bool, similarity_alone: bool) -> Tensor:
    mine, other = (x.i, x.j) if from_i else (x.j, x.i)
    given = Given(-x.bias, weight, similarity_alone)
    return walk_tiles(mine, other, x.rule, given, from_i=from_i, energy=from_i, gradient=gradient)[0]


def empty_rows(bias: Tensor, c_i: Tensor, clamped: bool, i_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=bias.device)

    energy, likeness = empty(*bias.shape), empty(*bias.shape) if clamped else empty(0)
    gradients = [empty(*c_i.shape) if asked else empty(0) for asked in (i_gradient, i_gradient and clamped)]
    return energy, likeness, gradients[0], gradients[1]


@operator("pair_option_rows")
def pair_rows(
    features_i: Tensor,
    inverse_i: Tensor,
    c_i: Tensor,
    features_j: Tensor,
    inverse_j: Tensor,
    c_j: Tensor,
    partner: Tensor | None,
    bias: Tensor,
    column_weight: Tensor | None,
    half: bool,
    low: float | None,
    high: float | None,
    hinge: bool,
    clamped: bool,
    i_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns sums over j: energy [B,P_i], clamped similarity [B,P_i], and both gradients [B,P_i,Z] to c_i."""
    x = sides_of(
        features_i, inverse_i, c_i, features_j, inverse_j, c_j,
        partner=partner, bias=bias, half=half, low=low, high=high, hinge=hinge,
    )  # fmt: skip
    weight, Z, nothing = contiguous(column_weight), c_i.shape[2], bias.new_empty(0)
    energy_i = bias.new_empty(*x.i.unit.shape) if i_gradient else None
    clamped_i = bias.new_empty(*x.i.unit.shape) if i_gradient and clamped else None
    with torch.cuda.device_of(features_i):
        energy = walk(x, energy_i, weight, from_i=True, similarity_alone=False)
        likeness = walk(x, clamped_i, weight, from_i=True, similarity_alone=True) if clamped else nothing
    gradients = [nothing.clone() if rows is None else rows[..., :Z].contiguous() for rows in (energy_i, clamped_i)]
    return energy, likeness, gradients[0], gradients[1]


@pair_rows.register_fake
def _(
    features_i, inverse_i, c_i, features_j, inverse_j, c_j, partner, bias, column_weight, half, low, high, hinge,
    clamped, i_gradient,
):  # fmt: skip
    return empty_rows(bias, c_i, clamped, i_gradient)


@operator("pair_option_rows_backward")
def pair_rows_backward(
    d_energy: Tensor | None,
    d_clamped: Tensor | None,
    features_i: Tensor,
    inverse_i: Tensor,
    c_i: Tensor,
    features_j: Tensor,
    inverse_j: Tensor,
    c_j: Tensor,
    partner: Tensor | None,
    bias: Tensor,
    column_weight: Tensor | None,
    half: bool,
    low: float | None,
    high: float | None,
    hinge: bool,
) -> Tensor:
    """Returns the gradient to c_j for upstream gradients [B,P_i]."""
    x = sides_of(
        features_i, inverse_i, c_i, features_j, inverse_j, c_j,
        partner=partner, bias=bias, half=half, low=low, high=high, hinge=hinge,
    )  # fmt: skip
    N, P_j, Z = c_j.shape
    total = bias.new_zeros(len(bias), P_j, Z)
    with torch.cuda.device_of(features_i):
        for upstream, similarity_alone in ((d_energy, False), (d_clamped, True)):
            if upstream is None:
                continue
            # at most 1 within an image, so that no 16-bit operand underflows
            size = upstream.abs().amax(1, keepdim=True).clamp(min=torch.finfo(upstream.dtype).tiny)
            rows = bias.new_empty(len(bias), P_j, padded(Z))
            walk(x, rows, (upstream / size).contiguous(), from_i=False, similarity_alone=similarity_alone)
            total += rows[..., :Z] * size[..., None]
    if column_weight is not None:
        total *= column_weight[..., None]
    if partner is None:
        return total
    # adds up in a fixed order, also on a GPU
    return total.new_zeros(N, P_j, Z).index_put_((partner.clamp(0, N - 1),), total, accumulate=True)


@pair_rows_backward.register_fake
def _(
    d_energy, d_clamped, features_i, inverse_i, c_i, features_j, inverse_j, c_j, partner, bias, column_weight, half,
    low, high, hinge,
):  # fmt: skip
    return torch.empty_like(c_j, memory_format=torch.contiguous_format)


def setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.rule = inputs[9:13]


def backward(ctx, d_energy, d_clamped, *_):
    *inputs, clamped, energy_i, clamped_i = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 15
    needs = ctx.needs_input_grad
    upstream = [(d, rows) for d, rows in ((d_energy, energy_i), (d_clamped, clamped_i)) if d is not None]
    if upstream and needs[2]:
        gradients[2] = sum(d[..., None] * rows for d, rows in upstream)
    if upstream and needs[5]:
        gradients[5] = pair_rows_backward(d_energy, d_clamped, *inputs, *ctx.rule)
    if d_energy is not None and needs[7]:
        gradients[7] = d_energy * clamped
    return tuple(gradients)


refuse_second_of(pair_rows_backward, "pair_energy")
pair_rows.register_autograd(backward, setup_context=setup_context)
