"""Networks under the names in DINO's and DINOv2's files, their arithmetic written out, and SmooSeg checkpoints."""

import math
import sys
import types
import typing
from collections import OrderedDict

import pytest
import torch
from torch.nn import functional as F

from smooseg_fast.backbones import load_backbone
from smooseg_fast.errors import UserError

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def make_vit(
    dim=64, depth=2, patch=8, side=64, *, hidden=None, scaled=False, gated=False, registers=0, scale=0.1, seed=0
):
    """Random tensors by their original names; positions are large enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, size=scale):
        return torch.randn(shape, generator=generator) * size

    hidden = hidden or 4 * dim
    weights = OrderedDict(
        cls_token=random(1, 1, dim, size=1.0), pos_embed=random(1, 1 + (side // patch) ** 2, dim, size=1.0)
    )
    if scaled:
        weights["mask_token"] = random(1, dim, size=1.0)
    if registers:
        weights["register_tokens"] = random(1, registers, dim, size=1.0)
    weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"] = random(dim, 3, patch, patch), random(dim)
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    layers |= (
        {"mlp.w12": (2 * hidden, dim), "mlp.w3": (dim, hidden)}
        if gated
        else {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    )
    for i in range(depth):
        for name in ("norm1", "norm2"):
            weights[f"blocks.{i}.{name}.weight"], weights[f"blocks.{i}.{name}.bias"] = 1 + random(dim), random(dim)
        for name, shape in layers.items():
            weights[f"blocks.{i}.{name}.weight"], weights[f"blocks.{i}.{name}.bias"] = random(*shape), random(shape[0])
        if scaled:
            weights[f"blocks.{i}.ls1.gamma"], weights[f"blocks.{i}.ls2.gamma"] = (
                random(dim, size=1.0),
                random(dim, size=1.0),
            )
    weights["norm.weight"], weights["norm.bias"] = 1 + random(dim), random(dim)
    return weights


def resized(table, h, w, *, registers):
    """[1, 1+N, D] -> [1, 1+h*w, D], bicubic by (h + 0.1)/sqrt(N); with registers to exactly h, antialiased."""
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
    """uint8 images -> patch tokens after the last norm, [B, h*w, D], in the precision of `weights`."""
    dtype, dim = weights["cls_token"].dtype, weights["cls_token"].shape[-1]
    registers = weights.get("register_tokens")

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

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
        query, key, value = (
            linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
            .unflatten(-1, (3, dim // 64, 64))
            .permute(2, 0, 3, 1, 4)
        )
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


def labels_by_hand(weights, head, image, *, mirror):
    """The paper's formula in float64 for a uint8 [H,W,3] image -> (labels [H,W], lead of the best cosine [H,W])."""
    weights = {name: value.double() for name, value in weights.items()}
    W1, b1, W2, b2, W3, b3, teacher = (head[name].double() for name in ("W1", "b1", "W2", "b2", "W3", "b3", "teacher"))

    def codes(pixels):
        f = features_by_hand(weights, pixels)[0]
        hidden = f @ W2.T + b2
        z = f @ W1.T + b1 + (hidden / (1 + (-hidden).exp())) @ W3.T + b3
        patch = weights["patch_embed.proj.weight"].shape[-1]
        return z.unflatten(0, (pixels.shape[-2] // patch, -1)).permute(2, 0, 1)

    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    z = codes(pixels)
    if mirror:
        z = (z + codes(pixels.flip(-1)).flip(-1)) / 2
    z = F.interpolate(z[None], size=image.shape[:2], mode="bilinear", align_corners=False)[0]
    cosines = torch.einsum("zhw,kz->khw", z / z.norm(dim=0), teacher / teacher.norm(dim=1, keepdim=True))
    best = cosines.topk(2, dim=0).values
    return cosines.argmax(0).numpy(), (best[0] - best[1]).numpy()


def make_head(dim, prototypes=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(W1=(64, dim), b1=(64,), W2=(dim, dim), b2=(dim,), W3=(64, dim), b3=(64,))
    shapes |= dict(student=(prototypes, 64), teacher=(prototypes, 64))
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def make_published(vit, head, settings=None):
    """The dict that Lightning saves for the paper's model, by the published names."""
    state = OrderedDict({f"net.model.{name}": value for name, value in vit.items()})
    for theirs, (weight, bias) in {"1.0": ("W1", "b1"), "2.0": ("W2", "b2"), "2.2": ("W3", "b3")}.items():
        state[f"projection.cluster{theirs}.weight"] = head[weight][:, :, None, None]
        state[f"projection.cluster{theirs}.bias"] = head[bias]
    state |= {"prediction.local_clusters": head["student"], "prediction.global_clusters": head["teacher"]}
    state["linear_probe.weight"] = torch.ones(27, 64, 1, 1)  # such models carry more along
    return {
        "epoch": 2,
        "global_step": 3000,
        "pytorch-lightning_version": "1.8.1",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'test/cluster/mIoU'}": {"best_model_score": torch.tensor(0.5), "dirpath": "/x"}
        },
        "optimizer_states": [
            {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        ],
        "lr_schedulers": [],
        "hparams_name": "cfg",
        "hyper_parameters": {} if settings is None else settings,
    }


def save_with_omegaconf(path, vit, head, settings, *, legacy=False):
    """Saves a checkpoint with a pickled omegaconf tree, whose classes are made for the purpose and gone afterwards."""
    names = {"omegaconf.dictconfig": "DictConfig", "omegaconf.listconfig": "ListConfig", "omegaconf.nodes": "AnyNode"}
    names |= {"omegaconf.base": "ContainerMetadata"}
    modules = {"omegaconf": types.ModuleType("omegaconf"), **{name: types.ModuleType(name) for name in names}}
    for module, name in names.items():
        kind = type(name, (), {"__module__": module, "__init__": lambda self, **state: self.__dict__.update(state)})
        setattr(modules[module], name, kind)
    replaced = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)

    def tree(value, parent=None):
        described = {"ref_type": typing.Any, "object_type": dict, "optional": True, "flags": {"struct": True}}
        metadata = modules["omegaconf.base"].ContainerMetadata(**described, key=None)
        kind = "dict" if isinstance(value, dict) else "list" if isinstance(value, list) else None
        if kind is None:
            return modules["omegaconf.nodes"].AnyNode(_metadata=metadata, _parent=parent, _val=value)
        container = getattr(modules[f"omegaconf.{kind}config"], f"{kind.title()}Config")(
            _metadata=metadata, _parent=parent
        )
        items = (
            {name: tree(item, container) for name, item in value.items()}
            if kind == "dict"
            else [tree(item, container) for item in value]
        )
        container._content = items
        return container

    try:
        torch.save(make_published(vit, head, tree(settings)), path, _use_new_zipfile_serialization=not legacy)
    finally:
        for name, module in replaced.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return path


def error_of(spec: str, *words: str) -> str:
    """The one error line of loading `spec`; asserts that it names `spec` and contains all of `words`."""
    with pytest.raises(UserError) as caught:
        load_backbone(spec)
    line = str(caught.value)
    assert line.startswith(f"--backbone {spec}: ")
    assert "\n" not in line
    for word in words:
        assert word in line
    return line
