"""prepare_encoder: the frozen condition encoder (R1 3.2), from a folder of Qwen3-VL weights or a tiny one made here.

Takes the captions and the edit pairs; leaves `encoder/`. A tiny encoder is taught the captions for some seconds and then
frozen: a random one hardly tells words apart (docs/decisions/0002-prepare-encoder.md).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from model_core.context import StepContext
from model_core.data.shards import read_rows
from model_core.models.condition import (
    ConditionEncoder,
    open_qwen3_vl,
    save_encoder,
    system_turn,
    tiny_qwen3_vl,
    train_tokenizer,
    user_turn,
)
from model_core.training.teach_encoder import teach


def run(context: StepContext) -> dict[str, Any]:
    """Makes or opens the encoder and saves it; returns its size and how its teaching went."""
    config = context.recipe.encoder
    max_tokens = context.recipe.captions.max_tokens
    began = time.monotonic()
    curve: list[dict[str, float]] = []
    torch.use_deterministic_algorithms(True)
    if config.path is not None:
        encoder = open_qwen3_vl(Path(config.path), system_prompt=config.system_prompt, max_tokens=max_tokens)
    else:
        lessons = _lessons(context)
        chats = [system_turn(config.system_prompt) + user_turn(prompt) + answer for prompt, answer in lessons]
        tokenizer = train_tokenizer(chats, vocab_size=config.vocab_size)
        model = tiny_qwen3_vl(config, num_tokens=len(tokenizer), seed=context.recipe.seed)
        encoder = ConditionEncoder(model, tokenizer, system_prompt=config.system_prompt, max_tokens=max_tokens)
        curve = teach(encoder, lessons, config, seed=context.recipe.seed, progress=context.progress)
        for point in curve:
            context.tracker.metrics({"teach/loss": point["loss"]}, step=int(point["step"]))
    save_encoder(encoder, context.output / "encoder")
    (context.output / "curves.json").write_text(json.dumps(curve, indent=1) + "\n")
    return {
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "tokens": len(encoder.tokenizer),
        "loss": curve[-1]["loss"] if curve else None,
        "train_seconds": round(time.monotonic() - began, 3),
    }


def _lessons(context: StepContext) -> list[tuple[str, str]]:
    """(prompt, answer) chats: each caption, and each edit's instruction, answered by the structured description of the picture."""
    captions = {row["sample_id"]: row for row in pq.read_table(context.inputs["captions"].path("captions.parquet")).to_pylist()}
    instructions = {
        row.sample_id: row.instruction
        for row in read_rows(context.inputs["edits"], columns=("sample_id", "instruction", "held_out"))
        if not row.held_out
    }
    lessons = []
    for sample_id, row in captions.items():
        prompts = [instructions.get(sample_id), row["general"], row["text"], row["knowledge"]]
        lessons += [(prompt, row["structured"]) for prompt in prompts if prompt]
    return lessons
