"""DINOv3's own files as backbones, against their arithmetic written out."""

import math

import pytest
import torch
from torch.nn import functional as F
from weights import MEAN, STD, error_of

from smooseg_fast.backbones import load_backbone
from smooseg_fast.backbones.catalogue import licence_of
from smooseg_fast.backbones.original import read_original, title

REGISTERS = 4


def make_dinov3(dim=128, heads=2, depth=2, hidden=256, *, gated=False, bias=True):
    """Random tensors by their original names, with a bias of the keys, which is masked."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, size=0.1):
        return torch.randn(shape, generator=generator) * size

    weights = {
        "cls_token": random(1, 1, dim, size=1.0),
        "storage_tokens": random(1, REGISTERS, dim, size=1.0),
        "mask_token": random(1, dim),
        "rope_embed.periods": (100.0 ** (torch.arange(dim // heads // 4) * 4 * heads / dim)).bfloat16(),
        "patch_embed.proj.weight": random(dim, 3, 16, 16),
        "patch_embed.proj.bias": random(dim),
        "norm.weight": 1 + random(dim),
        "norm.bias": random(dim),
        "local_cls_norm.weight": random(dim),
    }
    layers = {"attn.proj": (dim, dim)}
    layers |= dict.fromkeys(("mlp.w1", "mlp.w2"), (hidden, dim)) if gated else {"mlp.fc1": (hidden, dim)}
    layers["mlp.w3" if gated else "mlp.fc2"] = (dim, hidden)
    for i in range(depth):
        block = f"blocks.{i}"
        weights[f"{block}.attn.qkv.weight"] = random(3 * dim, dim)
        if bias:
            weights[f"{block}.attn.qkv.bias"] = random(3 * dim)
            weights[f"{block}.attn.qkv.bias_mask"] = torch.ones(3 * dim)
            weights[f"{block}.attn.qkv.bias_mask"][dim : 2 * dim] = 0
        for name, shape in layers.items():
            weights[f"{block}.{name}.weight"], weights[f"{block}.{name}.bias"] = random(*shape), random(shape[0])
        for n in (1, 2):
            weights[f"{block}.norm{n}.weight"], weights[f"{block}.norm{n}.bias"] = 1 + random(dim), random(dim)
            weights[f"{block}.ls{n}.gamma"] = random(dim, size=1.0)
    return weights


def features_by_hand(weights, images, heads):
    """uint8 images -> patch tokens after the last norm [B,h*w,D] in float64, with axial rotary positions in -1..1."""
    weights = {name: value.double() for name, value in weights.items()}
    dim = weights["cls_token"].shape[-1]

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (dim,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = F.conv2d(((images / 255 - MEAN) / STD).double(), weights["patch_embed.proj.weight"], stride=16)
    h, w = x.shape[-2:]
    x = x.flatten(2).mT + weights["patch_embed.proj.bias"]
    x = torch.cat([weights[name].expand(len(x), -1, -1) for name in ("cls_token", "storage_tokens")] + [x], 1)
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in (h, w))
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(h * w, 2, 1)
    frequencies = 100.0 ** -(torch.arange(dim // heads // 4, dtype=torch.float64) * 4 * heads / dim)
    angles = (2 * math.pi * places * frequencies).flatten(1).tile(2)

    def turned(x):
        patches = x[..., -h * w :, :]
        first, second = patches.chunk(2, -1)
        patches = patches * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
        return torch.cat([x[..., : -h * w, :], patches], -2)

    for i in range(sum(name.endswith("norm1.weight") for name in weights)):
        block = f"blocks.{i}"
        qkv = norm(x, f"{block}.norm1") @ weights[f"{block}.attn.qkv.weight"].T
        if f"{block}.attn.qkv.bias" in weights:
            qkv = qkv + weights[f"{block}.attn.qkv.bias"] * weights[f"{block}.attn.qkv.bias_mask"]
        query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weight = (turned(query) @ turned(key).mT / math.sqrt(dim / heads)).softmax(-1)
        attended = (weight @ value).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"{block}.attn.proj") * weights[f"{block}.ls1.gamma"]
        y = norm(x, f"{block}.norm2")
        if f"{block}.mlp.w1.weight" in weights:
            y = linear(F.silu(linear(y, f"{block}.mlp.w1")) * linear(y, f"{block}.mlp.w2"), f"{block}.mlp.w3")
        else:
            y = linear(F.gelu(linear(y, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + y * weights[f"{block}.ls2.gamma"]
    return norm(x, "norm")[:, -h * w :]


@pytest.mark.parametrize(
    ("options", "heads"),
    [({}, 2), ({"gated": True, "hidden": 192}, 2), ({"heads": 1, "bias": False}, 1)],
    ids=["plain", "gated", "wide heads without bias"],
)
def test_features_are_those_of_the_arithmetic_written_out(tmp_path, options, heads):
    weights = make_dinov3(**options)
    torch.save({"teacher": {f"backbone.{name}": value for name, value in weights.items()}}, tmp_path / "v3.pth")
    backbone = load_backbone(str(tmp_path / "v3.pth"))
    assert (backbone.patch, backbone.dim) == (16, 128)
    images = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features, grid = backbone(images)
    assert grid == (3, 5)
    expected = features_by_hand(weights, images, heads)
    assert (features - expected).abs().max() < 2e-5 * expected.abs().max()


def test_a_file_and_its_folder_are_one_backbone(tmp_path):
    torch.save(make_dinov3(), tmp_path / "dinov3_vits16_pretrain.pth")
    files = read_original(tmp_path / "dinov3_vits16_pretrain.pth")
    assert title(files.config) == "DINOv3 ViT-128/16 with 4 registers"
    files.write(tmp_path / "folder")
    one, two = load_backbone(str(tmp_path / "dinov3_vits16_pretrain.pth")), load_backbone(str(tmp_path / "folder"))
    assert one.digest == two.digest
    assert licence_of(str(tmp_path / "dinov3_vits16_pretrain.pth")) == "DINOv3 License"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_embed.periods": torch.ones(16)}, ["rope_embed.periods are not those of DINOv3"]),
        ({"storage_tokens": None}, ["not a whole DINOv3", "storage_tokens"]),
        ({"norm.bias": None}, ["not a whole DINOv3 ViT-128/16", "norm.bias is missing"]),
        ({"storage_tokens": torch.ones(3)}, ["not a whole DINOv3"]),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, changes, words):
    weights = {name: value for name, value in (make_dinov3() | changes).items() if value is not None}
    torch.save(weights, tmp_path / "v3.pth")
    error_of(str(tmp_path / "v3.pth"), *words)
