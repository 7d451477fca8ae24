"""A tiny Qwen3-VL with a tokenizer of its own, for where no weights are at hand (docs/decisions/0002-prepare-encoder.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from model_core.data.keys import keyed_generator
from model_core.models.vlm_input import SPECIAL_TOKENS
from model_core.recipe import Encoder, RewardTrunk


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts`: frequent words become one token, and any text has one.

    Capital letters and digits stay tokens of their own, as digits do in Qwen's, so that a text to be drawn is read sign by sign.
    """
    tokenizer = Tokenizer(models.BPE())
    signs = pre_tokenizers.Split(Regex("[A-Z0-9]"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([signs, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class TinyVision:
    """A vision tower that is to be trained: patches of `patch_px`, four an image token, of pictures up to `image_px` a side."""

    num_layers: int
    hidden_size: int
    num_heads: int
    patch_px: int
    image_px: int


def tiny_qwen3_vl(
    config: Encoder | RewardTrunk, *, num_tokens: int, seed: int, vision: TinyVision | None = None
) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL of the recipe's size with fresh weights keyed by `seed`; without `vision` its tower is as small as it can be.

    Token embeddings have unit variance: with the usual 0.02 the states of a small frozen model hardly tell words apart. With
    `vision` the model is one to train: all weights keep a token's scale (deviation 1 / sqrt(width)), which 0.02 does for thousands
    of channels and not for a hundred, and places stand out from patches as words do.
    """
    head_dim = config.hidden_size // config.num_heads
    half = head_dim // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    special = {name: index for index, name in enumerate(SPECIAL_TOKENS)}
    text_config: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": 3 * config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": head_dim,
        "vocab_size": num_tokens,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": sections,
            "mrope_interleaved": True,
        },
    }
    vision_config: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": config.hidden_size,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    if vision is not None:
        text_config["initializer_range"] = config.hidden_size**-0.5
        vision_config |= {
            "depth": vision.num_layers,
            "hidden_size": vision.hidden_size,
            "intermediate_size": 2 * vision.hidden_size,
            "num_heads": vision.num_heads,
            "deepstack_visual_indexes": [],
            "num_position_embeddings": (vision.image_px // vision.patch_px) ** 2,
            "patch_size": vision.patch_px,
            "temporal_patch_size": 1,
            "initializer_range": vision.hidden_size**-0.5,
        }
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator, which is left as it was
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config=text_config,
                vision_config=vision_config,
                image_token_id=special["<|image_pad|>"],
                video_token_id=special["<|video_pad|>"],
                vision_start_token_id=special["<|vision_start|>"],
                vision_end_token_id=special["<|vision_end|>"],
            )
        )
        nn.init.normal_(model.model.language_model.embed_tokens.weight)
        if vision is not None:
            nn.init.normal_(model.model.visual.pos_embed.weight)
    return model


@torch.no_grad()
def relate_signs(embeddings: Tensor, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
    """Makes capital letters akin to one another, and digits: each sign's embedding, of (V, dim), becomes (its own + its kind's) / sqrt 2.

    In a trained model they are akin. Among random embeddings nothing tells that A and B are both letters, and a transformer
    would have to learn for each sign by itself where to look for it.
    """
    for name, signs in (("capital letters", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), ("digits", "0123456789")):
        kind = torch.from_numpy(keyed_generator(seed, "signs", name).standard_normal(embeddings.shape[1], dtype=np.float32))
        ids = [tokenizer.convert_tokens_to_ids(sign) for sign in signs]
        embeddings[ids] = (embeddings[ids] + kind) / math.sqrt(2)
