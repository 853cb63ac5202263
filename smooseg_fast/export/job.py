"""The job of an export: images and groups of a folder of predictions, and how to write them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import UserError
from ..segment.names import Group
from ..system.stores import File
from .folder import PredictionFolder, Segmented


@dataclass(frozen=True)
class Extras:
    """Things that come with the file of a format: texts of further `files` by the ends of their names, `notes`, and
    how many images were `left_out`."""

    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_out: int = 0


@dataclass(frozen=True)
class Job:
    """An export of a folder.

    Attributes:
        instances: whether every connected region is a thing of its own.
        min_area: pixels below which a region is left out.
        simplify: tolerance of outlines in pixels; 0 keeps every corner.
    """

    folder: PredictionFolder
    instances: bool = False
    min_area: int = 1
    simplify: float = 0.0

    @property
    def images(self) -> Iterator[Segmented]:
        """The images, once."""
        return iter(self.folder)

    @property
    def root(self) -> File:
        """The folder of images."""
        return self.folder.root

    @cached_property
    def groups(self) -> dict[int, Group]:
        """The groups by their numbers in masks, ascending."""
        return {group.number: group for group in self.folder.groups}

    def require_regions(self, count: int) -> None:
        """UserError where no region is left to write."""
        if not count:
            raise UserError(f"--min-area {self.min_area}: leaves no region; give a smaller one")
