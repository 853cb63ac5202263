"""The colours of groups: 256 of them, far apart, the first twenty also to colour-blind eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# The first twenty are hand-picked, then moved apart: the closest two differ by 0.11 in OKLab (Ottosson 2020), and by
# 0.06 to colour-blind eyes. The others have hues a golden angle apart in OKLab, alternate in lightness and chroma, and
# keep their distance from all earlier ones.
_COLOURS = """
0c73b4 e6a00c 27a663 c77abe 53aef2 e5480c f8e62d 7f838b 6c3c9d 8d470d a4db86 0c4f3d a7ddec f89493 820c1a 3fc2b1
313c7c cdb2db 778121 f8cfb8 ba4764 c87a6d 621166 553506 4d610b 803e61 915f96 198770 4ecb6f 8d86d8 7d5acc a89044
a6b76d e25d8a 35a2b6 a16600 1251b5 066374 31e6bf a8a2f7 edc066 f084c2 80a11f a2182a 56dafe fda7e1 6b183b a75c53
f98d53 e1c812 374300 054457 2799e9 afc7fc cd95df fbafba ab72e4 016c09 5b71af ca7e1e 71dcd7 156843 832a8c 4949a9
2ac2dd dba069 70530a 5c4b8a 1b8391 9455b1 0f5b97 492970 23aa8a df6767 4b871a fdb57f b4b52d ca7299 8b2d72 c0d458
003883 83c178 8e3648 a55583 82aefa dfb4f6 8a7223 6f1a07 628eed 0fbdfb 349dd0 7068b7 2a2d89 e593a3 ac5b30 418557
3473ca 154a04 909b3b d3a64c 92cffc 004a28 6f4187 0580a6 b78b01 10a7a2 0c6758 074068 923700 483c03 0f6a2d fbb3a5
612c04 c16ec2 625a00 89dea0 750919 0dcd86 8b54c3 004843 26c9a8 52a580 e65d76 c3c0fa a8d797 bc484f 628109 013094
7cb3eb 67a724 364ab5 c5af12 bd79a3 6a0857 3794f6 a21c0d 376617 105e8a 006566 3ce3d0 f37ece 55c2bd b69bf9 7f490e
f782b0 1e857d c39cdd f49243 d1cf2a 1679c0 9d81d1 c57e5e 41ab5d 05c0ec 41306b b86ed9 7ed4fc c87f3f f08f84 632240
96bc79 419fc0 843d53 c38408 fea9d2 e0c666 9a5c89 df6a59 348930 8b2680 5744a5 feb76e a6ba3b d792d5 9b9648 902a67
b0d865 c23d61 e9c17a 9d51a6 4cb9f9 05464c 29579a 51256a 2ca896 6e172d 8d89cd 66006b a65e47 06617f 352988 25cb93
2a4702 9b2a10 cd718d d4a463 466fcc 6a2300 003e73 07829c 728aed 8c3e03 696dae bc96ff 73c384 6fdbe3 926e12 459ad5
8f363c 7a64b3 0e77c9 aa5478 90aafa e7b2ee 9351bd a95f23 68570a 064b1b 727c15 654884 e75e6a 046a3c 859e45 ffb299
cbaa4b c76cb9 bc4944 0b4932 1a2c94 753e80 007eb1 57a937 4247b4 7edfaa ae8f01 05a6ab 750c09 817626 004262 e69498
6d0450 4c90f8 338661 00c9b3 864311 cabcfd f87dc3 5b3105 5a5d07 fcaccb 85b0ed fa82a7 c0789b f09638 8e2379 c5d338
"""


def palette(k: int) -> np.ndarray:
    """Return the first k of 256 distinct colours, uint8 [k, 3].

    The first twenty suit colour-blind eyes. No two of the first 64 are closer than 0.05 in OKLab, twice a visible step.
    """
    return np.frombuffer(bytes.fromhex(_COLOURS), np.uint8).reshape(-1, 3)[:k]


def table_of(colours: Mapping[int, Sequence[int]]) -> np.ndarray:
    """A table uint8 [256, 3] with these colours, RGB, and those of `palette` for the other labels."""
    table = palette(256).copy()
    for label, colour in colours.items():
        table[label] = colour
    return table


# OKLab (Ottosson 2020): cones from linear RGB, then lightness and two axes of hue from their cube roots
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_AXES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def to_oklab(colours: np.ndarray) -> np.ndarray:
    """sRGB uint8 [..., 3] -> OKLab [..., 3]: lightness 0 to 1, and two axes of hue."""
    encoded = colours / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _CONES.T) @ _AXES.T


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """OKLab [..., 3] -> sRGB uint8 [..., 3]; colours that a screen lacks lose saturation, not lightness."""
    lab = np.concatenate([lab[..., :1].clip(0, 1), lab[..., 1:]], -1)
    low, high = np.zeros(lab.shape[:-1]), np.ones(lab.shape[:-1])
    for _ in range(12):  # the largest share of the saturation that a screen has, halving the interval
        middle = (low + high) / 2
        linear = _linear(lab, middle)
        legal = ((linear > -1e-4) & (linear < 1 + 1e-4)).all(-1)
        low, high = np.where(legal, middle, low), np.where(legal, high, middle)
    linear = _linear(lab, low).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)


def _linear(lab: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """Linear RGB of OKLab with a share [...] of its saturation."""
    part = np.concatenate([lab[..., :1], lab[..., 1:] * saturation[..., None]], -1)
    return (part @ np.linalg.inv(_AXES).T) ** 3 @ np.linalg.inv(_CONES).T
