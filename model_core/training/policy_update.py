"""One update of reinforcement learning: roll out, score, choose the groups to learn from, learn; and the record of all updates."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model_core.data.prompts import PolicyPrompt
from model_core.recipe import RewardPhase
from model_core.rewards.overlap import OverlappedScoring
from model_core.rewards.verdict import Score
from model_core.training.alarms import picture_statistics
from model_core.training.distributed import Ranks
from model_core.training.guard import TrainingDiverged
from model_core.training.optim import Optimizer
from model_core.training.policy import Learner, OldPolicy
from model_core.training.rollouts import Artist, Chunk, draw_chunks
from model_core.training.tally import Tally, Weights, agreement, make_tally


@dataclass(frozen=True)
class UpdateResult:
    """What an update found: its tally; `totals` (P, G), which of them `counted`; what became of each group; and numbers."""

    tally: Tally
    totals: Tensor
    counted: Tensor
    outcomes: list[str]
    measured: dict[str, float]


@dataclass(frozen=True)
class PolicyUpdate:
    """What every update is taken with. All ranks take it together; each rolls out its share of the groups."""

    artist: Artist
    learner: Learner
    scoring: OverlappedScoring
    rewards: Sequence[str]
    ranks: Ranks

    def take(self, prompts: Sequence[PolicyPrompt], *, update: int, weights: Weights, optimizer: Optimizer, key: str) -> UpdateResult:
        """Rolls out a group of each prompt, and takes the optimizer's steps; `key` names the policy in the scorer's requests.

        Raises TrainingDiverged when a gradient is not finite, and what the scorer raises.
        """
        config = self.artist.config
        chunks = self._roll_out(prompts, update=update, key=f"{key}/{update}")
        tally = self._tally(chunks, prompts)
        totals, counted = tally.totals(weights)
        outcomes = [_outcome(total[known], min_range=config.min_range) for total, known in zip(totals, counted, strict=True)]
        kept = counted & torch.tensor([outcome == "kept" for outcome in outcomes])[:, None]
        advantages = tally.advantages(weights, std_floor=config.std_floor)
        learned = self._learn(chunks, advantages.float(), kept, optimizer, update)
        statistics = self._statistics(chunks)
        return UpdateResult(tally, totals, counted, outcomes, learned | statistics | self._measure(tally, totals, counted, weights, kept))

    def _roll_out(self, prompts: Sequence[PolicyPrompt], *, update: int, key: str) -> list[Chunk]:
        """This rank's chunks; each is handed to the scorer as soon as it is drawn."""
        chunks = []
        for chunk in draw_chunks(self.artist, self.learner.model, prompts, self.ranks.share(len(prompts)), update=update):
            self.scoring.submit(chunk.requests(key, group_size=self.artist.config.group_size))
            chunks.append(chunk)
        return chunks

    def _tally(self, chunks: Sequence[Chunk], prompts: Sequence[PolicyPrompt]) -> Tally:
        """The scores of all ranks' groups, the same on every rank."""
        size = self.artist.config.group_size
        mine: dict[int, list[dict[str, Score]]] = {}
        for chunk, scores in zip(chunks, self.scoring.collect(), strict=True):
            mine |= {place: scores[row * size : (row + 1) * size] for row, place in enumerate(chunk.places)}
        together = {place: scores for part in self.ranks.gather(mine) for place, scores in part.items()}
        ordered = [together[place] for place in range(len(prompts))]
        return make_tally(ordered, names=self.rewards, categories=[prompt.category for prompt in prompts])

    def _learn(self, chunks: Sequence[Chunk], advantages: Tensor, kept: Tensor, optimizer: Optimizer, update: int) -> dict[str, float]:
        config, num_kept = self.artist.config, int(kept.sum())
        if not num_kept:
            return {"grad_norm": 0.0}
        old, measured, norm = OldPolicy(), {}, 0.0
        for _ in range(config.updates_per_rollout):
            measured = self.learner.backward(chunks, advantages, kept, old, num_kept=num_kept, ranks=self.ranks)
            norm = optimizer.clip().item()
            if not (math.isfinite(norm) and math.isfinite(measured["loss"])):
                raise TrainingDiverged(f"update {update}: found loss {measured['loss']} and gradient norm {norm}; a lower grpo.lr may help")
            optimizer.step(update)
        return measured | {"grad_norm": norm}

    def _statistics(self, chunks: Sequence[Chunk]) -> dict[str, float]:
        """Means over all ranks' groups."""
        size = self.artist.config.group_size
        groups = [chunk.pictures[row * size : (row + 1) * size] for chunk in chunks for row in range(len(chunk.places))]
        parts = self.ranks.gather((len(groups), picture_statistics(groups) if groups else {}))
        total = sum(count for count, _ in parts)
        names = next(found for _, found in parts if found)
        return {name: sum(count * found[name] for count, found in parts if found) / total for name in names}

    def _measure(self, tally: Tally, totals: Tensor, counted: Tensor, weights: Weights, kept: Tensor) -> dict[str, float]:
        config = self.artist.config
        measured = {
            "reward": totals[counted].mean().item(),
            "spread": tally.spread(weights),
            "kept_share": kept.double().mean().item(),
            **{f"reward/{name}": value for name, value in tally.means().items()},
        }
        table = tally.weights(weights)
        for number, name in enumerate(tally.values):
            expected = (table[:, number] > 0) if name != config.gold else torch.ones(len(table), dtype=torch.bool)
            if name != config.gold:
                measured[f"invalid/{name}"] = tally.invalid_share(name, expected=expected)
            measured[f"flat/{name}"] = tally.flat_share(name, std_floor=config.std_floor)
        if config.gold is not None:
            both = counted & tally.valid[config.gold]
            gold = tally.values[config.gold]
            measured |= {"gold": gold[both].mean().item(), "agreement": agreement(totals, gold, both), "gold_spread": _spread(gold, both)}
        return measured


@dataclass
class UpdateRecord:
    """What happened, in JSON values: `points`, one an update; `ledger`, one a group; `changes` of weights and mix."""

    points: list[dict[str, Any]] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    num_samples: int = 0

    def change(self, policy: str, update: int, phase: RewardPhase) -> None:
        """Notes what is rewarded from an update on."""
        self.changes.append({"policy": policy, "update": update, **phase.model_dump(mode="json")})

    def add(self, policy: str, update: int, prompts: Sequence[PolicyPrompt], result: UpdateResult, weights: Weights) -> None:
        """Notes the groups of an update: what was kept, what dropped and why."""
        self.reasons.update(result.tally.reasons(weights))
        self.num_samples += result.totals.numel()
        for place, prompt in enumerate(prompts):
            total = result.totals[place][result.counted[place]]
            line = {"policy": policy, "update": update, "place": place, "prompt_id": prompt.prompt_id, "category": prompt.category}
            spread = {"reward": total.mean().item(), "range": (total.max() - total.min()).item()} if len(total) else {}
            self.ledger.append(line | spread | {"outcome": result.outcomes[place]})

    def first_spread(self, window: int) -> float:
        """Mean deviation of the total within a group over the first `window` updates that have one."""
        known = [point["spread"] for point in self.points if "spread" in point][:window]
        return sum(known) / len(known) if known else 0.0

    @property
    def warnings(self) -> list[str]:
        """What a reader of the report must know."""
        return [f"{count} scores were invalid: {reason}" for reason, count in self.reasons.most_common(5)]

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from, as JSON values."""
        state: dict[str, Any] = json.loads(json.dumps(self.__dict__))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.__dict__.update(state | {"reasons": Counter(state["reasons"])})


def _outcome(totals: Tensor, *, min_range: float) -> str:
    """Whether a group is learned from (R4: by the range of its rewards), or why not."""
    if len(totals) < 2:
        return "dropped: fewer than two valid rewards"
    if (totals.max() - totals.min()).item() < min_range:
        return "dropped: range too small"
    return "kept"


def _spread(values: Tensor, valid: Tensor) -> float:
    found = [row[known].std(correction=0).item() for row, known in zip(values, valid, strict=True) if known.sum() >= 2]
    return sum(found) / len(found) if found else float("nan")
