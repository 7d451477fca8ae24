"""train_enhancer: the Prompt Enhancer's supervised training (R1 3.3: next token on (short request, thoughts, fine prompt)).

Takes captions, pictures and edits; leaves the model in `enhancer/`, `enhancer_card.json`, which tells how it answers held-out
requests, and the curves. Resumes bitwise from its newest checkpoint: every example is keyed by its number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_core.context import StepContext
from model_core.data.enhancer_examples import (
    Example,
    FinePrompt,
    Kind,
    check_fine_prompts,
    example_of,
    read_fine_prompts,
    training_example,
)
from model_core.data.synthetic import held_out_scenes
from model_core.documents import UserError
from model_core.evaluation.enhancer_card import FILE_NAME, enhancer_card, warnings_of
from model_core.models.enhancer import PromptEnhancer, open_enhancer, save_enhancer, tiny_enhancer
from model_core.recipe_enhancer import Enhancer
from model_core.training.curves import Curves
from model_core.training.distributed import compute_device, keep_deterministic
from model_core.training.guarded import resume_guarded, train_guarded

TOKENIZER_EXAMPLES = 2000  # whose words the tiny model's tokenizer learns
ANSWERED_TOGETHER = 64  # requests

Prompts = Mapping[Kind, Sequence[FinePrompt]]


def run(context: StepContext) -> dict[str, Any]:
    """Trains to the end; returns the card's figures, counts and times."""
    seed, config = context.recipe.seed, _config(context)
    device = compute_device(context.ranks)
    keep_deterministic(device)
    began = time.monotonic()
    folders = [context.inputs[name] for name in ("images", "edits", "captions")]
    prompts = read_fine_prompts(*folders, held_out=False, seed=seed)
    check_fine_prompts(prompts)
    model = _initial_model(config, prompts, seed=seed).to(device).train()
    training = resume_guarded(context, model, config=config, betas=config.betas, losses=("loss",))
    curves, guard = training.curves, training.guard
    data_seconds = time.monotonic() - began

    def backward(step: int) -> Tensor:
        numbers = range(step * config.batch_size, (step + 1) * config.batch_size)
        loss = answer_loss(model, [training_example(prompts, number, config, seed=seed) for number in numbers])
        loss.backward()
        return loss.detach()[None]

    seconds = train_guarded(context, training, backward=backward, lr_field="enhancer.lr")

    began = time.monotonic()
    card = _publish(context, model.eval().requires_grad_(False), curves)
    figures = ("valid_json", "quoted_kept", "constraints_kept", "restored", "open_filled", "kept", "fine_words", "length_ratio")
    return {
        **{name: card[name] for name in figures},
        "checked": card["num"],
        "edits_checked": card["edits"]["num"],
        "edits_valid_json": card["edits"]["valid_json"],
        "edits_quoted_kept": card["edits"]["quoted_kept"],
        "edits_exact": card["edits"]["exact"],
        "captions": len(prompts["image"]),
        "instructions": len(prompts["edit"]),
        "loss": curves.last,
        "steps": config.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": len(model.tokenizer),
        "skipped_steps": len(guard.events),
        "rollbacks": guard.num_rollbacks,
        "warnings": [*warnings_of(card), *guard.warnings],
        "data_seconds": round(data_seconds, 3),
        "train_seconds": round(seconds, 3),
        "evaluation_seconds": round(time.monotonic() - began, 3),
        "examples_per_second": round((config.steps - training.first) * config.batch_size / max(seconds, 1e-9), 1),
    }


def answer_loss(model: PromptEnhancer, examples: Sequence[Example]) -> Tensor:
    """The mean negative log-likelihood of the answers' tokens; the requests' own are not learned."""
    prompts = [model.prompt_ids(example.request, num_images=example.num_images) for example in examples]
    return -torch.cat(model.log_probs(prompts, [model.answer_ids(example.answer) for example in examples])).mean()


def answered(model: PromptEnhancer, examples: Sequence[Example], *, max_new_tokens: int) -> list[str]:
    """The likeliest answer to each request, as text."""
    answers = []
    for begin in range(0, len(examples), ANSWERED_TOGETHER):
        chunk = examples[begin : begin + ANSWERED_TOGETHER]
        found = model.generate(
            [example.request for example in chunk],
            num_images=[example.num_images for example in chunk],
            max_new_tokens=max_new_tokens,
        )
        answers += [model.text(ids) for ids in found]
    return answers


def held_out_examples(context: StepContext, config: Enhancer) -> list[Example]:
    """At most `num_checked` requests of each kind that were never trained on.

    Where the pictures are plain scenes they are held-out scenes, whose combinations and texts no training picture shows.
    """
    seed, num = context.recipe.seed, config.num_checked
    prompts = read_fine_prompts(*(context.inputs[name] for name in ("images", "edits", "captions")), held_out=True, seed=seed)
    pictures = prompts["image"][:num]
    if any(prompt.scene for prompt in prompts["image"]):
        pictures = [FinePrompt(scene=scene) for scene in held_out_scenes(num, context.recipe.data.scenes, seed=seed)]
    chosen = [("image", pictures), ("edit", prompts["edit"][:num])]
    return [
        example_of(prompt, config.degradations, seed, "held-out request", kind, place)
        for kind, pool in chosen
        for place, prompt in enumerate(pool)
    ]


def _config(context: StepContext) -> Enhancer:
    if context.recipe.enhancer is None:
        raise UserError("enhancer: found none; allowed is a section that says how the Prompt Enhancer is trained")
    return context.recipe.enhancer


def _initial_model(config: Enhancer, prompts: Prompts, *, seed: int) -> PromptEnhancer:
    """The model at `enhancer.path`, or a tiny one keyed by the seed."""
    if config.path is not None:
        return open_enhancer(Path(config.path).expanduser())
    examples = [
        training_example(prompts, number, config, seed=seed) for number in range(min(TOKENIZER_EXAMPLES, config.steps * config.batch_size))
    ]
    return tiny_enhancer(config, [f"{example.request}\n{example.answer}" for example in examples], seed=seed)


def _publish(context: StepContext, model: PromptEnhancer, curves: Curves) -> dict[str, Any]:
    """Writes the model with its curves and card, and returns the card."""
    config = _config(context)
    save_enhancer(model, context.output / "enhancer")
    examples = held_out_examples(context, config)
    card = enhancer_card(examples, answered(model, examples, max_new_tokens=config.max_new_tokens))
    logged = {f"held_out/{name}": card[name] for name in ("valid_json", "quoted_kept", "restored") if card[name] is not None}
    context.log(logged, step=config.steps)
    for name, document in (("curves.json", curves.points), (FILE_NAME, card)):
        (context.output / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return card
