"""Networks with the names of DINO's and DINOv2's own files, their arithmetic written out, and the checkpoints of SmooSeg around them."""

import math
from collections import OrderedDict

import torch
from torch.nn import functional as F

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def make_vit(dim=64, depth=2, patch=8, side=64, *, hidden=None, scaled=False, gated=False, registers=0, scale=0.1, seed=0):
    """Random tensors by their original names; positions are large enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, size=scale):
        return torch.randn(shape, generator=generator) * size

    hidden = hidden or 4 * dim
    weights = OrderedDict(
        cls_token=random(1, 1, dim, size=1.0),
        pos_embed=random(1, 1 + (side // patch) ** 2, dim, size=1.0),
    )
    if scaled:
        weights["mask_token"] = random(1, dim, size=1.0)
    if registers:
        weights["register_tokens"] = random(1, registers, dim, size=1.0)
    weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"] = random(dim, 3, patch, patch), random(dim)
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    layers |= {"mlp.w12": (2 * hidden, dim), "mlp.w3": (dim, hidden)} if gated else {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    for i in range(depth):
        for name in ("norm1", "norm2"):
            weights[f"blocks.{i}.{name}.weight"], weights[f"blocks.{i}.{name}.bias"] = 1 + random(dim), random(dim)
        for name, shape in layers.items():
            weights[f"blocks.{i}.{name}.weight"], weights[f"blocks.{i}.{name}.bias"] = random(*shape), random(shape[0])
        if scaled:
            weights[f"blocks.{i}.ls1.gamma"], weights[f"blocks.{i}.ls2.gamma"] = random(dim, size=1.0), random(dim, size=1.0)
    weights["norm.weight"], weights["norm.bias"] = 1 + random(dim), random(dim)
    return weights


def resized(table, h, w, *, registers):
    """[1, 1+N, D] -> [1, 1+h*w, D]: bicubic. DINO and DINOv2 scale by (h + 0.1)/sqrt(N); with registers, to h exactly and antialiased."""
    side = math.isqrt(table.shape[1] - 1)
    if h == w == side:
        return table
    patches = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if registers:
        patches = F.interpolate(patches, size=(h, w), mode="bicubic", antialias=True)
    else:
        patches = F.interpolate(patches, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
    return torch.cat((table[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)


def features_by_hand(weights, images):
    """Patch tokens after the last norm, [B, h*w, D], of uint8 images, in the tensors' own precision."""
    dtype, dim = weights["cls_token"].dtype, weights["cls_token"].shape[-1]
    registers = weights.get("register_tokens")

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def scaled(x, name):
        return x * weights.get(name, torch.ones((), dtype=dtype))

    pixels = ((images / 255 - MEAN) / STD).to(dtype)
    patch = weights["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(pixels, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=patch)
    h, w = x.shape[-2:]
    x = torch.cat((weights["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
    x = x + resized(weights["pos_embed"], h, w, registers=registers is not None)
    if registers is not None:
        x = torch.cat((x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]), dim=1)
    for i in range(sum(name.endswith("norm1.weight") for name in weights)):
        block = f"blocks.{i}"
        query, key, value = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, dim // 64, 64)).permute(2, 0, 3, 1, 4)
        attended = (query @ key.mT / 8).softmax(-1) @ value
        x = x + scaled(linear(attended.transpose(1, 2).flatten(2), f"{block}.attn.proj"), f"{block}.ls1.gamma")
        y = norm(x, f"{block}.norm2")
        if f"{block}.mlp.w12.weight" in weights:
            gate, up = linear(y, f"{block}.mlp.w12").chunk(2, -1)
            y = linear(gate * torch.sigmoid(gate) * up, f"{block}.mlp.w3")
        else:
            y = linear(F.gelu(linear(y, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + scaled(y, f"{block}.ls2.gamma")
    return norm(x, "norm")[:, -h * w :]
