"""Vision transformers by way of transformers: DINO, DINOv2 (with registers), DINOv3 and similar ones.

transformers only builds the network and maps the names of the weights. It gets a parsed config.json and loaded tensors,
never a path or a name, so it cannot run anything in a repository (remote code, pickles, adapters).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor, nn

from ..errors import UserError
from .base import Backbone, reason
from .vitfiles import CONFIG, PREPROCESSOR, WEIGHTS, VitFiles, weight_files

WANTED = [CONFIG, PREPROCESSOR, WEIGHTS, "model.safetensors.index.json", "model-*-of-*.safetensors"]
# published with the resizing of DinoPositions; the other families resize as transformers does
DINO_RESIZED = ("vit", "dinov2")


class VitBackbone(Backbone):
    """Patch tokens from `last_hidden_state`, which these families return after their final LayerNorm.

    Weights, arithmetic and features share one dtype. Raises UserError, naming the file at fault, for unusable files.
    """

    def __init__(self, name: str, files: VitFiles, device: torch.device, dtype: torch.dtype) -> None:
        digest = files.digest()
        self.kind = files.kind
        self.dtype, self.precision = dtype, str(dtype).removeprefix("torch.")
        settings, architecture, patch = _architecture(name, self.kind, files.config)
        model = _build(name, architecture, settings, files.weights).eval().requires_grad_(False).to(device)
        for parameter in model.parameters():  # not the buffers: rotary frequencies must stay in float32
            parameter.data = parameter.data.to(self.dtype)
        self.model = model
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (files.mean, files.std)
        )
        # transformers resizes position embeddings only on request, and only families with a table of them can
        accepts_resizing = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if accepts_resizing else {}
        self.prefix, dim = self._probe(name, patch, device)
        super().__init__(name=name, digest=digest, patch=patch, dim=dim, device=device)

    def extract(self, images: Tensor) -> Tensor:
        return self._tokens(images)[:, self.prefix :]

    def _tokens(self, images: Tensor) -> Tensor:
        """Every token after the final norm, [B, prefix + P, D]."""
        pixels = ((images - self.mean) / self.std).to(self.dtype)
        return self.model(pixel_values=pixels, **self.options).last_hidden_state

    def _probe(self, name: str, patch: int, device: torch.device) -> tuple[int, int]:
        """(tokens before the patches, D); two grids must agree on them, or the last tokens are not the patches."""
        layouts = set()
        for h, w in ((2, 3), (3, 4)):
            try:
                with torch.no_grad(), quiet():
                    tokens = self._tokens(torch.zeros(1, 3, h * patch, w * patch, device=device))
                _, count, dim = tokens.shape
            except Exception as error:
                raise UserError(
                    f"--backbone {name}: model type {self.kind} gives no patch features ({reason(error)}); "
                    "use a ViT that takes images of any size, such as DINO, DINOv2 or DINOv3"
                ) from error
            layouts.add((count - h * w, dim))
        prefix, dim = layouts.pop()
        if layouts or prefix < 0:
            raise UserError(
                f"--backbone {name}: model type {self.kind} does not give one token per {patch}x{patch} patch; "
                "use a plain ViT, such as DINO, DINOv2 or DINOv3"
            )
        return prefix, dim


class PatchEmbeddings(Protocol):
    """The part of transformers' module that DinoPositions reads: pixels of a patch and an image, (rows, columns)."""

    patch_size: tuple[int, int]
    image_size: tuple[int, int]


class DinoPositions:
    """Mixin for transformers' embeddings: resizes positions as DINO, and DINOv2 without registers, published it.

    Bicubic with the scale factor (h + 0.1)/H for a table of H rows; transformers asks for the size h, and features then
    differ by 4e-3.
    """

    patch_embeddings: PatchEmbeddings
    position_embeddings: Tensor

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Positions [1, 1+h*w, D] for tokens `embeddings` [B, 1+h*w, D] of an image of height x width pixels."""
        patch, (rows, columns) = self.patch_embeddings.patch_size, self.patch_embeddings.image_size
        grid, table = (height // patch[0], width // patch[1]), (rows // patch[0], columns // patch[1])
        if grid == table:
            return self.position_embeddings
        patches = self.position_embeddings[:, 1:].float().unflatten(1, table).permute(0, 3, 1, 2)
        scale = ((grid[0] + 0.1) / table[0], (grid[1] + 0.1) / table[1])
        patches = nn.functional.interpolate(patches, scale_factor=scale, mode="bicubic")
        patches = patches.flatten(2).transpose(1, 2).to(embeddings.dtype)
        return torch.cat((self.position_embeddings[:, :1], patches), dim=1)


def _with_dino_positions(embeddings: nn.Module, config: Any) -> nn.Module:
    """The same embeddings and weights, resized by DinoPositions."""
    kind = type(f"Dino{type(embeddings).__name__}", (DinoPositions, type(embeddings)), {})
    with torch.device("meta"):  # takes no memory and no random numbers from the caller
        resized = kind(config)
    resized.load_state_dict(embeddings.state_dict(), assign=True)
    return resized


def fetch(name: str) -> Path:
    """The folder with the hub's files for `name`: the local cache if complete (without network), else a download.

    Raises UserError for an unknown or gated model, without network, and for a model with pickled weights only.
    """
    api = huggingface_hub.HfApi()
    try:
        cached = Path(api.snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
        # an earlier call may have put a converted model next to that of the main branch
        for folder in (cached, *sorted(cached.parent.iterdir())):
            if weight_files(folder) and (folder / CONFIG).is_file():
                return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        folder = Path(api.snapshot_download(name, allow_patterns=WANTED))
        if weight_files(folder):
            return folder
        # older repositories, such as DINO's, hold only pickles; the hub's own bot then offers a conversion
        for offer in api.get_repo_discussions(
            name, author="SFconvertbot", discussion_type="pull_request", discussion_status="open"
        ):
            folder = Path(api.snapshot_download(name, revision=f"refs/pr/{offer.num}", allow_patterns=WANTED))
            if weight_files(folder):
                return folder
    except GatedRepoError as error:
        raise UserError(
            f"--backbone {name}: is gated; ask for access at https://huggingface.co/{name}, run `hf auth login`, "
            "then try again"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"--backbone {name}: the hub has no such model and there is no such folder here; check the name"
        ) from error
    except Exception as error:  # the network library, and so its exceptions, depend on the version of huggingface_hub
        raise UserError(
            f"--backbone {name}: the hub could not be reached ({reason(error)}); download the model where there is a "
            "network and give its folder (config.json and model.safetensors) instead of the name"
        ) from error
    raise UserError(
        f"--backbone {name}: the hub has no safetensors weights for it, and pickled ones are never loaded; "
        "use another model"
    )


def _architecture(name: str, kind: str, config: dict[str, Any]) -> tuple[Any, type[Any], int]:
    """The content of config.json -> (transformers' configuration, class of its bare model, pixels per patch side)."""
    try:
        settings = transformers.CONFIG_MAPPING[kind].from_dict(config)
        # transformers annotates its mapping of models as one of tokenizers
        architecture: type[Any] = transformers.MODEL_MAPPING[type(settings)]  # type: ignore[assignment]
    except KeyError as error:
        raise UserError(
            f"--backbone {name}: transformers {transformers.__version__} has no model of type {kind}; update it, "
            "or use another backbone"
        ) from error
    except Exception as error:
        raise UserError(
            f"--backbone {name}: config.json does not fit model type {kind} ({reason(error)}); download it again"
        ) from error
    patch = getattr(settings, "patch_size", None)
    if isinstance(patch, (tuple, list)) and len(set(patch)) == 1:
        patch = patch[0]
    if not isinstance(patch, int) or patch < 1:
        raise UserError(
            f"--backbone {name}: model type {kind} has no square patches (patch_size {patch}); "
            "use a ViT, such as DINO or DINOv2"
        )
    return settings, architecture, patch


def _build(name: str, architecture: type[Any], settings: Any, weights: dict[str, Tensor]) -> nn.Module:
    """The bare model in float32 with every weight of its trunk set. Raises UserError if the weights do not fit."""
    options = (
        {"add_pooling_layer": False}
        if "add_pooling_layer" in inspect.signature(architecture.__init__).parameters
        else {}
    )
    try:
        with quiet():
            model, report = architecture.from_pretrained(
                None,
                config=settings,
                state_dict=weights,
                dtype=torch.float32,
                attn_implementation="sdpa",  # a config.json may name one that is downloaded and run
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise UserError(
            f"--backbone {name}: the weights do not fit config.json ({reason(error)}); "
            "use a folder whose files belong together"
        ) from error
    # transformers sets missing weights to random numbers; neither of these two affects the patch tokens
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key and "mask_token" not in key)
    if missing:
        raise UserError(
            f"--backbone {name}: {len(missing)} weights that config.json asks for are in none of its files "
            f"({missing[0]}, ...); use a folder whose files belong together"
        )
    if settings.model_type in DINO_RESIZED:
        model.embeddings = _with_dino_positions(model.embeddings, model.config)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the reports and progress bars of transformers inside the `with` block."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
