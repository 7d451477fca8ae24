"""Group relative policy optimisation of text: ratios of tokens, clipped losses, KL (GRPO, arXiv 2402.03300, eq. 3 and 4).

An answer of L tokens is L actions with one advantage. Means are taken over the tokens of an answer and then over answers, as in
GRPO: every answer weighs alike, however long. DAPO (arXiv 2503.14476) divides by the tokens of all answers in place of it, so that long
answers weigh more; here rules keep lengths in bounds, and nothing calls for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_core.objectives.grpo import ppo_loss


@dataclass(frozen=True)
class TextSurrogate:
    """What B answers contribute, each (B,): `loss`, the tokens' mean ratio, and the shares of tokens held at either bound."""

    loss: Tensor
    ratio: Tensor
    at_upper: Tensor
    at_lower: Tensor


def text_policy_loss(new: Sequence[Tensor], old: Sequence[Tensor], advantages: Tensor, *, clip: float) -> TextSurrogate:
    """Mean over tokens of max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = exp(new - old), for answers of advantages (B,).

    `new` and `old` are log-probabilities (L,) of each answer's tokens under the policy and under the one that wrote them, which is a
    constant. Where both are the same the ratio is exactly 1, and the gradient -A times that of the mean log-probability. Raises ValueError
    for an answer without tokens, which has no probability to change.
    """
    rows = []
    for number, (now, before) in enumerate(zip(new, old, strict=True)):
        if not len(now):
            raise ValueError(f"answer {number}: found no tokens; allowed is at least one, its end")
        found = ppo_loss(now - before.detach(), advantages[number].expand(len(now)), clip=clip)
        parts = (found.loss, found.ratio, found.at_upper.to(now.dtype), found.at_lower.to(now.dtype))
        rows.append(torch.stack([part.mean() for part in parts]))
    return TextSurrogate(*torch.stack(rows).unbind(1))


def text_kl(new: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """(B,) mean over tokens of q - log q - 1, q = exp(reference - new): an estimate of KL(policy || reference) that is never negative.

    GRPO's eq. 4, Schulman's k3: log-probabilities of the tokens that were drawn are enough for it. Its mean is the KL where the policy
    itself drew them; it is 0 just where both agree on all tokens.
    """
    rows = []
    for now, anchor in zip(new, reference, strict=True):
        log_q = anchor.detach() - now
        rows.append((log_q.expm1() - log_q).mean())
    return torch.stack(rows)
