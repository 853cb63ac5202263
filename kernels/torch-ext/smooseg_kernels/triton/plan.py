"""The plan of one call of the objective: block sizes, and the tensors that launches leave to each other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .launch import block_k, block_z, config, operand_dtype, size_of


class Outputs(NamedTuple):
    """Results of the forward pass, fp32."""

    total: Tensor  # [H]
    energy: Tensor  # [H,T]
    data: Tensor  # [H]
    distance: Tensor  # [H,T]
    mean: Tensor  # [T]


class Scratch(NamedTuple):
    """Tensors that the forward pass leaves to the backward pass. N is B if rows need a gradient, else 0."""

    norms: Tensor  # [B,P] fp32 feature norms; [0,P] where the caller gives them
    totals: Tensor  # [B] fp32 sums of the patch weights
    # these two are flat: a compiler would make a condition on P of an axis that may be 1 or more
    sums: Tensor  # [S * B * D * H * BLOCK_K] moments of the splits, see Plan.sum_strides
    label_sums: Tensor  # [H * B * PARTS * BLOCK_K] fp32
    prepared: (
        Tensor  # [H,2,2*BLOCK_K,BLOCK_Z] unit rows, teacher and student, in two parts; [0,...] unless Plan.prepared
    )
    pull: Tensor  # [H,N,D,BLOCK_K] in the dtype of the features
    constant: Tensor  # [H,N,BLOCK_K] fp32
    d_student: Tensor  # [H,K,Z] fp32 for an upstream gradient of 1; [0,K,Z] where the student needs no gradient


def partial_dtype(like: Tensor) -> torch.dtype:
    """Returns the dtype of sums that one launch leaves to the next.

    They are means of products of unit rows, so fp16 never overflows and is finer than bf16.
    """
    return torch.float32 if like.dtype == torch.float32 else torch.float16


def parts(wanted: int, most: int) -> int:
    """Bounds a number of parts, which may be symbolic, to 1 .. most."""
    return torch.sym_max(torch.sym_min(wanted, most), 1)


class Plan:
    """Block sizes and splits of one problem, the same for the launches and for the fake operators (symbolic sizes)."""

    def __init__(self, features: Tensor, rows: Tensor, teacher: Tensor | None, pair_sets: int):
        self.B, self.P = features.shape[:2]
        # kernels are compiled for these, so a symbolic size becomes a number here
        self.D, self.H, width = int(features.shape[2]), int(rows.shape[0]), int(rows.shape[-1])
        self.Z, self.K = (1, width) if teacher is None else (width, int(teacher.shape[1]))
        self.T, self.columns, self.code_columns = pair_sets, block_k(self.K), block_z(self.Z)
        self.size = size_of(self.columns, self.code_columns)
        # several heads: norms and unit prototypes have a launch of their own, as have large prototypes of one head;
        # else the programs of label rows make them
        self.prepared = teacher is not None and (self.H > 1 or self.size != "")
        self.labels = config("label_rows", rows, self.H, self.size)
        # a launch of its own for the data term, where registers do not hold both; empty where they do
        self.student = config("student_rows", rows, self.H, self.size) if teacher is not None else {}
        patch_blocks = -(-self.P // self.labels["BLOCK_P"])
        self.parts = parts(self.labels["PROGRAMS"] // (self.B * self.H), patch_blocks)
        self.sums = config("row_products", features, self.H)
        for settings in (self.labels, self.sums):
            settings["BLOCK_D"] = min(settings["BLOCK_D"], max(16, triton.next_power_of_2(self.D)))
        self.sums["BLOCK_N"] = min(self.sums["BLOCK_N"], triton.next_power_of_2(self.H * self.columns))
        self.blocks = -(-self.H * self.columns // self.sums["BLOCK_N"]), -(-self.D // self.sums["BLOCK_D"])
        patch_blocks = -(-self.P // self.sums["BLOCK_P"])
        programs = self.B * math.prod(self.blocks)
        self.splits = parts(self.sums["PROGRAMS"] // programs, patch_blocks)
        self.per_split = -(-patch_blocks // self.splits) * self.sums["BLOCK_P"]
        self.pairs = config("pair_sums", features, self.H, self.size)
        self.pairs["BLOCK_D"] = max(1, min(self.pairs["BLOCK_D"], 4096 // self.columns, triton.next_power_of_2(self.D)))
        self.pair_slices = -(-self.D // self.pairs["BLOCK_D"])

    def sum_strides(self) -> dict[str, int]:
        """Returns the strides of the moments along heads, images, splits and D; the columns of a head are adjacent."""
        channel = self.H * self.columns
        image = self.D * channel
        return {"stride_h": self.columns, "stride_b": image, "stride_s": self.B * image, "stride_d": channel}

    def scratch(
        self, features: Tensor, rows: Tensor, norms_given: bool, rows_gradient: bool, student_gradient: bool
    ) -> Scratch:
        B, H, D, C = self.B, self.H, self.D, self.columns
        N = B if rows_gradient else 0

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=features.device)

        return Scratch(
            norms=empty(0 if norms_given else B, self.P),
            totals=empty(B),
            sums=empty(self.splits * B * D * H * C, dtype=partial_dtype(features)),
            label_sums=empty(H * B * self.parts * C),
            prepared=empty(H if self.prepared else 0, 2, 2 * C, self.code_columns, dtype=operand_dtype(rows.dtype)),
            pull=empty(H, N, D, C, dtype=features.dtype),
            constant=empty(H, N, C),
            d_student=empty(H if student_gradient else 0, self.K, self.Z),
        )

    def outputs(self, features: Tensor) -> Outputs:
        shapes = ((self.H,), (self.H, self.T), (self.H,), (self.H, self.T), (self.T,))
        return Outputs(*(torch.empty(shape, dtype=torch.float32, device=features.device) for shape in shapes))
