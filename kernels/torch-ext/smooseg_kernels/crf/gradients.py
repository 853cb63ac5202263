"""The gradients of a Gaussian sum, which are Gaussian sums: every registered form has them, of any order."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# points [B,N,d], values [B,N,K] and a tolerance, a number or a tensor, to sums [B,N,K]
Sums = Callable[[Tensor, Tensor, float | None, Tensor | None], Tensor]


def register_gradients(op) -> None:
    """Gives an operator of type Sums its gradients to both inputs."""

    def setup_context(ctx, inputs, output):
        points, values, ctx.tolerance, tolerance_tensor = inputs
        ctx.save_for_backward(points, values, tolerance_tensor, output)

    def backward(ctx, d_sums: Tensor):
        points, values, tolerance_tensor, sums = ctx.saved_tensors

        def sums_of(rows: Tensor) -> Tensor:
            return op(points, rows, ctx.tolerance, tolerance_tensor)

        d_sums, d_points = d_sums.contiguous(), None
        d_values = sums_of(d_sums)  # k is symmetric
        if ctx.needs_input_grad[0]:
            d_points = toward_points(sums_of, points, (values.to(sums.dtype), sums), (d_sums, d_values))
        return d_points, d_values.to(values.dtype) if ctx.needs_input_grad[1] else None, None, None

    op.register_autograd(backward, setup_context=setup_context)


def toward_points(
    sums_of: Callable[[Tensor], Tensor], points: Tensor, forward: tuple[Tensor, Tensor], upstream: tuple[Tensor, Tensor]
) -> Tensor:
    """Returns the gradient to the points [B,N,d], from values and their sums, and d_sums and theirs, each [B,N,K].

    With g = d_sums it is sum_j k_ij (g_i . v_j + v_i . g_j) (p_j - p_i). The products with p_j are sums of 2 K d
    columns, v_j and g_j times each coordinate; these are taken from their mean, because the two terms cancel.
    """
    (v, v_sums), (g, g_sums) = forward, upstream
    place = points - points.mean(1, keepdim=True)
    v_moments, g_moments = (
        sums_of((rows[..., None] * place[:, :, None]).flatten(2)).unflatten(2, (-1, points.shape[2])) for rows in (v, g)
    )
    moments = (g[..., None] * v_moments + v[..., None] * g_moments).sum(2)
    return moments - (g * v_sums + v * g_sums).sum(2, keepdim=True) * place
