"""Rollouts and updates of a policy: keyed draws, ratios of one, guidance modes, clips, adapters, and policies merged."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model_core.data.prompts import prompts_of_update
from model_core.models.lora import add_lora, merged_state, without_lora
from model_core.models.mmdit import MMDiT
from model_core.recipe import SDE, GuidanceMode
from model_core.sampling.conditions import sampling_velocity, velocity
from model_core.sampling.rollout import roll_out
from model_core.training.distributed import ALONE
from model_core.training.policy import Learner, OldPolicy
from model_core.training.policy_merging import merging_backward
from model_core.training.policy_state import PolicyState
from model_core.training.rollouts import Artist, Chunk, draw_chunks
from tests.alignment_parts import MODEL, artist_of, policy, prompts_of, write_alignment_inputs
from tests.encoded_inputs import Input


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return write_alignment_inputs(tmp_path_factory.mktemp("alignment"))


def drawn(inputs: dict[str, Input], artist: Artist, model: MMDiT, *, update: int = 0) -> list[Chunk]:
    prompts = prompts_of_update(prompts_of(inputs), update, 4, edit_share=0.5, seed=0)
    return list(draw_chunks(artist, model, prompts, range(4), update=update))


def learner(artist: Artist, model: MMDiT) -> Learner:
    return Learner(model, artist.config, artist.sampling, PolicyState(policy(), artist.config, seed=0).reference)


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(inputs: dict[str, Input]) -> None:
    model = policy()
    together, apart = artist_of(inputs, groups_a_chunk=4), artist_of(inputs, groups_a_chunk=1)
    by_place = [
        {place: chunk.trajectories.latents[row * 4 : (row + 1) * 4] for chunk in chunks for row, place in enumerate(chunk.places)}
        for chunks in (drawn(inputs, together, model), drawn(inputs, apart, model))
    ]
    for place in range(4):
        assert torch.allclose(by_place[0][place], by_place[1][place], atol=1e-5)


def test_a_group_shares_one_window_and_no_noise(inputs: dict[str, Input]) -> None:
    for chunk in drawn(inputs, artist_of(inputs), policy()):
        for row in range(len(chunk.places)):
            times, actions = chunk.trajectories.t[row * 4 : (row + 1) * 4], chunk.trajectories.actions[row * 4 : (row + 1) * 4]
            assert bool((times == times[0]).all())
            assert len({tuple(action.flatten().tolist()) for action in actions}) == 4


def test_windows_of_groups_and_updates_differ(inputs: dict[str, Input]) -> None:
    artist, model = artist_of(inputs, window_steps=1, rollout_steps=6, window_range=[0, 5]), policy()
    chunks = [chunk for update in range(3) for chunk in drawn(inputs, artist, model, update=update)]
    begins = {chunk.trajectories.t[row * 4, 0].item() for chunk in chunks for row in range(len(chunk.places))}
    assert len(begins) > 2


def test_states_and_actions_are_fp32_and_follow_one_another(inputs: dict[str, Input]) -> None:
    for chunk in drawn(inputs, artist_of(inputs), policy()):
        kept = chunk.trajectories
        assert kept.states.dtype == kept.actions.dtype == torch.float32
        assert torch.equal(kept.actions[:, 0], kept.states[:, 1])
        assert torch.equal(kept.following[:, 0], kept.t[:, 1])


def test_a_window_that_reaches_the_last_step_is_refused() -> None:
    times = torch.linspace(1, 0, 5)
    with pytest.raises(ValueError, match="allowed are steps before the last"):
        roll_out(
            lambda x, _: x,
            torch.zeros(1, 1, 1),
            times,
            first_steps=torch.tensor([2]),
            num_steps=2,
            sde="flow_sde",
            noise_level=0.7,
            step_noise=lambda _: torch.zeros(1, 1, 1),
        )


@pytest.mark.parametrize("ratio", ["guard", "ppo", "dppo"])
@pytest.mark.parametrize("mode", list(GuidanceMode))
def test_before_the_first_update_every_ratio_is_exactly_one(inputs: dict[str, Input], mode: GuidanceMode, ratio: str) -> None:
    artist, model = artist_of(inputs, guidance_mode=mode, ratio=ratio), policy()
    advantages = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(4, 4, dtype=torch.bool)
    found = learner(artist, model).backward(drawn(inputs, artist, model), advantages, kept, OldPolicy(), num_kept=16, ranks=ALONE)
    assert found["ratio"] == 1.0
    assert found["drift_squared"] == found["at_upper"] == found["at_lower"] == 0.0
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


@pytest.mark.parametrize("sde", ["flow_sde", "dance_sde", "cps"])
def test_the_first_loss_is_the_mean_advantage_with_its_sign_turned(inputs: dict[str, Input], sde: SDE) -> None:
    artist, model = artist_of(inputs, ratio="ppo", sde=sde, noise_level=0.5), policy()
    advantages = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[2] = False
    found = learner(artist, model).backward(drawn(inputs, artist, model), advantages, kept, OldPolicy(), num_kept=12, ranks=ALONE)
    assert found["loss"] == pytest.approx(-advantages[kept].mean().item(), rel=1e-5)


def gradients(model: MMDiT) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def test_micro_batches_do_not_change_the_gradient(inputs: dict[str, Input]) -> None:
    found = []
    for micro_batch in (3, 64):
        artist, model = artist_of(inputs, micro_batch=micro_batch), policy()
        advantages, kept = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4, 4, dtype=torch.bool)
        learner(artist, model).backward(drawn(inputs, artist, model), advantages, kept, OldPolicy(), num_kept=16, ranks=ALONE)
        found.append(gradients(model))
    assert torch.allclose(found[0], found[1], atol=1e-5 * found[0].abs().max().item())


def test_only_the_full_mode_reaches_the_unconditional_branch(inputs: dict[str, Input]) -> None:
    """Of the empty prompt's states alone: those of a prompt are told apart by a change of the empty prompt's."""
    found = {}
    for mode in (GuidanceMode.FULL, GuidanceMode.DETACH, GuidanceMode.CONDITIONAL):
        artist, model = artist_of(inputs, guidance_mode=mode, groups_a_chunk=4), policy()
        chunk = drawn(inputs, artist, model)[0]
        assert chunk.unconditional is not None
        texts = [text.clone().requires_grad_() for text in chunk.unconditional.text]
        marked = replace(chunk, unconditional=replace(chunk.unconditional, text=texts))
        replay = learner(artist, model).replay(model, marked, torch.tensor([0]), torch.tensor([1]))
        (gradient,) = torch.autograd.grad(replay.mean.sum(), texts[0], allow_unused=True)
        found[mode] = gradient is not None and bool(gradient.any())
    assert found == {GuidanceMode.FULL: True, GuidanceMode.DETACH: False, GuidanceMode.CONDITIONAL: False}


def test_the_hybrid_replays_the_conditional_policy_and_the_full_mode_the_guided_one(inputs: dict[str, Input]) -> None:
    means = {}
    for mode in GuidanceMode:
        artist, model = artist_of(inputs, guidance_mode=mode, groups_a_chunk=4), policy()
        chunk = drawn(inputs, artist_of(inputs, groups_a_chunk=4), model)[0]  # one rollout for all
        means[mode] = learner(artist, model).replay(model, chunk, torch.arange(4), torch.zeros(4, dtype=torch.long)).mean
    assert torch.equal(means[GuidanceMode.FULL], means[GuidanceMode.DETACH])
    assert torch.equal(means[GuidanceMode.CONDITIONAL], means[GuidanceMode.NONE])
    assert not torch.allclose(means[GuidanceMode.FULL], means[GuidanceMode.CONDITIONAL], atol=1e-3)


def test_a_second_pass_over_a_rollout_is_held_against_the_policy_of_the_first(inputs: dict[str, Input]) -> None:
    artist, model = artist_of(inputs), policy()
    chunks, old, kept = drawn(inputs, artist, model), OldPolicy(), torch.ones(4, 4, dtype=torch.bool)
    advantages = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    update = learner(artist, model)
    update.backward(chunks, advantages, kept, old, num_kept=16, ranks=ALONE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad.sign() * parameter.abs().mean()
    found = update.backward(chunks, advantages, kept, old, num_kept=16, ranks=ALONE)
    assert found["drift_squared"] > 0
    assert found["at_lower"] + found["at_upper"] > 0


def test_the_kl_is_zero_at_the_start_and_pulls_back_from_where_the_policy_went(inputs: dict[str, Input]) -> None:
    artist = artist_of(inputs, kl_weight=1.0)
    state = PolicyState(policy(), artist.config, seed=0)
    update = Learner(state.model, artist.config, artist.sampling, state.reference)
    chunks, kept, nothing = drawn(inputs, artist, state.model), torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4)
    assert update.backward(chunks, nothing, kept, OldPolicy(), num_kept=16, ranks=ALONE)["kl"] == 0
    with torch.no_grad():
        state.model.image_out.weight += 0.1
    state.optimizer.clear()
    before = update.backward(chunks, nothing, kept, OldPolicy(), num_kept=16, ranks=ALONE)["kl"]
    assert before > 0
    state.optimizer.step(0)
    assert update.backward(chunks, nothing, kept, OldPolicy(), num_kept=16, ranks=ALONE)["kl"] < before


def test_adapters_change_nothing_at_first_and_can_be_merged_and_left_out() -> None:
    plain = policy()
    model = copy.deepcopy(plain)
    add_lora(model, rank=2, alpha=4.0, seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.endswith((".up", ".down")) for name in trained)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in merged_state(model).items())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    merged = MMDiT(MODEL, latent_channels=4, text_dim=32)
    merged.load_state_dict(merged_state(model))
    arguments = _arguments(plain)
    assert torch.allclose(model(*arguments), merged(*arguments), atol=1e-4)
    assert not torch.allclose(model(*arguments), plain(*arguments), atol=1e-2)
    with without_lora(model):
        assert torch.equal(model(*arguments), plain(*arguments))


def _arguments(model: MMDiT) -> tuple[Tensor, Tensor, Tensor, object]:
    from model_core.models.stream import pack

    generator = torch.Generator().manual_seed(2)
    stream = pack([(3, (2, 2)), (2, (2, 2))], model.config)
    return torch.randn(8, 4, generator=generator), torch.randn(5, 32, generator=generator), torch.tensor([0.3, 0.8]), stream


def test_velocities_of_sampling_and_of_learning_are_the_same(inputs: dict[str, Input]) -> None:
    model = policy()
    for chunk in drawn(inputs, artist_of(inputs), model):
        x, t = chunk.trajectories.states[:, 0], chunk.trajectories.t[:, 0]
        assert torch.allclose(sampling_velocity(model, chunk.conditions)(x, t), velocity(model, chunk.conditions)(x, t), atol=1e-5)


def test_each_prompt_is_drawn_once_a_round_and_edits_make_their_share(inputs: dict[str, Input]) -> None:
    prompts = prompts_of(inputs)
    num = {kind: len(pool) for kind, pool in prompts.items()}
    chosen = [prompts_of_update(prompts, update, 2, edit_share=0.5, seed=0) for update in range(num["image"])]
    assert all(sum(bool(prompt.encoded) for prompt in update) == 1 for update in chosen)
    images = [prompt.prompt_id for update in chosen for prompt in update if not prompt.encoded]
    assert sorted(images) == sorted(prompt.prompt_id for prompt in prompts["image"])


def test_a_merged_student_learns_each_kind_from_its_own_teacher(inputs: dict[str, Input]) -> None:
    """Teachers that are students with other last layers: the student's gradient is that of each kind's own teacher."""
    artist = artist_of(inputs, prompts_per_update=4)
    student = policy()
    teachers = {"image": policy(), "edit": policy()}
    prompts = prompts_of_update(prompts_of(inputs), 0, 4, edit_share=0.5, seed=0)
    same = merging_backward(student, teachers, artist, prompts, range(4), update=0, ranks=ALONE)
    assert same.item() == 0
    with torch.no_grad():
        teachers["edit"].image_out.weight += 0.5
    for prompt_kind, expected in (("image", True), ("edit", False)):
        chosen = [prompt for prompt in prompts if bool(prompt.encoded) == (prompt_kind == "edit")]
        loss = merging_backward(student, teachers, artist, chosen, range(len(chosen)), update=0, ranks=ALONE)
        assert (loss.item() == 0) == expected


def test_a_student_recovers_affine_teachers_on_their_routes_and_their_mean_off_them() -> None:
    """Two teachers v = a x + b, and a student that is told the route, by the loss that merging takes."""
    from model_core.objectives.flow import flow_loss

    teachers, generator = {0: (0.5, -1.0), 1: (-2.0, 3.0)}, torch.Generator().manual_seed(0)
    for routed in (True, False):
        gains, offsets = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.Adam([gains, offsets], lr=0.05)
        for _ in range(600):
            x = torch.randn(64, 1, generator=generator)
            route = torch.arange(64) % 2
            told = route if routed else torch.zeros(64, dtype=torch.long)
            a, b = (torch.tensor([teachers[int(which)][part] for which in route])[:, None] for part in (0, 1))
            target = a * x + b
            loss = flow_loss(gains[told][:, None] * x + offsets[told][:, None], target, num_elements=64)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if routed:
            assert gains.tolist() == pytest.approx([0.5, -2.0], abs=1e-3)
            assert offsets.tolist() == pytest.approx([-1.0, 3.0], abs=1e-3)
        else:
            assert gains[0].item() == pytest.approx(-0.75, abs=0.1)
            assert offsets[0].item() == pytest.approx(1.0, abs=0.1)
