"""A model's folder as diffusers lays it out: `config.json` with the class's name, and weights in safetensors, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_core.documents import UserError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"


def class_name(folder: Path, *, what: str) -> str | None:
    """The class that a folder's `config.json` names; None where it names none. Raises UserError for one that is no JSON."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = "cannot be read" if isinstance(error, OSError) else "is not JSON"
        raise UserError(f"{what} {folder}: {CONFIG} {problem} ({str(error).splitlines()[0]})") from error
    return config.get("_class_name") if isinstance(config, dict) else None


def write_folder(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes the folder that diffusers' `from_pretrained` reads; `config` names the class as `_class_name`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(dict(state), folder / WEIGHTS, metadata={"format": "pt"})


def read_config(folder: Path, name: str, *, what: str) -> dict[str, Any]:
    """The configuration in a folder of the class `name`; raises UserError when it is of another."""
    if (found := class_name(folder, what=what)) != name:
        raise UserError(f"{what} {folder}: found _class_name {found!r}; allowed is {name}")
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config


def read_folder(folder: Path, name: str, *, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights in a folder of the class `name`; raises UserError when it is of another, or cannot be read."""
    config = read_config(folder, name, what=what)
    try:
        files = [WEIGHTS]
        if (folder / INDEX).is_file():
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        return config, {name: value for file in files for name, value in load_file(folder / file).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{what} {folder}: cannot be read ({str(error).splitlines()[0]}); allowed is a folder with {CONFIG} and {WEIGHTS}"
        ) from error


def check_weights(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, what: str, name: str) -> None:
    """Raises UserError for weights of the class `name` that lack one of the expected, have one more, or one of another shape."""
    for weight in sorted(expected.keys() | state.keys()):
        if weight not in state or weight not in expected:
            verb = "hold an unknown" if weight in state else "lack"
            raise UserError(f"{what}: the weights of {name} {verb} {weight}; allowed are those of its config")
        if state[weight].shape != expected[weight].shape:
            found, allowed = tuple(state[weight].shape), tuple(expected[weight].shape)
            raise UserError(f"{what}: {weight} has shape {found}; its config allows {allowed}")
