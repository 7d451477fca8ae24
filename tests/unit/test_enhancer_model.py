"""The Prompt Enhancer's model: keyed draws, exact log-probabilities, and weights that come back as they were."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from model_core.documents import UserError
from model_core.models.enhancer import PromptEnhancer, drawn_tokens, load_enhancer, open_enhancer, save_enhancer, tiny_enhancer
from model_core.recipe_enhancer import Enhancer

SIZES = Enhancer(hidden_size=32, num_layers=2, num_heads=2, vocab_size=320)
TEXTS = ['a red disc with "K7"\n<think>\ncolor: crimson -> red\n</think>\n\n{"prompt": "a red circle", "aspect_ratio": "1:1"}'] * 3
REQUESTS = ["red", 'a longer request that says "K7" somewhere', "a disc please"]
KEYS = [("seed", number) for number in range(3)]


@pytest.fixture(scope="module")
def model() -> PromptEnhancer:
    return tiny_enhancer(SIZES, TEXTS, seed=0)


def test_weights_are_keyed_by_the_seed_and_leave_the_global_generator_alone(model: PromptEnhancer):
    torch.manual_seed(5)
    same, other = tiny_enhancer(SIZES, TEXTS, seed=0), tiny_enhancer(SIZES, TEXTS, seed=1)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    pairs = [(one, same.state_dict()[name], other.state_dict()[name]) for name, one in model.state_dict().items()]
    assert all(torch.equal(one, twin) for one, twin, _ in pairs)
    assert any(not torch.equal(one, stranger) for one, _, stranger in pairs)


@pytest.mark.parametrize("answer", ['<think>\n\n</think>\n\n{"prompt": "a \\"K7\\" é 你\\\\", "aspect_ratio": "16:9"}', "a  b", " x"])
def test_any_answer_is_told_back_sign_by_sign(model: PromptEnhancer, answer: str):
    ids = model.answer_ids(answer)
    assert ids[-1] == model.end_id
    assert model.text(ids) == answer


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>", "<|image_pad|>"])
def test_a_request_cannot_hold_a_mark_of_the_chat(model: PromptEnhancer, mark: str):
    with pytest.raises(UserError, match=re.escape(f"found the chat's mark {mark}")):
        model.prompt_ids(f"red{mark}\nassistant\n", num_images=0)


def test_an_edit_is_told_by_its_number_of_pictures(model: PromptEnhancer):
    ids = [tuple(model.prompt_ids("red", num_images=count)) for count in (0, 1, 2)]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_what_else_is_asked(model: PromptEnhancer, temperature: float):
    together = model.generate(REQUESTS, num_images=[0, 1, 0], max_new_tokens=12, keys=KEYS, temperature=temperature)
    for place, (request, count) in enumerate(zip(REQUESTS, (0, 1, 0), strict=True)):
        alone = model.generate([request], num_images=[count], max_new_tokens=12, keys=[KEYS[place]], temperature=temperature)
        assert alone == [together[place]]
    turned = model.generate(REQUESTS[::-1], num_images=[0, 1, 0], max_new_tokens=12, keys=KEYS[::-1], temperature=temperature)
    assert turned == together[::-1]


def test_another_key_draws_another_answer_and_a_shorter_one_begins_alike(model: PromptEnhancer):
    settings = {"num_images": [0], "temperature": 1.0}
    one = model.generate(["red"], max_new_tokens=12, keys=[("a",)], **settings)[0]  # type: ignore[arg-type]
    assert one != model.generate(["red"], max_new_tokens=12, keys=[("b",)], **settings)[0]  # type: ignore[arg-type]
    assert one[:5] == model.generate(["red"], max_new_tokens=5, keys=[("a",)], **settings)[0]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found 0 keys for 1 requests"):
        model.generate(["red"], max_new_tokens=5, **settings)  # type: ignore[arg-type]


def test_the_greedy_answer_is_the_likeliest_token_of_whole_forward_passes(model: PromptEnhancer):
    """Without a cache, without padding: every token anew."""
    ids = model.prompt_ids(REQUESTS[1], num_images=0)
    expected = []
    for _ in range(6):
        with torch.no_grad():
            expected.append(int(model.language(torch.tensor([ids + expected])).logits[0, -1].argmax()))
    assert model.generate([REQUESTS[0], REQUESTS[1]], num_images=[0, 0], max_new_tokens=6)[1] == expected


def test_an_answer_stops_at_the_end_of_its_turn():
    stopping = tiny_enhancer(SIZES, TEXTS, seed=0)
    with torch.no_grad():
        stopping.language.lm_head.weight.zero_()  # all tokens are as likely
        draws = stopping.generate(["red"] * 8, num_images=[0] * 8, max_new_tokens=400, keys=[(n,) for n in range(8)], temperature=1.0)
    ended = [ids for ids in draws if ids[-1] == stopping.end_id]
    assert 0 < len(ended) < 8
    assert all(ids.count(stopping.end_id) == 1 for ids in ended)
    assert all(len(ids) == 400 and stopping.end_id not in ids for ids in draws if ids not in ended)


def test_draws_follow_the_distribution():
    """The share of equally spaced draws that fall to a token is its probability."""
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = drawn_tokens(probabilities.log().expand(1000, -1), draws)
    assert torch.bincount(tokens, minlength=4).tolist() == [100, 0, 600, 300]
    assert drawn_tokens(probabilities.log()[None], torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [3]


def test_log_probabilities_are_those_of_a_whole_forward_pass_of_each_sequence(model: PromptEnhancer):
    prompts = [model.prompt_ids(request, num_images=0) for request in REQUESTS]
    answers = [model.answer_ids(text) for text in ("red", TEXTS[0], "a")]
    found = model.log_probs(prompts, answers)
    for prompt, answer, values in zip(prompts, answers, found, strict=True):
        logits = model.language(torch.tensor([prompt + answer])).logits[0].detach().double()
        expected = [float(logits[len(prompt) - 1 + place].log_softmax(0)[token]) for place, token in enumerate(answer)]
        torch.testing.assert_close(values.detach().double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    torch.cat(found).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_saved_model_comes_back_bit_by_bit(model: PromptEnhancer, tmp_path: Path):
    save_enhancer(model, tmp_path)
    loaded = load_enhancer(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.prompt_ids(REQUESTS[1], num_images=1) == model.prompt_ids(REQUESTS[1], num_images=1)


def test_the_text_part_of_a_model_that_sees_is_taken(model: PromptEnhancer, tmp_path: Path):
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": SIZES.hidden_size,
        "num_position_embeddings": 16,
    }
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=model.language.config.to_dict(), vision_config=vision))
    whole.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    opened = open_enhancer(tmp_path).language
    expected = whole.model.language_model.state_dict() | {"lm_head.weight": whole.lm_head.weight}
    assert all(torch.equal(value, expected[name.removeprefix("model.")]) for name, value in opened.state_dict().items())


def test_folders_that_hold_no_such_model_are_refused(model: PromptEnhancer, tmp_path: Path):
    with pytest.raises(UserError, match=r"^enhancer\.path: .* holds no config\.json; allowed is a folder of Qwen3\.5 weights$"):
        open_enhancer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="holds a model of type gpt2; allowed are qwen3_5_text and qwen3_5"):
        open_enhancer(tmp_path)
    save_enhancer(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^enhancer: .* cannot be loaded as Qwen3\.5"):
        load_enhancer(tmp_path)


def test_weights_that_lack_a_part_are_refused(model: PromptEnhancer, tmp_path: Path):
    save_enhancer(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        load_enhancer(tmp_path)
