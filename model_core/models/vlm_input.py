"""What the vision-language model is fed: chat turns, pixel patches and positions (public code of Qwen-Image-2.1 and Qwen3-VL)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model_core.models.segments import Segment

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SLOT_PX = 32  # pixels a side of what one image token stands for: 2 x 2 latent tokens
LATENTS_A_SLOT_SIDE = 2


def system_turn(system_prompt: str) -> str:
    """The chat template's first turn."""
    return f"<|im_start|>system\n{system_prompt}<|im_end|>\n"


def user_turn(prompt: str, *, num_images: int = 0) -> str:
    """The condition images' slots, the prompt, and the header of the answer that never comes."""
    slots = " ".join(f"<image{number}><|vision_start|><|image_pad|><|vision_end|>" for number in range(1, num_images + 1))
    return f"<|im_start|>user\n{slots}{prompt}<|im_end|>\n<|im_start|>assistant\n"


def slot_grid(image: Tensor, *, slot_px: int = SLOT_PX) -> tuple[int, int]:
    """Rows and columns of the image tokens of a (3, H, W) picture; raises ValueError unless both sides are multiples of 32."""
    height, width = image.shape[1:]
    if height % slot_px or width % slot_px:
        raise ValueError(f"a condition image has {height} x {width} px; allowed are multiples of {slot_px}, which the VAE is given too")
    return height // slot_px, width // slot_px


def widen_slots(tokens: Sequence[int], grids: Sequence[tuple[int, int]], *, slot: int) -> tuple[list[int], list[Segment]]:
    """A chat's tokens with each `slot` widened to as many as its picture has, and its segments: text tokens or (rows, columns).

    `grids` are those of the pictures, one a slot, in order.
    """
    ids: list[int] = []
    segments: list[Segment] = []
    begin = 0
    for place, (rows, columns) in zip([place for place, token in enumerate(tokens) if token == slot], grids, strict=True):
        ids += [*tokens[begin:place], *[slot] * (rows * columns)]
        segments += [place - begin, (rows, columns)]
        begin = place + 1
    return [*ids, *tokens[begin:]], [*segments, len(tokens) - begin]


def vision_patches(image: Tensor, *, patch_px: int = 16, frames: int = 2, slot_px: int = SLOT_PX) -> Tensor:
    """A (3, H, W) picture in [-1, 1] as the vision tower reads it: (N, 3 frames patch_px^2), the patches of an image token together.

    [-1, 1] is the tower's own normalisation (mean and deviation 0.5), so it sees the very pixels that the VAE does. A still
    picture is a film of `frames` equal frames. `slot_px`: the side of what one image token stands for.
    """
    side = slot_px // patch_px
    rows, columns = slot_grid(image, slot_px=slot_px)
    patches = image.reshape(3, rows, side, patch_px, columns, side, patch_px).permute(1, 4, 2, 5, 0, 3, 6)
    return patches[:, :, :, :, :, None].expand(*[-1] * 5, frames, -1, -1).reshape(rows * columns * side**2, -1)


def rope_positions(segments: Sequence[Segment]) -> Tensor:
    """Frame, height and width of every token, (3, N): text counts on all three, an image's tokens spread from where it begins.

    An image of (rows, columns) image tokens takes as many positions as its longer side (Qwen3-VL's interleaved M-RoPE). Segments are
    in image tokens here, not in latents.
    """
    parts: list[Tensor] = []
    start = 0
    for segment in segments:
        if isinstance(segment, int):
            parts.append(torch.arange(start, start + segment).expand(3, -1))
            start += segment
        else:
            rows, columns = segment
            grid = torch.stack([torch.zeros(rows, columns), *torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")])
            parts.append(grid.long().flatten(1) + start)
            start += max(rows, columns)
    return torch.cat(parts, dim=1)


def batches_by_length(lengths: Sequence[int], *, max_tokens: int, max_padding: int) -> list[list[int]]:
    """Numbers of sequences that are padded together, longest first: a batch ends where the next one would exceed either count."""
    batches: list[list[int]] = []
    useful = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batches:
            padded = (len(batches[-1]) + 1) * lengths[batches[-1][0]]
            if padded <= max_tokens and padded - useful - lengths[number] <= max_padding:
                batches[-1].append(number)
                useful += lengths[number]
                continue
        batches.append([number])
        useful = lengths[number]
    return batches
