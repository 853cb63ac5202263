"""DINO's and DINOv2's own files as backbones, against their arithmetic written out."""

import pytest
import torch
from weights import error_of, features_by_hand, make_vit

from smooseg_fast.backbones import load_backbone
from smooseg_fast.backbones.original import read_original, title, vit_files

FAMILIES = {
    "dino": dict(),
    "dino-16": dict(patch=16, side=96, dim=128),
    "dinov2": dict(patch=14, side=70, scaled=True),
    "dinov2-giant": dict(patch=14, side=70, scaled=True, gated=True, hidden=176),
    "dinov2-registers": dict(patch=14, side=70, scaled=True, registers=4),
    "dinov2-giant-registers": dict(patch=14, side=70, scaled=True, gated=True, hidden=176, registers=4),
}


def make_images(height, width, batch=2):
    return torch.randint(
        0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def save(path, value, *, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def deviation(features, expected):
    return ((features - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_arithmetic_written_out(tmp_path, family, legacy):
    weights = make_vit(**FAMILIES[family])
    backbone = load_backbone(save(tmp_path / "vit.pth", weights, legacy=legacy))
    patch, side = FAMILIES[family].get("patch", 8), FAMILIES[family].get("side", 64)
    assert (backbone.patch, backbone.dim) == (patch, weights["cls_token"].shape[-1])
    exact = {name: value.double() for name, value in weights.items()}
    for size in ((side, side), (2 * side, 2 * side), (4 * patch, 9 * patch)):
        images = make_images(*size)
        features, grid = backbone(images)
        assert grid == (size[0] // patch, size[1] // patch)
        expected = features_by_hand(exact, images)
        same_precision = features_by_hand(weights, images)
        assert deviation(features, expected) <= 2 * deviation(same_precision, expected) + 1e-6, size


@pytest.mark.parametrize(("side", "depth"), [(224, 12), (320, 3)])
def test_a_vit_s8_at_the_papers_sizes(tmp_path, side, depth):
    weights = make_vit(384, depth, 8, 224, scale=0.05)
    backbone = load_backbone(save(tmp_path / "dino_deitsmall8_pretrain.pth", weights))
    images = make_images(side, side, batch=1)
    features, grid = backbone(images)
    assert grid == (side // 8, side // 8)
    torch.testing.assert_close(features, features_by_hand(weights, images), rtol=1e-4, atol=1e-4)


def test_the_norms_have_dinos_epsilon(tmp_path):
    """Tokens so small that 1e-6 is of the size of their variance."""
    weights = make_vit()
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        weights[name] *= 1e-3
    images = make_images(64, 64)
    features, _ = load_backbone(save(tmp_path / "vit.pth", weights))(images)
    torch.testing.assert_close(features, features_by_hand(weights, images), rtol=1e-4, atol=1e-4)


HOLDERS = {
    "plain": lambda w, other: w,
    "teacher": lambda w, other: {
        "student": prefixed("module.backbone.", other),
        "teacher": prefixed("backbone.", w),
        "epoch": 99,
    },
    "parallel": lambda w, other: {
        "teacher": prefixed("module.backbone.", w) | {"module.head.mlp.0.weight": torch.ones(2)}
    },
    "student": lambda w, other: {"student": prefixed("module.backbone.", w)},
    "state_dict": lambda w, other: {"state_dict": prefixed("module.", w)},
    "model": lambda w, other: {"model": w, "args": torch.Size([1])},
    "smooseg": lambda w, other: {
        "state_dict": prefixed("net.model.", w) | {"prediction.global_clusters": torch.ones(3, 64)}
    },
    "chunks": lambda w, other: {"teacher": {f"backbone.{k.replace('blocks.', 'blocks.0.')}": v for k, v in w.items()}},
    "classifier": lambda w, other: w | {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)},
}


def prefixed(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_network_is_found_where_checkpoints_have_it(tmp_path, holder):
    weights, other = make_vit(), make_vit(seed=1)
    plain = load_backbone(save(tmp_path / "plain.pth", weights))
    held = load_backbone(save(tmp_path / "held.pth", HOLDERS[holder](weights, other)))
    assert held.digest == plain.digest  # depends on the network, not on its place
    assert held.digest != load_backbone(save(tmp_path / "other.pth", other)).digest


def test_a_file_and_the_folder_written_of_it_are_one_backbone(tmp_path):
    path = save(tmp_path / "vit.pth", make_vit(**FAMILIES["dinov2-giant-registers"]))
    files = read_original(tmp_path / "vit.pth")
    assert title(files.config) == "DINOv2 ViT-64/14 with 4 registers"
    files.write(tmp_path / "folder")
    images = make_images(70, 84)
    one, two = load_backbone(path), load_backbone(str(tmp_path / "folder"))
    assert one.digest == two.digest
    assert torch.equal(one(images)[0], two(images)[0])


def test_loading_is_silent_and_takes_no_random_numbers(tmp_path, capfd):
    state = torch.get_rng_state()
    for number, family in enumerate(FAMILIES.values()):
        load_backbone(save(tmp_path / f"{number}.pth", make_vit(**family)))
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("dim", "patch", "hidden", "scaled", "name"),
    [
        (384, 8, 1536, False, "DINO ViT-S/8"),
        (768, 16, 3072, False, "DINO ViT-B/16"),
        (1024, 14, 4096, True, "DINOv2 ViT-L/14"),
    ],
)
def test_published_networks_have_their_names(dim, patch, hidden, scaled, name):
    with torch.device("meta"):
        files = vit_files(make_vit_like(dim, patch, hidden, scaled))
    assert title(files.config) == name
    assert files.config["num_attention_heads"] == dim // 64


def make_vit_like(dim, patch, hidden, scaled):
    """Has the shapes of a network, but no values."""
    small = make_vit(64, 1, patch, patch * 4, scaled=scaled)
    sides = {64: dim, 192: 3 * dim, 256: hidden}
    return {name: torch.empty([sides.get(n, n) for n in value.shape], device="meta") for name, value in small.items()}


# ---------------------------------------------------------------------------------------------- what is not one of them


def changed(**changes):
    weights = make_vit()
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"conv1.weight": torch.ones(3)},
            ["no vision transformer of DINO, DINOv2", "patch_embed.proj.weight"],
        ),
        ([torch.ones(3)], ["no vision transformer"]),
        (torch.ones(3), ["no vision transformer"]),
        (changed(norm__bias=None), ["not a whole DINO ViT-64/8", "norm.bias is missing"]),
        (changed(blocks__1__attn__proj__weight=None), ["blocks.1.attn.proj.weight is missing"]),
        (changed(dist_token=torch.ones(1, 1, 64)), ["dist_token has no place in it"]),
        (changed(pos_embed=None), ["it has no pos_embed"]),
        (changed(norm__bias=torch.ones(64, dtype=torch.int64)), ["norm.bias is no tensor of floating point"]),
        (changed(norm__bias="text"), ["norm.bias is no tensor of floating point"]),
        (make_vit(96, 1), ["a ViT of 96 channels"]),
        (make_vit(64, 1, hidden=100), ["100 in its MLPs"]),
        (make_vit(64, 1, registers=2), ["no DINO or DINOv2"]),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_other_files_are_refused_in_one_line(tmp_path, value, words):
    error_of(save(tmp_path / "other.pth", value), *words, "give a DINO, DINOv2 or DINOv3 .pth")


@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "blocks__1__attn__qkv__weight"])
def test_tensors_of_another_shape_are_refused(tmp_path, name):
    path = save(tmp_path / "other.pth", changed(**{name: torch.ones(1, 60, 64)}))
    error_of(path, "the weights do not fit the configuration")


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "text.pth").write_text("not weights")
    error_of(str(tmp_path / "text.pth"), "is no file of torch.save")
    (tmp_path / "empty.pth").write_bytes(b"")
    error_of(str(tmp_path / "empty.pth"), "is no file of torch.save")
    whole = save(tmp_path / "vit.pth", make_vit())
    content = (tmp_path / "vit.pth").read_bytes()
    (tmp_path / "vit.pth").write_bytes(content[: len(content) // 2])
    error_of(whole, "cut short or damaged")
