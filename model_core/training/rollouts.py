"""A policy's pictures for an update: groups of samples of each prompt, rolled out in chunks; one is scored while the next is drawn.

Every draw is keyed by (seed, policy, update, prompt, sample, step): no generator has a state, and neither ranks, chunks nor a
restart change what is drawn.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_core.data.keys import keyed_generator
from model_core.data.pixels import image_tensor, tensor_image
from model_core.data.prompts import PolicyPrompt
from model_core.models.condition import ConditionEncoder
from model_core.models.mmdit import MMDiT
from model_core.models.segments import Grid
from model_core.models.tiling import decode_pictures
from model_core.models.vae import ResidualVAE
from model_core.objectives.flow import shift_mu
from model_core.recipe import GRPO, CompressionRatio, GuidanceMode, Sampling
from model_core.rewards.verdict import ScoreRequest
from model_core.sampling.conditions import Conditions, encode_conditions, join, sampling_velocity
from model_core.sampling.pipeline import guided_velocity
from model_core.sampling.rollout import Trajectories, roll_out
from model_core.sampling.schedule import shifted_times


@dataclass(frozen=True)
class Artist:
    """What a policy draws with, beside itself: autoencoder and encoder are frozen; `policy` names it in the keys of its draws."""

    vae: ResidualVAE
    encoder: ConditionEncoder
    sampling: Sampling
    config: GRPO
    seed: int
    policy: str

    @property
    def guided(self) -> bool:
        """Whether rollouts are guided."""
        return self.config.guidance_mode != GuidanceMode.NONE and self.sampling.guidance_scale != 1.0

    def noise(self, channels: int, shape: Grid, *key: object) -> np.ndarray:
        """(N, C) standard normal, keyed."""
        generator = keyed_generator(self.seed, "policy", self.policy, *key)
        return generator.standard_normal((shape[0] * shape[1], channels), dtype=np.float32)


@dataclass(frozen=True)
class Chunk:
    """P groups of G samples that were rolled out together, group by group; `places` are the groups' among the update's.

    `unconditional` are the samples' conditions without a prompt, where the rollout was guided.
    """

    places: Sequence[int]
    prompts: Sequence[PolicyPrompt]
    conditions: Conditions
    unconditional: Conditions | None
    trajectories: Trajectories
    pictures: list[Image.Image]

    def requests(self, key: str, *, group_size: int) -> list[ScoreRequest]:
        """What is asked about the pictures; `key` and the place of a picture, with a digest of it, make the request's own."""
        requests = []
        for group, (prompt, place) in enumerate(zip(self.prompts, self.places, strict=True)):
            sources = prompt.sources
            for sample, picture in enumerate(self.pictures[group * group_size : (group + 1) * group_size]):
                digest = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
                requests.append(score_request(prompt, picture, sources, key=f"{key}/{place}/{sample}/{digest}"))
        return requests


def score_request(prompt: PolicyPrompt, picture: Image.Image, sources: Sequence[Image.Image], *, key: str) -> ScoreRequest:
    """What a scorer is asked about a picture of a prompt."""
    return ScoreRequest(key=key, prompt=prompt.prompt, image=picture, category=prompt.category, sources=sources, notes=prompt.notes)


def chunks_of(prompts: Sequence[PolicyPrompt], places: Sequence[int], *, groups_a_chunk: int) -> list[list[int]]:
    """The groups at `places` of an update's prompts in chunks of one shape each, in order."""
    shapes: dict[object, list[int]] = defaultdict(list)
    for place in places:
        shapes[prompts[place].shape].append(place)
    return [members[first : first + groups_a_chunk] for members in shapes.values() for first in range(0, len(members), groups_a_chunk)]


def draw_chunks(artist: Artist, mmdit: MMDiT, prompts: Sequence[PolicyPrompt], places: Sequence[int], *, update: int) -> Iterator[Chunk]:
    """Rolls out the groups at `places` of an update's prompts, a chunk at a time."""
    for members in chunks_of(prompts, places, groups_a_chunk=artist.config.groups_a_chunk):
        yield _draw(artist, mmdit, [prompts[place] for place in members], members, update=update)


def policy_conditions(
    vae: ResidualVAE, encoder: ConditionEncoder, prompts: Sequence[PolicyPrompt], *, repeats: int, guided: bool
) -> tuple[Conditions, Conditions | None]:
    """Conditions of `repeats` samples of each prompt, and those without a prompt, for guidance. Prompts are of one shape."""
    (height, width), num_sources = prompts[0].shape
    shape = (height // CompressionRatio, width // CompressionRatio)
    sources = [[image_tensor(image) for image in prompt.sources] for prompt in prompts]
    references = [torch.stack([images[slot] for images in sources]) for slot in range(num_sources)]
    texts = [prompt.prompt for prompt in prompts] + ([""] * len(prompts) if guided else [])
    encoded = encode_conditions(vae, encoder, texts, references, shape=shape)
    rows = [row for row in range(len(prompts)) for _ in range(repeats)]
    return encoded.rows(rows), encoded.rows([row + len(prompts) for row in rows]) if guided else None


def rollout_times(artist: Artist, size_px: tuple[int, int], *, num_steps: int) -> Tensor:
    """The grid of a rollout of pictures of `size_px`."""
    tokens = size_px[0] * size_px[1] // CompressionRatio**2
    return shifted_times(num_steps, mu=shift_mu(tokens, artist.sampling.shift_mu), final_sigma=artist.sampling.final_sigma)


def sampler_velocity(
    artist: Artist, mmdit: MMDiT, conditions: Conditions, unconditional: Conditions | None
) -> Callable[[Tensor, float], Tensor]:
    """The velocity that a rollout follows: guided as the recipe samples, where there is an unconditional branch."""
    if unconditional is None:
        return guided_velocity(sampling_velocity(mmdit, conditions), artist.sampling.model_copy(update={"guidance_scale": 1.0}))
    return guided_velocity(sampling_velocity(mmdit, join([conditions, unconditional])), artist.sampling)


def latent_pictures(vae: ResidualVAE, latents: Tensor, shape: Grid) -> list[Image.Image]:
    """Pictures of standardised latents (B, N, C)."""
    with torch.no_grad():
        decoded = decode_pictures(vae, vae.unstandardise(latents.transpose(1, 2).unflatten(2, shape))).clamp(-1, 1).cpu()
    return [tensor_image(picture) for picture in decoded]


def _draw(artist: Artist, mmdit: MMDiT, prompts: Sequence[PolicyPrompt], places: Sequence[int], *, update: int) -> Chunk:
    config, size_px = artist.config, prompts[0].size_px
    shape = (size_px[0] // CompressionRatio, size_px[1] // CompressionRatio)
    conditions, unconditional = policy_conditions(artist.vae, artist.encoder, prompts, repeats=config.group_size, guided=artist.guided)
    device, channels = conditions.images.device, mmdit.latent_channels
    samples = [(prompt.prompt_id, sample) for prompt in prompts for sample in range(config.group_size)]

    def noise(what: object) -> Tensor:
        return torch.from_numpy(np.stack([artist.noise(channels, shape, update, *sample, what) for sample in samples])).to(device)

    first, end = config.window_range
    starts = [
        int(keyed_generator(artist.seed, "window", artist.policy, update, prompt.prompt_id).integers(first, end - config.window_steps + 1))
        for prompt in prompts
    ]
    trajectories = roll_out(
        sampler_velocity(artist, mmdit, conditions, unconditional),
        noise("initial"),
        rollout_times(artist, size_px, num_steps=config.rollout_steps),
        first_steps=torch.tensor(starts, device=device).repeat_interleave(config.group_size),
        num_steps=config.window_steps,
        sde=config.sde,
        noise_level=config.noise_level,
        step_noise=noise,
    )
    pictures = latent_pictures(artist.vae, trajectories.latents, shape)
    return Chunk(places, prompts, conditions, unconditional, trajectories, pictures)
