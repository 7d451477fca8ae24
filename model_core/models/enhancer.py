"""The Prompt Enhancer: a Qwen3.5 that writes out a short request, thinking first (R1 3.3; docs/reference/enhancer.md).

It reads text alone: of an edit it is told how many pictures there are, not what they show.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, DynamicCache, PreTrainedTokenizerBase, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.utils import logging as transformers_logging

from model_core.data.keys import keyed_generator
from model_core.documents import UserError
from model_core.models.tiny_vlm import relate_signs, train_tokenizer
from model_core.models.vlm_input import system_turn, user_turn
from model_core.recipe_enhancer import Enhancer

transformers_logging.disable_progress_bar()  # its bars would break a step's lines

SYSTEM_PROMPT = "Write the request out as a full prompt. Think, then answer in JSON."
END = "<|im_end|>"
MODEL_TYPES = ("qwen3_5_text", "qwen3_5")


class PromptEnhancer(nn.Module):
    """A causal language model with its tokenizer, that answers requests in chats of one turn."""

    def __init__(self, language: Qwen3_5ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.language, self.tokenizer = language, tokenizer
        self.end_id = int(tokenizer.convert_tokens_to_ids(END))  # type: ignore[arg-type]

    def prompt_ids(self, request: str, *, num_images: int) -> list[int]:
        """The chat up to where the answer begins; `num_images` is how many pictures an edit has, 0 for a new picture.

        Raises UserError for a request that holds a mark of the chat.
        """
        request_ids = self._token_ids(request)
        marks = set(self.tokenizer.get_added_vocab().values())
        found = [token for token in request_ids if token in marks]
        if found:
            mark = self.tokenizer.convert_ids_to_tokens(found[0])
            raise UserError(f"prompt: found the chat's mark {mark} in {request[:60]!r}; allowed is text without it")
        images = f"{num_images} images: " if num_images else ""
        before, after = user_turn("\0").split("\0")
        return [*self._token_ids(system_turn(SYSTEM_PROMPT) + before + images), *request_ids, *self._token_ids(after)]

    def answer_ids(self, answer: str) -> list[int]:
        """An answer as the model is to give it, with the mark that ends its turn."""
        return [*self._token_ids(answer), self.end_id]

    def text(self, ids: Sequence[int]) -> str:
        """What an answer says, without the marks of the chat."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[str],
        *,
        num_images: Sequence[int],
        max_new_tokens: int,
        keys: Sequence[Sequence[object]] | None = None,
        temperature: float = 0.0,
    ) -> list[list[int]]:
        """An answer in tokens for each request; its last is `end_id` unless it was cut after `max_new_tokens`.

        At temperature 0 each token is the likeliest. Else token n of an answer is drawn by number n of the generator of its key,
        so that it depends on key and request alone, whatever else is in the batch (but for the order of floating-point sums).
        """
        if temperature and (keys is None or len(keys) != len(requests)):
            raise ValueError(f"found {len(keys or ())} keys for {len(requests)} requests; allowed is one each")
        if not requests:
            return []
        prompts = [self.prompt_ids(request, num_images=count) for request, count in zip(requests, num_images, strict=True)]
        device = self.language.lm_head.weight.device
        # Padded on the left: the next token of every answer lies at the same place.
        ids, mask = (values.to(device) for values in _padded(prompts, left=True))
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        draws = None
        if temperature:
            draws = torch.from_numpy(np.stack([keyed_generator(*key, "token").random(max_new_tokens) for key in keys or ()])).to(device)
        answers: list[list[int]] = [[] for _ in requests]
        cache = DynamicCache(config=self.language.config)
        running = [True] * len(requests)
        for place in range(max_new_tokens):
            output = self.language(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            logits = output.logits[:, -1].double()
            chosen = logits.argmax(1) if draws is None else drawn_tokens(logits / temperature, draws[:, place])
            for row, token in enumerate(chosen.tolist()):
                if running[row]:
                    answers[row].append(token)
                    running[row] = token != self.end_id
            if not any(running):
                break
            ids, positions = chosen[:, None], positions[:, -1:] + 1
            mask = F.pad(mask, (0, 1), value=1)
        return answers

    def log_probs(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """(L,) log-probability of each token of each answer after its prompt, fp32, with gradients."""
        device = self.language.lm_head.weight.device
        # Padded on the right: the model is causal, so no token sees the padding.
        ids, _ = _padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)], left=False)
        states = self.language.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        lengths = [len(answer) for answer in answers]
        rows = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor(lengths))
        places = torch.cat(
            [len(prompt) - 1 + torch.arange(length, dtype=torch.long) for prompt, length in zip(prompts, lengths, strict=True)]
        )
        logits = self.language.lm_head(states[rows.to(device), places.to(device)]).float()
        targets = ids[rows, places + 1].to(device)
        return list((-F.cross_entropy(logits, targets, reduction="none")).split(lengths))

    def _token_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def drawn_tokens(logits: Tensor, draws: Tensor) -> Tensor:
    """(B,) tokens of the distributions softmax(logits), (B, V), by inverting their cumulative sums at `draws`, (B,) in [0, 1)."""
    cumulative = logits.double().softmax(1).cumsum(1)
    # Scaled by the total, which rounding leaves beside 1: a draw near 1 would else find no token.
    return torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)[:, 0].clamp_max(logits.shape[1] - 1)


def tiny_enhancer(config: Enhancer, texts: Iterable[str], *, seed: int) -> PromptEnhancer:
    """An enhancer of the recipe's size with fresh weights keyed by `seed`, and a tokenizer of these requests and answers.

    All layers attend fully: the linear attention of the published ones runs token by token where its kernels are missing. Weights
    and embeddings keep a token's scale, and signs are akin, as in `model_core.models.tiny_vlm`. The head begins as the embeddings: to say
    a sign of the request again, which must go right for texts that training never showed, is then only to find it.
    """
    turns = [system_turn(SYSTEM_PROMPT) + user_turn(text) for text in texts]
    tokenizer = train_tokenizer([*turns, "1 images: 2 images: "], vocab_size=config.vocab_size)
    head_dim = config.hidden_size // config.num_heads
    half = head_dim // 2
    text_config = Qwen3_5TextConfig(
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=head_dim,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        initializer_range=config.hidden_size**-0.5,
        layer_types=["full_attention"] * config.num_layers,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 1.0,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            "mrope_interleaved": True,
        },
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator, which is left as it was
        torch.manual_seed(seed)
        language = Qwen3_5ForCausalLM(text_config)
        nn.init.normal_(language.model.embed_tokens.weight)
    embeddings = language.model.embed_tokens.weight
    relate_signs(embeddings, tokenizer, seed=seed)
    with torch.no_grad():
        language.lm_head.weight.copy_(embeddings * config.hidden_size**-0.5)
    return PromptEnhancer(language, tokenizer)


def open_enhancer(path: Path) -> PromptEnhancer:
    """An enhancer on published Qwen3.5 weights, of text alone or with a vision tower, which is left out.

    Raises UserError where the folder holds none.
    """
    return _read(path, "enhancer.path")


def save_enhancer(model: PromptEnhancer, folder: Path) -> None:
    """Writes weights and tokenizer as transformers does."""
    model.language.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def load_enhancer(folder: Path) -> PromptEnhancer:
    """The model that `save_enhancer` wrote, fp32, in evaluation mode and able to be trained."""
    return _read(folder, "enhancer")


def _read(folder: Path, field: str) -> PromptEnhancer:
    if not (folder / "config.json").is_file():
        raise UserError(f"{field}: {folder} holds no config.json; allowed is a folder of Qwen3.5 weights")
    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind not in MODEL_TYPES:
            raise UserError(f"{field}: {folder} holds a model of type {kind}; allowed are {' and '.join(MODEL_TYPES)}")
        loaded: Any = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: {folder} cannot be loaded as Qwen3.5 ({str(error).splitlines()[0]})") from error
    language, found = loaded
    if found["missing_keys"]:
        raise UserError(f"{field}: {folder} lacks the weights {sorted(found['missing_keys'])[0]} and maybe more; allowed is a whole model")
    return PromptEnhancer(language.eval(), tokenizer)


def _padded(sequences: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """(B, L) tokens and what of them is none of the padding, which is token 0."""
    longest = max(len(sequence) for sequence in sequences)
    ids, mask = torch.zeros(len(sequences), longest, dtype=torch.long), torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    return ids, mask
