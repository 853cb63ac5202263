"""Sorts the files of a folder into photos, label masks with the photos they belong to, and others.

Masks are recognised by the name of a folder (masks/, annotations/, train_masks/, SegmentationClass/) or by the end of a
file's name (x_mask.png next to x.png). What is so named counts as labels where it pairs with photos and holds few
values; where it pairs and holds many (drawings on photos, JPEG), it is left out. Nothing is left out without a line.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..system.outfolder import written_by_us
from ..system.stores import File, place
from . import formats
from .evenly import evenly
from .images import ImageError, visible_files
from .listing import Tree, listed
from .masks import tally

LOOKED_AT = 8  # masks of a kind that are opened to see whether they hold classes
LISTED = 8  # kinds of other files that a line lists
PAIRED = 0.5  # share of the files named like masks that belong to photos, from which on they are no photos

# thumbnails and bins of storage devices, viewers and archives; hidden folders are not listed at all
THUMBNAILS = {
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "__macosx",
    "system volume information", "thumbs", "_thumbs", "thumbnails", "thumbnail",
}  # fmt: skip
THUMBNAIL_FOLDERS = (".lrdata", ".lrcat-data", ".thumbnails")  # ends of folder names
ORIGINALS = ("originals", "masters")  # within a library of Apple Photos, the others are previews
# files next to photos that nobody takes for pictures
SIDECARS = {
    "", ".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".rst", ".yaml", ".yml", ".toml", ".ini", ".cfg",
    ".html", ".htm", ".log", ".db", ".sqlite", ".xmp", ".aae", ".py", ".ipynb", ".sh", ".tfw", ".jgw", ".pgw", ".prj",
    ".lnk", ".cache", ".safetensors", ".ckpt", ".pth",
}  # fmt: skip
IMAGE_FOLDERS = {
    "images", "image", "imgs", "img", "imgdir", "jpegimages", "photos", "photo", "pictures", "pics", "frames", "rgb",
    "input", "inputs", "originals", "original", "raw", "source", "src", "leftimg8bit",
}  # fmt: skip
# in order: where a photo has several, the first is its label
LABEL_FOLDERS = (
    "labels", "label", "labelids", "labelmaps", "labelmap", "masks", "mask", "segmentationclass",
    "segmentationclassaug", "annotations", "annotation", "annot", "anndir", "ann", "gt", "gts", "gtfine",
    "groundtruth", "groundtruths", "truth", "segmentations", "segmentation", "segmaps", "seg", "segs", "semantic",
)  # fmt: skip
DERIVED_FOLDERS = (
    "segmentationobject", "instances", "instance", "instanceids", "overlays", "overlay", "colormasks", "colourmasks",
    "visualizations", "visualisations", "vis",
)  # fmt: skip
LABEL_ENDINGS = (
    "labelids", "labelid", "labels", "label", "lab", "masks", "mask", "gt", "groundtruth", "segmentation", "seg",
    "annotation", "annot", "l",
)  # fmt: skip
DERIVED_ENDINGS = (
    "labeltrainids", "trainids", "instanceids", "instances", "instance", "color", "colors", "colour", "colours",
    "overlay", "vis",
)  # fmt: skip
IMAGE_ENDINGS = {"leftimg8bit", "image", "img", "rgb", "sat", "photo", "orig", "original"}
WEAK_ENDINGS = {"l", "lab", "vis", "color", "colors", "colour", "colours", "instance"}  # also of photos that pair
SPLIT_MASKS = re.compile("(train|val|valid|test)(annot|masks|labels)")
FOLDER_WORDS, ENDING_WORDS = {*LABEL_FOLDERS, *DERIVED_FOLDERS}, {*LABEL_ENDINGS, *DERIVED_ENDINGS}


@dataclass(frozen=True)
class Kind:
    """How files are named like masks: the word of a folder, of the end of a name, or both; "" for none."""

    folder: str
    ending: str

    @property
    def derived(self) -> bool:
        """Whether such files are for looking at or hold single objects, and are never labels."""
        return self.folder in DERIVED_FOLDERS or self.ending in DERIVED_ENDINGS

    @property
    def weak(self) -> bool:
        """Whether photos, too, may be named so."""
        return not self.folder and self.ending in WEAK_ENDINGS

    @property
    def rank(self) -> tuple[int, int]:
        """The order in which the labels of a photo are preferred."""
        endings = ("", *LABEL_ENDINGS, *DERIVED_ENDINGS)
        folders = (*LABEL_FOLDERS, "", *DERIVED_FOLDERS)
        return folders.index(self.folder), endings.index(self.ending)


@dataclass
class Group:
    """The files of a kind, and the photos that each belongs to; paths relative to the folder."""

    kind: Kind
    photos: dict[PurePosixPath, list[PurePosixPath]] = field(default_factory=dict)
    loosely: bool = False  # by names that occur once, in whatever folders

    @property
    def paired(self) -> int:
        return sum(map(bool, self.photos.values()))

    def title(self) -> str:
        """Name the files for people."""
        first = next(iter(self.photos))
        if not self.kind.folder:
            return f"*{first.stem[-len(self.kind.ending) - 1 :]}{first.suffix}"
        folders = sorted({marked_folder(file).as_posix() + "/" for file in self.photos})
        return ", ".join(folders[:2]) + (f" and {len(folders) - 2} more folders" if len(folders) > 2 else "")

    def hold_classes(self, folder: Path | Tree) -> bool:
        """Open a few of the files, and return whether most hold as few values as classes have; JPEG never does."""
        chosen, few = evenly(list(self.photos), LOOKED_AT), 0
        for file in chosen:
            with suppress(ImageError):
                few += is_lossless(file) and tally(file_in(folder, file)).few
        return 4 * few >= 3 * len(chosen)


@dataclass(frozen=True)
class Scan:
    """The files below `folder`, by paths relative to it.

    Attributes:
        photos: sorted.
        labels: the label of each photo that has one.
        stray: masks named like these labels, of no photo.
        notes: a line for each kind of file that is not taken for a photo.
    """

    folder: Path | Tree
    photos: tuple[PurePosixPath, ...]
    labels: Mapping[PurePosixPath, PurePosixPath]
    stray: tuple[PurePosixPath, ...]
    notes: tuple[str, ...]

    def file(self, name: PurePosixPath) -> File:
        return file_in(self.folder, name)


def file_in(folder: Path | Tree, name: PurePosixPath) -> File:
    """A listed file."""
    return folder / name if isinstance(folder, Path) else folder.files[name.as_posix()]


def scan(path: Path | str, argument: str = "--data") -> Scan:
    """Sort the files in `path`, an image or a folder in any nesting, into photos, labels and others. It may be the URL
    of a folder in a store, or name tar files.

    Recognises images by suffix, upper or lower case, and follows links to folders. Does not list hidden files and
    folders, and files written by smooseg (`visible_files`), so runs and predictions can live inside a photo folder.
    Opens only a few files that are named like masks. UserError naming `argument` when the path does not exist, cannot
    be read, or holds no photo.
    """
    path = place(path)
    suffixes = formats.photo_suffixes()
    looked_for = " ".join(suffixes)
    tree, single, ours = listed(path, argument), False, ""
    if tree is not None:
        folder: Path | Tree = tree
        paths = list(map(PurePosixPath, tree.files))
    else:
        local = Path(path)
        if not local.exists():
            raise UserError(f"{argument} {path}: no such file or folder; give a folder of images ({looked_for})")
        single, ours = local.is_file(), ", next to smooseg's own output" if written_by_us(local) else ""
        folder = local.parent if single else local
        files = [local] if single else visible_files(local, argument)
        paths = [PurePosixPath(file.relative_to(folder).as_posix()) for file in files]
    usable = [file for file in paths if not is_thumbnail(file)]
    pictures = [file for file in usable if file.suffix.lower() in suffixes]
    if not pictures:
        kinds = Counter(file.suffix or "without suffix" for file in paths).most_common(5)
        others = ", ".join(f"{count} {kind}" for kind, count in kinds)
        contents = f"only other files ({others})" if paths else "no files"
        heif = any(file.suffix.lower() in formats.HEIF for file in usable)
        advice = f"; {formats.HEIF_ADVICE} reads .heic" if heif else ""
        if tars := [file for file in paths if file.suffix.lower() == ".tar"]:
            advice += f"; give tar files by their names, as {tars[0].name} or {{a,b}}.tar or {{000..010}}.tar"
        raise UserError(
            f"{argument} {path}: no images in it; looked for {looked_for} and found {contents}{ours}{advice}"
        )
    if single:
        return Scan(folder, tuple(pictures), {}, (), ())
    masks = [file for file in usable if file.suffix.lower() in {*suffixes, *formats.LABELS}]
    sorted_files = sort_out(folder, pictures, masks)
    if not sorted_files.photos:
        what = "; ".join(sorted_files.lines)
        raise UserError(f"{argument} {path}: all {len(pictures)} image files in it are masks ({what}); give the photos")
    suffixes_left = (file.suffix.lower() for file in usable if file not in sorted_files.taken)
    lines = [*sorted_files.lines]
    thumbnails = [file for file in paths if is_thumbnail(file) and file.suffix.lower() in suffixes]
    if thumbnails:
        lines.append(f"{len(thumbnails)} previews and thumbnails left out, first {thumbnails[0]}")
    lines += ignored_note(Counter(suffix for suffix in suffixes_left if suffix not in {*suffixes, *SIDECARS}))
    yolo = [file for file in usable if file.suffix == ".txt" and mark(file) == "labels"]
    if yolo and not sorted_files.labels:
        lines.append(
            f"labels/ holds {len(yolo)} .txt files, as for object detectors, and no masks: only the photos count"
        )
    return Scan(folder, tuple(sorted_files.photos), sorted_files.labels, tuple(sorted_files.stray), tuple(lines))


@dataclass
class Sorted:
    """What `sort_out` found; paths relative to the folder."""

    photos: list[PurePosixPath]
    labels: dict[PurePosixPath, PurePosixPath] = field(default_factory=dict)  # photo -> mask
    stray: list[PurePosixPath] = field(default_factory=list)  # masks like these labels, of no photo
    taken: set[PurePosixPath] = field(default_factory=set)  # all masks, used or not
    lines: list[str] = field(default_factory=list)


def sort_out(folder: Path | Tree, pictures: Sequence[PurePosixPath], masks: Sequence[PurePosixPath]) -> Sorted:
    """Tell photos from masks by names, and where these could be photos' by a look at a few files.

    masks: files that could be masks by their suffix, photos among them.
    """
    result, kinds = Sorted(list(pictures)), []
    for group in groups_of(pictures, masks):
        kind, count = group.kind, len(group.photos)
        mostly = group.paired >= PAIRED * count
        trusted = kind == Kind("labels", "") and not group.loosely and any(map(is_lossless, group.photos))
        if kind.derived:
            left_out = mostly and (not kind.weak or group.hold_classes(folder))
            why = "made for looking at, or of single objects"
        elif (trusted and group.paired) or group.hold_classes(folder):
            left_out, why = True, "masks that belong to no photo"
            if group.paired:
                kinds.append(group)
                result.taken |= group.photos.keys()
                continue
        else:
            left_out = mostly and not kind.weak and not group.loosely
            why = "named like masks of the photos, with more values than classes have (JPEG changes numbers: use PNG)"
        if left_out:
            result.taken |= group.photos.keys()
            result.lines.append(f"{count} files in {group.title()} left out: {why}")
    for group in sorted(kinds, key=lambda group: (-group.paired, group.kind.rank)):
        before = len(result.labels)
        for mask, photos in group.photos.items():
            for photo in photos if is_lossless(mask) else ():
                result.labels.setdefault(photo, mask)
        if len(result.labels) == before:
            result.lines.append(f"{len(group.photos)} files in {group.title()} left out: the photos have other labels")
            continue
        result.stray += [mask for mask, photos in group.photos.items() if not photos]
        if group.kind != Kind("labels", ""):
            result.lines.append(f"{len(result.labels) - before} photos have labels in {group.title()}, matched by name")
    result.photos = [photo for photo in pictures if photo not in result.taken]
    result.labels = {photo: mask for photo, mask in result.labels.items() if photo not in result.taken}
    return result


def groups_of(pictures: Sequence[PurePosixPath], masks: Sequence[PurePosixPath]) -> list[Group]:
    """Group the files that are named like masks by how they are."""
    index = Index([file for file in pictures if not mark(file)])
    groups: dict[Kind, Group] = {}
    for file in masks:
        word, (ending, stem) = mark(file), split_ending(file.stem, ENDING_WORDS)
        photos: list[PurePosixPath] = []
        if word and (photos := index.find(file, file.stem)):
            ending = ""
        elif ending:
            photos = [photo for photo in index.find(file, stem) if word or photo.parent == file.parent]
        if word or photos:
            kind = Kind(word, ending)
            groups.setdefault(kind, Group(kind)).photos[file] = [photo for photo in photos if photo != file]
    for group in groups.values():
        if group.kind.folder and not group.paired:  # other folders, but names that occur once
            for file in group.photos:
                group.photos[file] = index.by_stem(file.stem)
            group.loosely = True
    return list(groups.values())


class Index:
    """Photos by the path and stem that their labels have, whatever the case and Unicode form."""

    def __init__(self, photos: Iterable[PurePosixPath]):
        self._plain: dict[str, list[PurePosixPath]] = defaultdict(list)
        self._stripped: dict[str, list[PurePosixPath]] = defaultdict(list)
        self._stems: dict[str, list[PurePosixPath]] = defaultdict(list)
        for photo in photos:
            self._plain[normal(key(photo, photo.stem))].append(photo)
            ending, stem = split_ending(photo.stem, IMAGE_ENDINGS)
            if ending:
                self._stripped[normal(key(photo, stem))].append(photo)
            self._stems[normal(photo.stem)].append(photo)

    def find(self, mask: PurePosixPath, stem: str) -> list[PurePosixPath]:
        """Return the photos of a mask: those of its very name, else those that differ in case or form alone."""
        place = key(mask, stem)
        photos = self._plain.get(normal(place)) or self._stripped.get(normal(place)) or []
        return [photo for photo in photos if key(photo, photo.stem) == place] or list(photos)

    def by_stem(self, stem: str) -> list[PurePosixPath]:
        """Return the photo that alone has this stem."""
        photos = self._stems.get(normal(stem), [])
        return list(photos) if len(photos) == 1 else []


def normal(name: str) -> str:
    """Bring names to one form that differ in case or Unicode form alone."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def key(file: PurePosixPath, stem: str) -> str:
    """Return the path that a photo and its masks share: without the words for images and masks in folder names."""
    parts = (split_folder(part, masks=False)[1] for part in file.parts[:-1])
    return "/".join([*filter(None, parts), stem])


def mark(file: PurePosixPath) -> str:
    """Return the word for masks in the names of a file's folders, the innermost; "" without one."""
    return next((word for part in reversed(file.parts[:-1]) if (word := split_folder(part)[0])), "")


def marked_folder(file: PurePosixPath) -> PurePosixPath:
    """Return the innermost folder with a word for masks."""
    return next(folder for folder in file.parents if split_folder(folder.name)[0])


@lru_cache(maxsize=1 << 16)
def split_folder(name: str, masks: bool = True) -> tuple[str, str]:
    """Split the name of a folder into a word for masks (masks=False: or for images), in lower case, and the rest."""
    words = FOLDER_WORDS if masks else {*FOLDER_WORDS, *IMAGE_FOLDERS}
    plain = re.sub("[^a-z0-9]", "", name.casefold())
    if plain in words:
        return plain, ""
    if match := SPLIT_MASKS.fullmatch(plain):
        return match[2], match[1]
    tokens = re.split("[^a-z0-9]+", name.casefold())
    for end in (-1, 0):
        if len(tokens) > 1 and tokens[end] in words:
            rest = tokens[:-1] if end else tokens[1:]
            return tokens[end], "_".join(rest)
    return "", name


def split_ending(stem: str, words: set[str]) -> tuple[str, str]:
    """Split a stem into one of the words at its end (else at its start), in lower case, and the rest."""
    match = re.fullmatch("(.+?)(?:[_. -]gtFine)?[_. -]([A-Za-z0-9]+)", stem)
    if match and match[2].casefold() in words:
        return match[2].casefold(), match[1]
    match = re.fullmatch("([A-Za-z0-9]+)[_. -](.+)", stem)
    if match and match[1].casefold() in words - WEAK_ENDINGS:
        return match[1].casefold(), match[2]
    return "", stem


def is_lossless(file: PurePosixPath) -> bool:
    """Return whether a label may have this suffix: lossy ones change numbers."""
    return file.suffix.lower() in formats.LABELS


def is_thumbnail(file: PurePosixPath) -> bool:
    """Return whether a file lies where storage devices, viewers and archives keep copies of photos."""
    folders = [part.casefold() for part in file.parts[:-1]]
    if any(folder in THUMBNAILS or folder.endswith(THUMBNAIL_FOLDERS) for folder in folders):
        return True
    library = next((n for n, folder in enumerate(folders) if folder.endswith(".photoslibrary")), None)
    return library is not None and folders[library + 1 : library + 2] != [] and folders[library + 1] not in ORIGINALS


def ignored_note(kinds: Counter[str]) -> list[str]:
    """Say how many other files there are, by suffix, and what would read them."""
    if not kinds:
        return []
    first = dict(kinds.most_common(LISTED))
    listed = ", ".join(f"{count} {suffix}" for suffix, count in first.items())
    more = f" and {kinds.total() - sum(first.values())} of other kinds" if len(kinds) > LISTED else ""
    advice = f"; {formats.HEIF_ADVICE} reads .heic" if kinds.keys() & set(formats.HEIF) else ""
    total = kinds.total()
    return [f"{total} file{'s' if total > 1 else ''} ignored: {listed}{more}{advice}"]
