"""`python -m smooseg_fast.cache ls|rm|verify`: list, remove and check the features that runs keep on disk."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from .command import parse, printable, run
from .errors import UserError
from .features.cachefolder import CacheFolder, StoreFolder
from .features.store import DamagedShard, read_shard, require_sound
from .system.progress import Bar
from .system.sizes import readable

DAY_S = 86_400.0
SETTINGS = ("dataset", "backbone", "size", "crops", "images")
# a column and its key in meta.json; shown only where rows that look alike differ in it
DETAILS = {
    "precision": "precision",
    "resample": "resample",
    "batch": "batch_size",
    "weights": "digest",
    "files": "fingerprint",
}


@dataclass(frozen=True, kw_only=True)
class List:
    """What is in the cache, the last used first. Where rows would look alike, further columns tell what differs:
    precision, resample and batch (squares that the backbone took at once), and digests of the backbone's weights and of
    the image files."""

    cache: str | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""


@dataclass(frozen=True, kw_only=True)
class Remove:
    """Remove features at once, without asking; none that a run is using. They can be made again from their images."""

    keys: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[KEY ...]", help_behavior_hint="")
    ] = ()
    """Keys of what to remove, as `ls` shows them; their first letters are enough."""
    all: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Remove everything."""
    older: float | None = None
    """Remove what was not used for this many days."""
    cache: str | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte and compare checksums.

    A damaged file is named and removed: the next run that needs it makes it again.
    """

    keys: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[KEY ...]", help_behavior_hint="")
    ] = ()
    """Keys of what to look at [everything]."""
    cache: str | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""


Command = (
    Annotated[List, tyro.conf.subcommand("ls")]
    | Annotated[Remove, tyro.conf.subcommand("rm")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main(args: Sequence[str]) -> None:
    command = parse(Command, args, prog="python -m smooseg_fast.cache")
    home = CacheFolder(command.cache)
    {List: show, Remove: remove, Verify: verify}[type(command)](home, command)


def show(home: CacheFolder, command: List) -> None:
    stores = home.stores()
    if not stores:
        print(f"{home.path}: holds no features")
        return
    rows = [Row(store) for store in stores]
    details = telling_details(rows)
    table = [("key", *SETTINGS, *details, "GB", "last used", "state"), *(row.cells(details) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    right = {table[0].index(name) for name in ("size", "images", "GB")}
    for line in table:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        )
        print("  ".join(cells).rstrip())
    print(f"\n{readable(sum(store.nbytes for store in stores))} in {home.path}")
    print("to free some: python -m smooseg_fast.cache rm KEY, or rm --older DAYS")


class Row:
    """One store as a line of the table."""

    def __init__(self, store: StoreFolder):
        self.store, meta = store, store.meta
        texts = {name: printable(str(meta.get(name, "?"))) for name in (*SETTINGS, *DETAILS.values())}
        texts["crops"] += ", mirrored" if meta.get("mirror") else ""
        self.settings = tuple(texts[name] for name in SETTINGS)
        self.details = {name: texts[key][:8] for name, key in DETAILS.items()}

    def cells(self, details: Sequence[str]) -> tuple[str, ...]:
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.store.last_used))
        size = f"{self.store.nbytes / 1e9:.2f}"
        return (
            self.store.key[:8],
            *self.settings,
            *(self.details[name] for name in details),
            size,
            last,
            state(self.store),
        )


def state(store: StoreFolder) -> str:
    """Whether a store is complete, and in use."""
    images, total = store.images() if store.readable else 0, store.meta.get("images")
    if not store.readable:
        text = "older version"
    elif images == total:
        text = "complete"
    else:
        text = f"partial, {100 * images // total} %" if isinstance(total, int) and total > 0 else "partial"
    return text + (", in use" if store.in_use else "")


def telling_details(rows: Sequence[Row]) -> list[str]:
    """The details in which rows with equal settings differ."""
    alike: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.settings].append(row)
    return [name for name in DETAILS if any(len({row.details[name] for row in group}) > 1 for group in alike.values())]


def remove(home: CacheFolder, command: Remove) -> None:
    if sum((bool(command.keys), command.all, command.older is not None)) != 1:
        raise UserError(
            "rm: say what to remove, in one way: KEY ..., --older DAYS or --all; "
            "python -m smooseg_fast.cache ls shows the keys"
        )
    if command.older is not None and not command.older >= 0:
        raise UserError(f"--older {command.older}: must be a number of days, 0 or more")
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
    stores = stores_with(home, command.keys) if command.keys else home.stores()
    older = [store.key[:8] for store in stores if not store.readable]
    if older:
        print(
            f"written by an older version, and not read: {', '.join(older)}; "
            f"to free them: python -m smooseg_fast.cache rm {' '.join(older)}"
        )
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
                    path.unlink(missing_ok=True)  # a run that has the file open keeps its content
    print(f"read {len(paths)} files of {len(stores)} stores in {home.path}: {len(damaged) or 'none'} damaged")
    if damaged:
        raise UserError(
            f"{home.path}: {len(damaged)} damaged files removed; the next run that needs them recomputes them: "
            "repeat the command that uses these features, and check the disk if it happens again"
        )


def stores_with(home: CacheFolder, keys: Sequence[str]) -> list[StoreFolder]:
    """The stores whose keys begin with `keys`, in this order. UserError where none or several do."""
    stores, chosen = home.stores(), {}
    for key in keys:
        fitting = [store for store in stores if store.key.startswith(key.lower())]
        if len(fitting) != 1 or not key:
            several = f"stands for {len(fitting)} stores ({', '.join(store.key[:8] for store in fitting)})"
            raise UserError(
                f"{key or 'an empty key'}: {several if fitting else 'no store has this key'}; "
                f"python -m smooseg_fast.cache ls shows the keys in {home.path}"
            )
        chosen[fitting[0].key] = fitting[0]
    return list(chosen.values())


if __name__ == "__main__":
    sys.exit(run(main))
