"""A vision transformer on disk, in transformers' terms: a configuration, named weights and the image normalisation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import UserError
from ..system.files import write_atomic, write_json
from .base import digest_of, reason

CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of RGB in 0..1
# keys of config.json that do not affect the features
NOTES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class VitFiles:
    """A network, not built yet.

    Attributes:
        config: the content of transformers' config.json.
        weights: by their names in transformers' files, which differ from the names of its modules.
        mean, std: statistics of RGB in 0..1.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]

    @property
    def kind(self) -> str:
        return str(self.config.get("model_type"))

    def digest(self) -> str:
        """Hex digest of weights, configuration and normalisation, independent of the file they came from."""
        function = {key: value for key, value in self.config.items() if key not in NOTES}
        return digest_of("vit-1", json.dumps([function, self.mean, self.std], sort_keys=True), self.weights)

    def write(self, folder: Path) -> Path:
        """Writes a folder that `read_folder` and transformers can read, the configuration last."""
        weights = {name: value.contiguous() for name, value in self.weights.items()}
        write_atomic(folder / WEIGHTS, save(weights, {"format": "pt"}))
        write_json(folder / PREPROCESSOR, {"image_mean": self.mean, "image_std": self.std})
        write_json(folder / CONFIG, self.config)
        return folder


def read_folder(name: str, folder: Path) -> VitFiles:
    """Reads a folder that `save_pretrained` wrote. Raises UserError, naming `name` and the file at fault."""
    config = _read_json(name, folder / CONFIG)
    mean, std = _statistics(name, folder)
    return VitFiles(config, _read_weights(name, folder), mean, std)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the weights: a single one or all shards in the index; empty if any is missing."""
    single, index = folder / WEIGHTS, folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        shards = {
            folder / Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(shards) if all(shard.suffix == ".safetensors" and shard.is_file() for shard in shards) else []


def _read_weights(name: str, folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    files = weight_files(folder)
    if not files:
        raise UserError(
            f"--backbone {name}: no model.safetensors (or all of its shards) in {folder}; pickled weights are never "
            "loaded: save the model again with save_pretrained"
        )
    for file in files:
        try:
            weights.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"--backbone {name}: {file} cannot be read ({reason(error)}); copy or download it again"
            ) from error
    return weights


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError as error:
        raise UserError(
            f"--backbone {name}: no {path.name} in {path.parent}; give the folder of a transformers model, "
            "as save_pretrained writes it"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"--backbone {name}: {path} cannot be read ({reason(error)}); copy or download it again"
        ) from error
    return value


def _statistics(name: str, folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB in 0..1, from preprocessor_config.json, else those of ImageNet."""
    path = folder / PREPROCESSOR
    if not path.is_file():
        return IMAGENET
    values = _read_json(name, path)
    mean, std = values.get("image_mean", IMAGENET[0]), values.get("image_std", IMAGENET[1])
    for key, numbers in (("image_mean", mean), ("image_std", std)):
        if not (
            isinstance(numbers, (list, tuple))
            and len(numbers) == 3
            and all(isinstance(number, (int, float)) for number in numbers)
        ):
            raise UserError(
                f"--backbone {name}: {path}: {key} is {numbers!r}; it must be three numbers, for red, green and blue"
            )
    if min(std) <= 0:
        raise UserError(f"--backbone {name}: {path}: image_std is {std}; each must be above 0")
    return tuple(map(float, mean)), tuple(map(float, std))
