"""Unsupervised semantic segmentation with SmooSeg: `fit(images)` learns without labels, `Segmenter` predicts.

Both are imported when first used, so that importing a part of the package costs that part alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Segmenter", "UserError", "fit"]

if TYPE_CHECKING:
    from .errors import UserError
    from .learn.trainer import fit
    from .segment.segmenter import Segmenter

_HOMES = {"Segmenter": "segment.segmenter", "UserError": "errors", "fit": "learn.trainer"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
