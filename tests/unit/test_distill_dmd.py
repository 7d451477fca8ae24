"""The step distill_dmd: backward simulation, who learns when, roles that share weights, and stops that leave no trace."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model_core.documents import UserError
from model_core.models.condition import load_encoder
from model_core.models.mmdit import MMDiT, load_mmdit, load_student
from model_core.models.vae import load_vae
from model_core.recipe import DMD, Sampling, parse_recipe
from model_core.sampling.conditions import velocity
from model_core.sampling.few_step import few_step
from model_core.steps.distill_dmd import run
from model_core.training import distillation
from model_core.training.distillation import STUDENT, Distiller, Draws, num_values, simulate, student_backward
from model_core.training.distillation_state import DistillationState, take_up
from model_core.training.distributed import ALONE, Ranks
from model_core.training.ema import update_ema
from model_core.training.guard import TrainingDiverged
from model_core.training.stopping import Stopped
from tests.alignment_parts import DMD_SETTINGS, context_of, policy, prompts_of, write_alignment_inputs
from tests.encoded_inputs import Input


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return write_alignment_inputs(tmp_path_factory.mktemp("inputs"))


def distiller_of(inputs: dict[str, Input], *, ranks: Ranks = ALONE, guidance_scale: float = 3.0, **dmd: Any) -> Distiller:
    teacher = policy().requires_grad_(False)
    return Distiller(
        vae=load_vae(inputs["vae"].folder("vae")),
        encoder=load_encoder(inputs["encoder"].folder("encoder")),
        teachers={"base": teacher, "aligned": teacher},
        sampling=Sampling(steps=2, guidance_scale=guidance_scale),
        config=DMD.model_validate(DMD_SETTINGS | dmd),
        seed=0,
        ranks=ranks,
    )


def document(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "distillation.json").read_text())
    return found


def test_the_exit_step_is_the_same_on_all_ranks_and_every_step_has_its_turn(inputs: dict[str, Input]) -> None:
    drawn = [[distiller_of(inputs, ranks=Ranks(rank, 4)).exit_step(iteration, STUDENT) for iteration in range(40)] for rank in range(4)]
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]
    assert set(drawn[0]) == {0, 1, 2}


def test_simulation_meets_the_states_that_the_sampler_does(inputs: dict[str, Input]) -> None:
    distiller, student = distiller_of(inputs), policy()
    chunk = distiller.chunks(prompts_of(inputs)["image"][:2], guided=False)[0]
    ask = velocity(student, chunk.conditions)
    draws = Draws(distiller, chunk, STUDENT, 0, channels=4)
    noises = [draws.noise() for _ in range(3)]
    met: list[torch.Tensor] = []

    def watched(x: torch.Tensor, t: float) -> torch.Tensor:
        met.append(x)
        with torch.no_grad():
            return ask(x, x.new_full((len(x),), t))

    times = distiller.sampler.times(chunk.num_tokens)
    few_step(watched, noises[0], times, step_noise=lambda step: noises[step + 1])
    for exit_step in range(3):
        again = Draws(distiller, chunk, STUDENT, 0, channels=4)
        x, t = simulate(distiller, student, chunk, again, exit_step=exit_step)
        assert t == times[exit_step]
        torch.testing.assert_close(x, met[exit_step], rtol=1e-4, atol=1e-5)


def test_a_linear_students_simulation_follows_the_affine_recursion() -> None:
    """x0 = a x + b at every time: mean and variance of the states, from noise on, by hand."""
    a, b, times = 0.6, 0.3, [1.0, 0.75, 0.5, 0.25]
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(200_000, 1, 1, generator=generator, dtype=torch.float64) for _ in range(4)]
    mean, variance = 0.0, 1.0
    for following in times[1:]:
        mean, variance = (1 - following) * (a * mean + b), (1 - following) ** 2 * a**2 * variance + following**2
    clean = few_step(lambda x, t: (x - (a * x + b)) / t, noises[0], times, step_noise=lambda step: noises[step + 1])
    assert clean.mean().item() == pytest.approx(a * mean + b, abs=0.01)
    assert clean.var().item() == pytest.approx(a**2 * variance, rel=0.02)


def test_no_gradient_leads_before_the_exit_step(inputs: dict[str, Input], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the states before the exit step made by a frozen copy, the gradient is the same."""
    distiller, student, critic = distiller_of(inputs), policy(), policy()
    monkeypatch.setattr(Distiller, "exit_step", lambda *_: 2)
    prompts = prompts_of(inputs)["image"][:2]
    chunks = distiller.chunks(prompts, guided=True)
    student_backward(distiller, student, critic, chunks, iteration=0, num_elements=num_values(prompts, 4))
    expected = {name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None}
    frozen = policy().requires_grad_(False)
    monkeypatch.setattr(distillation, "simulate", lambda one, _, *rest, **named: simulate(one, frozen, *rest, **named))
    student.zero_grad()
    student_backward(distiller, student, critic, chunks, iteration=0, num_elements=num_values(prompts, 4))
    assert expected
    for name, parameter in student.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_a_student_that_is_its_unguided_teacher_with_its_own_score_gets_no_gradient(inputs: dict[str, Input]) -> None:
    """Fake score and teacher are the same network: x0_fake = x0_real, whatever the student draws."""
    distiller, student = distiller_of(inputs, guidance_scale=1.0), policy()
    prompts = prompts_of(inputs)["image"][:2]
    measured = student_backward(
        distiller, student, policy(), distiller.chunks(prompts, guided=False), iteration=0, num_elements=num_values(prompts, 4)
    )
    assert measured.gradient_rms == 0.0


def test_the_gradient_does_not_depend_on_chunks(inputs: dict[str, Input]) -> None:
    prompts = [*prompts_of(inputs)["image"][:3], *prompts_of(inputs)["edit"][:2]]
    found = []
    for samples in (1, 8):
        distiller, student, critic = distiller_of(inputs, samples_a_chunk=samples, guidance_times=(0.1, 0.9)), policy(), policy()
        with torch.no_grad():
            critic.image_out.weight.mul_(0.5)
        student_backward(
            distiller, student, critic, distiller.chunks(prompts, guided=True), iteration=1, num_elements=num_values(prompts, 4)
        )
        found.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters() if parameter.grad is not None]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


def test_the_fake_score_takes_up_a_geometric_sum_of_the_students_weights() -> None:
    critic, student = policy(), policy()
    begin = critic.image_out.weight.detach().clone()
    values = (1.0, -2.0, 0.5)
    for value in values:
        torch.nn.init.constant_(student.image_out.weight, value)
        take_up(critic, student, share=0.03)
    expected = 0.97**3 * begin + sum(0.03 * 0.97 ** (2 - place) * value for place, value in enumerate(values))
    torch.testing.assert_close(critic.image_out.weight.detach(), expected)


def test_the_average_warms_up_and_is_held_at_its_decay() -> None:
    ema, model = policy(), policy()
    torch.nn.init.constant_(ema.image_out.weight, 0.0)
    torch.nn.init.constant_(model.image_out.weight, 1.0)
    expected = 0.0
    for step, decay in ((0, 0.1), (5, 6 / 15), (10_000, 0.98)):
        update_ema(ema, model, step=step, decay=0.98)
        expected = decay * expected + (1 - decay)
        torch.testing.assert_close(ema.image_out.weight, torch.full_like(ema.image_out.weight, expected))


def test_adapters_share_the_teachers_weights_and_leave_them_as_they_are(inputs: dict[str, Input], tmp_path: Path) -> None:
    state = DistillationState(start := policy(), DMD.model_validate(DMD_SETTINGS | {"lora_rank": 2}), seed=0)
    pointers = {parameter.data_ptr() for parameter in start.parameters()}
    for role in (state.student, state.critic, state.ema):
        frozen = [parameter for parameter in role.parameters() if not parameter.requires_grad and parameter.ndim == 2]
        assert sum(parameter.data_ptr() in pointers for parameter in frozen) >= len(list(start.blocks))
    before = {name: value.clone() for name, value in start.state_dict().items()}
    context = context_of(tmp_path, inputs, dmd={"lora_rank": 2})
    run(context)
    student, _ = load_student(context.output / "mmdit")
    teacher = load_mmdit(inputs["model"].folder("mmdit"))
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, teacher.state_dict()[name])]
    assert changed
    assert all(name.startswith("blocks.") for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())


def test_the_student_learns_every_second_iteration_and_the_fake_score_always(inputs: dict[str, Input], tmp_path: Path) -> None:
    context = context_of(tmp_path, inputs)
    stats = run(context)
    points = document(context.output)["points"]
    assert [point["iteration"] for point in points] == [1, 2, 3, 4, 5, 6]
    assert "student_grad_norm" not in points[0]
    norms = [point["student_grad_norm"] for point in points[1:]]
    assert norms[0] == norms[1] != norms[2] == norms[3] != norms[4]
    assert len({point["critic_loss"] for point in points}) == 6
    assert {"picture_mean", "picture_std"} <= points[-1].keys()
    assert stats["nfe"] == 3
    student, sampler = load_student(context.output / "mmdit")
    assert sampler.steps == 3
    assert isinstance(student, MMDiT)


def test_a_run_that_is_told_to_stop_goes_on_as_if_it_had_not(
    inputs: dict[str, Input], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = context_of(tmp_path / "undisturbed", inputs)
    run(undisturbed)
    for stop_after in (1, 3, 4):
        asked = iter(range(100))

        class Stop:
            def agreed(self, _ranks: Ranks, *, asked: Any = asked, stop_after: int = stop_after) -> bool:
                return next(asked) == stop_after - 1

        class Noting:
            def __enter__(self) -> Stop:
                return Stop()

            def __exit__(self, *_: object) -> None:
                return None

        monkeypatch.setattr("model_core.training.updates.noting_sigterm", Noting)
        root = tmp_path / f"stopped-{stop_after}"
        with pytest.raises(Stopped, match=f"after iteration {stop_after}"):
            run(context_of(root, inputs))
        monkeypatch.undo()
        resumed = context_of(root, inputs)
        run(resumed)
        found, expected = (load_file(one.output / "mmdit/model.safetensors") for one in (resumed, undisturbed))
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert document(resumed.output)["points"] == document(undisturbed.output)["points"]


def test_offload_changes_nothing_that_is_computed(inputs: dict[str, Input], tmp_path: Path) -> None:
    for name, offload in (("kept", False), ("moved", True)):
        run(context_of(tmp_path / name, inputs, dmd={"offload": offload}))
    found, expected = (load_file(tmp_path / name / "output-0/mmdit/model.safetensors") for name in ("moved", "kept"))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_loss_that_is_not_finite_stops_the_step_in_one_sentence(inputs: dict[str, Input], tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="of the fake score: found a loss of"):
        run(context_of(tmp_path, inputs, dmd={"critic_lr": 1e38, "lr": 1e38, "ida": 1.0}))


def test_a_recipe_without_the_section_is_refused(inputs: dict[str, Input], tmp_path: Path) -> None:
    context = context_of(tmp_path, inputs)
    context = dataclasses.replace(context, recipe=context.recipe.model_copy(update={"dmd": None}))
    with pytest.raises(UserError, match="found no dmd"):
        run(context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_steps": 2}, "teacher_weights has 4 entries; allowed is one a student step, 2"),
        ({"teacher_weights": [{"base": 0.5}, {"base": 1}, {"base": 1}, {"base": 1}]}, "teacher_weights of step 0 sum to 0.5; allowed is 1"),
        ({"match_times": [0.9, 0.1]}, "match_times is .* allowed are two rising times"),
        ({"offload": True, "lora_rank": 4}, "allowed is one of them"),
        ({"teacher_weights": [{"other": 1.0}]}, "teacher_weights"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe({"name": "tiny", "mmdit": {"stages": {"S1": {}}}, "dmd": settings}, "recipe")
