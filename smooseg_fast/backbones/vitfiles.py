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
from ..system.files import regular, write_atomic, write_json
from .base import digest_of, reason, require_finite

CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
SHARDS, AGAIN = "model-*-of-*.safetensors", "copy or download it again"
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

    def digest(self) -> str:
        """Hex digest of weights, configuration and normalisation, independent of the file they came from."""
        function = {key: value for key, value in self.config.items() if key not in NOTES}
        return digest_of("vit-1", json.dumps([function, self.mean, self.std], sort_keys=True), self.weights)

    def write(self, folder: Path) -> None:
        """Writes a folder that `read_folder` and transformers can read, the configuration last."""
        weights = {name: value.contiguous() for name, value in self.weights.items()}
        write_atomic(folder / WEIGHTS, save(weights, {"format": "pt"}))
        write_json(folder / PREPROCESSOR, {"image_mean": self.mean, "image_std": self.std})
        write_json(folder / CONFIG, self.config)


def read_folder(folder: Path) -> VitFiles:
    """Reads a folder that `save_pretrained` wrote. Raises UserError, naming the file at fault."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"no {CONFIG} in {folder}; give a transformers folder, as save_pretrained writes it")
    config = _read_json(folder / CONFIG)
    values = _read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    mean, std = (_channels(folder, values, key, usual) for key, usual in zip(("image_mean", "image_std"), IMAGENET))
    if not (files := weight_files(folder)):
        advice = "pickled weights are never loaded: save the model again with save_pretrained"
        raise UserError(f"no {WEIGHTS} (or all of its shards) in {folder}; {advice}")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(load_file(regular(file)))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({reason(error)}); {AGAIN}") from error
    require_finite(weights, AGAIN)
    return VitFiles(config, weights, mean, std)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the weights: a single one or all shards; empty if any is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    shards = sorted(folder.glob(SHARDS))
    return shards if shards and shards[0].stem.endswith(f"-of-{len(shards):05}") else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(regular(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); {AGAIN}") from error
    return value


def _channels(folder: Path, values: dict[str, Any], key: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    """Three numbers, for red, green and blue."""
    numbers = values.get(key, usual)
    try:
        red, green, blue = map(float, numbers)
        if key == "image_std" and min(red, green, blue) <= 0:
            raise ValueError
    except (TypeError, ValueError) as error:
        positive = " above 0" if key == "image_std" else ""
        problem = f"{key} is {numbers!r}; it must be three numbers{positive}, for red, green and blue"
        raise UserError(f"{folder / PREPROCESSOR}: {problem}") from error
    return red, green, blue
