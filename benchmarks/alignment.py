"""Reinforcement learning on this machine's CPU: the hybrid update against the one through both branches, and scoring beside the rollout.

Prints one JSON line a measurement. An update of `conditional` and of `full` guidance are taken in turn over the same rollout, with the
demo's transformer; the ratio is hybrid over full, medians over rounds. Overlap: a scorer that waits, as a service on another machine does,
for half of the rollout's time; hidden is the share of its time that does not lengthen the rollout.

    python -m benchmarks.alignment
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.training_steps import seconds
from model_core.data.prompts import PolicyPrompt
from model_core.models.condition import ConditionEncoder
from model_core.models.mmdit import MMDiT
from model_core.models.tiny_vlm import tiny_qwen3_vl, train_tokenizer
from model_core.models.vae import ResidualVAE
from model_core.models.vlm_input import system_turn, user_turn
from model_core.recipe import Recipe, load_recipe
from model_core.rewards.overlap import OverlappedScoring
from model_core.rewards.verdict import Score, ScoreRequest, Value
from model_core.training.distributed import ALONE
from model_core.training.policy import Learner, OldPolicy
from model_core.training.policy_state import PolicyState
from model_core.training.rollouts import Artist, Chunk, draw_chunks

ROUNDS = 7
TEXTS = ("A7", "B3", "K0", "T1")
PROMPTS = [f"a {color} circle on the left of a gray background with the text {text}" for color in ("red", "blue") for text in TEXTS]


class WaitingScorer:
    """A service elsewhere: each request takes so many seconds, and none of this machine's cores."""

    names = ("reward",)

    def __init__(self, seconds_each: float) -> None:
        self.seconds_each = seconds_each

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        """Waits, and gives zeros."""
        time.sleep(self.seconds_each * len(requests))
        return [{"reward": Value(0.0)} for _ in requests]


def artist_of(recipe: Recipe, **grpo: Any) -> tuple[Artist, MMDiT]:
    """The demo's parts with random weights, and its recipe's grpo with changes."""
    assert recipe.grpo is not None
    torch.manual_seed(0)
    chats = [system_turn(recipe.encoder.system_prompt) + user_turn(prompt) for prompt in PROMPTS]
    tokenizer = train_tokenizer(chats, vocab_size=recipe.encoder.vocab_size)
    vlm = tiny_qwen3_vl(recipe.encoder, num_tokens=len(tokenizer), seed=0)
    encoder = ConditionEncoder(vlm, tokenizer, system_prompt=recipe.encoder.system_prompt, max_tokens=64)
    config = type(recipe.grpo).model_validate(recipe.grpo.model_dump(mode="json") | grpo)
    model = MMDiT(recipe.mmdit.model, latent_channels=recipe.vae.model.latent_channels, text_dim=encoder.dim)
    torch.nn.init.normal_(model.image_out.weight, std=0.02)
    artist = Artist(vae=ResidualVAE(recipe.vae.model), encoder=encoder, sampling=recipe.sampling, config=config, seed=0, policy="policy")
    return artist, model


def prompts_of(side_px: int) -> list[PolicyPrompt]:
    """Prompts for pictures of one size."""
    size_px = (side_px, side_px)
    return [PolicyPrompt(prompt_id=str(index), prompt=text, category="text", size_px=size_px) for index, text in enumerate(PROMPTS)]


def measure_update(recipe: Recipe, *, side_px: int) -> None:
    """Says how long an update takes in both modes, over the same rollout."""
    learners: dict[str, Learner] = {}
    chunks: list[Chunk] = []
    for mode in ("conditional", "full"):
        artist, model = artist_of(recipe, guidance_mode=mode)
        if not chunks:
            chunks = list(draw_chunks(artist, model, prompts_of(side_px), range(len(PROMPTS)), update=0))
        state = PolicyState(model, artist.config, seed=0)
        learners[mode] = Learner(state.model, artist.config, artist.sampling, state.reference)
    size = learners["full"].config.group_size
    advantages, kept = torch.randn(len(PROMPTS), size), torch.ones(len(PROMPTS), size, dtype=torch.bool)

    def update(mode: str) -> None:
        learners[mode].backward(chunks, advantages, kept, OldPolicy(), num_kept=kept.numel(), ranks=ALONE)

    for mode in learners:
        update(mode)
    times = []
    for number in range(ROUNDS):
        order = ("conditional", "full") if number % 2 else ("full", "conditional")
        taken = {mode: seconds(lambda mode=mode: update(mode)) for mode in order}
        times.append((taken["conditional"], taken["full"]))
    ratio = statistics.median(hybrid / full for hybrid, full in times)
    hybrid, full = (statistics.median(each) for each in zip(*times, strict=True))
    said = {"what": "update", "px": side_px, "samples": kept.numel(), "hybrid_s": round(hybrid, 3), "full_s": round(full, 3)}
    print(json.dumps(said | {"hybrid_over_full": round(ratio, 3), "rounds": ROUNDS}), flush=True)


def measure_overlap(recipe: Recipe) -> None:
    """Says what share of a waiting scorer's time a rollout hides, when its time is half of the rollout's."""
    artist, model = artist_of(recipe, groups_a_chunk=1)
    prompts, size = prompts_of(64), artist.config.group_size

    def roll_out(scorer: WaitingScorer | None) -> None:
        scoring = None if scorer is None else OverlappedScoring(scorer, num_threads=1, max_waiting=4)
        for chunk in draw_chunks(artist, model, prompts, range(len(prompts)), update=0):
            if scoring is not None:
                scoring.submit(chunk.requests("benchmark", group_size=size))
        if scoring is not None:
            scoring.collect()
            scoring.close()

    roll_out(None)
    rounds = []
    for _ in range(ROUNDS):
        alone = seconds(lambda: roll_out(None))
        scorer = WaitingScorer(0.5 * alone / (len(prompts) * size))
        together = seconds(lambda scorer=scorer: roll_out(scorer))
        rounds.append((alone, together, 1 - (together - alone) / (0.5 * alone)))
    alone, together, hidden = (statistics.median(each) for each in zip(*rounds, strict=True))
    said = {"what": "overlap", "chunks": len(prompts), "rollout_s": round(alone, 3), "with_scoring_s": round(together, 3)}
    print(json.dumps(said | {"hidden_share": round(hidden, 3), "rounds": ROUNDS}), flush=True)


def main() -> None:
    """Measures all of it."""
    print(json.dumps({"machine": machine()}))
    recipe = load_recipe(Path("pipelines/recipes/demo.yaml"))
    for side_px in (64, 128):
        measure_update(recipe, side_px=side_px)
    measure_overlap(recipe)


if __name__ == "__main__":
    main()
