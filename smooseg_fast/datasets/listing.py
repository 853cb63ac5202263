"""The files of a data set that lies in a store or in tar files, listed once, as a folder to walk in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from copy import copy
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..system.ahead import ahead
from ..system.outfolder import MARKER, written_by_us
from ..system.patience import LOGINS, reason, remedy
from ..system.progress import announced
from ..system.stores import Remote, entries, looked_up, place
from . import formats
from .shards import archives_of, members

MOST = 20_000_000  # files that a listing takes in
DEPTH = 32  # folders below each other: pages of web servers may link to each other without end
THREADS = 32  # that ask a web server for sizes


class Tree:
    """A folder of listed files, to walk in. Asks no store.

    Args:
        root: the folder or pattern that was listed, for messages.
        files: by their paths relative to `root`, sorted.
    """

    def __init__(self, root: str, files: dict[str, Remote]):
        self.root, self.files, self.below = root, files, PurePosixPath()
        self._folders: dict[PurePosixPath, dict[str, None]] = {PurePosixPath(): {}}  # the names of those inside each
        for name in files:
            above, new = PurePosixPath(name).parent, []
            while above not in self._folders:
                self._folders[above] = {}
                new.append(above)
                above = above.parent
            for folder in new:
                self._folders[folder.parent][folder.name] = None

    def __str__(self) -> str:
        return f"{self.root.rstrip('/')}/{self.below}" if self.below.parts else self.root

    def __truediv__(self, name: str | PurePosixPath) -> Tree:
        """The folder of this name in it, whether or not there is one."""
        tree = copy(self)
        tree.below = self.below / name
        return tree

    @property
    def name(self) -> str:
        return self.below.name or place(self.root).name

    def resolve(self) -> Tree:
        return self

    def is_dir(self) -> bool:
        return self.below in self._folders

    def folders(self) -> list[str]:
        """The names of the folders in it."""
        return list(self._folders.get(self.below, ()))

    def file(self, name: str | PurePosixPath) -> Remote | None:
        """A file in it."""
        return self.files.get((self.below / name).as_posix())


def listed(path: Path | Remote, argument: str) -> Tree | None:
    """The files at or below a URL, or in the tar files that `path` names; None for a local folder or image.

    UserError, naming the URL, where there is nothing or the store does not list it.
    """
    archives = archives_of(path)
    if archives:
        with announced(f"listing    the files in {path}"):
            return Tree(str(path), members(archives, argument))
    if isinstance(path, Path):
        if path.suffix.lower() != ".zip" or not path.is_file():
            return None
        path = Remote(f"zip://::{path}")
    elif path.suffix.lower() == ".zip" and not path.archive and path.is_file():
        path = Remote(f"zip://::{path}")
    try:
        if path.suffix.lower() in formats.photo_suffixes():
            return Tree(str(path.parent), {path.name: looked_up(path)})
        files = sorted(_below(path), key=lambda pair: pair[0])
        if path.protocol in ("http", "https"):  # their pages list no sizes, which tell images that changed
            with closing(ahead(looked_up, (file for _, file in files), threads=THREADS, waiting=2 * THREADS)) as known:
                files = list(zip((name for name, _ in files), known))
    except FileNotFoundError as error:
        private = f", or for a private one {LOGINS['hf']}" if path.protocol == "hf" else ""  # which hides them
        raise UserError(f"{argument} {path}: no such file or folder; check the address{private}") from error
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{argument} {path}: cannot be listed ({reason(error)}); {remedy(path, error)}") from error
    if not files and path.protocol in ("http", "https"):
        what = "an address whose page links to the images, or that of one image, a .zip or .tar files"
        raise UserError(f"{argument} {path}: the server's page there lists no files; give {what}")
    return Tree(str(path), dict(files))


def _below(root: Remote) -> Iterator[tuple[str, Remote]]:
    """(relative path, file) of the visible files below `root` that smooseg did not write, a folder after the other."""
    pending, count = [("", root)], 0
    while pending:
        above, folder = pending.pop()
        children = list(entries(folder))
        ours = written_by_us(folder) if any(child.name == MARKER for child, _ in children) else set()
        for child, is_folder in children:
            if child.name.startswith(".") or child.name in ours:
                continue
            name = f"{above}{child.name}"
            if not is_folder:
                count += 1
                yield name, child
            elif name.count("/") < DEPTH:
                pending.append((f"{name}/", child))
        if count > MOST:
            raise UserError(f"{root}: holds more than {MOST:,} files; give a folder in it")
