"""Draws many pictures with one model: requests of one size share a batch, and every picture has its own seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from model_core.data.buckets import fit
from model_core.data.pixels import image_tensor, tensor_image
from model_core.documents import UserError
from model_core.models.condition import ConditionEncoder, load_encoder
from model_core.models.mmdit import MMDiT, load_mmdit, load_student
from model_core.models.tiling import decode_pictures, encode_pictures
from model_core.models.vae import ResidualVAE, load_vae
from model_core.recipe import Sampling
from model_core.sampling.few_step import FewStep, load_sampler
from model_core.sampling.pipeline import sample
from model_core.training.distributed import compute_device, frozen_dtype

BATCH_PIXELS = 64 * 64 * 64  # 64 pictures of 64 px


@dataclass(frozen=True)
class Painter:
    """A trained model and how it is sampled."""

    mmdit: MMDiT
    vae: ResidualVAE
    encoder: ConditionEncoder
    sampling: Sampling | FewStep

    @property
    def flow_sampling(self) -> Sampling:
        """How the flow is sampled; raises UserError for a student of few steps, which is none."""
        if isinstance(self.sampling, FewStep):
            raise UserError("found a student of few steps, which its own sampler alone can draw with; allowed is a model of a flow")
        return self.sampling


def open_painter(*, mmdit: Path, vae: Path, encoder: Path, sampling: Sampling) -> Painter:
    """The model in these folders, on this machine's GPU where it has one.

    A student of few steps has the sampler that was saved beside its weights, in place of `sampling`.
    """
    device = compute_device()
    model, own = (load_mmdit(mmdit), sampling) if load_sampler(mmdit) is None else load_student(mmdit)
    return Painter(
        mmdit=model.to(device).eval(),
        vae=load_vae(vae).to(device),
        encoder=load_encoder(encoder, dtype=frozen_dtype(device)).to(device),
        sampling=own,
    )


@dataclass(frozen=True)
class Request:
    """A picture to draw: `size_px` is (height, width); `references` are fitted to it."""

    text: str
    seed: int
    size_px: tuple[int, int]
    references: Sequence[Image.Image] = ()


def draw(painter: Painter, requests: Sequence[Request], *, on_drawn: Callable[[int], None]) -> list[Image.Image]:
    """One picture a request, in their order; `on_drawn` hears how many a finished batch held."""
    drawn: dict[int, Image.Image] = {}
    for batch in draw_batches(painter, requests):
        drawn |= batch
        on_drawn(len(batch))
    return [drawn[index] for index in range(len(requests))]


def draw_batches(painter: Painter, requests: Sequence[Request]) -> Iterator[dict[int, Image.Image]]:
    """The pictures by their request's place, a finished batch at a time."""
    groups: dict[tuple[tuple[int, int], int], list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        groups[request.size_px, len(request.references)].append(index)
    for (size_px, num_references), members in groups.items():
        batch_size = max(1, BATCH_PIXELS // (size_px[0] * size_px[1]))
        for first in range(0, len(members), batch_size):
            chosen = members[first : first + batch_size]
            references = [
                torch.stack([image_tensor(fit(requests[index].references[slot], size_px)) for index in chosen])
                for slot in range(num_references)
            ]
            pictures = sample(
                painter.mmdit,
                painter.vae,
                painter.encoder,
                [requests[index].text for index in chosen],
                size_px=size_px,
                seeds=[requests[index].seed for index in chosen],
                sampling=painter.sampling,
                references=references,
            )
            yield {index: tensor_image(picture) for index, picture in zip(chosen, pictures, strict=True)}


@torch.inference_mode()
def reconstruct(vae: ResidualVAE, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Each picture through the autoencoder and back, those of one size together; sides are multiples of 16."""
    device = vae.latent_mean.device
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        groups[picture.size].append(index)
    decoded: dict[int, Image.Image] = {}
    for (width, height), members in groups.items():
        batch_size = max(1, BATCH_PIXELS // (width * height))
        for first in range(0, len(members), batch_size):
            chosen = members[first : first + batch_size]
            images = torch.stack([image_tensor(pictures[index]) for index in chosen]).to(device)
            images = decode_pictures(vae, encode_pictures(vae, images)).cpu()
            decoded |= {index: tensor_image(image) for index, image in zip(chosen, images, strict=True)}
    return [decoded[index] for index in range(len(pictures))]
