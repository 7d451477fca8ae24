"""Teaching a tiny condition encoder its captions, before it is frozen: a random one hardly conditions anything.

The lesson is a chat: the prompt as the user's turn, another description of the same picture as the answer, and next-token
prediction on the answer alone, as in instruction tuning. To answer, the model must carry what each word of the prompt says.
Prediction on the prompt itself would undo that: the states of "red" and "blue" become equal, since the same words follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model_core.data.keys import keyed_generator
from model_core.models.condition import ConditionEncoder, system_turn, user_turn
from model_core.progress import Progress
from model_core.recipe import Encoder
from model_core.training.optim import Optimizer


def teach(
    encoder: ConditionEncoder, lessons: Sequence[tuple[str, str]], config: Encoder, *, seed: int, progress: Progress
) -> list[dict[str, float]]:
    """Trains the encoder's language model on (prompt, answer) pairs and freezes it again; returns its loss curve."""
    model = encoder.model.model.language_model.requires_grad_(True)
    head = encoder.model.lm_head.requires_grad_(True)
    optimizer = Optimizer(
        torch.nn.ModuleList([model, head]), lr=config.teach_lr, warmup_steps=20, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0
    )
    curve = []
    for step in range(config.teach_steps):
        chosen = keyed_generator(seed, "teach", step).integers(len(lessons), size=config.teach_batch_size)
        ids, mask, answers = _batch(encoder, [lessons[index] for index in chosen])
        states = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        loss = F.cross_entropy(head(states[:, :-1][answers[:, 1:]]), ids[:, 1:][answers[:, 1:]])
        loss.backward()
        optimizer.step(step)
        if (step + 1) % 20 == 0 or step + 1 == config.teach_steps:
            curve.append({"step": step + 1, "loss": float(loss.detach())})
            progress.update(step + 1, config.teach_steps, f"loss {curve[-1]['loss']:.3f}")
    encoder.requires_grad_(False)
    return curve


def _batch(encoder: ConditionEncoder, lessons: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of whole chats, padded on the right; which are tokens; which of those are the answer's: each (B, L)."""
    rows, starts = [], []
    for prompt, answer in lessons:
        question = encoder.token_ids(system_turn(encoder.system_prompt) + user_turn(prompt or " "))
        starts.append(len(question))
        rows.append((question + encoder.token_ids(answer + "<|im_end|>"))[: 2 * encoder.max_tokens])
    place = torch.arange(max(len(row) for row in rows))[None]
    mask = place < torch.tensor([len(row) for row in rows])[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for row in rows for token in row])
    return ids, mask, mask & (place >= torch.tensor(starts)[:, None])
