"""`smooseg cache ls|rm|verify`: list, remove or verify the features that are kept on disk, so that the backbone runs
once."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from .command import run
from .config import FIT, Folder
from .errors import UserError
from .system.commandline import Parser, choose_command, command_line, parse
from .system.fields import Bounds, Value
from .system.progress import Bar
from .system.sizes import readable
from .system.table import aligned
from .system.terminal import one_line, printable

if TYPE_CHECKING:
    from .features.cachefolder import CacheFolder, StoreFolder

DAY_S = 86_400.0
SETTINGS = ("dataset", "backbone", "size", "crops", "images")
# shown where rows that look alike differ
DETAILS = ("scale", "margin", "mirror", "shift", "reading", "precision", "resample", "batch", "weights", "files")


@dataclass(frozen=True, kw_only=True)
class List:
    """List the contents of the cache, the last used first. Where rows would look alike, further columns show what
    differs: scale, margin, mirror, shift (pixels down and right), reading (intensity, bands and pages), precision,
    resample and batch (squares that the backbone took at once), and digests of the backbone's weights and of the image
    files."""

    cache: Folder | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""


@dataclass(frozen=True, kw_only=True)
class Remove:
    """Remove features at once, without asking, except those that a run is using. They can be recomputed from their
    images."""

    keys: Annotated[tuple[str, ...], Value("KEY", positional=True)] = ()
    """Keys of the features to remove, as `ls` shows them; their first letters are enough."""
    all: bool = False
    """Remove everything."""
    older: Annotated[float | None, Bounds(0)] = None
    """Remove features that were not used for this many days."""
    cache: Folder | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte and compare checksums. Damaged files are listed and removed; the next run that needs them
    recomputes them."""

    keys: Annotated[tuple[str, ...], Value("KEY", positional=True)] = ()
    """Keys of the features to verify [all]."""
    cache: Folder | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""


COMMANDS: dict[str, tuple[str, type[List | Remove | Verify]]] = {
    "ls": ("list what is in the cache", List),
    "rm": ("remove features", Remove),
    "verify": ("read everything and compare checksums", Verify),
}


def main(args: Sequence[str]) -> None:
    about = {name: line for name, (line, _) in COMMANDS.items()}
    chosen = choose_command(Parser(prog=command_line("cache")), args, about)
    if chosen is None:
        return
    name, words = chosen
    command = parse(COMMANDS[name][1], words, "cache", name)
    from .features.cachefolder import CacheFolder

    home = CacheFolder(command.cache)
    if isinstance(command, List):
        show(home, command)
    elif isinstance(command, Remove):
        remove(home, command)
    else:
        verify(home, command)


def show(home: CacheFolder, command: List) -> None:
    stores = home.stores()
    if not stores:
        print(f"{home.path}: holds no features")
        return
    rows = [row(store) for store in stores]

    def kinds(*names: str) -> int:
        return len({tuple(cells[name] for name in names) for cells in rows})

    details = [name for name in DETAILS if kinds(*SETTINGS, name) > kinds(*SETTINGS)]
    columns = ["key", *SETTINGS, *details, "GB", "last used", "state"]
    left = [number for number, name in enumerate(columns) if name not in ("size", "images", "GB")]
    print(aligned([columns, *([cells[name] for name in columns] for cells in rows)], left=left))
    print(f"\n{readable(sum(store.nbytes for store in stores))} in {home.path}")
    print(f"to free some: {command_line('cache', 'rm')} KEY, or rm --older DAYS")


def row(store: StoreFolder) -> dict[str, str]:
    """The cells of a store in the table, by column."""
    scale = store.meta.get("scale", [FIT])
    meta = store.meta | {"scale": " ".join(map(str, scale if isinstance(scale, list) else [scale]))}
    cells = {name: printable(str(meta.get(name, "?"))) for name in (*SETTINGS, *DETAILS)}
    cells |= {name: cells[name][:8] for name in ("weights", "files")}
    last_used = time.strftime("%Y-%m-%d %H:%M", time.localtime(store.last_used))
    size = f"{store.nbytes / 1e9:.2f}"
    return cells | {"key": store.key[:8], "GB": size, "last used": last_used, "state": state(store)}


def state(store: StoreFolder) -> str:
    """Whether a store is complete, and in use."""
    total = store.meta.get("shards")
    if not store.readable:
        text = "older version"
    elif not isinstance(total, int) or total < 1:
        text = "partial"
    else:
        percent = 100 * store.kept(total) // total
        text = "complete" if percent == 100 else f"partial, {percent} %"
    return text + (", in use" if store.in_use else "")


def remove(home: CacheFolder, command: Remove) -> None:
    if sum((bool(command.keys), command.all, command.older is not None)) != 1:
        keys = f"{command_line('cache', 'ls')} shows the keys"
        raise UserError(f"rm: say what to remove, in one way: KEY ..., --older DAYS or --all ({keys})")
    stores = stores_with(home, command.keys) if command.keys else home.stores()
    if command.older is not None:
        stores = [store for store in stores if time.time() - store.last_used > DAY_S * command.older]
    total, in_use = 0, []
    for store in stores:
        label, freed = store.label, store.remove()
        if freed is None:
            in_use.append(store.key[:8])
            continue
        total += freed
        print(f"removed {label}: {readable(freed)}")
    print(f"freed {readable(total)} in {home.path}")
    if in_use:
        raise UserError(f"{', '.join(in_use)}: in use by a run, and not removed; remove it when the run has ended")


def verify(home: CacheFolder, command: Verify) -> None:
    from .features.store import DamagedShard, read_shard, require_sound

    stores = stores_with(home, command.keys) if command.keys else home.stores()
    others = [store.key[:8] for store in stores if not store.readable]
    if others:
        free = command_line("cache", "rm", *others)
        print(f"written by an older version, and not read: {', '.join(others)}; to free them: {free}")
    paths = [(path, store) for store in stores if store.readable for path in store.shards()]
    damaged = kept = 0
    for path, store in Bar(iterable=paths, desc="verify", unit="file"):
        try:
            if shard := read_shard(path):
                require_sound(path, shard)
        except DamagedShard as damage:
            damaged += 1
            Bar.write(one_line(f"damaged: {path} ({store.label}): {damage}"))
            try:
                path.unlink(missing_ok=True)  # a run that has the file open keeps its content
            except OSError as error:  # another user's, or a disk that is read alone
                kept += 1
                Bar.write(one_line(f"cannot be removed: {path} ({error.strerror})"))
    total = len(stores) - len(others)
    print(f"read {len(paths)} files of {total} stores in {home.path}: {damaged or 'none'} damaged")
    if kept:
        raise UserError(
            f"{home.path}: {kept} of {damaged} damaged files cannot be removed; remove them as the user who owns them, "
            "or give another --cache: runs recompute what is damaged"
        )
    if damaged:
        raise UserError(
            f"{home.path}: {damaged} damaged files removed; the next run that needs them recomputes them: "
            "repeat the command that uses these features, and check the disk if it happens again"
        )


def stores_with(home: CacheFolder, keys: Sequence[str]) -> list[StoreFolder]:
    """The stores whose keys begin with `keys`, in this order. UserError where none or several do."""
    stores, chosen = home.stores(), []
    for key in keys:
        fitting = [store for store in stores if store.key.startswith(key.lower())]
        if len(fitting) != 1:
            several = f"stands for {len(fitting)} stores ({', '.join(store.key[:8] for store in fitting)})"
            raise UserError(
                f"{key}: {several if fitting else 'no store has this key'}; "
                f"{command_line('cache', 'ls')} shows the keys in {home.path}"
            )
        chosen += fitting
    return list(dict.fromkeys(chosen))


if __name__ == "__main__":
    sys.exit(run(main))
