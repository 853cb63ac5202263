"""COCO-Stuff as its owners pack it: images/{train,val}2017/*.jpg and the stuff+thing pixel maps
annotations/{train,val}2017/*.png.

Pixel maps hold 182 numbers (0 to 90 things, 91 to 181 stuff: the number in labels.txt minus one) and 255 for nothing.
The 27 classes of the unsupervised benchmark are the 12 groups of things and 15 groups of stuff in the owners' hierarchy
(Caesar et al., CVPR 2018, and github.com/nightrome/cocostuff), in the order of Ji et al. (ICCV 2019). Their curated
lists, curated/{train,val}2017/Coco164kFull_Stuff_Coarse_7.txt, name the images of the benchmark; without them all
images are used, and a note says so.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .base import Layout, NumberedFiles, Numbering, files_below, first_folder, numbered_files, pick, read_list

# labels.txt, numbers 1 to 182: on disk one less
_FINE = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign, "
    "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, "
    "backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, "
    "baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, "
    "spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, "
    "potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell "
    "phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair "
    "drier, toothbrush, hair brush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, "
    "carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, "
    "door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, "
    "fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, "
    "mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing, "
    "railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, "
    "stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, "
    "wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, "
    "window-other, wood"
)
FINE = tuple(_FINE.split(", "))

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
COARSE_OF = {fine: number for number, members in enumerate(HIERARCHY.values()) for fine in members.split(", ")}
NUMBERING = Numbering("COCO-Stuff", tuple(HIERARCHY), {number: COARSE_OF[fine] for number, fine in enumerate(FINE)})

YEAR = "2017"
CURATED = "Coco164kFull_Stuff_Coarse_7.txt"
MAPS = (
    "annotations",
    "stuffthingmaps",
    "stuffthingmaps_trainval2017",
    "annotations/stuffthingmaps",
    "annotations/stuffthingmaps_trainval2017",
)


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
        parts={split: partial(_open, root, folder, where / (split + YEAR), split) for split, folder in images.items()},
        pictures=images.get("val", images.get("train")),
    )


def _open(root: Path, images: Path, maps: Path, split: str) -> NumberedFiles:
    present = chosen = files_below(images)
    notes: list[str] = []
    # some people keep the lists next to the folder, not in it
    lists = [home / "curated" / (split + YEAR) / CURATED for home in (root, root.resolve().parent)]
    curated = next((path for path in lists if path.is_file()), None)
    if curated is not None:
        chosen, notes = pick(read_list(curated), present, curated)
    elif split != "test":
        images_of = f"all {len(present)} images of {split + YEAR}"
        notes = [f"no curated list ({lists[0]}): {images_of}, not the benchmark's choice of them"]
    return numbered_files(
        f"COCO-Stuff {split}",
        images,
        chosen,
        files_below(maps, (".png",)),
        NUMBERING,
        label_name=str,
        held_out=split != "train",
        where=str(maps),
        present=present,
        notes=notes,
    )
