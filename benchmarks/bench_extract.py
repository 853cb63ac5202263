"""Features of 1024 x 512 JPEGs: the whole extraction beside the backbone alone, and with a backbone that costs nothing; decoding alone."""

import os
from contextlib import ExitStack

import extraction
import pytest

# what the machine has half precision for is measured in both
DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("crops", "images"), [("center", 32), ("slide", 6)])
def bench_extraction_with_a_vit(crops, images, dtype, bench, tmp_path):
    """Alternating, since the difference is small. A photo has one square in the center, and five that slide."""
    photos = extraction.Photos(images)
    photos = photos.shrunk() if bench.smoke else photos
    backbone = extraction.random_vit(tmp_path / "vit", bench.device, dtype, bench.smoke)
    work = extraction.Extraction(tmp_path, photos, backbone, crops)
    work.check()
    runs = {"backbone alone": work.backbone_alone, "extraction": work.whole}
    shape = "vit_s8" if crops == "center" else f"vit_s8_{crops}"
    bench.alternating("extract", shape, vars(photos), runs, dtype, rounds=5, between=work.tidy)


def bench_extraction_with_a_trivial_backbone(bench, tmp_path):
    photos = extraction.Photos(256)
    photos = photos.shrunk() if bench.smoke else photos
    work = extraction.Extraction(tmp_path, photos, extraction.Pooled(bench.device))
    work.check()
    workers = os.cpu_count() or 1
    decoding = extraction.Decoding(work, workers)
    with ExitStack() as stack:
        runs = {
            "backbone alone": work.backbone_alone,
            "extraction": work.whole,
            "decoding, 1 thread": decoding.one_thread,
        }
        for name, kind in extraction.POOLS.items():
            executor, run = decoding.pool(kind)
            stack.enter_context(executor)
            runs[f"decoding, {workers} {name}"] = run
        bench.alternating("extract", "mean_colours", vars(photos), runs, "float32", rounds=7, between=work.tidy)
