"""Earlier weights to start from, `mmdit.path`: a folder of this project's or of diffusers', which the recipe must agree with."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError

from model_core.documents import UserError
from model_core.models import mmdit, mmdit_diffusers
from model_core.models.mmdit import MMDiT
from model_core.recipe import MMDiTModel
from model_core.sampling.few_step import load_sampler


def load_earlier(path: str, settings: MMDiTModel, *, latent_channels: int, text_dim: int) -> MMDiT:
    """The transformer at `mmdit.path`, in fp32, for latents and text states of so many channels.

    Raises UserError when there is none, when the recipe's `settings` are others than its own, and when it has other channels.
    """
    channels = check_earlier(path, settings)
    for name, found, allowed in zip(("latents", "text states"), (latent_channels, text_dim), channels, strict=True):
        if found != allowed:
            raise UserError(f"mmdit.path: found {name} of {found} channels; the weights at {path} allow {allowed}")
    folder = Path(path).expanduser()
    try:
        return mmdit_diffusers.read_diffusers(folder) if mmdit_diffusers.is_diffusers(folder) else mmdit.load_mmdit(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"mmdit.path: {path} cannot be loaded ({str(error).splitlines()[0]}); allowed are whole weights") from error


def check_earlier(path: str, settings: MMDiTModel) -> tuple[int, int]:
    """Latent channels and text channels of the weights at `mmdit.path`, which are not read; raises UserError as `load_earlier` does."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(
            f"mmdit.path: {path} holds no config.json; allowed is a folder of a transformer's weights, this project's or diffusers'"
        )
    if load_sampler(folder) is not None:
        raise UserError(
            f"mmdit.path: {path} holds a student of few steps, which training as a flow would undo; allowed are weights of a flow"
        )
    theirs = mmdit_diffusers.is_diffusers(folder)
    try:
        found, latent_channels, text_dim = (mmdit_diffusers if theirs else mmdit).read_settings(folder)
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(f"mmdit.path: {path}/config.json is none of a transformer of this project's or of diffusers'") from error
    for field, allowed in found:
        if (told := getattr(settings, field)) != allowed:
            raise UserError(f"mmdit.model.{field}: found {told}; the weights at {path} allow {allowed}")
    return latent_channels, text_dim
