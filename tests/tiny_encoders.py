"""Small condition encoders for tests: Qwen3-VL of a few channels, with a tokenizer of a few hundred tokens."""

from __future__ import annotations

import torch

from model_core.models.condition import ConditionEncoder
from model_core.models.tiny_vlm import tiny_qwen3_vl, train_tokenizer
from model_core.models.vlm_input import system_turn, user_turn
from model_core.recipe import Encoder

CONFIG = Encoder(hidden_size=32, num_layers=2, num_heads=2, vocab_size=320)
COLORS, TEXTS = ("red", "blue", "green"), ("A7", "B3", "K0")
PROMPTS = [f"a {color} circle with the text {text}" for color in COLORS for text in TEXTS]


def encoder(*, system_prompt: str = "Look.", max_tokens: int = 64, sees_images: bool = False) -> ConditionEncoder:
    """An encoder whose weights and tokens are the same each time."""
    tokenizer = train_tokenizer([system_turn("Look.") + user_turn(prompt) for prompt in PROMPTS], vocab_size=CONFIG.vocab_size)
    model = tiny_qwen3_vl(CONFIG, num_tokens=len(tokenizer), seed=0)
    return ConditionEncoder(model, tokenizer, system_prompt=system_prompt, max_tokens=max_tokens, sees_images=sees_images)


def picture(number: int, height: int, width: int) -> torch.Tensor:
    """(3, height, width) in [-1, 1], each value one that 8 bits hold."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, height, width), generator=generator) / 127.5 - 1
