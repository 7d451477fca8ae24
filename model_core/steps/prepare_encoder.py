"""prepare_encoder: the frozen condition encoder (R1 3.2), from a folder of Qwen3-VL weights or a tiny one made here.

Takes the captions and the edit pairs; leaves `encoder/`. The tiny one has random weights and a tokenizer trained on what it
will read: its states tell words apart, and what they mean the transformer learns (docs/decisions/0002-prepare-encoder.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from model_core.context import StepContext
from model_core.data.latents import CAPTIONS
from model_core.data.shards import read_rows
from model_core.models.condition import ConditionEncoder, open_qwen3_vl, save_encoder
from model_core.models.tiny_vlm import relate_signs, tiny_qwen3_vl, train_tokenizer
from model_core.models.vlm_input import system_turn, user_turn


def run(context: StepContext) -> dict[str, Any]:
    """Makes or opens the encoder and saves it; returns its size."""
    config = context.recipe.encoder
    began = time.monotonic()
    settings: dict[str, Any] = {
        "system_prompt": config.system_prompt,
        "max_tokens": context.recipe.captions.max_tokens,
        "sees_images": config.sees_images,
    }
    if config.path is not None:
        encoder = open_qwen3_vl(Path(config.path).expanduser(), dtype="auto", **settings)  # copied as they are: weights may be large
    else:
        chats = [system_turn(config.system_prompt) + turn for turn in _turns(context)]
        tokenizer = train_tokenizer(chats, vocab_size=config.vocab_size)
        model = tiny_qwen3_vl(config, num_tokens=len(tokenizer), seed=context.recipe.seed)
        relate_signs(model.model.language_model.embed_tokens.weight, tokenizer, seed=context.recipe.seed)
        encoder = ConditionEncoder(model, tokenizer, **settings)
    save_encoder(encoder, context.output / "encoder")
    return {
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "tokens": len(encoder.tokenizer),
        "data_seconds": round(time.monotonic() - began, 3),
    }


def _turns(context: StepContext) -> Iterator[str]:
    """All that training may ask with: every caption, and the instruction of every edit that is not held out."""
    for row in pq.read_table(context.inputs["captions"].path("captions.parquet"), columns=list(CAPTIONS)).to_pylist():
        yield from (user_turn(text) for text in row.values() if text)
    for edit in read_rows(context.inputs["edits"], columns=("instruction", "held_out")):
        if not edit.held_out:
            # One slot stands for all: what is between two of them has the same words.
            yield user_turn(edit.instruction, num_images=int(context.recipe.encoder.sees_images))
