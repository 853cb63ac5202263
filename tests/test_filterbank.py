"""The built-in features: responses to gratings, invariance to light, and independence of the batch."""

import math

import pytest
import torch
import torch.nn.functional as F

from smooseg_fast.backbones import load_backbone
from smooseg_fast.backbones.filterbank import (
    DIM,
    ORIENTATIONS,
    SCALES,
    WAVELENGTH,
    Filterbank,
    blur,
    gabor_pairs,
    mirrored,
)
from smooseg_fast.datasets.mosaic import Mosaic


@pytest.fixture(scope="module")
def bank():
    return Filterbank()


@pytest.fixture(scope="module")
def images():
    mosaic = Mosaic("train", 3, 96)
    return torch.stack([torch.from_numpy(mosaic.image(i)).permute(2, 0, 1) for i in range(3)])


def test_shape_and_name(bank, images):
    features, grid = bank(images[:, :, :64, :88])
    assert features.shape == (3, 88, DIM)
    assert grid == (8, 11)
    assert features.dtype == torch.float32
    assert (bank.patch, bank.dim) == (8, DIM)
    assert load_backbone("filterbank").digest == bank.digest


def test_one_image_equals_itself_in_a_batch(bank, images):
    together = bank(images)[0]
    for i in range(3):
        torch.testing.assert_close(bank(images[i : i + 1])[0][0], together[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", range(SCALES))
@pytest.mark.parametrize("orientation", [0, 3, 6])
def test_a_grating_answers_at_its_scale_and_orientation(bank, scale, orientation):
    angle, wavelength = math.pi * orientation / ORIENTATIONS, WAVELENGTH * 2**scale * 1.25
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    grey = 0.5 + 0.3 * torch.sin(2 * math.pi / wavelength * (x * math.cos(angle) + y * math.sin(angle)))
    answer = bank.amplitudes(grey[None, None])[0][:, :, 4:-4, 4:-4].mean((2, 3))
    best = divmod(int(answer.argmax()), ORIENTATIONS)
    assert best == (scale, orientation)
    # and with the image turned by a right angle, at the orientation turned by one
    turned = bank.amplitudes(grey.T[None, None].flip(2))[0][:, :, 4:-4, 4:-4].mean((2, 3))
    assert int(turned[scale].argmax()) == (orientation + ORIENTATIONS // 2) % ORIENTATIONS


def test_filters_are_unit_and_blind_to_flat_areas():
    filters = gabor_pairs()
    torch.testing.assert_close(filters.flatten(1).norm(dim=1), torch.ones(2 * ORIENTATIONS))
    assert filters.sum((1, 2, 3)).abs().max() < 1e-5


@pytest.mark.parametrize("value", [0, 128, 255])
def test_constant_images_give_finite_equal_rows(bank, value):
    features = bank(torch.full((1, 3, 32, 40), value, dtype=torch.uint8))[0][0]
    assert torch.isfinite(features).all()
    torch.testing.assert_close(features, features[:1].expand_as(features), atol=1e-3, rtol=0)


def test_light_shifts_colour_and_leaves_texture(bank, images):
    """Half the light shifts the lightness of all patches alike and hardly moves relative colour and texture."""
    bright = images[:1].float() / 255 * 0.9 + 0.1
    a, b = bank.measure(bright), bank.measure(bright / 2)
    shift = (a["colour"] - b["colour"])[:, 0]
    assert float(shift.mean()) == pytest.approx(2 * math.log(2), abs=0.15)
    assert float(shift.std()) < 0.1
    for name in ("relative", "profile", "directed", "patchy"):
        assert float((a[name] - b[name]).abs().mean()) < 0.02


def test_relative_colour_sees_faint_contrasts_and_not_the_average(bank):
    """Stripes of 16 pixels: relative colour is +-1 at 10 and at 50 % contrast, bright and dark; noise stays near 0."""
    stripes = torch.arange(512) // 16 % 2 * 2.0 - 1
    for average in (0.2, 0.6):
        for contrast in (0.1, 0.5):
            image = (average * (1 + contrast * stripes)).expand(1, 3, 64, 512)
            lightness = bank.measure(image)["relative"][0, 0]
            torch.testing.assert_close(lightness, stripes[::8].expand(8, 64), atol=0.15, rtol=0)
    noise = bank.measure(0.5 + 0.02 * torch.randn(1, 3, 64, 512, generator=torch.Generator().manual_seed(0)))
    assert float(noise["relative"].abs().mean()) < 0.2


def test_cosines_mean_something(bank, images):
    """Spread out, and higher within a material than between materials."""
    f = F.normalize(bank(images)[0], dim=-1)
    labels = torch.stack([torch.from_numpy(Mosaic("train", 3, 96).label(i))[4::8, 4::8] for i in range(3)]).flatten(1)
    cosines = f[0] @ f[0].T
    same = labels[0][:, None] == labels[0][None]
    assert float(cosines[same].mean()) > float(cosines[~same].mean()) + 0.2
    assert float(cosines.min()) < 0


def test_mirrored_borders():
    x = torch.arange(3.0).expand(3, 3)
    assert mirrored(x, 4)[0].tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0]
    flat = torch.full((1, 1, 5, 7), 3.0)
    torch.testing.assert_close(blur(flat, (1, 4, 6, 4, 1)), flat)


def test_a_turned_image_has_turned_features(bank, images):
    """No channel depends on where up is: turning by a right angle only moves the rows."""
    square = images[:1, :, :64, :64]
    rows = bank(square)[0].reshape(8, 8, DIM)
    turned = bank(square.rot90(1, (2, 3)))[0].reshape(8, 8, DIM)
    torch.testing.assert_close(turned, rows.rot90(1, (0, 1)), atol=0.05, rtol=0)
