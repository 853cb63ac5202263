"""The guided filter and joint upsampling against the formulas as written, pixel by pixel in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import smooseg_kernels as sk
from smooseg_kernels import edge_blocks, edges


def picture(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def maps(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).softmax(-3)


def means_of_cells(values, counted, step):
    """Means [h,w,N] over the counted pixels of the cells of [H,W,N], and how many there are."""
    (H, W), shape = values.shape[:2], (-(-values.shape[0] // step), -(-values.shape[1] // step))
    means, weight = np.zeros((*shape, values.shape[2])), np.zeros(shape)
    for i, j in np.ndindex(*shape):
        rows, columns = slice(i * step, min((i + 1) * step, H)), slice(j * step, min((j + 1) * step, W))
        inside = counted[rows, columns]
        weight[i, j] = inside.sum()
        if inside.any():
            means[i, j] = values[rows, columns][inside].mean(0)
    return means, weight


def filtered_as_written(p, image, radius, eps, step, counted):
    """p [K,H,W], image [H,W,C] in 0..1, both float64 -> [K,H,W]."""
    (K, H, W), C = p.shape, image.shape[2]
    small, weight = means_of_cells(np.concatenate([image, p.transpose(1, 2, 0)], 2), counted, step)
    h, w = weight.shape
    n = max(1, round(radius / step))
    fits, seen = np.zeros((h, w, C + 1, K)), np.zeros((h, w), bool)
    windows = {(i, j): np.s_[max(0, i - n) : i + n + 1, max(0, j - n) : j + n + 1] for i, j in np.ndindex(h, w)}
    for place, window in windows.items():
        share = weight[window].ravel()
        seen[place] = share.sum() > 0
        if not seen[place]:
            continue
        rows = small[window].reshape(-1, C + K)
        mean = np.average(rows, 0, share)
        centred = (rows - mean) * share[:, None] / share.sum()
        covariance = centred.T @ (rows - mean)
        slope = np.linalg.solve(covariance[:C, :C] + eps * np.eye(C), covariance[:C, C:])
        fits[place] = np.concatenate([slope, (mean[C:] - mean[:C] @ slope)[None]])
    lines = np.zeros_like(fits)
    for place, window in windows.items():
        if seen[window].any():
            lines[place] = fits[window][seen[window]].mean(0)
    flat = torch.from_numpy(lines.reshape(h, w, -1)).permute(2, 0, 1)[None]
    fine = F.interpolate(flat, size=(h * step, w * step), mode="bilinear")[0, :, :H, :W]
    fine = fine.unflatten(0, (C + 1, K)).numpy()
    return np.einsum("hwc,ckhw->khw", image, fine[:C]) + fine[C]


@pytest.mark.parametrize(
    ("K", "H", "W", "radius", "step"),
    [(3, 13, 10, 2, 1), (1, 9, 17, 5, 2), (2, 11, 12, 4, 3), (2, 5, 3, 9, 1), (4, 1, 6, 1, 1), (2, 7, 7, 40, None)],
)
@pytest.mark.parametrize("colour", [True, False], ids=["colour", "grey"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "whole"])
def test_the_guided_filter_is_the_formula(K, H, W, radius, step, colour, masked):
    image, p = picture(H, W, *([3] if colour else [])), maps(K, H, W)
    counted = np.random.default_rng(3).random((H, W)) < 0.5 if masked else np.ones((H, W), bool)
    guide = image.double().view(H, W, -1).numpy() / 255
    expected = filtered_as_written(p.numpy(), guide, radius, 0.01, step or radius // 4, counted)
    options = {"radius": radius, "eps": 0.01, "subsample": step, "mask": torch.from_numpy(counted) if masked else None}
    result = sk.guided_filter(p, image, **options)
    if not masked:
        torch.testing.assert_close(result.sum(0), torch.ones(H, W, dtype=torch.float64))
    reached = expected.sum(0) > 0.5  # elsewhere no window has a counted pixel
    np.testing.assert_allclose(result.numpy()[:, reached], expected[:, reached], atol=1e-11)
    assert torch.equal(result[:, ~reached], p[:, ~torch.from_numpy(reached)])
    single = sk.guided_filter(p.float(), image, **options)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), result, atol=2e-4, rtol=0)


def test_noise_goes_by_the_filter_of_every_channel_by_itself(monkeypatch):
    monkeypatch.setattr(edges, "NOISE_PIXELS", 1)  # strips of 8 rows
    image, counted = picture(19, 6, 3).numpy() / 255.0, np.random.default_rng(0).random((19, 6)) < 0.6
    guide, weight = torch.from_numpy(image)[None], torch.from_numpy(counted)[None, ..., None].double()
    clean = edges.denoised(guide, weight, radius=2, eps=1e-2)[0].numpy()
    for c in range(3):
        channel = image[..., c]
        expected = filtered_as_written(channel[None], channel[..., None], 2, 1e-2, 1, counted)[0]
        np.testing.assert_allclose(clean[..., c][counted], expected[counted], atol=1e-12)
    torch.testing.assert_close(edges.denoised(guide, torch.ones_like(weight), radius=0, eps=1e-2), guide)


def test_denoised_colours_keep_their_edges():
    sides = torch.where(torch.arange(20) < 10, 0.3, 0.6).expand(1, 16, 20)[..., None]
    guide = sides + 0.01 * torch.randn(sides.shape, generator=torch.Generator().manual_seed(0))
    clean = edges.denoised(guide, torch.ones_like(guide), radius=2, eps=3e-4)
    assert (clean - sides).std() < 0.7 * (guide - sides).std()
    assert (clean[:, :, 10] - clean[:, :, 9]).mean() > 0.29


def upsampled_as_written(scores, image, size, window, sigma_position, sigma_colour):
    """scores [K,h,w], image [H,W,C] 0..255 -> [K,H,W]."""
    (K, h, w), (H, W) = scores.shape, image.shape[:2]
    y, x = (np.arange(H) + 0.5) * h / size[0], (np.arange(W) + 0.5) * w / size[1]
    colours, reach = np.zeros((h, w, image.shape[2])), window // 2
    for i, j in np.ndindex(h, w):
        cell = image[np.floor(y) == i][:, np.floor(x) == j]
        colours[i, j] = cell.mean((0, 1)) if cell.size else 0
    fine = np.zeros((K, H, W))
    for row, column in np.ndindex(H, W):
        i, j = int(y[row]), int(x[column])
        total = 0.0
        for a in range(max(0, i - reach), min(h, i + reach + 1)):
            for b in range(max(0, j - reach), min(w, j + reach + 1)):
                position = (y[row] - a - 0.5) ** 2 + (x[column] - b - 0.5) ** 2
                colour = ((image[row, column] - colours[a, b]) ** 2).sum()
                weight = np.exp(-position / (2 * sigma_position**2) - colour / (2 * sigma_colour**2))
                fine[:, row, column] += weight * scores[:, a, b]
                total += weight
        fine[:, row, column] /= total
    return fine


@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize(
    ("grid", "shape", "size"),
    [((3, 4), (12, 16), None), ((2, 5), (9, 13), None), ((4, 3), (13, 10), (15, 12)), ((1, 1), (2, 3), None)],
)
@pytest.mark.parametrize("colour", [True, False], ids=["colour", "grey"])
def test_joint_upsampling_is_the_formula(monkeypatch, grid, shape, size, window, colour):
    image, scores = picture(*shape, *([3] if colour else [])), maps(2, *grid) - 0.3
    guide = image.double().view(*shape, -1).numpy()
    expected = upsampled_as_written(scores.numpy(), guide, size or shape, window, 0.6, 90.0)
    options = {"size": size, "window": window, "sigma_position": 0.6, "sigma_colour": 90.0}
    result = sk.joint_upsample(scores, image, **options)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)
    monkeypatch.setattr(edge_blocks, "BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(sk.joint_upsample(scores, image, **options), result, atol=1e-14, rtol=0)
    single = sk.joint_upsample(scores.float(), image, **options)
    torch.testing.assert_close(single.double(), result, atol=1e-5, rtol=0)


def test_colours_far_from_all_patches_take_the_nearest():
    image = torch.zeros(8, 8, 3, dtype=torch.uint8)
    image[0, 0], image[:, 4:] = 255, 200
    fine = sk.joint_upsample(torch.eye(2)[:, None].expand(2, 1, 2), image, sigma_colour=1.0)
    assert fine.isfinite().all()
    assert fine[1, 0, 0] > 0.99, "the white pixel is nearer to the bright patch's colour"


def test_edges_of_the_picture_come_back():
    """A disc that the patches blur: the borders lie on the picture's again."""
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    disc = ((y - 45) ** 2 + (x - 50) ** 2 < 30**2).float()
    image = (60 + 120 * disc[..., None] + torch.randn(96, 96, 3, generator=torch.Generator().manual_seed(0)) * 8).byte()
    share = F.avg_pool2d(disc[None, None], 8)[0]
    patches = torch.cat([1 - share, share])
    blurred = F.interpolate(patches[None], size=(96, 96), mode="bilinear")[0]
    wrong = {
        "bilinear": (blurred.argmax(0) != disc).sum(),
        "guided": (sk.guided_filter(blurred, image, radius=8, eps=1e-3, subsample=1).argmax(0) != disc).sum(),
        "joint": (sk.joint_upsample(patches, image, window=3).argmax(0) != disc).sum(),
    }
    assert wrong["bilinear"] > 60
    assert wrong["guided"] < 10
    assert wrong["joint"] == 0


def test_gradients_and_batches():
    image, grey, p = picture(2, 6, 5, 3), picture(2, 6, 5, seed=5), maps(2, 3, 6, 5).requires_grad_()
    scores = maps(2, 2, 3, 2).requires_grad_()
    for guide in (image, grey):
        for step in (1, 2):
            assert torch.autograd.gradcheck(
                lambda p, g=guide, s=step: sk.guided_filter(p, g, radius=2, eps=0.01, subsample=s), p
            )
        assert torch.autograd.gradcheck(lambda scores, g=guide: sk.joint_upsample(scores, g, sigma_colour=60), scores)
        for n in range(2):
            torch.testing.assert_close(
                sk.guided_filter(p, guide, radius=2, eps=0.01)[n], sk.guided_filter(p[n], guide[n], radius=2, eps=0.01)
            )
            torch.testing.assert_close(sk.joint_upsample(scores, guide)[n], sk.joint_upsample(scores[n], guide[n]))
        floats = guide.double() / 255
        torch.testing.assert_close(sk.joint_upsample(scores, floats), sk.joint_upsample(scores, guide))


def test_a_window_of_the_picture_gives_its_values():
    image, p = picture(40, 36, 3), maps(3, 40, 36, dtype=torch.float32)
    whole = sk.guided_filter(p, image, radius=4, eps=0.01, subsample=2)
    part = sk.guided_filter(p[:, 12:, 8:], image[12:, 8:], radius=4, eps=0.01, subsample=2)
    torch.testing.assert_close(part[:, 10:, 10:], whole[:, 22:, 18:], atol=1e-6, rtol=0)


def test_strips_and_blocks_have_gradients_of_any_order(monkeypatch):
    image, p, scores = picture(1, 7, 5, 3), maps(1, 2, 7, 5).requires_grad_(), maps(1, 2, 3, 2).requires_grad_()
    monkeypatch.setattr(edge_blocks, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(edge_blocks, "STRIP_ELEMENTS", 1)
    monkeypatch.setattr(edge_blocks, "LINE_ELEMENTS", {"cpu": 1})
    for step in (1, 2, 6):  # at 6 the last strip lies outside of the picture
        guided = partial(sk.guided_filter, image=image, radius=2, eps=0.01, subsample=step)
        assert torch.autograd.gradcheck(guided, p, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda p, guided=guided: guided(p).square(), p, fast_mode=True)
    upsampled = partial(sk.joint_upsample, image=image, sigma_colour=60)
    assert torch.autograd.gradcheck(upsampled, scores)
    assert torch.autograd.gradgradcheck(lambda scores: upsampled(scores).square(), scores, fast_mode=True)


P, IMAGE = torch.rand(2, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: sk.guided_filter(P[0], IMAGE, radius=1, eps=0.1), ValueError, r"probabilities must have shape \[K"),
        (lambda: sk.guided_filter(P.int(), IMAGE, radius=1, eps=0.1), TypeError, "probabilities must be fp32"),
        (lambda: sk.guided_filter(P, IMAGE[:4], radius=1, eps=0.1), ValueError, r"image must have the \[8, 8\] pixels"),
        (lambda: sk.guided_filter(P, IMAGE.int(), radius=1, eps=0.1), TypeError, "image must be uint8"),
        (lambda: sk.guided_filter(P, IMAGE[..., :2], radius=1, eps=0.1), ValueError, r"image must have shape \[H, W"),
        (lambda: sk.guided_filter(P, IMAGE.float().requires_grad_(), radius=1, eps=0.1), ValueError, "image is a"),
        (lambda: sk.guided_filter(P, IMAGE, radius=0, eps=0.1), ValueError, "radius must be at least 1, got 0"),
        (lambda: sk.guided_filter(P, IMAGE, radius=1.5, eps=0.1), TypeError, "radius must be an integer"),
        (lambda: sk.guided_filter(P, IMAGE, radius=1, eps=0), ValueError, "eps must be a finite number above 0"),
        (lambda: sk.guided_filter(P, IMAGE, radius=1, eps=1, subsample=0), ValueError, "subsample must be at least 1"),
        (lambda: sk.guided_filter(P, IMAGE, radius=1, eps=1, mask=P[0]), TypeError, "mask must be a bool tensor"),
        (lambda: sk.guided_filter(P, IMAGE, radius=1, eps=1, mask=P > 0), ValueError, r"mask must have shape \[8, 8\]"),
        (lambda: sk.joint_upsample(P, IMAGE[:4]), ValueError, "image must have a pixel for each"),
        (lambda: sk.joint_upsample(P, IMAGE, window=4), ValueError, "window must be 3 or 5, got 4"),
        (lambda: sk.joint_upsample(P, IMAGE, sigma_colour=0), ValueError, "sigma_colour must be a finite number"),
        (lambda: sk.joint_upsample(P, IMAGE, size=(8, 12)), ValueError, "size must have a width of at least"),
        (lambda: sk.joint_upsample(P[None], IMAGE), ValueError, r"image must have shape \[1, H, W, 3\] or"),
        (lambda: sk.joint_upsample(P, IMAGE.numpy()), TypeError, "image must be a tensor"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()
