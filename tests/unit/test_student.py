"""A student of few steps: drawn by its own sampler, once a step, without guidance, and taken by nothing that expects a flow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model_core.data.keys import keyed_generator
from model_core.data.pixels import tensor_image
from model_core.documents import UserError
from model_core.evaluation.drawing import Painter, Request, draw, open_painter
from model_core.models.condition import save_encoder
from model_core.models.diffusers_pipeline import PARTS, write_pipeline
from model_core.models.earlier_mmdit import check_earlier
from model_core.models.mmdit import load_mmdit, load_student, save_mmdit
from model_core.models.tiling import decode_pictures
from model_core.models.vae import save_vae
from model_core.recipe import Sampling
from model_core.sampling.conditions import encode_conditions, velocity
from model_core.sampling.few_step import FewStep, few_step, load_sampler, save_sampler
from model_core.sampling.pipeline import sample
from tests.published_models import painter
from tests.tiny_encoders import PROMPTS, picture

SAMPLER = FewStep(4, (0.5, 0.9))
SIZE = (64, 32)


@pytest.fixture(scope="module")
def student() -> Painter:
    return replace(painter(), sampling=SAMPLER)


@pytest.fixture(scope="module")
def folder(student: Painter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("student")
    save_mmdit(student.mmdit, place / "mmdit")
    save_sampler(SAMPLER, place / "mmdit")
    save_vae(student.vae, place / "vae")
    save_encoder(student.encoder, place / "encoder")
    return place


def pictures(painter: Painter, prompts: list[str], seeds: list[int]) -> torch.Tensor:
    return sample(painter.mmdit, painter.vae, painter.encoder, prompts, size_px=SIZE, seeds=seeds, sampling=painter.sampling)


def test_few_steps_equal_the_affine_recursion_of_an_affine_velocity() -> None:
    # v = a x + b at any time gives x0 = (1 - t a) x - t b, then x = (1 - t') x0 + t' eps.
    a, b, times = 0.7, -0.3, [1.0, 0.8, 0.35]
    noises = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    x = noises[0]
    for t, following, noise in ((1.0, 0.8, noises[1]), (0.8, 0.35, noises[2])):
        x = (1 - following) * ((1 - t * a) * x - t * b) + following * noise
    expected = (1 - 0.35 * a) * x - 0.35 * b
    start, *fresh = (torch.from_numpy(noise).float() for noise in noises)
    found = few_step(lambda x, t: a * x + b, start, times, step_noise=lambda step: fresh[step])
    assert found.dtype == torch.float64
    assert np.abs(found.numpy() - expected).max() < 1e-6


def test_times_are_equal_steps_shifted_towards_noise_and_the_sampler_is_read_back(tmp_path: Path) -> None:
    shift = np.exp(0.5)  # 256 tokens: mu is the first
    assert SAMPLER.times(256) == pytest.approx([1.0, *(shift / (shift + 1 / t - 1) for t in (0.75, 0.5, 0.25))])
    assert load_sampler(tmp_path) is None
    save_sampler(SAMPLER, tmp_path)
    assert load_sampler(tmp_path) == SAMPLER


def test_sampler_takes_the_conditional_branch_from_keyed_noises(student: Painter) -> None:
    seeds, (height, width) = [3, 8], (side // 16 for side in SIZE)
    tokens = height * width

    def noise(seed: int, *key: object) -> np.ndarray:
        return keyed_generator(seed, "sample", *key).standard_normal((4, height, width), dtype=np.float32).reshape(4, tokens).T

    with torch.inference_mode():
        ask = velocity(student.mmdit, encode_conditions(student.vae, student.encoder, PROMPTS[:2], [], shape=(height, width)))
        x = np.stack([noise(seed) for seed in seeds])
        times = SAMPLER.times(tokens)
        for step, t in enumerate(times):
            clean = x - t * ask(torch.from_numpy(x).float(), torch.full((2,), t)).numpy()
            if step < 3:
                following = times[step + 1]
                x = (1 - following) * clean + following * np.stack([noise(seed, "step", step) for seed in seeds])
        latents = torch.from_numpy(clean).float().transpose(1, 2).unflatten(2, (height, width))
        expected = decode_pictures(student.vae, student.vae.unstandardise(latents)).clamp(-1, 1)
    assert torch.allclose(pictures(student, PROMPTS[:2], seeds), expected, atol=1e-4)


def test_a_seed_draws_the_same_picture_in_any_batch_and_another_seed_another(student: Painter) -> None:
    together = pictures(student, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], [1, 2, 3])
    assert torch.equal(pictures(student, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], [1, 2, 3]), together)
    assert torch.allclose(pictures(student, PROMPTS[:1], [1]), together[:1], atol=1e-4)
    assert torch.allclose(pictures(student, PROMPTS[1:2], [2]), together[1:2], atol=1e-4)
    assert (together[0] - together[2]).abs().mean() > 1e-3


def test_one_step_begins_at_the_noise_that_the_teacher_begins_at(student: Painter) -> None:
    # A single step leads from noise to x - v for both, up to where the flow's last time is.
    teacher = replace(student, sampling=Sampling(steps=1, guidance_scale=1.0))
    assert torch.allclose(
        pictures(replace(student, sampling=FewStep(1, (0.5, 0.9))), PROMPTS[:1], [5]), pictures(teacher, PROMPTS[:1], [5]), atol=1e-4
    )


def test_painter_opened_on_a_student_asks_it_once_a_step_without_guidance(folder: Path, student: Painter) -> None:
    given = Sampling(steps=40, guidance_scale=4.0)
    opened = open_painter(mmdit=folder / "mmdit", vae=folder / "vae", encoder=folder / "encoder", sampling=given)
    assert opened.sampling == SAMPLER
    passes: list[int] = []
    opened.mmdit.register_forward_pre_hook(lambda _module, arguments: passes.append(len(arguments[2])))
    (drawn,) = draw(opened, [Request(PROMPTS[0], 1, SIZE)], on_drawn=lambda _: None)
    assert passes == [1] * SAMPLER.steps
    (expected,) = (tensor_image(one) for one in pictures(student, PROMPTS[:1], [1]))
    # Published encoders are kept in the type that this machine computes them in, hence the tolerance.
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_a_student_edits(student: Painter) -> None:
    reference = [picture(1, 32, 64)[None], picture(2, 32, 64)[None]]
    drawn = [
        sample(student.mmdit, student.vae, student.encoder, PROMPTS[:1], size_px=SIZE, seeds=[0], sampling=SAMPLER, references=[one])
        for one in reference
    ]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


def test_nothing_that_expects_a_flow_takes_a_student(folder: Path, student: Painter, tmp_path: Path) -> None:
    said = "found a student of few steps, which its own sampler alone can draw with; allowed are weights of a flow"
    with pytest.raises(UserError, match=said):
        load_mmdit(folder / "mmdit")
    with pytest.raises(UserError, match=r"mmdit.path: .* holds a student of few steps"):
        check_earlier(str(folder / "mmdit"), student.mmdit.config)
    with pytest.raises(UserError, match="found a student of few steps"):
        write_pipeline(student, tmp_path, list(PARTS))
    assert list(tmp_path.iterdir()) == []


def test_a_student_is_loaded_with_its_sampler_and_a_flow_is_refused_as_one(folder: Path, student: Painter, tmp_path: Path) -> None:
    model, sampler = load_student(folder / "mmdit")
    assert sampler == SAMPLER
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), student.mmdit.parameters(), strict=True))
    save_mmdit(student.mmdit, tmp_path)
    with pytest.raises(UserError, match="found weights of a flow; allowed is a student of few steps"):
        load_student(tmp_path)
