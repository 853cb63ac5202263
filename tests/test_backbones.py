from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from weights import error_of

from smooseg_fast.backbones import load_backbone, precision
from smooseg_fast.backbones.base import Backbone, digest_of
from smooseg_fast.backbones.precision import compute_dtype
from smooseg_fast.errors import UserError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {  # model type -> (configuration, tokens before the patches)
    "vit": (lambda: transformers.ViTConfig(**SMALL, patch_size=8, image_size=64), 1),
    "dinov2": (lambda: transformers.Dinov2Config(**SMALL, patch_size=14, image_size=70), 1),
    "dinov2_with_registers": (
        lambda: transformers.Dinov2WithRegistersConfig(**SMALL, patch_size=14, image_size=70, num_register_tokens=4),
        5,
    ),
    "dinov3_vit": (
        lambda: transformers.DINOv3ViTConfig(**SMALL, patch_size=16, image_size=64, num_register_tokens=4),
        5,
    ),
    "deit": (
        lambda: transformers.DeiTConfig(**SMALL, patch_size=8, image_size=64),
        2,
    ),  # reached as any other type would be
}


def make_model(kind: str, **options) -> nn.Module:
    """A random network whose position table is large enough to matter."""
    torch.manual_seed(0)
    config = FAMILIES[kind][0]()
    for name, value in options.items():
        setattr(config, name, value)
    model = transformers.MODEL_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 1.0 if "position" in name else 0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One saved folder per family; tests that change a folder make their own."""
    root = tmp_path_factory.mktemp("models")
    for kind in FAMILIES:
        make_model(kind).save_pretrained(root / kind)
    return root


@pytest.fixture
def folder(tmp_path):
    make_model("vit").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def make_images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randint(
        0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def normalised(images: Tensor, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) -> Tensor:
    return (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# ----------------------------------------------------------------------------------------------------------------- base


class Blocks(Backbone):
    """Mean colour of each 4x4 block; `give` replaces the result."""

    def __init__(self, give=None):
        super().__init__(name="blocks", digest="0", patch=4, dim=3)
        self.give = give

    def extract(self, images):
        return F.avg_pool2d(images, 4).flatten(2).transpose(1, 2) if self.give is None else self.give


def test_a_backbone_scales_images_and_lays_patches_out_row_by_row():
    images = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)
    images[1, 2, 4:, 8:] = 255
    features, grid = Blocks()(images)
    assert grid == (2, 3)
    assert features.is_contiguous()
    expected = torch.zeros(2, 6, 3)
    expected[1, 5, 2] = 1.0
    assert torch.equal(features, expected)


def test_features_are_constants_that_a_loss_may_use():
    class Learned(Blocks):
        weight = nn.Parameter(torch.ones(3))

        def extract(self, images):
            return super().extract(images) * self.weight

    features, _ = Learned()(make_images(8, 8))
    assert not features.requires_grad
    weight = torch.ones(3, requires_grad=True)
    (features * weight).sum().backward()
    torch.testing.assert_close(weight.grad, features.sum((0, 1)))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, 8, 8), "uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), r"\[1, 1, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "B >= 1"),
        (torch.zeros(1, 3, 8, 10, dtype=torch.uint8), "multiples of the 4-pixel patch of blocks, not 8x10"),
        (torch.zeros(1, 3, 0, 8, dtype=torch.uint8), "not 0x8"),
    ],
    ids=["float", "one-image", "grey", "empty", "ragged", "no-rows"],
)
def test_images_of_another_shape_are_refused(images, words):
    with pytest.raises(ValueError, match=words):
        Blocks()(images)


@pytest.mark.parametrize(
    "give", [torch.zeros(1, 3, 3), torch.zeros(1, 4, 5), torch.zeros(2, 4, 3), torch.zeros(1, 4, 3).long()], ids=str
)
def test_features_of_another_shape_are_refused(give):
    with pytest.raises(UserError, match=r"--backbone blocks: a 8x8 image must give features \[1, 4, 3\]"):
        Blocks(give)(make_images(8, 8, batch=1))


def test_a_digest_sees_names_values_dtypes_shapes_and_boundaries():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0, dtype=torch.bfloat16)}
    base = digest_of("x", state)
    assert base == digest_of("x", dict(reversed(state.items())))
    others = [
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].view(3, 2), "b": state["b"]},
        {"a": state["a"].half(), "b": state["b"]},
        {"a": state["a"].clone().index_fill_(0, torch.tensor([1]), 9.0), "b": state["b"]},
        {"a": state["a"], "b": state["b"] + 1},
    ]
    assert len({base, *(digest_of("x", other) for other in others)}) == 6
    assert digest_of("ab", "c") != digest_of("a", "bc")
    assert digest_of("x", {"a": state["a"].t().contiguous().t()}) == digest_of("x", {"a": state["a"]})


# -------------------------------------------------------------------------------------------------- vision transformers


@pytest.mark.parametrize(
    ("kind", "height", "width"),
    [
        ("vit", 64, 64),  # other sizes: see test_original
        ("dinov2", 70, 70),
        ("dinov2_with_registers", 70, 70),
        ("dinov2_with_registers", 42, 98),
        ("dinov3_vit", 64, 64),
        ("dinov3_vit", 32, 96),
        ("deit", 64, 64),
        ("deit", 40, 88),
    ],
)
def test_tokens_before_the_patches_are_dropped(folders, kind, height, width):
    model, prefix, images = make_model(kind), FAMILIES[kind][1], make_images(height, width)
    resize = {"interpolate_pos_encoding": True} if kind in ("vit", "deit") else {}
    with torch.no_grad():
        expected = model(normalised(images), **resize).last_hidden_state[:, prefix:]
    features, grid = load_backbone(str(folders / kind))(images)
    assert grid == (height // model.config.patch_size, width // model.config.patch_size)
    assert expected.shape[1] == grid[0] * grid[1]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_images_are_normalised_as_the_folder_says(folder):
    images = make_images(64, 64)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]})
    )
    expected = make_model("vit")(normalised(images, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))).last_hidden_state[:, 1:]
    torch.testing.assert_close(load_backbone(str(folder))(images)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_half_precision_keeps_the_features(folders, kind):
    images = make_images(112, 224)
    exact = load_backbone(str(folders / kind), precision="float32")
    backbone = load_backbone(str(folders / kind), precision="bfloat16")
    assert (exact.precision, backbone.precision) == ("float32", "bfloat16")
    assert exact.digest == backbone.digest
    assert all(buffer.dtype != torch.bfloat16 for buffer in backbone.model.buffers())
    features = backbone(images)[0]
    assert features.dtype == torch.bfloat16
    assert F.cosine_similarity(features.float(), exact(images)[0], dim=-1).min() > 0.99


def test_auto_is_what_the_device_is_fast_in(monkeypatch):
    cpu = torch.device("cpu")
    assert compute_dtype("auto", cpu) == torch.float32
    monkeypatch.setattr(precision, "has_matrix_units", lambda: True)
    assert compute_dtype("auto", cpu) == torch.bfloat16
    assert compute_dtype("float32", cpu) == torch.float32
    assert compute_dtype("auto", torch.device("mps")) == torch.float16


def test_a_precision_that_cannot_be(folders):
    with pytest.raises(
        UserError, match="--backbone-precision double: unknown; choose one of auto, float32, bfloat16, float16"
    ):
        load_backbone(str(folders / "vit"), precision="double")
    with pytest.raises(
        UserError, match="--backbone-precision bfloat16: filterbank computes in float32 alone; leave the flag out"
    ):
        load_backbone("filterbank", precision="bfloat16")
    assert load_backbone("filterbank", precision="float32").precision == "float32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_gpu_gives_half_precision_features_close_to_the_cpu(folders, kind):
    images = make_images(112, 224)
    on_cpu, on_gpu = load_backbone(str(folders / kind)), load_backbone(str(folders / kind), "cuda")
    assert on_cpu.digest == on_gpu.digest
    features, grid = on_gpu(images)
    assert (features.device.type, grid) == ("cuda", on_cpu(images)[1])
    assert features.dtype == (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )
    assert F.cosine_similarity(features.cpu().float(), on_cpu(images)[0], dim=-1).min() > 0.99


def test_loading_is_silent_and_takes_no_random_numbers(folders, capfd):
    log, state = transformers.utils.logging, torch.get_rng_state()
    before = (log.get_verbosity(), log.is_progress_bar_enabled())
    for kind in FAMILIES:
        load_backbone(str(folders / kind))(make_images(112, 112))
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_a_digest_follows_weights_configuration_and_normalisation_only(folder):
    first = load_backbone(str(folder)).digest
    assert load_backbone(str(folder)).digest == first
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "5.0.0", "architectures": None}))
    assert load_backbone(str(folder)).digest == first
    path.write_text(json.dumps({**config, "num_attention_heads": 2}))
    seen = {first, load_backbone(str(folder)).digest}
    path.write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    seen.add(load_backbone(str(folder)).digest)
    (folder / "preprocessor_config.json").unlink()
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.bias"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    seen.add(load_backbone(str(folder)).digest)
    assert len(seen) == 4


def test_shards_and_heads_make_no_difference(tmp_path, folders):
    model = make_model("vit")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    classifier = transformers.ViTForImageClassification(model.config)
    classifier.vit.load_state_dict(model.state_dict(), strict=False)
    classifier.save_pretrained(tmp_path / "classifier")
    images = make_images(64, 64)
    expected = load_backbone(str(folders / "vit"))(images)[0]
    for name in ("shards", "classifier"):
        torch.testing.assert_close(load_backbone(str(tmp_path / name))(images)[0], expected, rtol=0, atol=0)
    next((tmp_path / "shards").glob("model-00001-*.safetensors")).unlink()
    error_of(str(tmp_path / "shards"), "no model.safetensors (or all of its shards)")


# ------------------------------------------------------------------------------------------ folders that cannot be used


def test_a_folder_without_a_configuration(tmp_path):
    error_of(str(tmp_path), "no config.json in")


def test_a_configuration_that_cannot_be_read(folder):
    (folder / "config.json").write_text('{"model_type": "vit"')
    error_of(str(folder), "config.json cannot be read")
    (folder / "config.json").write_text("[]")
    error_of(str(folder), "not a JSON object")


def test_pickled_weights_are_never_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error_of(str(folder), "no model.safetensors", "pickled weights are never loaded")


def test_weights_cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    error_of(str(folder), "model.safetensors cannot be read")


def test_weights_that_are_missing_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.bias"], weights["embeddings.cls_token"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    error_of(str(folder), "2 weights that the configuration asks for are missing", "embeddings.cls_token")


def test_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    error_of(str(folder), "weights do not fit the configuration")


@pytest.mark.parametrize(
    ("statistics", "word"),
    [
        ({"image_mean": 0.5}, "image_mean is 0.5"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is [0.5, 0.5]"),
        ({"image_std": [0.2, 0.2, 0]}, "image_std is [0.2, 0.2, 0]"),
        ({"image_std": ["a", "b", "c"]}, "image_std is ['a', 'b', 'c']"),
    ],
    ids=["number", "two", "zero", "text"],
)
def test_normalisation_that_makes_no_sense(folder, statistics, word):
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    error_of(str(folder), "preprocessor_config.json", word)


def test_a_type_that_transformers_does_not_know(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vitt"}))
    error_of(str(folder), "no model of type vitt")
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    error_of(str(folder), "no model of type None")


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.ViTMAEModel(
            transformers.ViTMAEConfig(**SMALL, patch_size=8, image_size=64)
        ),  # drops three tokens of four
        lambda: transformers.SwinModel(
            transformers.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32)
        ),
        lambda: transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=20)),
        lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL, patch_size=8, image_size=64, num_channels=1)),
    ],
    ids=["masked", "merged", "text", "grey"],
)
def test_types_without_one_token_a_patch_are_refused(tmp_path, make):
    make().save_pretrained(tmp_path)
    error_of(str(tmp_path), "model type ", "use a ")


# -------------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_name_without_a_network(hub):
    error_of("facebook/dino-vits8", "the hub could not be reached", "give its folder")


def test_a_hub_name_in_the_cache_needs_no_network(hub, folders):
    repository = hub / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("1" * 40)).symlink_to(folders / "vit", target_is_directory=True)
    backbone = load_backbone("owner/name")
    assert backbone.name == "owner/name"
    assert backbone.digest == load_backbone(str(folders / "vit")).digest


class FakeHub:
    """The three answers of the hub that `fetch` asks for; `folders` maps a revision to what a download gives."""

    def __init__(self, folders, offers=(), error=None):
        self.folders, self.offers, self.error = folders, offers, error

    def snapshot_download(self, name, *, allow_patterns, revision="main", local_files_only=False):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing cached")
        if self.error is not None:
            raise self.error
        return str(self.folders[revision])

    def get_repo_discussions(self, name, *, author, discussion_type, discussion_status):
        assert (author, discussion_type, discussion_status) == ("SFconvertbot", "pull_request", "open")
        return iter(self.offers)


def test_a_repository_of_pickles_is_read_through_its_conversion(folders, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((folders / "vit" / "config.json").read_text())
    fake = FakeHub({"main": tmp_path, "refs/pr/3": folders / "vit"}, offers=[SimpleNamespace(num=3)])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    assert load_backbone("owner/name").digest == load_backbone(str(folders / "vit")).digest
    fake.offers = []
    error_of("owner/name", "no safetensors weights", "never loaded")


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("GatedRepoError", "https://huggingface.co/owner/name"),
        ("RepositoryNotFoundError", "no such model"),
        (None, "could not be reached"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, kind, word):
    # made without __init__, whose arguments differ between versions of huggingface_hub
    error = (
        ConnectionError("a\nb")
        if kind is None
        else getattr(huggingface_hub.errors, kind).__new__(getattr(huggingface_hub.errors, kind))
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeHub({}, error=error))
    error_of("owner/name", word)


# ------------------------------------------------------------------------------------------------------ module:callable

MODULE = """
import torch
from torch import nn
from torch.nn import functional as F

def grid_form(images):
    assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
    return F.avg_pool2d(images, 16)

def row_form(images):
    pooled = F.avg_pool2d(images, 16)
    return pooled.flatten(2).transpose(1, 2), tuple(pooled.shape[-2:])

class Net(nn.Module):
    def __init__(self, fill=0.5):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 32, stride=32)
        nn.init.constant_(self.conv.weight, fill)
        nn.init.zeros_(self.conv.bias)
        self.drop = nn.Dropout(0.9)

    def forward(self, images):
        return self.drop(self.conv(images)).double()

net, other = Net(), Net(0.25)

class Padded:
    patch = 14
    digest = "one"

    def __call__(self, images):
        return images[:, :1, ::14, ::14]

class Demanding:
    def __init__(self, path):
        pass

class Mute:
    pass

def overlapping(images):
    return F.avg_pool2d(images, 16, stride=13)

def stretched(images):
    return F.avg_pool2d(images, (16, 32))

def fixed(images):
    return images.new_zeros(len(images), 4, 14, 14)

def vector(images):
    return images.mean((2, 3))

def rows_alone(images):
    return row_form(images)[0]

def wrong_rows(images):
    return row_form(images)[0], (3, 5)

def whole_numbers(images):
    return grid_form(images).long()

def one_image(images):
    return images.new_zeros(3, 4, 14, 14)

def array(images):
    return grid_form(images).numpy()

def raising(images):
    raise RuntimeError("out of\\nluck")

def halves(images):
    return grid_form(images)
halves.patch = 8

def fraction(images):
    return grid_form(images)
fraction.patch = 16.0

def labelled(images):
    return grid_form(images)
labelled.digest = 5

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "own_features.py"
    sys.modules.pop("own_features", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("name", ["grid_form", "row_form"])
def test_both_output_forms(module, name):
    backbone, images = load_backbone(f"own_features:{name}"), make_images(48, 80)
    assert (backbone.patch, backbone.dim, backbone.name) == (16, 3, f"own_features:{name}")
    features, grid = backbone(images)
    assert grid == (3, 5)
    assert features.is_contiguous()
    torch.testing.assert_close(features, F.avg_pool2d(images / 255, 16).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", ["Net", "net"])
def test_a_module_is_frozen_and_set_to_eval(module, name):
    backbone, images = load_backbone(f"own_features:{name}"), make_images(64, 96)
    assert (backbone.patch, backbone.dim) == (32, 7)
    features, grid = backbone(images)
    assert grid == (2, 3)
    assert features.dtype == torch.float32  # given as float64
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in backbone.target.parameters())
    sums = F.avg_pool2d(images / 255, 32).sum(1).flatten(1) * 32 * 32 * 0.5
    torch.testing.assert_close(features, sums[..., None].expand(-1, -1, 7), rtol=1e-4, atol=1e-3)


def test_the_attribute_patch_is_taken_where_224_does_not_divide(module):
    backbone = load_backbone("own_features:Padded")
    assert (backbone.patch, backbone.dim) == (14, 1)
    assert backbone(make_images(42, 56))[1] == (3, 4)


def test_custom_digests_follow_source_weights_and_the_attribute(module):
    def digest(name):
        sys.modules.pop("own_features", None)
        return load_backbone(f"own_features:{name}").digest

    assert digest("net") == digest("net")
    seen = {digest("net"), digest("other"), digest("grid_form"), digest("row_form"), digest("Padded")}
    assert len(seen) == 5
    before = sys.modules["own_features"]
    before.Padded.digest = "two"  # the same source file
    seen.add(load_backbone("own_features:Padded").digest)
    assert len(seen) == 6
    module.write_text(MODULE + "\n# changed, and therefore perhaps another function\n")
    assert digest("net") not in seen


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", ["importing it failed", "no attribute 'absent'"]),
        ("number", ["is 3", "cannot be called"]),
        ("Demanding", ["importing it failed", "argument: 'path'", "a class must need no arguments"]),
        ("Mute", ["is a Mute", "cannot be called"]),
        ("overlapping", ["grid of 17x17 for 224x224 pixels", "attribute `patch`"]),
        ("stretched", ["grid of 14x7", "attribute `patch`"]),
        ("vector", ["gave float32 [1, 3] for B=1", "[B,D,h,w], or ([B,P,D], (h, w))"]),
        ("rows_alone", ["gave float32 [1, 196, 3]"]),
        ("wrong_rows", ["gave a tuple of (float32 [1, 196, 3], a tuple of (3, 5))"]),
        ("whole_numbers", ["gave int64 [1, 3, 14, 14]", "floating point"]),
        ("one_image", ["gave float32 [3, 4, 14, 14] for B=1"]),
        ("array", ["gave a ndarray"]),
        ("raising", ["calling it with [1,3,224,224] failed (RuntimeError: out of)"]),
        ("halves", ["gave a grid of 14x14 for 224x224 pixels, which are no patches of 8x8"]),
        ("fraction", ["`patch` is 16.0"]),
        ("labelled", ["`digest` is 5"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_callables_that_cannot_be_used(module, name, words):
    error_of(f"own_features:{name}", *words)


def test_a_grid_that_does_not_follow_the_image_is_refused(module):
    backbone = load_backbone("own_features:fixed")
    with pytest.raises(UserError, match="gave a grid of 14x14 for 64x64 pixels, which are no patches of 16x16"):
        backbone(make_images(64, 64))


def test_modules_that_cannot_be_imported(module):
    error_of("no_such_features:Net", "No module named 'no_such_features'", "PYTHONPATH")
    error_of("no_such_package.features:Net", "No module named 'no_such_package'")
    module.write_text("import no_such_dependency\n")
    error_of("own_features:net", "importing it failed", "no_such_dependency")
    module.write_text("def broken(:\n")
    error_of("own_features:net", "importing it failed", "SyntaxError")


# ----------------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("spec", ["resnet", "", "facebook", "./models/dino", "/no/such/folder", "models/dino/vits8"])
def test_an_unknown_backbone_says_what_is_accepted(spec):
    error_of(
        spec, "filterbank", "facebook/dino-vits8", "module:callable", "no such folder" if "/" in spec else "unknown"
    )


@pytest.mark.parametrize("spec", ["features.py:Net", "folder/features:Net", "features:", ":Net", "a:b:c"])
def test_a_callable_that_is_written_otherwise(spec):
    error_of(spec, "package.module:callable")


@pytest.mark.parametrize("device", ["tpu9", "cuda:99"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(UserError, match=f"--device {device}: cannot be used here") as caught:
        load_backbone("filterbank", device)
    assert "\n" not in str(caught.value)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_transformers_is_imported_only_when_asked_for():
    assert run_python("import sys, smooseg_fast.backbones; print('transformers' in sys.modules)") == "False\n"


def test_without_transformers_the_way_to_it_is_said():
    line = run_python(
        "import sys; sys.modules['transformers'] = None\n"
        "from smooseg_fast.backbones import load_backbone\n"
        "try: load_backbone('facebook/dino-vits8')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    assert line.startswith("UserError --backbone facebook/dino-vits8: needs transformers")
    assert 'pip install "smooseg_fast[transformers]"' in line
    assert line.count("\n") == 1
