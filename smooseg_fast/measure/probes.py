"""Probes: how much about the classes a linear map, or the nearest neighbours, can read out of features or codes.

The field reports both beside the scores of groups learnt without labels, because they tell poor features from poor
groups. A probe is fitted on the labels of training images and applied to held-out ones: it gives every patch a score
for each class, which is upsampled as codes are, and the best score labels a pixel. No group is matched to a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smooseg_kernels.rows import unit_rows

from ..datasets import classes_of
from .confusion import LabelSquares
from .scores import Scores, matched

Kind = Literal["linear", "neighbours"]
View = Callable[[LabelSquares], Callable[[Tensor], Tensor]]
"""From squares to their rows: int64 [n] numbers of rows -> features or codes [n,P,D]."""

LINEAR_PATCHES, BANK_PATCHES = 40_000, 10_000  # of the training images, that a probe is fitted on
DECAY = 1e-4  # half of it times the squared weights is added to the mean cross-entropy
ITERATIONS = 200
NEIGHBOURS, TEMPERATURE = 20, 0.07  # Wu et al., CVPR 2018: a neighbour's vote counts exp(cosine / TEMPERATURE)
QUERIES = 2048  # patches that look for neighbours at a time


class Patches(NamedTuple):
    """Labelled patches: rows [N,D] and the share of each one's pixels in every class, [N,C], at most 1 in all."""

    rows: Tensor
    shares: Tensor


class Linear(NamedTuple):
    """Scores rows * weight + bias, weight [D,C] and bias [C]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows [...,D] -> logits [...,C]."""
        return rows.float() @ self.weight + self.bias


class Neighbours(NamedTuple):
    """Votes of the nearest of N labelled unit rows [N,D], whose pixels have the classes shares [N,C]."""

    bank: Tensor
    shares: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows [...,D] -> the mean vote of the neighbours, [...,C], 0 to 1."""
        flat = unit_rows(rows.float()).flatten(0, -2)
        votes = torch.cat([self._votes(part) for part in flat.split(QUERIES)])
        return votes.unflatten(0, rows.shape[:-1])

    def _votes(self, unit: Tensor) -> Tensor:
        nearest, which = (unit @ self.bank.mT).topk(min(NEIGHBOURS, len(self.bank)), dim=1)
        weights = torch.softmax(nearest / TEMPERATURE, dim=1)
        return (weights[..., None] * self.shares[which]).sum(1)


def probe(train: LabelSquares, val: LabelSquares, views: Mapping[str, View]) -> dict[str, dict[Kind, Scores]]:
    """Fit both probes for every view on the labels of `train`, and score them on all labelled pixels of `val`.

    Class numbers mean the same in both. Several processes share the reading and the counting, and all get the scores.
    """
    classes = len(classes_of(val.dataset))
    scores: dict[str, dict[Kind, Scores]] = {}
    for name, view in views.items():
        probes: dict[Kind, Linear | Neighbours] = {
            "linear": fit_linear(sample(train, view(train), classes, LINEAR_PATCHES)),
            "neighbours": fit_neighbours(sample(train, view(train), classes, BANK_PATCHES)),
        }
        scores[name] = {kind: score(val, fitted, view(val)) for kind, fitted in probes.items()}
    return scores


def score(val: LabelSquares, fitted: Linear | Neighbours, rows: Callable[[Tensor], Tensor]) -> Scores:
    """Score all labelled pixels; the class of a pixel is the best of the upsampled scores."""
    classes, device = len(classes_of(val.dataset)), rows(torch.tensor([0])).device
    fitted = type(fitted)(*(part.to(device) for part in fitted))
    counts = val.confusion(lambda numbers: fitted(rows(numbers)), torch.eye(classes, device=device))
    return matched(counts, np.arange(classes), "probe")


def sample(labels: LabelSquares, rows: Callable[[Tensor], Tensor], classes: int, patches: int) -> Patches:
    """Random labelled patches, equally many of every square, at most about `patches`; the same in every run."""
    store, per_square = labels.store, max(1, patches // len(labels.store))
    drawn = []
    for numbers, shares in labels.class_shares(classes):
        g = torch.Generator().manual_seed(int(numbers[0]))
        order = torch.rand(len(numbers), store.P, generator=g).masked_fill(shares.sum(-1) == 0, 2.0)
        order, places = (part[:, :per_square] for part in order.sort(1))
        square, place = (order < 2).nonzero(as_tuple=True)
        patch = places[square, place]
        drawn.append((rows(numbers).float().cpu()[square, patch], shares[square, patch]))
    parts = [part for of_process in labels.processes.all(drawn) for part in of_process]
    return Patches(*(torch.cat(list(column)) for column in zip(*parts)))


def fit_linear(patches: Patches) -> Linear:
    """Multinomial logistic regression by L-BFGS; a patch counts as much as it has labelled pixels.

    Minimises the mean cross-entropy plus DECAY / 2 times the squared weights of standardised channels, which is convex:
    the minimum does not depend on where the steps begin.
    """
    rows, shares = patches
    mean, scale = rows.mean(0), 1.0 / rows.std(0, unbiased=False).clamp(min=1e-6)
    standard, total = (rows - mean) * scale, shares.sum()
    weight, bias = torch.zeros(rows.shape[1], shares.shape[1]), torch.zeros(shares.shape[1])
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = -(shares * F.log_softmax(standard @ weight + bias, 1)).sum() / total
        value = entropy + DECAY / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    weight, bias = weight.detach(), bias.detach()
    return Linear(weight * scale[:, None], bias - (mean * scale) @ weight)


def fit_neighbours(patches: Patches) -> Neighbours:
    """A bank of unit rows; cosines tell the nearest."""
    return Neighbours(unit_rows(patches.rows), patches.shares)
