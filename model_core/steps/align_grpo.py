"""align_grpo: reinforcement learning of the last stage's model from rewards (R1 4.2, R4).

Takes the model, the autoencoder, the encoder, the data whose prompts are drawn, and the reward models; leaves the average weights in
`mmdit/`, `alignment.json` (every update, every change of weights and mix, what was compared), `prompts.jsonl`, a line a group and
update, and pictures of the same prompts and seeds before and after. An update is rolled out, scored and learned from in one piece:
one that a kill has cut short is drawn again, bit for bit, from the newest checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from model_core.context import StepContext
from model_core.data.contact_sheet import contact_sheet
from model_core.data.prompts import PolicyPrompt, prompts_of_update, read_prompts
from model_core.documents import UserError
from model_core.evaluation.before_after import Drawn, FixedPrompt, compare, draw_fixed, fixed_prompts
from model_core.evaluation.drawing import Painter
from model_core.evaluation.judge import Judge
from model_core.evaluation.report import ALIGNMENT
from model_core.evaluation.reward_card import FILE_NAME as REPORT_CARD
from model_core.models.condition import load_encoder
from model_core.models.mmdit import MMDiT, load_mmdit, save_mmdit
from model_core.models.vae import load_vae
from model_core.recipe import DIMENSIONS, GRPO
from model_core.rewards.client import HTTPScorer
from model_core.rewards.opening import model_scorers, open_scorer
from model_core.rewards.overlap import OverlappedScoring
from model_core.rewards.verdict import Scorer
from model_core.training.alarms import AlarmBell
from model_core.training.distributed import compute_device, frozen_dtype, keep_deterministic
from model_core.training.ema import update_ema
from model_core.training.guard import TrainingDiverged
from model_core.training.policy import Learner
from model_core.training.policy_merging import kind_of, merging_backward
from model_core.training.policy_state import PolicyState
from model_core.training.policy_update import PolicyUpdate, UpdateRecord
from model_core.training.rollouts import Artist
from model_core.training.updates import take_all

ONE, MERGED = "policy", "merged"
KINDS = ("image", "edit")
NUM_SHOWN = 12  # pairs in the picture of before and after


def run(context: StepContext) -> dict[str, Any]:
    """Trains to the end; returns what rose and fell. Raises TrainingDiverged when an alarm is raised, RewardUnavailable without rewards."""
    device = compute_device(context.ranks)
    keep_deterministic(device)
    alignment = _Alignment(context, device)
    seconds = take_all(
        context,
        first=alignment.resume(),
        total=alignment.num_updates,
        checkpoint_every=alignment.config.checkpoint_every_updates,
        take=alignment.take,
        save=alignment.save,
        noun="update",
    )
    if not context.ranks.is_first:
        return {}
    return alignment.publish() | {"updates": alignment.num_updates, "train_seconds": round(seconds, 3)}


def _settings(context: StepContext) -> GRPO:
    if context.recipe.grpo is None:
        raise UserError(f"recipe {context.recipe.name}: found no grpo; allowed for align_grpo is a recipe with that section")
    return context.recipe.grpo


class _Alignment:
    """The policies of a recipe in turn, and their record."""

    def __init__(self, context: StepContext, device: torch.device) -> None:
        recipe, inputs = context.recipe, context.inputs
        self.context, self.config = context, _settings(context)
        self.vae = load_vae(inputs["vae"].folder("vae")).to(device)
        self.encoder = load_encoder(inputs["encoder"].folder("encoder"), dtype=frozen_dtype(device)).to(device)
        self.start = load_mmdit(inputs["model"].folder("mmdit")).to(device)
        resolution_px = recipe.mmdit.stages[recipe.stages[-1]].resolution_px
        self.prompts = read_prompts(
            inputs["images"],
            inputs["edits"],
            inputs["captions"],
            resolution_px=resolution_px,
            multiple_px=self.encoder.multiple_px,
            seed=recipe.seed,
        )
        self.size_px = (resolution_px, resolution_px)
        two = self.config.policies == "two"
        if two and not all(self.prompts[kind] for kind in KINDS):
            raise UserError("grpo.policies: found two, but the data hold no prompts of one kind; allowed is one")
        self.phases = [(kind, self.config.updates) for kind in KINDS] if two else [(ONE, self.config.updates)]
        self.phases += [(MERGED, self.config.merge_updates)] if two else []
        self.scorer = self._open_scorer()
        # A scorer of this process works on the same cores: it is asked in turn, not beside the rollout.
        self.scoring = OverlappedScoring(self.scorer, num_threads=int(isinstance(self.scorer, HTTPScorer)), max_waiting=4)
        self.state = PolicyState(self.start, self.config, seed=recipe.seed)
        self.bell = AlarmBell(self.config.alarms)
        self.record = UpdateRecord()
        self.teachers: dict[str, MMDiT] = {}

    @property
    def num_updates(self) -> int:
        """Updates of all policies."""
        return sum(updates for _, updates in self.phases)

    def resume(self) -> int:
        """Takes up the newest checkpoint; returns how many updates are done."""
        found = self.context.checkpoints.restore({"policy": self.state})
        if found is None:
            return 0
        self.bell.load_state_dict(found.notes["bell"])
        self.record.load_state_dict(found.notes["record"])
        return found.step

    def save(self, done: int) -> None:
        """A checkpoint after `done` updates."""
        notes = {"bell": self.bell.state_dict(), "record": self.record.state_dict(), "recipe": self.context.recipe.digest()}
        self.context.checkpoints.save(done, {"policy": self.state}, notes=notes)

    def take(self, update: int) -> None:
        """One update of the policy whose turn it is."""
        policy, number, first_of_policy, last_of_policy = self._turn(update)
        if first_of_policy and update:
            self.state.begin()
            self.bell = AlarmBell(self.config.alarms)
        if policy == MERGED:
            point = self._merge(number)
        else:
            point = self._reinforce(policy, number)
        update_ema(self.state.ema, self.state.model, step=number, decay=self.config.ema_decay)
        if last_of_policy:
            self.state.finish(policy)
        point = {"update": update, "policy": policy, **point}
        self.record.points.append(point)
        self._tell(update, point)

    def publish(self) -> dict[str, Any]:
        """Writes the last policy's weights, the record and the comparison; returns numbers of it."""
        output, recipe = self.context.output, self.context.recipe
        aligned = self.state.finished(self.phases[-1][0])
        save_mmdit(aligned, output / "mmdit")
        weights = self.config.phase(self.config.updates).weights
        fixed = fixed_prompts(recipe, self.prompts, num=self.config.num_fixed, size_px=self.size_px)
        judge = Judge(recipe.data.scenes) if any(each.asked for each in fixed) else None
        drawn = []
        for name, model in (("before", self.start), ("after", aligned)):
            self.context.say(f"drawing {len(fixed)} fixed prompts, {name} the alignment")
            painter = Painter(mmdit=model.to(self.state.device).eval(), vae=self.vae, encoder=self.encoder, sampling=recipe.sampling)
            drawn.append(draw_fixed(painter, fixed, self.scorer, weights, judge, key=f"{self.context.key}/{name}"))
        comparison = compare(*drawn, spread=self.record.first_spread(self.config.alarms.window), seed=recipe.seed)
        shown = self._pictures(fixed, *drawn)
        document = {
            "points": self.record.points,
            "changes": self.record.changes,
            "comparison": comparison,
            "guidance_mode": self.config.guidance_mode,
            "gold": self.config.gold,
            "report_cards": _report_cards(self.context),
            "shown": shown,
        }
        (output / ALIGNMENT).write_text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")
        lines = [json.dumps(line, sort_keys=True, allow_nan=False) for line in self.record.ledger]
        (output / "prompts.jsonl").write_text("".join(line + "\n" for line in lines))
        history = self.context.inputs["model"].path("history.json").read_bytes()
        (output / "history.json").write_bytes(history)
        return _numbers(comparison) | {"samples": self.record.num_samples, "warnings": self.record.warnings}

    def _open_scorer(self) -> Scorer:
        names, inputs, recipe = self.config.rewards, self.context.inputs, self.context.recipe
        return open_scorer(
            self.context.site,
            names,
            local=lambda: model_scorers(names, inputs, scenes=recipe.data.scenes),
            say=self.context.say,
        )

    def _turn(self, update: int) -> tuple[str, int, bool, bool]:
        """The policy of an update, the update's number within it, and whether it is the policy's first or last one."""
        for policy, updates in self.phases:
            if update < updates:
                return policy, update, update == 0, update == updates - 1
            update -= updates
        raise ValueError(f"found an update {update} beyond the last policy")

    def _reinforce(self, policy: str, update: int) -> dict[str, Any]:
        config, phase = self.config, self.config.phase(update)
        if phase.from_update == update:
            self.record.change(policy, update, phase)
            self.context.say(f"from update {update}: {json.dumps(phase.model_dump(mode='json')['weights'])}, edit_share {phase.edit_share}")
        prompts = self._prompts_of(policy, update, edit_share=phase.edit_share)
        learner = Learner(self.state.model, config, self.context.recipe.sampling, self.state.reference)
        step = PolicyUpdate(self._artist(policy), learner, self.scoring, self.scorer.names, self.context.ranks)
        result = step.take(
            prompts, update=update, weights=phase.weights, optimizer=self.state.optimizer, key=f"{self.context.key}/{policy}"
        )
        self.record.add(policy, update, prompts, result, phase.weights)
        alarms = self.bell.hear(result.measured)
        if alarms:
            raise TrainingDiverged(f"alarm at update {update} of {policy}: {'; '.join(alarms)}")
        return {name: value for name, value in result.measured.items() if math.isfinite(value)}

    def _merge(self, update: int) -> dict[str, Any]:
        if not self.teachers:
            self.teachers = {kind: self.state.finished(kind).to(self.state.device).requires_grad_(False) for kind in KINDS}
        prompts = self._prompts_of(MERGED, update, edit_share=self.config.phase(self.config.updates).edit_share)
        places, ranks = self.context.ranks.share(len(prompts)), self.context.ranks
        loss = merging_backward(
            self.state.model, self.teachers, self._artist(MERGED), prompts, list(places), update=update, ranks=ranks
        ).item()
        norm = self.state.optimizer.clip().item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(f"merging update {update}: found loss {loss} and gradient norm {norm}; a lower grpo.lr may help")
        self.state.optimizer.step(update)
        return {"merging_loss": loss, "grad_norm": norm}

    def _prompts_of(self, policy: str, update: int, *, edit_share: float) -> list[PolicyPrompt]:
        pools: Mapping[str, Sequence[PolicyPrompt]] = self.prompts
        if policy in KINDS:
            pools = {kind: self.prompts[kind] if kind == policy else [] for kind in KINDS}
        seed = self.context.recipe.seed
        return prompts_of_update(pools, update, self.config.prompts_per_update, edit_share=edit_share, seed=seed)

    def _artist(self, policy: str) -> Artist:
        recipe = self.context.recipe
        return Artist(vae=self.vae, encoder=self.encoder, sampling=recipe.sampling, config=self.config, seed=recipe.seed, policy=policy)

    def _tell(self, update: int, point: Mapping[str, Any]) -> None:
        done = update + 1
        if done % self.config.log_every_updates == 0 or done == self.num_updates:
            numbers = {f"grpo/{name}": float(value) for name, value in point.items() if isinstance(value, int | float) and name != "update"}
            self.context.log(numbers, step=done)
        message = f"reward {point['reward']:.4f}" if "reward" in point else f"merging loss {point.get('merging_loss', float('nan')):.5f}"
        self.context.show(done, self.num_updates, message)

    def _pictures(self, fixed: Sequence[FixedPrompt], before: Drawn, after: Drawn) -> list[dict[str, Any]]:
        """Saves what the report shows: half of it prompts, half edits, those whose reward has changed most among each first."""
        kinds = [kind_of(each.prompt) for each in fixed]
        change = [0.0 if math.isnan(value) else abs(value) for value in (after.totals - before.totals).tolist()]
        chosen: list[int] = []
        for kind in KINDS:
            members = [index for index in range(len(fixed)) if kinds[index] == kind]
            chosen += sorted(members, key=lambda index: -change[index])[: NUM_SHOWN // 2]
        folder = self.context.output / "pictures"
        folder.mkdir()
        shown, cells = [], []
        for index in chosen:
            each = fixed[index]
            row = {"before": before.pictures[index], "after": after.pictures[index]}
            row |= {f"source{slot}": source for slot, source in enumerate(each.prompt.sources)}
            names = {name: _save(folder / f"{index:03d}-{name}.png", picture) for name, picture in row.items()}
            rewards = {"before": _number(before.totals[index]), "after": _number(after.totals[index])}
            shown.append({"prompt": each.prompt.prompt, "kind": kinds[index], "seed": each.seed, "reward": rewards, "pictures": names})
            cells.append([before.pictures[index], after.pictures[index]])
        sheet = self.context.output / "before_after.png"
        contact_sheet(cells, columns=3).save(sheet)
        self.context.tracker.image("before_after", sheet, 0)
        return shown


def _report_cards(context: StepContext) -> dict[str, Any]:
    """What each reward model that the step was given is worth: its accuracy on pairs that it never saw."""
    kept = ("accuracy", "accuracy_3way", "pairs")
    cards = {name: context.inputs[name].read_json(REPORT_CARD) for name in DIMENSIONS if name in context.inputs}
    return {name: {key: card[key] for key in kept} for name, card in cards.items()}


def _save(path: Path, picture: Image.Image) -> str:
    picture.save(path)
    return f"{path.parent.name}/{path.name}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _numbers(comparison: Mapping[str, Any]) -> dict[str, float]:
    """The comparison's figures, flat: what manifests and tracking keep."""
    numbers = {"reward_before": comparison["reward"]["before"], "reward_after": comparison["reward"]["after"], "p": comparison["p"]}
    if comparison["gain_in_spreads"] is not None:
        numbers["gain_in_spreads"] = comparison["gain_in_spreads"]
    for group in ("rewards", "judge"):
        for name, pair in comparison[group].items():
            numbers |= {f"{when}/{name}": value for when, value in pair.items() if value is not None}
    return numbers
