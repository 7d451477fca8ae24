"""One update of the Prompt Enhancer: answers, pictures, rewards, advantages, gradients; and the alarms that end a training.

The old policy's log-probabilities are taken in the first pass over a rollout, where the policy still is the old one: the ratio is exactly
1 there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model_core.data.short_requests import ShortRequest
from model_core.evaluation.drawing import Painter
from model_core.models.enhancer import PromptEnhancer
from model_core.objectives.text_policy import text_kl, text_policy_loss
from model_core.recipe_enhancer import CONSTRAINTS, EnhancerGRPO
from model_core.rewards.verdict import Scorer
from model_core.training.enhancer_rollouts import (
    Candidate,
    draw_prompts,
    picture_seed,
    sample_candidates,
    score_pictures,
    with_constraints,
)
from model_core.training.guard import TrainingDiverged
from model_core.training.optim import Optimizer
from model_core.training.tally import DEFAULT, Tally, Weights, make_tally

MEASURED = ("loss", "ratio", "at_upper", "at_lower", "kl")
ROUNDING = 1e-9  # advantages below it come of the mean of equal rewards alone
MAX_UPDATES_WITHOUT_SIGNAL = 5  # in a row (ours)


def weights_of(config: EnhancerGRPO) -> Weights:
    """Weights of rewards by category: those of edits, and those of all others."""
    return {DEFAULT: config.weights, "edit": config.edit_weights}


@dataclass
class OldLogProbs:
    """Log-probabilities of a rollout's answers under the policy that wrote them, by group."""

    groups: dict[int, list[Tensor]] = field(default_factory=dict)

    def of(self, place: int, new: Sequence[Tensor]) -> list[Tensor]:
        """Those of a group: in the first pass the new ones themselves."""
        return self.groups.setdefault(place, [value.detach() for value in new])


@dataclass(frozen=True)
class EnhancerUpdate:
    """What every update is taken with. `reference` is the supervised model, where the KL to it has a weight."""

    enhancer: PromptEnhancer
    reference: PromptEnhancer | None
    painter: Painter
    scorer: Scorer
    config: EnhancerGRPO
    max_new_tokens: int
    seed: int

    def take(self, asked: Sequence[ShortRequest], *, update: int, optimizer: Optimizer, key: str) -> tuple[Tally, dict[str, float]]:
        """Learns from a group of answers to each request; returns the rewards and what was measured.

        `key` names the training in the scorer's requests. Raises TrainingDiverged when a gradient is not finite, and what the scorer
        raises.
        """
        config = self.config
        groups = sample_candidates(
            self.enhancer,
            self.painter.encoder,
            asked,
            update=update,
            group_size=config.group_size,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )
        seeds = [picture_seed(one, update=update, seed=self.seed) for one in asked]
        pictures = draw_prompts(self.painter, asked, [[each.drawn for each in group] for group in groups], seeds)
        scores = with_constraints(score_pictures(self.scorer, asked, pictures, key=f"{key}/{update}"), groups)
        categories = [one.meant.category for one in asked]
        tally = make_tally(scores, names=[*self.scorer.names, CONSTRAINTS], categories=categories)
        weights = weights_of(config)
        totals, counted = tally.totals(weights)
        advantages = tally.advantages(weights, std_floor=config.std_floor)
        # A group whose answers are all as good as each other says nothing of how to answer.
        kept = counted & (advantages.abs() > ROUNDING).any(1, keepdim=True)
        learned = self._learn(asked, groups, advantages.float(), kept, optimizer, update)
        measured = {"reward": totals[counted].mean().item(), "spread": tally.spread(weights), "kept_share": kept.double().mean().item()}
        measured["distinct"] = sum(len({each.drawn for each in group}) for group in groups) / kept.numel()
        measured |= {f"reward/{name}": value for name, value in tally.means().items()}
        return tally, learned | measured | answer_statistics([each for group in groups for each in group])

    def _learn(
        self,
        asked: Sequence[ShortRequest],
        groups: Sequence[Sequence[Candidate]],
        advantages: Tensor,
        kept: Tensor,
        optimizer: Optimizer,
        update: int,
    ) -> dict[str, float]:
        if not bool(kept.any()):
            return {"grad_norm": 0.0}
        old, measured, norm = OldLogProbs(), {}, 0.0
        for _ in range(self.config.updates_per_rollout):
            measured = self.backward(asked, groups, advantages, kept, old)
            norm = optimizer.clip().item()
            if not (math.isfinite(norm) and math.isfinite(measured["loss"])):
                found = f"found loss {measured['loss']} and gradient norm {norm}"
                raise TrainingDiverged(f"update {update}: {found}; a lower enhancer_grpo.lr may help")
            optimizer.step(update)
        return measured | {"grad_norm": norm}

    def backward(
        self, asked: Sequence[ShortRequest], groups: Sequence[Sequence[Candidate]], advantages: Tensor, kept: Tensor, old: OldLogProbs
    ) -> dict[str, float]:
        """Adds up the gradients of the mean loss over `kept` answers (P, G), a group at a time; returns means of what is measured."""
        device = next(self.enhancer.parameters()).device
        sums, num_kept = torch.zeros(len(MEASURED), dtype=torch.float64, device=device), int(kept.sum())
        for place, (one, group) in enumerate(zip(asked, groups, strict=True)):
            chosen = kept[place].nonzero().squeeze(1)
            if not len(chosen):
                continue
            answers = [group[sample].tokens for sample in chosen.tolist()]
            prompts = [self.enhancer.prompt_ids(one.request, num_images=len(one.meant.encoded))] * len(answers)
            new = self.enhancer.log_probs(prompts, answers)
            found = text_policy_loss(new, old.of(place, new), advantages[place, chosen].to(device), clip=self.config.clip)
            kl = torch.zeros_like(found.loss)
            if self.reference is not None:
                with torch.no_grad():
                    anchor = self.reference.log_probs(prompts, answers)
                kl = text_kl(new, anchor)
            ((found.loss + self.config.kl_weight * kl).sum() / num_kept).backward()
            measured = (found.loss, found.ratio, found.at_upper, found.at_lower, kl)
            sums += torch.stack([value.detach().double().sum() for value in measured])
        return dict(zip(MEASURED, (sums / num_kept).tolist(), strict=True))


def answer_statistics(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Of an update's answers: the mean length in tokens and the longest, and the shares that are valid, keep all rules, or were cut."""
    lengths, num = [len(each.tokens) for each in candidates], len(candidates)
    return {
        "length": sum(lengths) / num,
        "length_max": float(max(lengths)),
        "valid": sum(each.is_valid for each in candidates) / num,
        "kept_rules": sum(each.is_valid and not each.problems for each in candidates) / num,
        "cut": sum(each.cut for each in candidates) / num,
    }


def alarms(points: Sequence[Mapping[str, Any]], *, std_floor: float) -> list[str]:
    """What is wrong with the newest updates, one sentence each: too many in a row without a valid answer, or with flat rewards."""
    newest, found = points[-MAX_UPDATES_WITHOUT_SIGNAL:], []
    if len(newest) < MAX_UPDATES_WITHOUT_SIGNAL:
        return []
    row = f"{len(newest)} updates in a row"
    if all(point["valid"] == 0 for point in newest):
        found.append(f"no answer of {row} follows the schema; a longer train_enhancer may help")
    if all(point["spread"] < std_floor for point in newest):
        found.append(
            f"the answers to a request are all rewarded alike in {row}; a reward may be constant or invalid, or all answers the same"
        )
    return found
