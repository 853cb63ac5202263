"""The plan of one call of the objective: block sizes, and the tensors that launches leave to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launch import block_k, block_z, config, narrow


class Outputs(NamedTuple):
    """Results of the forward pass, fp32."""

    total: Tensor  # [H]
    energy: Tensor  # [H,T]
    data: Tensor  # [H]
    distance: Tensor  # [H,T]
    mean: Tensor  # [T]


class Scratch(NamedTuple):
    """Tensors that the forward pass leaves to the backward pass. N is B if rows need a gradient, else 0; S splits."""

    norms: Tensor  # [B,P] fp32 feature norms; [0,P] where the caller gives them
    totals: Tensor  # [B] fp32 sums of the patch weights
    sums: Tensor  # [H,B,S,D,BLOCK_K] moments of the splits
    prob_sums: Tensor  # [H,B,S,BLOCK_K] fp32
    pull: Tensor  # [H,N,D,BLOCK_K] in the dtype of the features
    prob_pull: Tensor  # [H,N,T,BLOCK_K] fp32
    drift: Tensor  # [H,N,slices,BLOCK_K] fp32
    d_student: Tensor  # [H,K,Z] fp32 for an upstream gradient of 1; [0,K,Z] where the student needs no gradient


def partial_dtype(like: Tensor) -> torch.dtype:
    """Returns the dtype of sums that one launch leaves to the next.

    They are means of products of unit rows, so fp16 never overflows and is finer than bf16.
    """
    return torch.float32 if like.dtype == torch.float32 else torch.float16


class Plan:
    """Block sizes and splits of one problem, the same for the launches and for the fake operators (symbolic sizes)."""

    def __init__(self, features: Tensor, rows: Tensor, teacher: Tensor | None, pair_sets: int):
        self.B, self.P = features.shape[:2]
        # kernels are compiled for these, so a symbolic size becomes a number here
        self.D, self.H, width = int(features.shape[2]), int(rows.shape[0]), int(rows.shape[-1])
        self.Z, self.K = (1, width) if teacher is None else (width, int(teacher.shape[1]))
        self.T, self.columns, self.code_columns = pair_sets, block_k(self.K), block_z(self.Z)
        self.sums = narrow(config("image_moments", features, self.H), self.H, self.columns)
        self.sums["BLOCK_D"] = min(self.sums["BLOCK_D"], max(16, triton.next_power_of_2(self.D)))
        tiles = -(-self.D // self.sums["BLOCK_D"])
        self.slices = -(-tiles // self.sums["TILES"])
        self.sums["TILES"] = -(-tiles // self.slices)
        # whole rows in one program give their norms with the sums, once a block of heads; else a launch before does
        self.norms_alone = self.slices > 1
        programs = self.B * self.slices * (self.H // self.sums["HEADS"])
        patch_blocks = (self.P + self.sums["BLOCK_P"] - 1) // self.sums["BLOCK_P"]
        self.splits = torch.sym_max(torch.sym_min(self.sums["PROGRAMS"] // programs, patch_blocks), 1)
        self.pairs = dict(config("pair_sums", features, self.H))
        self.pairs["BLOCK_D"] = max(1, min(self.pairs["BLOCK_D"], 4096 // self.columns, triton.next_power_of_2(self.D)))
        self.pair_slices = -(-self.D // self.pairs["BLOCK_D"])

    def scratch(self, features: Tensor, norms_given: bool, rows_gradient: bool, student_gradient: bool) -> Scratch:
        B, H, C, S = self.B, self.H, self.columns, self.splits
        N = B if rows_gradient else 0

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=features.device)

        return Scratch(
            norms=empty(0 if norms_given else B, self.P),
            totals=empty(B),
            sums=empty(H, B, S, self.D, C, dtype=partial_dtype(features)),
            prob_sums=empty(H, B, S, C),
            pull=empty(H, N, self.D, C, dtype=features.dtype),
            prob_pull=empty(H, N, self.T, C),
            drift=empty(H, N, self.pair_slices, C),
            d_student=empty(H if student_gradient else 0, self.K, self.Z),
        )

    def outputs(self, features: Tensor) -> Outputs:
        shapes = ((self.H,), (self.H, self.T), (self.H,), (self.H, self.T), (self.T,))
        return Outputs(*(torch.empty(shape, dtype=torch.float32, device=features.device) for shape in shapes))
