"""COCO-Stuff as its owners pack it: images/{train,val}2017/*.jpg and the stuff+thing pixel maps
annotations/{train,val}2017/*.png.

Pixel maps hold 182 numbers (0 to 90 things, 91 to 181 stuff: the number in labels.txt minus one) and 255 for nothing.
The 27 classes of the unsupervised benchmark are the 12 groups of things and 15 groups of stuff in the owners' hierarchy
(Caesar et al., CVPR 2018, and github.com/nightrome/cocostuff), in the order of Ji et al. (ICCV 2019). Their curated
lists, curated/{train,val}2017/Coco164kFull_Stuff_Coarse_7.txt, name the images of the benchmark; without them all
images are used, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .base import Files, Layout, Numbering, first_folder

HIERARCHY = {
    "electronic": "tv, laptop, mouse, remote, keyboard, cell phone",
    "appliance": "microwave, oven, toaster, sink, refrigerator, blender",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture": "chair, couch, potted plant, bed, mirror, dining table, window, desk, toilet, door",
    "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush",
    "kitchen": "bottle, plate, wine glass, cup, fork, knife, spoon, bowl",
    "accessory": "hat, backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase",
    "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "outdoor": "traffic light, fire hydrant, street sign, stop sign, parking meter, bench",
    "person": "person",
    "sports": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, "
    "tennis racket",
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "ceiling-stuff": "ceiling-tile, ceiling-other",
    "floor-stuff": "carpet, floor-tile, floor-wood, floor-marble, floor-stone, floor-other",
    "food-stuff": "fruit, salad, vegetable, food-other",
    "furniture-stuff": "door-stuff, desk-stuff, table, shelf, cabinet, cupboard, mirror-stuff, counter, light, stairs, "
    "furniture-other",
    "rawmaterial-stuff": "cardboard, paper, plastic, metal",
    "textile-stuff": "rug, mat, towel, napkin, clothes, cloth, curtain, blanket, pillow, banner, textile-other",
    "wall-stuff": "wall-tile, wall-panel, wall-wood, wall-brick, wall-stone, wall-concrete, wall-other",
    "window-stuff": "window-blind, window-other",
    "building-stuff": "house, skyscraper, bridge, tent, roof, building-other",
    "ground-stuff": "sand, snow, dirt, mud, gravel, road, pavement, railroad, platform, playingfield, ground-other",
    "plant-stuff": "grass, tree, bush, leaves, flower, branch, moss, straw, plant-other",
    "sky-stuff": "clouds, sky-other",
    "solid-stuff": "wood, rock, stone, mountain, hill, solid-other",
    "structural-stuff": "fence, cage, net, railing, structural-other",
    "water-stuff": "fog, river, sea, waterdrops, water-other",
}
MEMBERS = {name: members.split(", ") for name, members in HIERARCHY.items()}
COARSE_OF = {fine: number for number, members in enumerate(MEMBERS.values()) for fine in members}
# the owners' labels.txt numbers things group by group, then stuff by the alphabet
THINGS = (
    "person", "vehicle", "outdoor", "animal", "accessory", "sports", "kitchen", "food", "furniture", "electronic",
    "appliance", "indoor",
)  # fmt: skip
STUFF = sorted(fine for name, members in MEMBERS.items() if name not in THINGS for fine in members)
FINE = [fine for name in THINGS for fine in MEMBERS[name]] + STUFF
NUMBERING = Numbering("COCO-Stuff", tuple(HIERARCHY), [COARSE_OF[fine] for fine in FINE])

YEAR = "2017"
CURATED = "Coco164kFull_Stuff_Coarse_7.txt"
ARCHIVES = ("stuffthingmaps", "stuffthingmaps_trainval2017")
MAPS = ("annotations", *ARCHIVES, *(f"annotations/{name}" for name in ARCHIVES))


def recognise(root: Path) -> Layout | None:
    places = {split: (root / "images" / (split + YEAR), root / (split + YEAR)) for split in ("train", "val", "test")}
    images = {split: folder for split, both in places.items() if (folder := first_folder(*both)) is not None}
    if not {"train", "val"} & set(images):
        return None
    maps = first_folder(*(root / place / (split + YEAR) for place in MAPS for split in images))
    # without pixel maps it may be anything: somebody's own labels next to these images, or a folder of images alone
    if maps is None and ((root / "labels").is_dir() or not (root / "images").is_dir()):
        return None
    where = root / MAPS[0] if maps is None else maps.parent
    contents = "images without pixel maps" if maps is None else f"images and pixel maps in {where.name}"
    return Layout(
        title=f"COCO-Stuff ({contents}, 27 classes)",
        preset="cocostuff27",
        root=root,
        parts={split: _part(root, split, folder, where / (split + YEAR)) for split, folder in images.items()},
        pictures=images.get("val", images.get("train")),
    )


def _part(root: Path, split: str, images: Path, maps: Path) -> Callable[[], Files]:
    # some people keep the lists next to the folder, not in it
    lists = [home / "curated" / (split + YEAR) / CURATED for home in (root, root.resolve().parent)]
    curated = next((path for path in lists if path.is_file()), None)
    note = f"no curated list ({lists[0]}): all images of {split + YEAR}, not the benchmark's choice of them"
    notes = [] if curated or split == "test" else [note]
    return partial(Files.of_owner, NUMBERING, split, images, maps, listed=curated, notes=notes)
