"""What is learnt: the projection from features to codes, and the prototypes with their slow teacher. Imports torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kmeans import principal_directions, spherical_kmeans


class Projection(nn.Module):
    """codes = W1 (f * m1) + b1 + W3 SiLU(W2 (f * m2) + b2) + b3; [B,P,D] -> [B,P,Z]. Lan et al. 2023, section 3.2."""

    def __init__(self, dim: int, code_dim: int = 64):
        super().__init__()
        self.linear = nn.Linear(dim, code_dim)
        self.hidden = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, code_dim)

    def forward(self, features: Tensor, linear_mask: Tensor | None = None, hidden_mask: Tensor | None = None) -> Tensor:
        """features [B,P,D]; masks [B,D] multiply an image's channels on the way into W1 and W2."""
        if linear_mask is None:
            straight = self.linear(features)
        else:  # the mask rides on the weights, which are smaller than the features
            straight = features @ (self.linear.weight * linear_mask[:, None, :]).mT + self.linear.bias
        masked = features if hidden_mask is None else features * hidden_mask[:, None, :]
        return straight + self.outer(F.silu(self.hidden(masked)))


class Head(nn.Module):
    """Projection, student prototypes [K,Z] and their exponential moving average, the teacher [K,Z]."""

    def __init__(self, dim: int, prototypes: int, code_dim: int = 64, seed: int = 0):
        """Random start as in the paper: PyTorch's default for the projection, Xavier-normal prototypes made unit, teacher = student."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = Projection(dim, code_dim)
            rows = F.normalize(nn.init.xavier_normal_(torch.empty(prototypes, code_dim)), dim=-1)
        self.student = nn.Parameter(rows)
        self.register_buffer("teacher", rows.clone())

    @torch.no_grad()
    def start_from_features(self, rows: Tensor, seed: int = 0) -> None:
        """The steadier start: W1 = the leading singular vectors of feature rows [N,D], W3 = 0, prototypes = k-means of those codes.

        Seeds then end closer to each other than from random starts. N is at least K; k-means is spherical, the best of 4.
        """
        directions = principal_directions(rows, self.student.shape[1])
        self.projection.linear.weight.copy_(directions)
        self.projection.linear.bias.zero_()
        self.projection.outer.weight.zero_()
        self.projection.outer.bias.zero_()
        centres = spherical_kmeans(rows.float() @ directions.T.to(rows.device), len(self.student), starts=4, seed=seed).centres
        self.student.copy_(centres)
        self.teacher.copy_(centres)

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """teacher <- decay * teacher + (1 - decay) * student."""
        self.teacher.lerp_(self.student, 1.0 - decay)
