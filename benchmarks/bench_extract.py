"""Features of 1024 x 512 JPEGs: extraction next to the backbone alone, for a ViT and a backbone without cost."""

import extraction
import pytest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("crops", "images"), [("center", 32), ("slide", 6)])  # one square a photo, five that slide
def bench_extraction_with_a_vit(crops, images, dtype, bench, tmp_path):
    backbone = extraction.random_vit(tmp_path / "vit", bench.device, dtype, bench.smoke)
    alternate(bench, "vit_s8" if crops == "center" else f"vit_s8_{crops}", images, backbone, dtype, tmp_path, crops)


def bench_extraction_with_a_trivial_backbone(bench, tmp_path):
    alternate(bench, "mean_colours", 256, extraction.Pooled(bench.device), "float32", tmp_path)


def alternate(bench, shape, images, backbone, dtype, place, crops="center"):
    photos = extraction.Photos(images)
    work = extraction.Extraction(place, photos.shrunk() if bench.smoke else photos, backbone, crops)
    runs = {"backbone alone": work.backbone_alone, "extraction": work.whole}
    bench.alternating("extract", shape, vars(work.photos), runs, dtype, between=work.tidy)
