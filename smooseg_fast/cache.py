"""`smooseg cache ls|rm|verify`: list, remove or verify the features that are kept on disk, so that the backbone runs
once."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from .command import printable, run
from .config import Folder
from .errors import UserError
from .system.commandline import choose_command, command_line, parse
from .system.fields import Bounds, Value
from .system.progress import Bar
from .system.sizes import readable
from .system.table import aligned

if TYPE_CHECKING:
    from .features.cachefolder import CacheFolder, StoreFolder

DAY_S = 86_400.0
SETTINGS = ("dataset", "backbone", "size", "crops", "images")
# columns that are shown only where rows would be equal without, and the settings in them
DETAILS = {
    "precision": "precision",
    "resample": "resample",
    "batch": "batch_size",
    "weights": "digest",
    "files": "fingerprint",
}


@dataclass(frozen=True, kw_only=True)
class List:
    """List the contents of the cache, the last used first. Where rows would look alike, further columns show what
    differs: precision, resample and batch (squares that the backbone took at once), and digests of the backbone's
    weights and of the image files."""

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
    """Read every byte and compare checksums. A damaged file is named and removed: the next run that needs it recomputes
    it."""

    keys: Annotated[tuple[str, ...], Value("KEY", positional=True)] = ()
    """Keys of the features to verify [all]."""
    cache: Folder | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""


COMMANDS = {
    "ls": ("list what is in the cache", List),
    "rm": ("remove features", Remove),
    "verify": ("read everything and compare checksums", Verify),
}


def main(args: Sequence[str]) -> None:
    chosen = choose_command(args, {name: line for name, (line, _) in COMMANDS.items()}, command_line("cache"))
    if chosen is None:
        return
    name, words = chosen
    command = parse(COMMANDS[name][1], words, "cache", name)
    from .features.cachefolder import CacheFolder

    {List: show, Remove: remove, Verify: verify}[type(command)](CacheFolder(command.cache), command)


def show(home: CacheFolder, command: List) -> None:
    stores = home.stores()
    if not stores:
        print(f"{home.path}: no features in it")
        return
    rows = [Row(store) for store in stores]
    shown = telling(rows)
    table = [("key", *SETTINGS, *shown, "GB", "last used", "state"), *(row.cells(shown) for row in rows)]
    right = {table[0].index(name) for name in ("size", "images", "GB")}
    print(aligned(table, left=[column for column in range(len(table[0])) if column not in right]))
    print(f"\n{readable(sum(store.nbytes for store in stores))} in {home.path}")
    print(f"to free some: {command_line('cache', 'rm')} KEY, or rm --older DAYS")


class Row:
    """A line of the table."""

    def __init__(self, store: StoreFolder):
        self.store, meta = store, store.meta
        known = {name: printable(str(meta.get(name, "?"))) for name in (*SETTINGS, *DETAILS.values())}
        known["crops"] += ", mirrored" if meta.get("mirror") else ""
        self.settings = tuple(known[name] for name in SETTINGS)
        self.details = {name: known[setting][:8] for name, setting in DETAILS.items()}

    def cells(self, shown: Sequence[str]) -> tuple[str, ...]:
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.store.last_used))
        size = f"{self.store.nbytes / 1e9:.2f}"
        return (
            self.store.key[:8],
            *self.settings,
            *(self.details[name] for name in shown),
            size,
            last,
            state(self.store),
        )


def state(store: StoreFolder) -> str:
    there, whole = store.images() if store.readable else 0, store.meta.get("images")
    if not store.readable:
        words = "of another version"
    elif there == whole:
        words = "complete"
    else:
        words = f"partial, {100 * there // whole} %" if isinstance(whole, int) and whole > 0 else "partial"
    return words + (", in use" if store.in_use else "")


def telling(rows: Sequence[Row]) -> list[str]:
    """The details in which rows of equal settings differ."""
    alike: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.settings].append(row)
    return [name for name in DETAILS if any(len({row.details[name] for row in group}) > 1 for group in alike.values())]


def remove(home: CacheFolder, command: Remove) -> None:
    if sum((bool(command.keys), command.all, command.older is not None)) != 1:
        keys = f"{command_line('cache', 'ls')} shows the keys"
        raise UserError(f"rm: say what to remove, in one way: KEY ..., --older DAYS or --all ({keys})")
    stores = named(home, command.keys) if command.keys else home.stores()
    if command.older is not None:
        stores = [store for store in stores if time.time() - store.last_used > DAY_S * command.older]
    total, used = 0, []
    for store in stores:
        label, freed = store.label, store.remove()
        if freed is None:
            used.append(store.key[:8])
            continue
        total += freed
        print(f"removed {label}: {readable(freed)}")
    print(f"freed {readable(total)} in {home.path}")
    if used:
        raise UserError(f"{', '.join(used)}: in use by a run, and left as it is; remove it when the run has ended")


def verify(home: CacheFolder, command: Verify) -> None:
    from .features.store import DamagedShard, read_shard, require_sound

    stores = named(home, command.keys) if command.keys else home.stores()
    others = [store.key[:8] for store in stores if not store.readable]
    if others:
        free = command_line("cache", "rm", *others)
        print(f"of another version, and left out: {', '.join(others)}; to free them: {free}")
    stores = [store for store in stores if store.readable]
    paths = [path for store in stores for path in store.shards()]
    damaged = []
    with Bar(total=sum(path.stat().st_size for path in paths), desc="verify", unit="B", unit_scale=True) as bar:
        for store in stores:
            for path in store.shards():
                try:
                    shard = read_shard(path)
                    if shard is not None:
                        require_sound(path, shard)
                        bar.update(path.stat().st_size)
                except DamagedShard as damage:
                    damaged.append(path)
                    bar.write(f"damaged: {path} ({store.label}): {damage}")
                    path.unlink(missing_ok=True)  # a run that has it open keeps what it has
    print(f"read {len(paths)} files of {len(stores)} stores in {home.path}: {len(damaged) or 'none'} damaged")
    if damaged:
        raise UserError(
            f"{home.path}: {len(damaged)} damaged files are removed; the next run that needs them makes them again: "
            "repeat the command that uses these features, and look at the disk if it happens again"
        )


def named(home: CacheFolder, keys: Sequence[str]) -> list[StoreFolder]:
    """One for each of `keys`, in their order."""
    stores, found = home.stores(), {}
    for key in keys:
        fits = [store for store in stores if store.key.startswith(key.lower())]
        if len(fits) != 1:
            which = (
                f"stands for {len(fits)} stores ({', '.join(store.key[:8] for store in fits)})"
                if fits
                else "no store has this key"
            )
            raise UserError(f"{key}: {which}; {command_line('cache', 'ls')} shows the keys in {home.path}")
        found[fits[0].key] = fits[0]
    return list(found.values())


if __name__ == "__main__":
    sys.exit(run(main))
