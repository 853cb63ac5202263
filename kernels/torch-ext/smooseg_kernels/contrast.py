"""The front door of the contrastive losses: a log-sum-exp over pairs, some of which are positives."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from . import checks, contrast_blocks, contrast_dense
from .derivatives import refuse_tangents, refuse_transforms
from .dispatch import implementation
from .precision import outside_autocast
from .problem import ContrastProblem
from .rows import accumulation_dtype
from .types import ContrastiveTerms

FORMS = {"dense": contrast_dense, "torch": contrast_blocks}


@outside_autocast
def contrastive_loss(
    codes_i: Tensor,
    codes_j: Tensor,
    *,
    labels_i: Tensor | None = None,
    labels_j: Tensor | None = None,
    features_i: Tensor | None = None,
    features_j: Tensor | None = None,
    threshold: float | Tensor | None = None,
    threshold_j: Tensor | None = None,
    negative_threshold: float | Tensor | None = None,
    temperature: float | Tensor = 0.1,
    exclude_self: bool = False,
    inside: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> ContrastiveTerms:
    """Computes the contrastive loss of queries i against keys j of the same image, without the query-by-key matrix.

    With s_ij = cos(c_i, c_j) / temperature, the positives P_i and the candidates A_i of a query (positives and
    negatives), loss_i = log sum_{j in A_i} exp(s_ij) - mean_{j in P_i} s_ij, the "outside" form of Khosla et al.,
    NeurIPS 2020, arXiv 2004.11362. With `inside` the last term is log mean_{j in P_i} exp(s_ij), their other form. Both
    are InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) where a query has one positive. Queries without a positive
    have no loss, and the mean leaves them out.

    Positives come from labels or from features. Labels: those with the same label, 0 or more. A key with a negative
    label takes no part; a query with one has no positive. Features: S_ij = cos(f_i, f_j) > threshold.

    Args:
        codes_i: [B,N,Z] queries, rows of any length. Get gradients.
        codes_j: [B,M,Z] keys, like codes_i. The same tensor on both sides gets the sum of both gradients.
        labels_i: integers [B,N].
        labels_j: integers [B,M]; both or neither.
        features_i: [B,N,D] frozen features in place of labels, rows of any length. A constant.
        features_j: [B,M,D], like features_i; both or neither.
        threshold: a finite number, or a tensor [] or [B,N] for one of each query. A constant.
        threshold_j: [B,M], one of each key: S_ij above it also makes a positive. A constant.
        negative_threshold: a number, [] or [B,N]. Pairs that are not positive are negatives below it, and take no part
            from it on. Default: all that are not positive are negatives.
        temperature: above 0, a number or a tensor of shape []. A constant.
        exclude_self: leave out the pairs with i = j, which needs N = M.
        inside: see above.
        reduction: "mean" over all queries of the batch that have a positive, or "none".
        impl: "auto", "triton", "torch" or "dense". "dense" writes [B,N,M] matrices. "torch" works in blocks of bounded
            size. "triton" keeps the blocks in registers.

    Returns:
        ContrastiveTerms, fp32 (fp64 with any fp64 input). fp16 codes need loss scaling, because their gradients
        underflow. Only "dense" has gradients of gradients and runs inside torch.func.

    Raises:
        ValueError, TypeError: name the argument, what came and what was expected.
        RuntimeError: impl="triton" cannot run here.
    """
    checks.float_tensor("codes_i", codes_i, ("B", "N", "Z"))
    B, N, Z = codes_i.shape
    checks.float_tensor("codes_j", codes_j, (B, "M", Z), codes_i)
    M = codes_j.shape[1]
    by_labels, by_features = labels_i is not None, features_i is not None
    if by_labels == by_features:
        got = "both" if by_labels else "neither"
        raise ValueError(f"positives come from labels_i and labels_j or from features_i and features_j, got {got}")
    if exclude_self and N != M:
        raise ValueError(f"exclude_self needs as many keys as queries, got {M} keys and {N} queries")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    tensors = [codes_i, codes_j]
    if labels_i is not None:
        checks.truth("labels_i", labels_i, (B, N), codes_i)
        checks.truth("labels_j", cast(Tensor, labels_j), (B, M), codes_i)
        given = {"features_j": features_j, "threshold": threshold, "threshold_j": threshold_j}
        for name, value in (given | {"negative_threshold": negative_threshold}).items():
            if value is not None:
                raise ValueError(f"{name} applies to features, but positives come from labels here: leave it out")
    else:
        if labels_j is not None:
            raise ValueError("labels_j needs labels_i: pass both or neither")
        f_i, f_j = cast(Tensor, features_i), cast(Tensor, features_j)
        checks.float_tensor("features_i", f_i, (B, N, "D"), codes_i, constant=True)
        checks.float_tensor("features_j", f_j, (B, M, f_i.shape[2]), codes_i, constant=True)
        tensors += [f_i, f_j]
        if threshold is None:
            raise ValueError("threshold must say above which cosine of the features a pair is positive, got None")
    dtype, device = accumulation_dtype(*tensors), codes_i.device
    heat = checks.temperature(temperature, dtype, device)
    module = implementation(impl, (1, 1), *tensors, forms=FORMS)
    problem = ContrastProblem(
        codes_i=codes_i,
        codes_j=codes_j,
        temperature=checks.constant("temperature", heat, dtype, device),
        labels_i=labels_i,
        labels_j=labels_j,
        features_i=features_i,
        features_j=features_j,
        threshold=None if threshold is None else row_thresholds("threshold", threshold, (B, N), codes_i, dtype),
        threshold_j=checks.optional_constant("threshold_j", threshold_j, (B, M), codes_i, dtype),
        negative_threshold=None
        if negative_threshold is None
        else row_thresholds("negative_threshold", negative_threshold, (B, N), codes_i, dtype),
        exclude_self=bool(exclude_self),
        inside=bool(inside),
        mean=reduction == "mean",
    )
    if module is FORMS["torch"]:
        refuse_tangents("torch", problem)
        refuse_transforms("torch", *tensors)
    mean_loss, log_sum, positive, count = module.contrastive(problem)
    loss = reduced(log_sum, positive, count, mean=problem.mean) if mean_loss is None else mean_loss
    return ContrastiveTerms(loss, log_sum, positive, count)


def row_thresholds(
    name: str, value: float | Tensor, shape: tuple[int, int], like: Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns a threshold for each query, [B,N], from one for all or one for each."""
    if isinstance(value, Tensor) and value.dim() == 2:
        checks.float_tensor(name, value, shape, like, constant=True)
        return value.to(dtype)
    if isinstance(value, Tensor) and value.dim() != 0:
        raise ValueError(f"{name} must be a number, or a tensor of shape [] or {list(shape)}, got {list(value.shape)}")
    return checks.constant(name, value, dtype, like.device).expand(shape)


def reduced(log_sum: Tensor, positive: Tensor, count: Tensor, *, mean: bool) -> Tensor:
    """Returns the loss of each query, 0 without a positive, or its mean over the queries that have one."""
    has_positive = count > 0
    loss = torch.where(has_positive, log_sum - positive, 0.0)
    return loss.sum() / has_positive.sum().clamp(min=1) if mean else loss
