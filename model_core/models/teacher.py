"""A frozen teacher for the latents' semantic alignment, where no pre-trained backbone is at hand.

R2 aligns latents with a middle layer of DINOv2-L (model_core/models/dinov2.py). This one is made by hand and knows no
semantics: colour, and the strength of edges in eight directions at three scales, on the latent's grid. It asks the same of the
latents - places that look alike to the teacher shall lie alike - at no cost.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.recipe import CompressionRatio

SCALES_PX = (2, 4, 8)
NUM_DIRECTIONS = 8


class OrientedEdges(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to features (B, dim, H / 16, W / 16); nothing in it is trained."""

    directions: Tensor
    dim = 3 + NUM_DIRECTIONS * len(SCALES_PX)

    def __init__(self) -> None:
        super().__init__()
        angles = 2 * math.pi * torch.arange(NUM_DIRECTIONS) / NUM_DIRECTIONS
        self.register_buffer("directions", torch.stack((angles.cos(), angles.sin()), dim=1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Mean colour, then for each scale the mean of the rectified luma gradient along each direction."""
        features = [F.avg_pool2d(images, CompressionRatio)]
        luma = images.mean(1, keepdim=True)
        for scale in SCALES_PX:
            small = F.pad(F.avg_pool2d(luma, scale), (1, 1, 1, 1), mode="replicate")
            gradient = torch.cat((small[..., 1:-1, 2:] - small[..., 1:-1, :-2], small[..., 2:, 1:-1] - small[..., :-2, 1:-1]), dim=1)
            along = torch.einsum("dk,bkhw->bdhw", self.directions, gradient)
            features.append(F.avg_pool2d(F.relu(along), CompressionRatio // scale))
        return torch.cat(features, dim=1)
