"""Reward models: what they read, what they leave, and when a scorer gives no number."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model_core.documents import UserError
from model_core.models.reward import Calibration, RewardModel, calibrated, load_reward, open_reward_trunk, save_reward, square_tensor
from model_core.models.reward_scorer import RewardScorer
from model_core.models.vlm_input import vision_patches
from model_core.recipe import Dimension
from model_core.rewards.verdict import Invalid, ScoreRequest, Value
from tests.reward_parts import PROMPTS, model, square


def request(prompt: str = PROMPTS[0], level: int = 100, **given: object) -> ScoreRequest:
    return ScoreRequest(key="k", prompt=prompt, image=square(level), **given)  # type: ignore[arg-type]


def stirred(dimension: Dimension = "aesthetics") -> RewardModel:
    """A model whose heads are not zero, calibrated."""
    made = model(dimension)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for head in (made.score_head, made.preference_head):
            head.weight.add_(0.3 * torch.randn(head.weight.shape, generator=generator))
    made.calibration = Calibration(scale=1.5, shift=-0.5, temperature=0.7, uncertainty_scale=0.4)
    return made.eval().requires_grad_(False)


def test_judgements_do_not_depend_on_the_company_in_a_batch() -> None:
    made = stirred("alignment")
    prompts = [PROMPTS[0], "a plain square beside a large square", PROMPTS[2]]
    chats = [made.chat(prompt, num_sources=0) for prompt in prompts]
    pictures = torch.stack([square_tensor(square(level), 32) for level in (20, 120, 220)])
    together = made(chats, pictures)
    for place in range(3):
        alone = made(chats[place : place + 1], pictures[place : place + 1])
        for name in ("logits", "mean", "log_deviation", "log_likelihood"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[place], rtol=1e-4, atol=1e-5)
    assert together.mean.std() > 0.01


def test_prompt_likelihood_is_the_language_models_own_loss_on_the_prompt() -> None:
    made = stirred("alignment")
    chat = made.chat(PROMPTS[1], num_sources=0)
    begin, end = chat.prompt
    assert made.tokenizer.decode(chat.ids[begin:end]) == PROMPTS[1]
    pictures = square_tensor(square(200), 32)[None]
    side = made.image_px // 8
    labels = torch.tensor([[token if begin <= place < end else -100 for place, token in enumerate(chat.ids)]])
    mine = made([chat], pictures).log_likelihood.item()
    patches = vision_patches(pictures[0], patch_px=8, frames=1, slot_px=16)
    loss = made.trunk(  # transformers counts positions and shifts labels by itself
        input_ids=torch.tensor([chat.ids]),
        pixel_values=patches,
        image_grid_thw=torch.tensor([[1, side, side]]),
        mm_token_type_ids=(torch.tensor([chat.ids]) == made.trunk.config.image_token_id).int(),
        labels=labels,
    ).loss.item()
    assert mine == pytest.approx(-loss, abs=1e-4)


def test_each_picture_of_a_batch_is_read_in_its_own_request() -> None:
    made = stirred("visual_consistency")
    chats = [made.chat(PROMPTS[0], num_sources=num) for num in (1, 2)]
    pictures = torch.stack([square_tensor(square(level, level), 32) for level in (20, 60, 90, 120, 150, 180, 220)])
    before = made(chats, pictures).mean
    changed = pictures.clone()
    changed[6] = -changed[6]
    after = made(chats, changed).mean
    assert after[0].item() == pytest.approx(before[0].item(), abs=1e-6)
    assert abs(after[1] - before[1]).item() > 1e-4


def test_a_saved_model_judges_as_before(tmp_path: Path) -> None:
    made = stirred("instruction_following")
    save_reward(made, tmp_path)
    loaded = load_reward(tmp_path)
    asked = [request(sources=[square(10)])]
    assert RewardScorer(loaded).score(asked) == RewardScorer(made).score(asked)
    assert (loaded.dimension, loaded.image_px, loaded.calibration) == (made.dimension, 32, made.calibration)
    with pytest.raises(UserError, match=r"holds no reward\.json"):
        load_reward(tmp_path / "elsewhere")


def test_fresh_heads_go_on_given_weights_and_other_folders_are_refused(tmp_path: Path) -> None:
    save_reward(stirred(), tmp_path)
    given = open_reward_trunk(tmp_path, dimension="portrait", image_px=64)
    assert given.preference_head.weight.abs().sum() == 0
    with pytest.raises(UserError, match="image_px: found 40"):
        open_reward_trunk(tmp_path, dimension="portrait", image_px=40)
    with pytest.raises(UserError, match=r"reward\.trunk\.path"):
        open_reward_trunk(tmp_path / "elsewhere", dimension="portrait", image_px=32)


def test_values_are_calibrated_and_carry_an_uncertainty() -> None:
    made = stirred()
    score = RewardScorer(made).score([request()])[0]["aesthetics"]
    said = made([made.chat(PROMPTS[0], num_sources=0)], square_tensor(square(100), 32)[None])
    shares = said.logits[0].softmax(0).numpy()
    assert isinstance(score, Value)
    assert score.value == pytest.approx((1.5 * float((shares * np.arange(1, 6)).sum()) - 0.5 - 1) / 4, abs=1e-5)
    assert score.uncertainty == pytest.approx(0.4 * math.exp(said.log_deviation.item()) / 4, rel=1e-5)
    by_mean = calibrated(said, replace(made.calibration, reads="preference"))[0]
    assert by_mean.item() == pytest.approx(1.5 * said.mean.item() - 0.5, rel=1e-5)


def test_a_scorer_gives_invalid_and_never_a_number_where_it_cannot_judge() -> None:
    scorer = RewardScorer(stirred("alignment"))
    assert scorer.names == ("alignment",)
    good, empty, marked = scorer.score([request(), request(prompt="  "), request(prompt="a <|image_pad|> square")])
    assert isinstance(good["alignment"], Value)
    assert empty["alignment"] == Invalid("no prompt")
    assert isinstance(marked["alignment"], Invalid)
    assert "mark of an image slot" in marked["alignment"].reason
    assert RewardScorer(stirred("instruction_following")).score([request()]) == [
        {"instruction_following": Invalid("an edit without its sources")}
    ]
    assert scorer.score([]) == []


def test_a_value_that_is_not_finite_is_invalid() -> None:
    broken = stirred()
    broken.score_head.bias.fill_(float("nan"))
    assert RewardScorer(broken).score([request()]) == [{"aesthetics": Invalid("the model's value is nan")}]


def test_pictures_are_padded_to_a_square_and_never_cropped() -> None:
    wide = Image.new("RGB", (64, 16), (255, 255, 255))
    tensor = square_tensor(wide, 32)
    assert tensor.shape == (3, 32, 32)
    assert (tensor[:, 12:20] == 1).all()
    assert tensor[:, :12].abs().max() < 0.01
    assert torch.equal(square_tensor(square(90), 32), square_tensor(square(90).convert("RGBA"), 32))
