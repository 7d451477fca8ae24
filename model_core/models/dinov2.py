"""A middle layer of DINOv2 as the teacher of the latents' semantic alignment (R2 4.2), from a folder of weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Model
from transformers.utils import logging as transformers_logging

from model_core.documents import UserError
from model_core.recipe import CompressionRatio

transformers_logging.disable_progress_bar()  # its bars would break a step's lines

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2Layer(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to the patches' states (B, dim, H / 16, W / 16) after one of DINOv2's layers.

    DINOv2's patches are 14 px, a latent's place 16: pictures are scaled by 14 / 16, so that both grids are equal.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Dinov2Model, *, layer: int) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.model.encoder.layer = self.model.encoder.layer[:layer]  # those above it are never asked
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    @property
    def dim(self) -> int:
        """Channels of the states."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """States before DINOv2's last norm, without its class token."""
        rows, columns = images.shape[2] // CompressionRatio, images.shape[3] // CompressionRatio
        patch = self.model.config.patch_size
        scaled = F.interpolate((images + 1) / 2, size=(rows * patch, columns * patch), mode="bicubic", antialias=True).clamp(0, 1)
        states = self.model.embeddings((scaled - self.mean) / self.std)
        for layer in self.model.encoder.layer:
            states = layer(states)
        return states[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))


def load_dinov2(folder: Path, *, layer: int) -> DINOv2Layer:
    """One layer, counted from 1, of the DINOv2 in a folder; raises UserError when it holds none, or not that many layers."""
    if not (folder / "config.json").is_file():
        raise UserError(f"vae.teacher_path: {folder} holds no config.json; allowed is a folder of DINOv2 weights")
    try:
        model = Dinov2Model.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"vae.teacher_path: {folder} cannot be loaded as DINOv2 ({str(error).splitlines()[0]})") from error
    if layer > model.config.num_hidden_layers:
        raise UserError(f"vae.teacher_layer: found {layer}; {folder} has layers 1 to {model.config.num_hidden_layers}")
    return DINOv2Layer(model, layer=layer)
