"""align_enhancer: reinforcement learning of the Prompt Enhancer from pictures that a frozen generator draws (R1 3.3).

Takes the supervised enhancer, the generator with its autoencoder and encoder, the data whose captions are made short, and the reward
models; leaves the aligned one in `enhancer/`, the card of the supervised one, `enhancement.json` (every update, and what was compared) and
pictures. An update that a kill has cut short is taken again, bit for bit, from the newest checkpoint.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from model_core.context import StepContext
from model_core.data.contact_sheet import contact_sheet
from model_core.data.prompts import prompts_of_update, read_prompts
from model_core.data.short_requests import ShortRequest, short_request
from model_core.documents import UserError
from model_core.evaluation.before_after import Drawn
from model_core.evaluation.drawing import open_painter
from model_core.evaluation.enhanced_pictures import (
    ALIGNED,
    OWN,
    SUPERVISED,
    WAYS,
    FixedRequest,
    answer_greedily,
    compare_ways,
    draw_requests,
    fixed_requests,
    losses,
)
from model_core.evaluation.enhancer_card import FILE_NAME as CARD
from model_core.evaluation.judge import Judge
from model_core.evaluation.report import ENHANCEMENT
from model_core.models.enhancer import load_enhancer, save_enhancer
from model_core.recipe_enhancer import CONSTRAINTS, Enhancer, EnhancerGRPO
from model_core.rewards.opening import model_scorers, open_scorer
from model_core.rewards.verdict import Scorer
from model_core.training.distributed import compute_device, keep_deterministic
from model_core.training.enhancer_rollouts import Candidate
from model_core.training.enhancer_update import EnhancerUpdate, alarms, weights_of
from model_core.training.guard import TrainingDiverged
from model_core.training.optim import Optimizer
from model_core.training.updates import take_all

NUM_SHOWN = 12


def run(context: StepContext) -> dict[str, Any]:
    """Trains to the end; returns what rose and fell. Raises TrainingDiverged when an alarm is raised, RewardUnavailable without rewards.

    An enhancer that the rewards have not helped is published all the same, with a warning that says so.
    """
    keep_deterministic(compute_device())
    alignment = _Alignment(context)
    updates = alignment.config.updates
    seconds = take_all(
        context,
        first=alignment.resume(),
        total=updates,
        checkpoint_every=alignment.config.checkpoint_every_updates,
        take=alignment.take,
        save=alignment.save,
        noun="update",
    )
    return alignment.publish() | {"updates": updates, "train_seconds": round(seconds, 3)}


def _settings(context: StepContext) -> tuple[EnhancerGRPO, Enhancer]:
    recipe = context.recipe
    if recipe.enhancer_grpo is None or recipe.enhancer is None:
        absent = "enhancer_grpo" if recipe.enhancer_grpo is None else "enhancer"
        raise UserError(f"recipe {recipe.name}: found no {absent}; allowed for align_enhancer is a recipe with that section")
    return recipe.enhancer_grpo, recipe.enhancer


class _Alignment:
    """The policy, what it is rewarded by, and the record of its updates."""

    def __init__(self, context: StepContext) -> None:
        recipe, inputs = context.recipe, context.inputs
        self.context, (self.config, self.settings) = context, _settings(context)
        self.painter = open_painter(
            mmdit=inputs["generator"].folder("mmdit"),
            vae=inputs["vae"].folder("vae"),
            encoder=inputs["encoder"].folder("encoder"),
            sampling=recipe.sampling,
        )
        self.size_px = (recipe.mmdit.stages[recipe.stages[-1]].resolution_px,) * 2
        self.prompts = read_prompts(
            inputs["images"],
            inputs["edits"],
            inputs["captions"],
            resolution_px=self.size_px[0],
            multiple_px=self.painter.encoder.multiple_px,
            seed=recipe.seed,
        )
        self.start = inputs["enhancer"].folder("enhancer")
        self.enhancer = load_enhancer(self.start).to(compute_device())
        self.optimizer = Optimizer(
            self.enhancer,
            lr=self.config.lr,
            warmup_steps=self.config.warmup_updates,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            grad_clip=self.config.grad_clip,
        )
        self.scorer = self._open_scorer()
        reference = load_enhancer(self.start).to(compute_device()).requires_grad_(False) if self.config.kl_weight else None
        self.step = EnhancerUpdate(
            self.enhancer, reference, self.painter, self.scorer, self.config, self.settings.max_new_tokens, recipe.seed
        )
        self.points: list[dict[str, Any]] = []
        self.reasons: Counter[str] = Counter()

    def resume(self) -> int:
        """Takes up the newest checkpoint; returns how many updates are done."""
        found = self.context.checkpoints.restore({"enhancer": self.enhancer, "optimizer": self.optimizer})
        if found is None:
            return 0
        self.points, self.reasons = list(found.notes["points"]), Counter(found.notes["reasons"])
        return found.step

    def save(self, done: int) -> None:
        """A checkpoint after `done` updates."""
        notes = {"points": self.points, "reasons": dict(self.reasons), "recipe": self.context.recipe.digest()}
        self.context.checkpoints.save(done, {"enhancer": self.enhancer, "optimizer": self.optimizer}, notes=notes)

    def take(self, update: int) -> None:
        """One update."""
        tally, measured = self.step.take(self._asked(update), update=update, optimizer=self.optimizer, key=self.context.key)
        self.reasons.update(tally.reasons(weights_of(self.config)))
        self.points.append({"update": update} | {name: value for name, value in measured.items() if math.isfinite(value)})
        raised = alarms(self.points, std_floor=self.config.std_floor)
        if raised:
            raise TrainingDiverged(f"alarm at update {update}: {'; '.join(raised)}")
        self._tell(update)

    def publish(self) -> dict[str, Any]:
        """Writes the weights, the record and the comparison; returns numbers of it."""
        output, recipe = self.context.output, self.context.recipe
        save_enhancer(self.enhancer, output / "enhancer")
        (output / CARD).write_bytes(self.context.inputs["enhancer"].path(CARD).read_bytes())
        requests = fixed_requests(recipe, self.settings.degradations, self.prompts, num=self.config.num_fixed, size_px=self.size_px)
        self.context.say(f"drawing {len(requests)} short requests: as they stand, enhanced, and enhanced by the aligned model")
        supervised = load_enhancer(self.start).to(compute_device())
        answers = {
            way: answer_greedily(model, self.painter.encoder, requests, max_new_tokens=self.settings.max_new_tokens)
            for way, model in ((SUPERVISED, supervised), (ALIGNED, self.enhancer))
        }
        prompts = {OWN: [each.asked.request for each in requests]}
        prompts |= {way: [each.drawn for each in found] for way, found in answers.items()}
        judge = Judge(recipe.data.scenes) if any(each.fixed.asked for each in requests) else None
        drawn = draw_requests(self.painter, requests, prompts, self.scorer, weights_of(self.config), judge, key=self.context.key)
        comparison = compare_ways(drawn, answers, seed=recipe.seed)
        document = {"points": self.points, "comparison": comparison, "shown": self._pictures(requests, answers[ALIGNED], drawn)}
        (output / ENHANCEMENT).write_text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")
        warnings = [f"{count} scores were invalid: {reason}" for reason, count in self.reasons.most_common(5)]
        warnings += losses(comparison)
        if judge is None:
            warnings.append("no plain scenes among the data: what was drawn is compared by the rewards alone")
        return _numbers(comparison) | {"warnings": warnings}

    def _open_scorer(self) -> Scorer:
        names, inputs, recipe = [name for name in self.config.rewards if name != CONSTRAINTS], self.context.inputs, self.context.recipe
        return open_scorer(
            self.context.site,
            names,
            local=lambda: model_scorers(names, inputs, scenes=recipe.data.scenes),
            say=self.context.say,
        )

    def _asked(self, update: int) -> list[ShortRequest]:
        config, seed = self.config, self.context.recipe.seed
        chosen = prompts_of_update(self.prompts, update, config.prompts_per_update, edit_share=config.edit_share, seed=seed)
        return [short_request(prompt, self.settings.degradations, seed, "align_enhancer", update, prompt.prompt_id) for prompt in chosen]

    def _tell(self, update: int) -> None:
        done, point = update + 1, self.points[-1]
        if done % self.config.log_every_updates == 0 or done == self.config.updates:
            self.context.log({f"enhancer_grpo/{name}": float(value) for name, value in point.items() if name != "update"}, step=done)
        reward = f"{point['reward']:.4f}" if "reward" in point else "unknown"
        self.context.show(done, self.config.updates, f"reward {reward}, {point['valid']:.0%} of the answers valid")

    def _pictures(self, requests: Sequence[FixedRequest], answers: Sequence[Candidate], drawn: Mapping[str, Drawn]) -> list[dict[str, Any]]:
        """Saves what the report shows: the first requests for pictures, and the first edits, each drawn in all ways."""
        edits = [index for index, each in enumerate(requests) if each.asked.meant.encoded]
        others = [index for index in range(len(requests)) if index not in set(edits)]
        folder, shown, cells = self.context.output / "requests", [], []
        folder.mkdir()
        for index in (*others[: NUM_SHOWN // 2], *edits[: NUM_SHOWN // 2]):
            row = {way: drawn[way].pictures[index] for way in WAYS}
            sources = {f"source{slot}": source for slot, source in enumerate(requests[index].asked.meant.sources)}
            names = {name: _save(folder / f"{index:03d}-{name}.png", picture) for name, picture in (row | sources).items()}
            told = {"request": requests[index].asked.request, "thoughts": answers[index].thoughts, "prompt": answers[index].drawn}
            shown.append(told | {"seed": requests[index].fixed.seed, "pictures": names})
            cells.append([*row.values()])
        sheet = self.context.output / "enhanced.png"
        contact_sheet(cells, columns=2).save(sheet)
        self.context.tracker.image("enhanced", sheet, 0)
        return shown


def _save(path: Path, picture: Image.Image) -> str:
    picture.save(path)
    return f"{path.parent.name}/{path.name}"


def _numbers(comparison: Mapping[str, Any]) -> dict[str, float]:
    """The comparison's figures, flat: what manifests and tracking keep."""
    numbers = {"p": comparison["p"]}
    numbers |= {f"{way}/reward": value for way, value in comparison["reward"].items() if value is not None}
    for group in ("judge", "rewards"):
        numbers |= {f"{way}/{name}": value for way, found in comparison[group].items() for name, value in found.items()}
    return numbers | {f"{way}/{group}": value for group in ("valid", "kept") for way, value in comparison[group].items()}
