"""Exports of predictions, each read back by the format's own library where there is one."""

import csv
import io
import json
import shutil
import zipfile
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from textures import draw

from smooseg_fast import exporting, predict
from smooseg_fast.command import run
from smooseg_fast.datasets import IGNORE
from smooseg_fast.datasets.survey import page_names
from smooseg_fast.export import coco, formats, labelstudio, runs
from smooseg_fast.export.folder import PredictionFolder, name_of
from smooseg_fast.segment.names import Group, read_groups, write_groups
from smooseg_fast.show import items
from smooseg_fast.system.fields import fields_of

# the second of four was merged into another
GROUPS = [Group(0, "sky", (10, 20, 30)), Group(2, "road & <kerb>", (200, 0, 0)), Group(3, "été", (0, 200, 9))]

MORE = {"merge": [], "more": []}  # of the journal's lines


def labels_of(height, width, seed):
    """Blobs of the groups 0, 2 and 3, single pixels among them, and a strip without data."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((3, height, width)), (0, 2, 2))
    labels = np.array([0, 2, 3], np.uint8)[smooth.argmax(0)]
    labels[rng.random((height, width)) < 0.02] = 3
    labels[:2, : width // 2] = IGNORE
    return labels


@pytest.fixture
def maps(tmp_path, monkeypatch):
    """A folder of predictions of three images -> their labels by name."""
    monkeypatch.chdir(tmp_path)
    maps = {
        "a.jpg": labels_of(40, 30, 0),
        "deep/b c.png": labels_of(17, 50, 1),
        "deep/ü.tif": np.full((9, 8), 2, np.uint8),
    }
    lines = []
    for name, labels in maps.items():
        stem = str(Path(name).with_suffix(""))
        file = tmp_path / "my photos" / name
        for path, array in ((tmp_path / "out" / "masks" / f"{stem}.png", labels), (file, np.stack([labels] * 3, 2))):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
        shares = {str(k): 0.5 for k in np.unique(labels) if k != IGNORE}
        lines.append(
            json.dumps({"stem": stem, "stamp": [str(file), 1, 1], "shares": shares, "look": "", "seconds": 0.5, **MORE})
        )
    (tmp_path / "out" / "done.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "out" / "shares.json").write_text("{}")
    write_groups(tmp_path / "out" / "groups.json", GROUPS)
    return maps


def export(kind, *args):
    return run(exporting.main, ["--predictions", "out", "--format", kind, *args])


def test_every_format_is_offered():
    assert fields_of(exporting.ExportConfig)["format"].choices == tuple(formats.FORMATS)


def decoded(segmentation):
    """COCO's run lengths as its documentation has them, one character after the other."""
    counts, text = [], segmentation["counts"].encode()
    place = 0
    while place < len(text):
        x = k = 0
        more = True
        while more:
            c = text[place] - 48
            x |= (c & 31) << 5 * k
            more = bool(c & 32)
            place, k = place + 1, k + 1
            if not more and c & 16:
                x |= -1 << 5 * k
        counts.append(x + counts[-2] if len(counts) > 2 else x)
    values = np.repeat(np.arange(len(counts)) % 2, counts)
    height, width = segmentation["size"]
    return values.reshape(width, height).T.astype(bool)


def test_coco_holds_the_masks(maps, capsys):
    assert export("coco") == 0
    assert (
        "exported   3 of 3 images and 3 groups as COCO annotations\nwritten    out/exports/coco.json"
        in capsys.readouterr().out
    )
    content = json.load(open("out/exports/coco.json"))
    assert [(c["id"], c["name"], tuple(c["color"])) for c in content["categories"]] == [
        (group.number + 1, group.name, group.colour) for group in GROUPS
    ]
    assert [image["file_name"] for image in content["images"]] == list(maps)
    seen = {image["id"]: np.full((image["height"], image["width"]), IGNORE, np.uint8) for image in content["images"]}
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"]) == 7
    for annotation in content["annotations"]:
        mask, labels = decoded(annotation["segmentation"]), seen[annotation["image_id"]]
        assert (labels[mask] == IGNORE).all()
        labels[mask] = annotation["category_id"] - 1
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        assert annotation["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
        assert (annotation["area"], annotation["iscrowd"]) == (mask.sum(), 0)
    for labels, expected in zip(seen.values(), maps.values()):
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("least", [1, 5])
def test_coco_instances_are_connected_regions(maps, least):
    assert export("coco", "--instances", "--min-area", str(least)) == 0
    content = json.load(open("out/exports/coco.json"))
    labels, expected = maps["a.jpg"], 0
    for group in (0, 2, 3):
        parts, _ = ndimage.label(labels == group)
        sizes = np.bincount(parts.ravel())[1:]
        expected += (sizes >= least).sum()
        ours = [a for a in content["annotations"] if a["image_id"] == 1 and a["category_id"] == group + 1]
        assert sorted(a["area"] for a in ours) == sorted(sizes[sizes >= least])
        for annotation in ours:
            mask = decoded(annotation["segmentation"])
            assert ndimage.label(mask)[1] == 1
            assert (labels[mask] == group).all()
    assert expected == sum(a["image_id"] == 1 for a in content["annotations"])


@pytest.mark.parametrize("arguments", [(), ("--instances",)])
def test_pycocotools_reads_coco(maps, arguments):
    COCO, mask = pytest.importorskip("pycocotools.coco").COCO, pytest.importorskip("pycocotools.mask")
    assert export("coco", *arguments) == 0
    annotations = COCO("out/exports/coco.json")
    for number, expected in zip(annotations.getImgIds(), maps.values()):
        labels = np.full(expected.shape, IGNORE)
        for annotation in annotations.loadAnns(annotations.getAnnIds(imgIds=number)):
            labels[annotations.annToMask(annotation) == 1] = annotation["category_id"] - 1
            assert mask.area(annotation["segmentation"]) == annotation["area"]
            assert mask.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]
        np.testing.assert_array_equal(labels, expected)


def test_long_run_lengths_are_those_of_pycocotools():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for size in (1, 3, 33, 70, 3000):
        image = np.sort(rng.random((size, 50)) < 0.4, 0)
        (first, *_) = [r for r in runs.runs_of(image.ravel(order="F")) if r.label == 1] or [
            runs.Runs(1, *np.empty((2, 0), int))
        ]
        assert (
            coco.compressed(first.alternating(image.size)) == mask.encode(np.asfortranarray(image))["counts"].decode()
        )


def test_cvat_holds_the_masks_in_colours(maps, capsys):
    assert export("cvat", "--out", "x.zip") == 0
    assert 'Upload annotations > "Segmentation mask 1.1" > x.zip' in capsys.readouterr().out
    with zipfile.ZipFile("x.zip") as archive:
        assert archive.testzip() is None
        lines = archive.read("labelmap.txt").decode().splitlines()
        assert lines[:2] == ["# label:color_rgb:parts:actions", "background:0,0,0::"]
        table = {tuple(map(int, line.split(":")[1].split(","))): line.split(":")[0] for line in lines[1:]}
        assert archive.read("ImageSets/Segmentation/default.txt").decode().split("\n") == [
            "a",
            "deep/b c",
            "deep/ü",
            "",
        ]
        names = {IGNORE: "background"} | {group.number: group.name for group in GROUPS}
        # Pascal VOC's colours of the first objects
        objects = {(0, 0, 0): IGNORE, (128, 0, 0): 0, (0, 128, 0): 2, (128, 128, 0): 3}
        for name, labels in maps.items():
            folders = ("SegmentationClass", "SegmentationObject")
            files = [archive.read(f"{folder}/{Path(name).with_suffix('')}.png") for folder in folders]
            pictures = [Image.open(io.BytesIO(file)) for file in files]
            assert [picture.mode for picture in pictures] == ["RGB", "RGB"]
            pixels, instances = (np.asarray(picture).reshape(-1, 3).tolist() for picture in pictures)
            assert [table[tuple(pixel)] for pixel in pixels] == [names[k] for k in labels.ravel().tolist()]
            assert [objects[tuple(pixel)] for pixel in instances] == labels.ravel().tolist()
    labels = [(label["name"], label["color"]) for label in json.load(open("x_labels.json"))]
    assert labels == [("sky", "#0a141e"), ("road & <kerb>", "#c80000"), ("été", "#00c809")]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Group(3, "a:b", (1, 2, 3)), "'a:b': CVAT's labelmap.txt holds no name with a colon"),
        (Group(3, "#3", (1, 2, 3)), "'#3': CVAT's labelmap.txt holds no name that begins with #"),
        (Group(3, "x", (200, 0, 0)), "'x': shares its colour #c80000 with 'road & <kerb>' in CVAT"),
        (Group(3, "x", (0, 0, 0)), "'x': shares its colour #000000 with 'background' in CVAT"),
        (Group(3, "background", (1, 2, 3)), "'background': shares its name with 'what no group covers' in CVAT"),
    ],
)
def test_cvat_refuses_groups_that_it_would_not_tell_apart(maps, capsys, group, message):
    write_groups("out/groups.json", [*GROUPS[:2], group])
    assert export("cvat") == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(Path("out/exports").glob("*"))


def test_cvat_gets_no_image_that_it_would_not_find(maps, capsys):
    """It refuses a whole file for one mask without a frame, and mixes up frames that differ in their suffix alone."""
    lines = Path("out/done.jsonl").read_text().splitlines()
    for stem, file in (("a.png", "a.png"), ("s#1", "s.tif"), ("#1", "#1.jpg"), (" b", " b.jpg"), ("c\nd", "c\nd.jpg")):
        shutil.copy("out/masks/a.png", f"out/masks/{stem}.png")
        lines.append(json.dumps(json.loads(lines[0]) | {"stem": stem, "stamp": [f"/my photos/{file}", 1, 1]}))
    Path("out/done.jsonl").write_text("\n".join(lines) + "\n")
    assert export("cvat") == 0
    printed = capsys.readouterr().out
    assert "exported   2 of 8 images" in printed
    assert "note       left out ' b.jpg' and 5 more: CVAT finds images by their names without suffix" in printed
    with zipfile.ZipFile("out/exports/cvat.zip") as archive:
        assert archive.read("ImageSets/Segmentation/default.txt").decode().split() == ["deep/b", "c", "deep/ü"]
        assert len(archive.namelist()) == 2 * 2 + 2
    assert export("coco") == 0  # which has all of them
    printed = capsys.readouterr().out
    assert "exported   8 of 8 images" in printed
    assert "note       's#1.tif': no file has this name, so other tools cannot open it" in printed
    assert "pycocotools.coco.COCO('out/exports/coco.json')" in printed


def unpacked(rle):
    """The values that thi.ng/rle-pack packed, by its documentation."""
    bits = iter("".join(f"{byte:08b}" for byte in rle))

    def take(n):
        return int("".join(next(bits) for _ in range(n)), 2)

    total, word = take(32), take(5) + 1
    sizes, values = [take(4) + 1 for _ in range(4)], []
    while len(values) < total:
        run, size = take(1), sizes[take(2)]
        length = take(size) + 1
        values += [take(word)] * length if run else [take(word) for _ in range(length)]
    return np.array(values, np.uint8)


def test_label_studio_holds_the_masks(maps, capsys):
    assert export("labelstudio") == 0
    assert "paste out/exports/labelstudio.xml" in capsys.readouterr().out
    tasks = json.load(open("out/exports/labelstudio.json"))
    assert [task["data"]["image"] for task in tasks] == [
        "/data/local-files/?d=my%20photos/a.jpg",
        "/data/local-files/?d=my%20photos/deep/b%20c.png",
        "/data/local-files/?d=my%20photos/deep/%C3%BC.tif",
    ]
    numbers = {group.name: group.number for group in GROUPS}
    for task, expected in zip(tasks, maps.values()):
        labels = np.full(expected.shape, IGNORE)
        for result in task["predictions"][0]["result"]:
            value = result["value"]
            assert (result["original_height"], result["original_width"]) == labels.shape
            image = unpacked(value["rle"]).reshape(*labels.shape, 4)
            assert (image == image[..., :1]).all()
            labels[image[..., 3] == 255] = numbers[value["brushlabels"][0]]
        np.testing.assert_array_equal(labels, expected)


def test_label_studio_sdk_reads_the_masks(maps):
    package = find_spec("label_studio_sdk")
    if package is None:
        pytest.skip("needs label-studio-sdk")
    # the module alone: its package imports all that the SDK needs
    spec = spec_from_file_location("brush", Path(package.submodule_search_locations[0], "converter", "brush.py"))
    brush = module_from_spec(spec)
    spec.loader.exec_module(brush)
    assert export("labelstudio") == 0
    names = {group.name: group.number for group in GROUPS}
    for task, expected in zip(json.load(open("out/exports/labelstudio.json")), maps.values()):
        labels = np.full(expected.shape, IGNORE)
        for result in task["predictions"][0]["result"]:
            image = brush.decode_rle(result["value"]["rle"]).reshape(*expected.shape, 4)
            labels[image[..., 3] == 255] = names[result["value"]["brushlabels"][0]]
        np.testing.assert_array_equal(labels, expected)


def test_label_studio_interface_names_what_the_predictions_use(maps):
    assert export("labelstudio") == 0
    view = ElementTree.parse("out/exports/labelstudio.xml").getroot()
    tags = {tag.get("name"): tag for tag in view}
    labels = [(label.get("value"), label.get("background")) for label in tags["groups"]]
    assert labels == [("sky", "#0a141e"), ("road & <kerb>", "#c80000"), ("été", "#00c809")]
    (result, *_) = json.load(open("out/exports/labelstudio.json"))[0]["predictions"][0]["result"]
    assert (result["from_name"], result["to_name"]) == ("groups", tags["groups"].get("toName"))
    assert tags["image"].get("value") == "$image"


@pytest.mark.parametrize("counts", [[0, 5], [5], [3, 1, 1, 40_000, 2], [0, 16_384], [16_385, 70_000, 1]])
def test_runs_that_no_counter_holds_are_split(counts):
    expected = np.repeat(np.arange(len(counts)) % 2 * 255, 4 * np.array(counts))
    np.testing.assert_array_equal(unpacked(labelstudio.packed(np.array(counts))), expected)


def test_arrays(maps):
    assert export("npz") == 0
    with np.load("out/exports/labels.npz") as arrays:
        assert arrays["images"].tolist() == list(maps)
        for name, labels in maps.items():
            np.testing.assert_array_equal(arrays[f"labels/{name}"], labels)
        assert arrays["groups"].tolist() == [0, 2, 3]
        assert arrays["names"].tolist() == [group.name for group in GROUPS]
        assert arrays["colours"].tolist() == [list(group.colour) for group in GROUPS]


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_count_pixels(maps):
    assert export("csv") == 0
    table = rows("out/exports/images.csv")
    for name, labels in maps.items():
        counts = {int(row["group"]): int(row["pixels"]) for row in table if row["image"] == name}
        assert counts == {k: (labels == k).sum() for k in np.unique(labels) if k != IGNORE}
        shares = [float(row["share"]) for row in table if row["image"] == name]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
    totals = rows("out/exports/images_groups.csv")
    assert [(row["name"], row["colour"]) for row in totals] == [
        ("sky", "#0a141e"),
        ("road & <kerb>", "#c80000"),
        ("été", "#00c809"),
    ]
    for row in totals:
        mine = [int(line["pixels"]) for line in table if line["group"] == row["group"]]
        assert (int(row["pixels"]), int(row["images"])) == (sum(mine), len(mine))
    assert {row["area"] + row["unit"] + row["confidence"] for row in table + totals} == {""}


def painted(features, place, size):
    """The labels that polygons cover, drawn by rasterio."""
    from rasterio.features import rasterize

    shapes = [(feature["geometry"], feature["properties"]["group"]) for feature in features]
    return rasterize(shapes, size, fill=IGNORE, transform=place, dtype="uint8")


def signed_area(ring):
    x, y = np.array(ring).T
    return ((x[:-1] * y[1:] - x[1:] * y[:-1]) / 2).sum()


def test_geojson_outlines_every_region(maps, capsys):
    pytest.importorskip("shapely")
    rasterio = pytest.importorskip("rasterio")
    assert export("geojson") == 0
    collection = json.load(open("out/exports/polygons.geojson"))
    assert collection["type"] == "FeatureCollection"
    holes = 0
    for name, labels in maps.items():
        features = [feature for feature in collection["features"] if feature["properties"]["image"] == name]
        np.testing.assert_array_equal(painted(features, rasterio.Affine.identity(), labels.shape), labels)
        for feature in features:
            outer, *inner = feature["geometry"]["coordinates"]
            assert signed_area(outer) > 0
            assert all(signed_area(ring) < 0 for ring in inner)
            covered = signed_area(outer) + sum(map(signed_area, inner))
            assert covered == feature["properties"]["pixels"]
            holes += len(inner)
    assert holes > 10
    assert collection["features"][0]["properties"]["name"] in {group.name for group in GROUPS}
    assert "note       coordinates are pixels, y down" in capsys.readouterr().out


def test_simplified_neighbours_keep_common_borders(maps):
    shapely = pytest.importorskip("shapely")
    pytest.importorskip("rasterio")
    assert export("geojson", "--simplify", "2", "--min-area", "4") == 0
    assert export("geojson", "--min-area", "4", "--out", "exact.geojson") == 0
    polygons, exact = (
        [
            shapely.from_geojson(json.dumps(feature["geometry"]))
            for feature in json.load(open(path))["features"]
            if feature["properties"]["image"] == "a.jpg"
        ]
        for path in ("out/exports/polygons.geojson", "exact.geojson")
    )
    assert len(polygons) == len(exact)
    assert min(shapely.area(exact)) >= 4
    assert shapely.is_valid(polygons).all()
    assert shapely.coverage_is_valid(polygons)
    assert shapely.get_num_coordinates(polygons).sum() < shapely.get_num_coordinates(exact).sum() / 2
    # what is taken from one is given to its neighbour; only outlines that nobody shares lose or gain
    assert shapely.area(polygons).sum() == pytest.approx(shapely.area(exact).sum(), rel=0.05)


def test_neighbours_share_every_corner(maps):
    """So that nothing opens between them in other coordinates, or where another tool simplifies them."""
    shapely = pytest.importorskip("shapely")
    pytest.importorskip("rasterio")
    assert export("geojson") == 0
    features = json.load(open("out/exports/polygons.geojson"))["features"]
    for name in maps:
        polygons = [json.dumps(f["geometry"]) for f in features if f["properties"]["image"] == name]
        assert shapely.coverage_is_valid(shapely.from_geojson(polygons)), name


@pytest.fixture
def georeferenced(maps):
    """The images of `maps` as GeoTIFFs in two zones of UTM, 10 m a pixel -> (labels, zone, transform) by name."""
    rasterio = pytest.importorskip("rasterio")
    pytest.importorskip("shapely")
    lines, placed = [], {}
    for line, (name, labels), zone in zip(open("out/done.jsonl"), maps.items(), (32632, 32633, 32633)):
        file = Path("my photos", name).with_suffix(".tif").absolute()
        height, width = labels.shape
        transform = rasterio.Affine(10, 0, 500_000 + 1000 * len(lines), 0, -10, 5_000_000)
        options = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint8"}
        with rasterio.open(file, "w", crs=f"EPSG:{zone}", transform=transform, **options) as out:
            out.write(np.zeros((1, height, width), np.uint8))
        placed[str(Path(name).with_suffix(".tif"))] = labels, zone, transform
        lines.append(json.dumps(json.loads(line) | {"stamp": [str(file), 1, 1]}))
    Path("out/done.jsonl").write_text("\n".join(lines) + "\n")
    return placed


def test_geojson_of_maps_is_in_degrees(georeferenced):
    from rasterio.warp import transform_geom

    assert export("geojson") == 0
    features = json.load(open("out/exports/polygons.geojson"))["features"]
    for name, (labels, zone, transform) in georeferenced.items():
        mine = [feature for feature in features if feature["properties"]["image"] == name]
        for feature in mine:
            longitude, latitude = np.array(feature["geometry"]["coordinates"][0]).T
            assert (abs(latitude - 45.15) < 0.01).all()
            assert (abs(longitude - (9 if zone == 32632 else 15)) < 0.05).all()
            assert signed_area(feature["geometry"]["coordinates"][0]) > 0
            assert feature["properties"]["area"] == 100 * feature["properties"]["pixels"]
        back = [
            feature | {"geometry": transform_geom("EPSG:4326", f"EPSG:{zone}", feature["geometry"])} for feature in mine
        ]
        np.testing.assert_array_equal(painted(back, transform, labels.shape), labels)


def test_geopackage_has_a_layer_for_each_coordinate_system(georeferenced, monkeypatch):
    pyogrio = pytest.importorskip("pyogrio")
    import shapely
    from pyogrio.raw import read

    monkeypatch.setattr("smooseg_fast.export.geopackage.TOGETHER", 3)
    assert export("gpkg", "--out", "x.gpkg") == 0
    assert pyogrio.list_layers("x.gpkg").tolist() == [["EPSG_32632", "Polygon"], ["EPSG_32633", "Polygon"]]
    for layer, names in (("EPSG_32632", ["a.tif"]), ("EPSG_32633", ["deep/b c.tif", "deep/ü.tif"])):
        about, _, geometry, columns = read("x.gpkg", layer=layer)
        assert about["crs"] == layer.replace("_", ":")
        table = [dict(zip(about["fields"], row)) for row in zip(*columns)]
        assert {row["image"] for row in table} == set(names)
        for name in names:
            features = [
                {"properties": row, "geometry": json.loads(shapely.to_geojson(shapely.from_wkb(shape)))}
                for row, shape in zip(table, geometry)
                if row["image"] == name
            ]
            labels, _, transform = georeferenced[name]
            np.testing.assert_array_equal(painted(features, transform, labels.shape), labels)
            assert all(f["properties"]["area"] == 100 * f["properties"]["pixels"] for f in features)


def test_geopackage_in_pixels(maps):
    for package in ("rasterio", "shapely", "pyogrio"):
        pytest.importorskip(package)
    from pyogrio.raw import read

    assert export("gpkg") == 0
    about, _, _, columns = read("out/exports/polygons.gpkg", layer="pixels")
    assert about["crs"] in (None, "")
    pixels = dict(zip(about["fields"], columns))["pixels"]
    assert pixels.sum() == sum((labels != IGNORE).sum() for labels in maps.values())
    assert np.isnan(dict(zip(about["fields"], columns))["area"]).all()


def test_masks_that_are_maps_are_read_where_the_photos_are_gone(georeferenced):
    """Labels as GeoTIFF, as predict writes them for maps."""
    import rasterio

    assert export("geojson", "--out", "before.geojson") == 0
    for name, (labels, zone, transform) in georeferenced.items():
        mask, (height, width) = Path("out/masks", name), labels.shape
        options = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint8", "nodata": 255}
        with rasterio.open(mask, "w", crs=f"EPSG:{zone}", transform=transform, **options) as out:
            out.write(labels[None])
        mask.with_suffix(".png").unlink()
    shutil.rmtree("my photos")
    assert export("geojson") == 0
    assert Path("out/exports/polygons.geojson").read_bytes() == Path("before.geojson").read_bytes()
    assert export("npz") == 0
    with np.load("out/exports/labels.npz") as arrays:
        np.testing.assert_array_equal(arrays["labels/a.tif"], georeferenced["a.tif"][0])


def test_geojson_refuses_maps_next_to_pixels(georeferenced, capsys):
    lines = open("out/done.jsonl").read().splitlines()
    record = json.loads(lines[1])
    record["stamp"][0] = record["stamp"][0].replace(".tif", ".png")
    Path("out/done.jsonl").write_text("\n".join([lines[0], json.dumps(record), lines[2]]) + "\n")
    assert export("geojson") == 2
    assert "error: deep/b c.png: has no place on a map, but a.tif has" in capsys.readouterr().err
    assert not list(Path("out/exports").glob("*"))
    assert export("gpkg") == 0  # which has a layer for each


def test_tables_have_areas_on_maps(georeferenced):
    assert export("csv") == 0
    for row in rows("out/exports/images.csv") + rows("out/exports/images_groups.csv"):
        assert (float(row["area"]), row["unit"]) == (100 * int(row["pixels"]), "square metre")


def test_tables_have_the_confidence_that_predict_wrote(maps):
    rng, sums = np.random.default_rng(0), dict.fromkeys((0, 2, 3), 0.0)
    for name, labels in maps.items():
        confidence = rng.integers(0, 255, labels.shape, np.uint8)
        path = Path("out/confidence", name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(confidence).save(path)
        for k in sums:
            sums[k] += confidence[labels == k].sum() / 254
        if name == "a.jpg":
            first = confidence[labels == 0].mean() / 254
    assert export("csv") == 0
    assert float(rows("out/exports/images.csv")[0]["confidence"]) == pytest.approx(first, abs=1e-4)
    for row in rows("out/exports/images_groups.csv"):
        assert float(row["confidence"]) == pytest.approx(sums[int(row["group"])] / int(row["pixels"]), abs=1e-4)


def test_what_predict_wrote_is_exported(trained, tmp_path, capsys):
    """From a run to COCO, with two pages of a stack, and two images that differ in their suffix alone."""
    photos, image = tmp_path / "mixed", draw(20, 48, 64)[0]
    trained = shutil.move(trained, tmp_path / "checkpoint.safetensors")
    shutil.rmtree("out")  # the run's folder
    (photos / "deep").mkdir(parents=True)
    for name in ("a.jpg", "a.png", "deep/b.webp"):
        Image.fromarray(image).save(photos / name)
    Image.fromarray(image).save(photos / "s.tif", save_all=True, append_images=[Image.fromarray(image[:, ::-1])])
    given = ["--checkpoint", str(trained), "--images", str(photos), "--pages", "all", "--out", "out"]
    assert run(predict.main, given) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("exporting --predictions out --format coco")
    assert export("coco") == 0
    assert f"file names are relative to {photos}" in capsys.readouterr().out
    content = json.load(open("out/exports/coco.json"))
    names = {image["id"]: image["file_name"] for image in content["images"]}
    assert list(names.values()) == ["a.jpg", "a.png", "deep/b.webp", "s#1.tif", "s#2.tif"]
    shares = json.load(open("out/shares.json"))["images"]
    for number, name in names.items():
        areas = {a["category_id"] - 1: a["area"] for a in content["annotations"] if a["image_id"] == number}
        assert {str(k): pytest.approx(area / sum(areas.values()), abs=1e-6) for k, area in areas.items()} == shares[
            name
        ]
    groups = [(group.number + 1, group.name) for group in read_groups("out/groups.json")]
    assert [(category["id"], category["name"]) for category in content["categories"]] == groups


@pytest.mark.parametrize("pages", [1, 12])
def test_names_come_back_from_the_stems_of_outputs(pages):
    """Images that differ in their suffix alone, have the names of others' outputs, or are pages."""
    files = ["a.jpg", "a.png", "a.png.png", "a.PNG.tif", "b/a.jpg", "b/s#1.tif", "b/s.tif", "b/s.jpg", "b/t#2.tif"]
    counts = [pages if file in ("b/s.tif", "a.PNG.tif", "b/t#2.tif") else 1 for file in files]
    names = page_names(files, counts)
    places = [file for file, count in zip(files, counts) for _ in range(count)]
    stems = items.output_stems([Path(name) for name in names])
    assert [name_of(stem, f"/photos/{file}") for stem, file in zip(stems, places)] == names


# what is refused, and what a mishap leaves


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictions", "nothing"], "--predictions nothing: holds no done.jsonl; give the --out folder of smooseg"),
        (["--predictions", "several"], "--predictions several: holds groups_4, groups_8; give one of them"),
        (["--predictions", "empty"], "--predictions empty: no image is segmented there yet; resume smooseg predict"),
        (["--format", "voc"], "--format: 'voc' is not known; choose one of coco, cvat, labelstudio, geojson"),
        (["--format", "npz", "--simplify", "1"], "--simplify: does nothing to npz; leave it out"),
        (["--format", "cvat", "--instances"], "--instances: does nothing to cvat; leave it out"),
        (["--min-area", "9"], "--min-area: coco has regions with --instances only"),
        (["--out", "x.txt"], "--out x.txt: coco is a .json file; give x.json"),
        (["--format", "geojson", "--min-area", "99999"], "--min-area 99999: leaves no region; give a smaller one"),
    ],
)
def test_refusals_are_one_line(maps, capsys, arguments, message):
    if "geojson" in arguments:
        pytest.importorskip("rasterio")
        pytest.importorskip("shapely")
    for folder in ("several/groups_8", "several/groups_4", "empty"):
        Path(folder).mkdir(parents=True)
        Path(folder, "done.jsonl").touch()
    assert run(exporting.main, ["--predictions", "out", "--format", "coco", *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert error[0].startswith(f"error: {message}")
    assert not list(Path("out").glob("exports/*"))


@pytest.mark.parametrize("missing", ["rasterio", "shapely"])
def test_polygons_name_the_package_that_is_missing(maps, capsys, monkeypatch, missing):
    from smooseg_fast.export import polygons

    monkeypatch.setattr(polygons, "find_spec", lambda package: None if package == missing else True)
    assert export("geojson") == 2
    assert f"error: --format: polygons need {missing}; pip install 'smooseg_fast[polygons]'" in capsys.readouterr().err


def test_a_mask_that_cannot_be_read_is_skipped(maps, capsys):
    Path("out/masks/a.png").write_bytes(b"junk")
    labels = maps["deep/b c.png"].copy()
    labels[5, 5] = 1  # merged since
    Image.fromarray(labels).save("out/masks/deep/b c.png")
    assert export("coco") == 0
    printed = capsys.readouterr()
    assert "exported   1 of 3 images" in printed.out
    assert "skipped: out/masks/a.png: not an image" in printed.err
    assert "skipped: out/masks/deep/b c.png: holds 1, which is no group in groups.json" in printed.err
    assert [image["file_name"] for image in json.load(open("out/exports/coco.json"))["images"]] == ["deep/ü.tif"]


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_a_stop_leaves_the_file_of_before(maps, capsys, monkeypatch, kind):
    if kind in ("geojson", "gpkg"):
        for package in ("rasterio", "shapely", "pyogrio"):
            pytest.importorskip(package)
    assert export(kind) == 0
    before = {path: path.read_bytes() for path in Path("out/exports").iterdir()}
    plain, seen = PredictionFolder._labels, []

    def stopping(self, mask):
        seen.append(mask)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(self, mask)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionFolder, "_labels", stopping)
        assert export(kind) == 130
    assert "as it was before; the same command starts over\nresume" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out/exports").iterdir()} == before
    assert export(kind) == 0
    if kind != "gpkg":  # which holds the time
        assert {path: path.read_bytes() for path in Path("out/exports").iterdir()} == before


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_an_image_without_data_has_no_regions(maps, kind):
    if kind in ("geojson", "gpkg"):
        for package in ("rasterio", "shapely", "pyogrio"):
            pytest.importorskip(package)
    Image.fromarray(np.full((5, 7), IGNORE, np.uint8)).save("out/masks/a.png")
    arguments = ["--simplify", "1"] if "simplify" in formats.FORMATS[kind].options else []
    assert export(kind, *arguments) == 0
