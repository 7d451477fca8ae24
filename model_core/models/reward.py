"""A reward model: Qwen3-VL that reads pictures, a prompt and a rubric, and two heads that judge (docs/reference/rewards.md).

The state of the last token gives five logits over scores 1 to 5, and a mean and a deviation for Bradley-Terry. Where the
question is whether a picture is what the prompt says, the heads also read how likely the prompt is under the pictures
(arXiv 2306.01879): its words, predicted one by one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from model_core.data.pixels import image_tensor, on_white
from model_core.documents import UserError
from model_core.models.segments import Segment
from model_core.models.tiny_vlm import TinyVision, relate_signs, tiny_qwen3_vl, train_tokenizer
from model_core.models.vlm_input import rope_positions, user_turn, vision_patches, widen_slots
from model_core.objectives.preference import SCORES, expected_score
from model_core.recipe import Dimension, RewardTrunk

transformers_logging.disable_progress_bar()  # its bars would break a step's lines

HEADS, SETTINGS = "heads.safetensors", "reward.json"
PADDING = (128, 128, 128)  # beside a picture that is not square
TINY_PATCH_PX = 8  # four patches are an image token: a quarter of the side of a picture of 64 px
RUBRICS: dict[Dimension, str] = {
    "aesthetics": "Is it balanced, well lit, rich and coherent?",
    "alignment": "Does it show all that was asked for?",
    "portrait": "Are face, body, skin and hair right?",
    "instruction_following": "Was it edited as told?",
    "visual_consistency": "Did all else stay as it was?",
}
PROMPT_DIMENSIONS: tuple[Dimension, ...] = ("alignment", "instruction_following")  # judged by how likely the prompt is, too


@dataclass(frozen=True)
class Chat:
    """A request in tokens. `prompt` is where the prompt's own begin and end; `segments` are in image tokens."""

    ids: list[int]
    segments: list[Segment]
    prompt: tuple[int, int]


@dataclass(frozen=True)
class Judgement:
    """What the model says of B requests: `logits` (B, 5) of scores 1 to 5, `mean` and `log_deviation` (B,) for Bradley-Terry.

    `log_likelihood` (B,) is the prompt's mean a token under the pictures; 0 in dimensions that are not about it.
    """

    logits: Tensor
    mean: Tensor
    log_deviation: Tensor
    log_likelihood: Tensor


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a judgement becomes a value on the scale of 1 to 5: scale * (expected score, or Bradley-Terry mean) + shift.

    `uncertainty_scale` turns the Bradley-Terry deviation into the value's; 0 where it was not trained. `temperature`:
    sigmoid(difference of two values / temperature) is how likely the first is the better.
    """

    reads: Literal["score", "preference"] = "score"
    scale: float = 1.0
    shift: float = 0.0
    temperature: float = 1.0
    uncertainty_scale: float = 0.0


class RewardModel(nn.Module):
    """A trunk, its tokenizer, and the heads of one dimension."""

    def __init__(
        self, trunk: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, *, dimension: Dimension, image_px: int
    ) -> None:
        super().__init__()
        vision: Any = trunk.config.vision_config
        self.slot_px = vision.patch_size * vision.spatial_merge_size
        if image_px % self.slot_px:
            raise UserError(f"reward.trunk.image_px: found {image_px}; allowed for this trunk are multiples of {self.slot_px}")
        self.trunk, self.tokenizer, self.dimension, self.image_px = trunk, tokenizer, dimension, image_px
        self.reads_likelihood = dimension in PROMPT_DIMENSIONS
        self.calibration = Calibration()
        text: Any = trunk.config.text_config
        dim = int(text.hidden_size)
        features = dim + 2 * self.reads_likelihood
        self.score_head, self.preference_head = nn.Linear(features, len(SCORES)), nn.Linear(features, 2)
        for head in (self.score_head, self.preference_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        with torch.no_grad():
            self.preference_head.bias[1] = -1.0  # a deviation of 0.4: small beside the differences that are learned
            if self.reads_likelihood:
                self.preference_head.weight[0, dim] = 1.0  # the likelier the prompt, the better

    def chat(self, prompt: str, *, num_sources: int) -> Chat:
        """The request's tokens: the pictures of `request_pictures`, the prompt, and what to judge.

        Raises UserError for a prompt that holds the mark of an image slot.
        """
        slot, num_images = self.trunk.config.image_token_id, _num_images(num_sources)
        before, after = user_turn("\0", num_images=num_images).split("\0")
        parts = [self._token_ids(text) for text in (before, prompt or " ", f"\n{RUBRICS[self.dimension]}{after}")]
        if slot in parts[1]:
            raise UserError(f"prompt: found the mark of an image slot in {prompt[:60]!r}; allowed are pictures given as such")
        side = self.image_px // self.slot_px
        ids, segments = widen_slots([*parts[0], *parts[1], *parts[2]], [(side, side)] * num_images, slot=slot)
        end = len(ids) - len(parts[2])
        return Chat(ids, segments, (end - len(parts[1]), end))

    def forward(self, chats: Sequence[Chat], pictures: Tensor) -> Judgement:
        """Judges B requests; `pictures` (P, 3, image_px, image_px) in [-1, 1] are those of all requests, in order."""
        device, lengths = self.score_head.weight.device, [len(chat.ids) for chat in chats]
        ids = torch.zeros(len(chats), max(lengths), dtype=torch.long)
        positions = torch.zeros(3, *ids.shape, dtype=torch.long)
        for row, chat in enumerate(chats):
            ids[row, : len(chat.ids)] = torch.tensor(chat.ids)
            positions[:, row, : len(chat.ids)] = rope_positions(chat.segments)
        ids = ids.to(device)
        states = self._states(ids, positions.to(device), pictures)
        last = states[torch.arange(len(chats), device=device), torch.tensor(lengths, device=device) - 1].float()
        likelihood = torch.zeros(len(chats), device=device)
        if self.reads_likelihood:
            log_probs, counts = self._prompt_log_probs(chats, ids, states)
            likelihood = log_probs.sum(1) / counts
            # By the root of its length the sum of a long prompt stays in reach, and one wrong word in it still weighs.
            last = torch.cat([last, (log_probs.sum(1) / counts.sqrt())[:, None], log_probs.amin(1, keepdim=True)], dim=1)
        mean, log_deviation = self.preference_head(last).unbind(1)
        return Judgement(self.score_head(last), mean, log_deviation.clamp(-6.0, 3.0), likelihood)

    def _states(self, ids: Tensor, positions: Tensor, pictures: Tensor) -> Tensor:
        """(B, L, dim), padded on the right: the trunk is causal, so no token sees the padding."""
        vision: Any = self.trunk.config.vision_config
        # Pictures of one size below one another have the patches of each in order.
        tall = pictures.permute(1, 0, 2, 3).flatten(1, 2)
        patches = vision_patches(tall, patch_px=vision.patch_size, frames=vision.temporal_patch_size, slot_px=self.slot_px)
        side = self.image_px // vision.patch_size
        output = self.trunk.model(
            input_ids=ids,
            position_ids=positions,
            pixel_values=patches.to(ids.device, self.trunk.dtype),
            image_grid_thw=torch.tensor([[1, side, side]] * len(pictures), device=ids.device),
            use_cache=False,
        )
        states: Tensor = output.last_hidden_state
        return states

    def _prompt_log_probs(self, chats: Sequence[Chat], ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, longest) of each prompt's tokens, 0 after its end, and how many it has (B,)."""
        begins, ends = (torch.tensor(side, device=ids.device) for side in zip(*(chat.prompt for chat in chats), strict=True))
        counts = ends - begins
        offsets = torch.arange(int(counts.max()), device=ids.device)
        inside = offsets < counts[:, None]
        places = torch.where(inside, begins[:, None] + offsets, begins[:, None])
        rows = torch.arange(len(chats), device=ids.device)[:, None]
        logits = self.trunk.lm_head(states[rows, places - 1]).float()
        log_probs = -F.cross_entropy(logits.flatten(0, 1), ids[rows, places].flatten(), reduction="none").unflatten(0, places.shape)
        return log_probs * inside, counts.float()

    def _token_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def calibrated(judgement: Judgement, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Values (B,) on the scale of 1 to 5, and their standard deviations (B,), 0 where they were not trained."""
    read = expected_score(judgement.logits) if calibration.reads == "score" else judgement.mean
    return read * calibration.scale + calibration.shift, judgement.log_deviation.exp() * calibration.uncertainty_scale


def request_pictures(sources: Sequence[Image.Image], picture: Image.Image, *, image_px: int) -> Tensor:
    """What the model is shown of a request, (N, 3, image_px, image_px): sources, the picture and, of an edit, the difference.

    The difference is that of the picture from the first source, on gray: attention would have to learn for each place to look at
    the same place of another picture. Without sources N is 1, else their number and two.
    """
    squares = [square_tensor(image, image_px) for image in (*sources, picture)]
    if sources:
        squares.append((squares[-1] - squares[0]).clamp(-1, 1))
    return torch.stack(squares)


def square_tensor(image: Image.Image, side_px: int) -> Tensor:
    """(3, side, side) in [-1, 1]: the whole picture, its longer side scaled to `side_px`, centred on gray."""
    picture = on_white(image)
    scale = side_px / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    if size != (side_px, side_px):
        square = Image.new("RGB", (side_px, side_px), PADDING)
        square.paste(picture, ((side_px - size[0]) // 2, (side_px - size[1]) // 2))
        picture = square
    return image_tensor(picture)


def tiny_reward(config: RewardTrunk, prompts: Iterable[str], *, dimension: Dimension, num_sources: int, seed: int) -> RewardModel:
    """A reward model with fresh weights keyed by `seed`, and a tokenizer of these prompts as they stand in its chats."""
    turns = [user_turn(f"{prompt}\n{RUBRICS[dimension]}", num_images=_num_images(num_sources)) for prompt in prompts]
    tokenizer = train_tokenizer(turns, vocab_size=config.vocab_size)
    vision = TinyVision(
        num_layers=config.vision_layers,
        hidden_size=config.vision_hidden_size,
        num_heads=config.num_heads,
        patch_px=TINY_PATCH_PX,
        image_px=config.image_px,
    )
    trunk = tiny_qwen3_vl(config, num_tokens=len(tokenizer), seed=seed, vision=vision)
    relate_signs(trunk.model.language_model.embed_tokens.weight, tokenizer, seed=seed)
    return RewardModel(trunk, tokenizer, dimension=dimension, image_px=config.image_px)


def open_reward_trunk(folder: Path, *, dimension: Dimension, image_px: int) -> RewardModel:
    """A reward model on the Qwen3-VL weights in a folder, with fresh heads; raises UserError where there are none."""
    if not (folder / "config.json").is_file():
        raise UserError(f"reward.trunk.path: {folder} holds no config.json; allowed is a folder of Qwen3-VL weights")
    try:
        trunk, tokenizer = _read_trunk(folder, torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"reward.trunk.path: {folder} cannot be loaded as Qwen3-VL ({str(error).splitlines()[0]})") from error
    return RewardModel(trunk, tokenizer, dimension=dimension, image_px=image_px)


def save_reward(model: RewardModel, folder: Path) -> None:
    """Writes trunk and tokenizer as transformers does, and the heads and `reward.json` beside them."""
    if not all(math.isfinite(value) for value in asdict(model.calibration).values() if isinstance(value, float)):
        raise ValueError(f"the calibration is not finite: {model.calibration}")
    folder.mkdir(parents=True, exist_ok=True)
    model.trunk.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    heads = {"score_head": model.score_head, "preference_head": model.preference_head}
    save_file(
        {f"{name}.{part}": value.contiguous() for name, head in heads.items() for part, value in head.state_dict().items()}, folder / HEADS
    )
    settings = {"dimension": model.dimension, "image_px": model.image_px, "calibration": asdict(model.calibration)}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load_reward(folder: Path, *, dtype: torch.dtype = torch.float32) -> RewardModel:
    """The model that `save_reward` wrote, for scoring; its trunk in `dtype`, its heads in fp32."""
    if not (folder / SETTINGS).is_file():
        raise UserError(f"reward model: {folder} holds no {SETTINGS}; allowed is a folder that train_reward left")
    settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    trunk, tokenizer = _read_trunk(folder, dtype)
    model = RewardModel(trunk, tokenizer, dimension=settings["dimension"], image_px=settings["image_px"])
    model.load_state_dict(load_file(folder / HEADS), strict=False)
    model.calibration = Calibration(**settings["calibration"])
    return model.eval().requires_grad_(False)


def _num_images(num_sources: int) -> int:
    """Pictures of a request: the difference comes with sources alone."""
    return num_sources + 2 if num_sources else 1


def _read_trunk(folder: Path, dtype: torch.dtype) -> tuple[Qwen3VLForConditionalGeneration, PreTrainedTokenizerBase]:
    trunk = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return trunk, AutoTokenizer.from_pretrained(folder, local_files_only=True)
