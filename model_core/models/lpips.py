"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) on a frozen VGG16, from one safetensors file; nothing in it is trained.

The file holds the thirteen convolutions by torchvision's names, `features.N.weight` and `features.N.bias`, and the five linear
layers as `lin0.weight` to `lin4.weight`, each (1, C, 1, 1) and not negative.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model_core.documents import UserError

# Convolutions of VGG16 by their number in torchvision's `features`, and before each block but the first a 2x2 max pool.
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# ImageNet's mean and deviation for pictures in [-1, 1], rounded as in the authors' code.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10
MIN_SIDE_PX = 16  # four poolings


class LPIPS(nn.Module):
    """Distances (B,) of pictures (B, 3, H, W) in [-1, 1]. Widths are those of the weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        for name, value in weights.items():
            self.register_buffer(
                _buffer(name), value.float().contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value.float()
            )

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Sum over blocks of the mean over places of sum_c w_c (a_c / ||a|| - b_c / ||b||)^2; raises ValueError below 16 px a side."""
        if min(target.shape[2:]) < MIN_SIDE_PX:
            raise ValueError(f"found pictures of {target.shape[2]} x {target.shape[3]} px; LPIPS needs {MIN_SIDE_PX} px a side")
        distance = prediction.new_zeros(len(prediction))
        ours, theirs = self.normalise(prediction), self.normalise(target)
        for number, block in enumerate(BLOCKS):
            ours, theirs = self.block(ours, number, block), self.block(theirs, number, block)
            # The norm's gradient is 0 where all channels are, as F.normalize has it; a bare square root's would be infinite.
            difference = F.normalize(ours, dim=1, eps=EPS) - F.normalize(theirs, dim=1, eps=EPS)
            distance = distance + F.conv2d(difference.square(), self.get_buffer(f"lin{number}_weight")).mean(dim=(1, 2, 3))
        return distance

    def normalise(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1] to what VGG16 was trained on."""
        return (images - self.shift) / self.scale

    def block(self, x: Tensor, number: int, convolutions: tuple[int, ...]) -> Tensor:
        """One block of VGG16: pool unless it is the first, then 3x3 convolutions with ReLU."""
        if number:
            x = F.max_pool2d(x, 2)
        for index in convolutions:
            x = F.relu(F.conv2d(x, self.get_buffer(f"features_{index}_weight"), self.get_buffer(f"features_{index}_bias"), padding=1))
        return x


def load_lpips(path: Path) -> LPIPS:
    """LPIPS from its file; raises UserError, naming what is amiss, for a file that does not hold it."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"vae.lpips_path: {path} cannot be read as safetensors ({str(error).splitlines()[0]})") from error
    for name, shape in _shapes(weights).items():
        if name not in weights:
            raise UserError(
                f"vae.lpips_path: {path} lacks {name}; allowed are VGG16's features.N.weight, features.N.bias and lin0..lin4.weight"
            )
        if weights[name].shape != shape:
            raise UserError(f"vae.lpips_path: {path} holds {name} of shape {tuple(weights[name].shape)}; allowed is {tuple(shape)}")
        if name.startswith("lin") and weights[name].min() < 0:
            raise UserError(f"vae.lpips_path: {path} holds a negative number in {name}; allowed are distances, which have none")
    return LPIPS({name: weights[name] for name in _shapes(weights)})


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Name and shape of each weight; a layer's width is that of its bias, 0 where that is missing."""
    shapes, width = {}, 3
    for number, block in enumerate(BLOCKS):
        for index in block:
            before, width = width, len(weights.get(f"features.{index}.bias", ()))
            shapes[f"features.{index}.bias"] = torch.Size([width])
            shapes[f"features.{index}.weight"] = torch.Size([width, before, 3, 3])
        shapes[f"lin{number}.weight"] = torch.Size([1, width, 1, 1])
    return shapes


def _buffer(name: str) -> str:
    """A buffer's name has no dots."""
    return name.replace(".", "_")
