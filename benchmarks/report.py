"""Writes what results files say into the marked blocks of README.md and docs/performance.md, and the pictures beside them. Nothing else.

    python benchmarks/report.py benchmarks/results/cpu.jsonl benchmarks/results/gpu.jsonl
    python benchmarks/report.py benchmarks/results/*.jsonl --check     # writes nothing; exit 1 and the names of what would change

A block stands between `<!-- report: NAME -->` and `<!-- end report -->`. A picture is up to date when it was drawn from the same data:
another matplotlib draws them in other bytes. Exit status: 0, 1 with --check where something would change, 2 for a file that cannot be
read or a block without a name that is known (one line says which).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import cells  # noqa: E402
import charts  # noqa: E402
import goals  # noqa: E402
import results  # noqa: E402
import tables  # noqa: E402

from smooseg_fast.errors import UserError  # noqa: E402
from smooseg_fast.system.files import write_atomic  # noqa: E402

PAGES = ("README.md", "docs/performance.md")
PICTURES = "docs/pictures"
BLOCK = re.compile(r"(<!-- report: (?P<name>[^>]*?) -->\n).*?(<!-- end report -->)", re.DOTALL)
BLOCKS = {
    "measured": goals.measured,
    "goals": goals.goals,
    **{
        name: getattr(tables, name)
        for name in ("objective", "memory", "assign", "rest", "ceilings", "floors", "kernels", "scaling")
    },
    **{name: getattr(tables, name) for name in ("head_step", "extract", "pairs", "skipped", "repeats", "spread")},
}


def blocks(found: tables.Cells, drawn: dict[str, charts.Chart], folder: str) -> dict[str, str]:
    """Every block's text; `folder` is where a page finds the pictures."""
    texts = {name: function(found) for name, function in BLOCKS.items()}
    for name in ("objective", "scaling"):
        pictures = [charts.embed(stem, chart, folder) for stem, chart in drawn.items() if stem.startswith(name)]
        texts[f"{name} picture"] = "\n\n".join(pictures)
    return texts


def rewritten(page: str, texts: dict[str, str]) -> tuple[str, list[str]]:
    """The page with its blocks filled, and the names of those that changed. ValueError for an unknown or unfinished block."""
    changed = []

    def fill(match: re.Match) -> str:
        name = match["name"]
        if name not in texts or "<!-- report:" in match[0][len(match[1]) :]:
            raise ValueError(f"block {name!r}: no such block, or no end; there are: {', '.join(sorted(texts))}")
        new = f"{match[1]}{texts[name]}\n{match[3]}"
        if new != match[0]:
            changed.append(name)
        return new

    filled = BLOCK.sub(fill, page)
    if page.count("<!-- report:") != len(BLOCK.findall(page)):
        raise ValueError("a block begins and does not end; write <!-- end report --> on a line of its own")
    return filled, changed


def pages(root: Path, found: tables.Cells, drawn: dict[str, charts.Chart]) -> tuple[dict[Path, str], list[str]]:
    """New texts of the pages that would change, and what of them would."""
    texts, names = {}, []
    for page in PAGES:
        path = root / page
        try:
            folder = PICTURES + "/" if page == "README.md" else PICTURES.removeprefix("docs/") + "/"
            filled, changed = rewritten(path.read_text(encoding="utf-8"), blocks(found, drawn, folder))
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
        if changed:
            texts[path] = filled
            names += [f"{page}: {name}" for name in changed]
    return texts, names


def pictures(
    root: Path, drawn: dict[str, charts.Chart]
) -> tuple[dict[Path, tuple[charts.Chart, str]], list[Path], list[str]]:
    """What to draw, what to remove, and the names of both."""
    wanted = {
        root / PICTURES / f"{stem}-{theme}.svg": (chart, theme)
        for stem, chart in drawn.items()
        for theme in charts.THEMES
    }
    stale = {
        path: what
        for path, what in wanted.items()
        if not path.exists() or charts.digest_of(path.read_text(encoding="utf-8")) != what[0].digest
    }
    unwanted = sorted(set((root / PICTURES).glob("*.svg")) - set(wanted))
    return stale, unwanted, [f"{path.relative_to(root)}" for path in [*stale, *unwanted]]


def run(files: list[Path], root: Path, check: bool) -> int:
    found = cells.collect(results.read(files))
    drawn = charts.charts(found)
    texts, names = pages(root, found, drawn)
    stale, unwanted, more = pictures(root, drawn)
    names += more
    if not check:
        write(texts, stale, unwanted)
    print(
        "\n".join(f"{'would change' if check else 'wrote'} {name}" for name in names)
        or "everything says what the files say"
    )
    return int(check and bool(names))


def write(texts: dict[Path, str], stale: dict[Path, tuple[charts.Chart, str]], unwanted: list[Path]) -> None:
    for path, text in texts.items():
        write_atomic(path, text)
    for path, (chart, theme) in stale.items():
        write_atomic(path, chart.svg(theme))
    for path in unwanted:
        path.unlink()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to write to (this one)")
    args = parser.parse_args(arguments)
    try:
        return run(args.files, args.root, args.check)
    except (OSError, ValueError, UserError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
