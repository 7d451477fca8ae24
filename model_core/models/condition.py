"""The frozen vision-language model that reads the prompt: Qwen3-VL by transformers (R1 3.2), from a folder or a tiny one.

Its states are those of the last decoder layer before the final norm: the normalised ones degrade text rendering (public code
of Qwen-Image-2.1). The prompt is put into the chat template with the report's system turn, whose tokens are dropped. Condition
images stand before the prompt; the states of text tokens are kept (h_y), those of image tokens (h_x) are not: latents take
their place. docs/reference/condition.md tells it in order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from model_core.data.folders import Folder
from model_core.documents import UserError
from model_core.models.segments import Segment, text_runs
from model_core.models.vlm_input import (
    LATENTS_A_SLOT_SIDE,
    SLOT_PX,
    batches_by_length,
    rope_positions,
    slot_grid,
    system_turn,
    user_turn,
    vision_patches,
    widen_slots,
)
from model_core.recipe import CompressionRatio

transformers_logging.disable_progress_bar()  # its bars would break a step's lines

SETTINGS, TOKENIZER = "condition.json", "tokenizer_config.json"
BATCH_TOKENS = 16_384  # most tokens of one pass of the model, padding included
PADDING_TOKENS = 1_024  # most of them that are padding: computing so few costs less than a pass of its own


@dataclass(frozen=True)
class TextStates:
    """States of B prompts' text tokens, unpadded: `states` (T, dim), one prompt after the other.

    `segments` tell each prompt's order: a number of text tokens, or the (rows, columns) of the latents that belong there. The
    numbers of all segments sum to T.
    """

    states: Tensor
    segments: list[list[Segment]]

    @property
    def lengths(self) -> list[int]:
        """Text tokens of each prompt."""
        return [sum(text_runs(segments)) for segments in self.segments]

    def split(self) -> list[Tensor]:
        """States (L, dim) of each prompt."""
        return list(self.states.split(self.lengths))


class ConditionEncoder(nn.Module):
    """Prompts and condition images to text states; never trained. `sees_images` says whether it is shown the images."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str,
        max_tokens: int,
        sees_images: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.system_prompt, self.max_tokens, self.sees_images = tokenizer, system_prompt, max_tokens, sees_images
        self._system_length = len(self.token_ids(system_turn(system_prompt)))

    @property
    def dim(self) -> int:
        """Channels of the states."""
        return int(self.model.config.text_config.hidden_size)

    @property
    def multiple_px(self) -> int:
        """What the sides of pictures must be multiples of."""
        return multiple_px(sees_images=self.sees_images)

    @torch.no_grad()
    def encode_packed(self, prompts: Sequence[str], images: Sequence[Sequence[Tensor]] | None = None) -> TextStates:
        """States of B prompts, on the model's device and in its dtype; an empty prompt counts as one space.

        `images`: each prompt's condition images in order, (3, H, W) in [-1, 1], sides multiples of 32: the very pixels that the
        VAE encodes. Raises UserError for a prompt of more than `max_tokens` tokens of its own.
        """
        pictures = [list(row) for row in images] if images is not None else [[] for _ in prompts]
        if any(pictures) and not self.sees_images:
            raise ValueError("this condition encoder is not shown images; allowed are prompts alone")
        chats = [self._chat(prompt, [slot_grid(picture) for picture in row]) for prompt, row in zip(prompts, pictures, strict=True)]
        found: dict[int, Tensor] = {}
        lengths = [len(chat.ids) for chat in chats]
        for batch in batches_by_length(lengths, max_tokens=BATCH_TOKENS, max_padding=PADDING_TOKENS):
            states = self._text_states([chats[number] for number in batch], [picture for number in batch for picture in pictures[number]])
            found |= dict(zip(batch, states, strict=True))
        # Made outside inference mode, so that what reads the states may be trained.
        return TextStates(torch.cat([found[number] for number in range(len(chats))]), [self._segments(chat) for chat in chats])

    def num_tokens(self, prompt: str, *, num_images: int = 0) -> int:
        """How many states `encode_packed` gives for a prompt with so many condition images."""
        text = system_turn(self.system_prompt) + user_turn(prompt or " ", num_images=num_images)
        return len(self.token_ids(text)) - self._system_length - num_images

    def reads(self, prompt: str) -> bool:
        """Whether `encode_packed` takes a prompt: at most `max_tokens` tokens, and no mark of the chat among them."""
        ids = self.token_ids(prompt)
        return len(ids) <= self.max_tokens and not set(ids) & set(self.tokenizer.get_added_vocab().values())

    def token_ids(self, text: str) -> list[int]:
        """Tokens of `text`, special ones by their names, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _chat(self, prompt: str, grids: list[tuple[int, int]]) -> _Chat:
        """The tokens of both turns, an image's slot widened to as many tokens as it has."""
        slot = self.model.config.image_token_id
        tokens = self.token_ids(system_turn(self.system_prompt) + user_turn(prompt or " ", num_images=len(grids)))
        if tokens.count(slot) != len(grids):
            raise UserError(f"prompt: found the mark of an image slot in {prompt[:60]!r}; allowed are condition images given as such")
        if len(tokens) - self._system_length > self.max_tokens and (own := len(self.token_ids(prompt))) > self.max_tokens:
            raise UserError(f"prompt: found {own} tokens; allowed are {self.max_tokens}")
        return _Chat(*widen_slots(tokens, grids, slot=slot))

    def _segments(self, chat: _Chat) -> list[Segment]:
        """What the transformer reads of a chat: without the system turn, images in latents."""
        first, *rest = (
            segment if isinstance(segment, int) else (segment[0] * LATENTS_A_SLOT_SIDE, segment[1] * LATENTS_A_SLOT_SIDE)
            for segment in chat.segments
        )
        assert isinstance(first, int)
        return [first - self._system_length, *rest]

    def _text_states(self, chats: Sequence[_Chat], pictures: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """States (L, dim) of each chat's text tokens, the system turn's left out; `pictures` are those of all chats, in order.

        Chats are padded on the right and the model is causal: no token sees the padding, and no mask keeps fast attention away.
        """
        longest = max(len(chat.ids) for chat in chats)
        ids, positions = torch.zeros(len(chats), longest, dtype=torch.long), torch.zeros(3, len(chats), longest, dtype=torch.long)
        kept, lengths = [], []
        for row, chat in enumerate(chats):
            ids[row, : len(chat.ids)] = torch.tensor(chat.ids)
            positions[:, row, : len(chat.ids)] = rope_positions(chat.segments)
            text = (ids[row, : len(chat.ids)] != self.model.config.image_token_id).nonzero()[self._system_length :, 0]
            kept.append(row * longest + text)
            lengths.append(len(text))
        with torch.inference_mode():
            states = last_states(self.model, ids, positions, pictures).flatten(0, 1)
        return states[torch.cat(kept).to(states.device)].split(lengths)


@dataclass(frozen=True)
class _Chat:
    """Tokens, and how many are text or (rows, columns) of image tokens, in order."""

    ids: list[int]
    segments: list[Segment]


def last_states(model: Qwen3VLForConditionalGeneration, ids: Tensor, positions: Tensor, pictures: Sequence[Tensor] = ()) -> Tensor:
    """Output of the last decoder layer before the final norm, (B, L, dim), for token ids (B, L) at positions (3, B, L).

    Taken at the norm's input: transformers 5 hands out the normalised state as `hidden_states[-1]`. `pictures` (3, H, W) fill the
    image slots of all rows in order; without any the vision tower is not run.
    """
    captured: list[Tensor] = []
    handle = model.model.language_model.norm.register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    ids, positions = ids.to(model.device, non_blocking=True), positions.to(model.device, non_blocking=True)
    try:
        if pictures:
            vision: Any = model.config.vision_config
            pixels = [vision_patches(picture, patch_px=vision.patch_size, frames=vision.temporal_patch_size) for picture in pictures]
            grids = [[1, picture.shape[1] // vision.patch_size, picture.shape[2] // vision.patch_size] for picture in pictures]
            model.model(
                input_ids=ids,
                position_ids=positions,
                pixel_values=torch.cat(pixels).to(model.device, model.dtype, non_blocking=True),
                image_grid_thw=torch.tensor(grids, device=model.device),
                use_cache=False,
            )
        else:
            model.model.language_model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        handle.remove()
    return captured[0]


def save_encoder(encoder: ConditionEncoder, folder: Path) -> None:
    """Writes the model and its tokenizer as transformers does, and `condition.json` beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    settings: dict[str, Any] = {"system_prompt": encoder.system_prompt, "max_tokens": encoder.max_tokens}
    if encoder.sees_images:  # left out where it is not: an encoder that has never seen any keeps its bytes, and so its digest
        settings["sees_images"] = True
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def sees_images(folder: Folder) -> bool:
    """Whether the encoder that `save_encoder` left in `encoder/` of a step's result is shown images; its weights are not read."""
    return bool(folder.read_json(f"encoder/{SETTINGS}").get("sees_images", False))


def multiple_px(*, sees_images: bool) -> int:
    """What the sides of pictures must be multiples of: an image token where the encoder sees images, else a latent token."""
    return SLOT_PX if sees_images else CompressionRatio


def load_encoder(folder: Path, *, dtype: torch.dtype = torch.float32) -> ConditionEncoder:
    """The encoder that `save_encoder` wrote, in `dtype`."""
    settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    return open_qwen3_vl(folder, dtype=dtype, **settings)


def open_qwen3_vl(
    folder: Path,
    *,
    system_prompt: str,
    max_tokens: int,
    sees_images: bool = False,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
) -> ConditionEncoder:
    """An encoder from a folder of Qwen3-VL weights, in `dtype` ("auto": as they are stored); its tokenizer may lie in `processor/` beside.

    Raises UserError when the folder holds none, or holds a vision tower that reads other patches than `vision_patches` gives.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"encoder.path: {folder} holds no config.json; allowed is a folder of Qwen3-VL weights")
    # diffusers' layout keeps the tokenizer, and how pictures are read, in a folder beside the weights.
    beside = folder.parent / "processor"
    reader = beside if not (folder / TOKENIZER).is_file() and (beside / TOKENIZER).is_file() else folder
    try:
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(reader, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"encoder.path: {folder} cannot be loaded as Qwen3-VL ({str(error).splitlines()[0]})") from error
    if sees_images:
        _check_vision(reader, model)
    return ConditionEncoder(model, tokenizer, system_prompt=system_prompt, max_tokens=max_tokens, sees_images=sees_images)


def _check_vision(folder: Path, model: Qwen3VLForConditionalGeneration) -> None:
    vision: Any = model.config.vision_config
    slot_px = vision.patch_size * vision.spatial_merge_size
    if slot_px != SLOT_PX:
        raise UserError(f"encoder.path: {folder} has image tokens of {slot_px} px a side; allowed are {SLOT_PX}")
    processor = folder / "preprocessor_config.json"
    known = json.loads(processor.read_text()) if processor.is_file() else {}
    for name in ("image_mean", "image_std"):
        if known.get(name, [0.5] * 3) != [0.5] * 3:
            raise UserError(f"encoder.path: {processor} has {name} {known[name]}; allowed is [0.5, 0.5, 0.5]")
