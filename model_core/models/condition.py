"""The frozen vision-language model that reads the prompt: Qwen3-VL by transformers (R1 3.2), from a folder or a tiny one.

Its states are those of the last decoder layer before the final norm: the normalised ones degrade text rendering (public code
of Qwen-Image-2.1). The prompt is put into the chat template with the report's system turn, whose tokens are dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from model_core.data.keys import keyed_generator
from model_core.documents import UserError
from model_core.recipe import Encoder

transformers_logging.disable_progress_bar()  # its bars would break a step's lines

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SETTINGS = "condition.json"


class ConditionEncoder(nn.Module):
    """Prompts to text states; never trained."""

    def __init__(
        self, model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str, max_tokens: int
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.system_prompt, self.max_tokens = tokenizer, system_prompt, max_tokens
        self._system_length = len(self.token_ids(system_turn(system_prompt)))

    @property
    def dim(self) -> int:
        """Channels of the states."""
        return int(self.model.config.text_config.hidden_size)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, L, dim) and mask (B, L) of B prompts, padded on the right; an empty prompt counts as one space.

        Raises UserError for a prompt of more than `max_tokens` tokens.
        """
        rows = [self.token_ids(system_turn(self.system_prompt) + user_turn(prompt or " ")) for prompt in prompts]
        longest = max(len(row) for row in rows)
        if longest - self._system_length > self.max_tokens:
            raise UserError(f"prompt: found {longest - self._system_length} tokens; allowed are {self.max_tokens}")
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
        states = last_states(self.model, ids, mask)[:, self._system_length :]
        mask = mask[:, self._system_length :]
        return states * mask[:, :, None], mask

    def num_tokens(self, prompt: str) -> int:
        """How many states `encode` gives for a prompt."""
        return len(self.token_ids(system_turn(self.system_prompt) + user_turn(prompt or " "))) - self._system_length

    def token_ids(self, text: str) -> list[int]:
        """Tokens of `text`, special ones by their names, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def system_turn(system_prompt: str) -> str:
    """The chat template's first turn."""
    return f"<|im_start|>system\n{system_prompt}<|im_end|>\n"


def user_turn(prompt: str) -> str:
    """The prompt, and the header of the answer that never comes."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def last_states(model: Qwen3VLForConditionalGeneration, ids: Tensor, mask: Tensor) -> Tensor:
    """Output of the last decoder layer before the final norm, (B, L, dim), for token ids (B, L) padded on the right.

    Taken at the norm's input: transformers 5 hands out the normalised state as `hidden_states[-1]`.
    """
    captured: list[Tensor] = []
    language_model = model.model.language_model
    handle = language_model.norm.register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    try:
        language_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    finally:
        handle.remove()
    return captured[0]


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


def tiny_qwen3_vl(config: Encoder, *, num_tokens: int, seed: int) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL of the recipe's size with fresh weights keyed by `seed`; its vision tower is as small as it can be.

    Token embeddings have unit variance: with the usual 0.02 the states of a small frozen model hardly tell words apart.
    """
    head_dim = config.hidden_size // config.num_heads
    half = head_dim // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    special = {name: index for index, name in enumerate(SPECIAL_TOKENS)}
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator, which is left as it was
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config={
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
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_heads": 2,
                    "out_hidden_size": config.hidden_size,
                    "deepstack_visual_indexes": [0],
                    "num_position_embeddings": 16,
                },
                image_token_id=special["<|image_pad|>"],
                video_token_id=special["<|video_pad|>"],
                vision_start_token_id=special["<|vision_start|>"],
                vision_end_token_id=special["<|vision_end|>"],
            )
        )
        nn.init.normal_(model.model.language_model.embed_tokens.weight)
    return model


@torch.no_grad()
def relate_signs(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
    """Makes capital letters akin to one another, and digits: each sign's embedding becomes (its own + its kind's) / sqrt 2.

    In a trained model they are akin. Among random embeddings nothing tells that A and B are both letters, and a transformer
    would have to learn for each sign by itself where to look for it.
    """
    embeddings = model.model.language_model.embed_tokens.weight
    for name, signs in (("capital letters", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), ("digits", "0123456789")):
        kind = torch.from_numpy(keyed_generator(seed, "signs", name).standard_normal(embeddings.shape[1], dtype=np.float32))
        ids = [tokenizer.convert_tokens_to_ids(sign) for sign in signs]
        embeddings[ids] = (embeddings[ids] + kind) / math.sqrt(2)


def save_encoder(encoder: ConditionEncoder, folder: Path) -> None:
    """Writes the model and its tokenizer as transformers does, and `condition.json` beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    settings = {"system_prompt": encoder.system_prompt, "max_tokens": encoder.max_tokens}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load_encoder(folder: Path) -> ConditionEncoder:
    """The encoder that `save_encoder` wrote."""
    settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    return open_qwen3_vl(folder, **settings)


def open_qwen3_vl(folder: Path, *, system_prompt: str, max_tokens: int) -> ConditionEncoder:
    """An encoder from a folder of Qwen3-VL weights; raises UserError when it holds none."""
    if not (folder / "config.json").is_file():
        raise UserError(f"encoder.path: {folder} holds no config.json; allowed is a folder of Qwen3-VL weights")
    try:
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"encoder.path: {folder} cannot be loaded as Qwen3-VL ({str(error).splitlines()[0]})") from error
    return ConditionEncoder(model, tokenizer, system_prompt=system_prompt, max_tokens=max_tokens)
