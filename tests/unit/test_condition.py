"""The condition encoder: which states it hands out, for which tokens, and what the tiny one is made of."""

import pytest
import torch

from model_core.documents import UserError
from model_core.models.condition import last_states, load_encoder, open_qwen3_vl, save_encoder
from model_core.models.tiny_vlm import relate_signs, tiny_qwen3_vl
from model_core.models.vlm_input import batches_by_length, rope_positions, system_turn, user_turn
from tests.tiny_encoders import COLORS, CONFIG, PROMPTS, encoder


def test_states_are_those_before_the_final_norm():
    one = encoder()
    ids = torch.tensor([one.token_ids(system_turn("Look.") + user_turn(PROMPTS[0]))])
    language_model = one.model.model.language_model
    torch.nn.init.uniform_(language_model.norm.weight, 0.5, 2.0)
    normalised = language_model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    states = last_states(one.model, ids, rope_positions([ids.shape[1]])[:, None])
    # This version of transformers hands out the normalised state as the last hidden one; ours is the norm's input.
    assert torch.allclose(language_model.norm(states), normalised, atol=1e-5)
    assert not torch.allclose(states, normalised, atol=1e-2)


def test_the_system_turn_is_read_but_its_tokens_are_dropped():
    states = encoder().encode_packed(PROMPTS[:1]).states
    assert states.shape == (len(encoder().token_ids(user_turn(PROMPTS[0]))), CONFIG.hidden_size)
    other = encoder(system_prompt="Look well.").encode_packed(PROMPTS[:1]).states
    assert other.shape == states.shape
    assert not torch.allclose(other, states, atol=1e-3)


def test_an_empty_prompt_counts_as_one_space():
    one = encoder()
    assert torch.equal(one.encode_packed([""]).states, one.encode_packed([" "]).states)


def test_a_prompt_has_the_same_states_beside_a_longer_one():
    one = encoder()
    alone = one.encode_packed(["a red circle"]).states
    first, second = one.encode_packed(["a red circle", PROMPTS[0]]).split()
    assert len(first) == len(alone) < len(second)
    assert torch.allclose(first, alone, atol=1e-5)


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers_and_its_template_does_not_count():
    one = encoder(max_tokens=12)
    own = len(one.token_ids(PROMPTS[0]))
    with pytest.raises(UserError, match=rf"found {own} tokens; allowed are {own - 1}"):
        encoder(max_tokens=own - 1).encode_packed([PROMPTS[0]])
    assert len(encoder(max_tokens=own).encode_packed([PROMPTS[0]]).states) == one.num_tokens(PROMPTS[0]) > own


def test_prompts_of_1024_tokens_are_read_whole_and_beside_short_ones():
    one = encoder(max_tokens=1024)
    (word,) = one.token_ids(" circle")
    long = " circle" * 1024
    assert one.token_ids(long) == [word] * 1024
    packed = one.encode_packed(["a red circle", long])
    assert packed.lengths == [one.num_tokens("a red circle"), one.num_tokens(long)]
    assert packed.lengths[1] > 1024
    assert torch.allclose(packed.split()[0], one.encode_packed(["a red circle"]).states, atol=1e-5)
    assert packed.states.isfinite().all()


def test_packed_states_are_in_the_order_of_the_prompts():
    one = encoder()
    prompts = ["a", *PROMPTS, "", "a red circle " * 5]
    packed = one.encode_packed(prompts)
    assert packed.lengths == [one.num_tokens(prompt) for prompt in prompts]
    assert packed.segments == [[length] for length in packed.lengths]
    for row, prompt in zip(packed.split(), prompts, strict=True):
        assert torch.allclose(row, one.encode_packed([prompt]).states, atol=1e-5)


def test_batches_keep_to_their_budgets_and_hold_each_sequence_once():
    lengths = [1000, *[40] * 60, 700, 300, 30]
    batches = batches_by_length(lengths, max_tokens=2000, max_padding=400)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[number] for number in batch)
        assert padded <= 2000
        assert padded - sum(lengths[number] for number in batch) <= 400
    assert [lengths[batch[0]] for batch in batches] == sorted((lengths[batch[0]] for batch in batches), reverse=True)
    assert batches_by_length([5000], max_tokens=2000, max_padding=0) == [[0]]


def test_a_long_prompt_pads_few_others(monkeypatch):
    one = encoder(max_tokens=1024)
    computed = []
    forward = one.model.model.language_model.forward
    monkeypatch.setattr(
        one.model.model.language_model, "forward", lambda **given: (computed.append(given["input_ids"].numel()), forward(**given))
    )
    one.encode_packed([*PROMPTS, " circle" * 1000, *PROMPTS])
    useful = sum(one.num_tokens(prompt) for prompt in [*PROMPTS, *PROMPTS, " circle" * 1000])
    assert len(computed) == 2
    assert sum(computed) < useful + 1024 + 19 * 40  # 19 system turns; all padded to the longest would be 19 times 1,000


def test_what_reads_the_states_can_be_trained():
    states = encoder().encode_packed(PROMPTS[:2]).states
    weight = torch.zeros(states.shape[1], 2, requires_grad=True)
    (states @ weight).sum().backward()
    assert torch.allclose(weight.grad[:, 0], states.sum(dim=0), atol=1e-4)


def test_states_come_in_the_model_s_type(tmp_path):
    save_encoder(encoder(), tmp_path)
    halved = load_encoder(tmp_path, dtype=torch.bfloat16)
    states = halved.encode_packed(PROMPTS).states
    exact = encoder().encode_packed(PROMPTS).states
    assert states.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(states.float(), exact, dim=1).min() > 0.99


def test_capital_letters_and_digits_are_tokens_of_their_own_and_any_text_survives():
    tokenizer = encoder().tokenizer
    tokens = tokenizer.tokenize("the text A7 and BC12")
    assert [token for token in tokens if token.isascii() and (token.isupper() or token.isdigit())] == ["A", "7", "B", "C", "1", "2"]
    assert len(tokenizer.tokenize(" circle")) == 1
    for text in ("a zebra\n\t\u00fc\u4f60\u597d \U0001f600", ' "quoted" {json: 1}'):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_weights_are_keyed_by_the_seed_and_the_callers_random_numbers_stay_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (tiny_qwen3_vl(CONFIG, num_tokens=300, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


def test_words_that_differ_have_states_that_differ_and_nothing_is_trained():
    one = encoder()
    states = torch.stack(one.encode_packed([f"a {color} circle" for color in COLORS]).split())
    place = one.token_ids(user_turn("a red circle")).index(one.token_ids(" red")[0])
    words = torch.nn.functional.normalize(states[:, place], dim=-1)
    assert (words @ words.T - torch.eye(len(COLORS))).abs().max() < 0.7
    assert not any(parameter.requires_grad for parameter in one.parameters())


def test_letters_are_made_akin_to_letters_and_digits_to_digits_and_nothing_else_is_touched():
    plain, related = encoder(), encoder()
    relate_signs(related.model.model.language_model.embed_tokens.weight, related.tokenizer, seed=0)
    before, after = (one.model.model.language_model.embed_tokens.weight for one in (plain, related))
    letters, digits = (related.tokenizer.convert_tokens_to_ids(list(signs)) for signs in ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"))
    unit = torch.nn.functional.normalize(after, dim=-1)

    def alike(first: list[int], second: list[int]) -> float:
        cosines = unit[first] @ unit[second].T
        return float(cosines[cosines < 0.999].mean())

    assert alike(letters, letters) == pytest.approx(0.5, abs=0.15)
    assert alike(digits, digits) == pytest.approx(0.5, abs=0.15)
    assert alike(letters, digits) == pytest.approx(0.0, abs=0.3)
    rest = [index for index in range(len(before)) if index not in {*letters, *digits}]
    assert torch.equal(before[rest], after[rest])


def test_a_saved_encoder_opens_to_the_same_states(tmp_path):
    one = encoder()
    save_encoder(one, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert torch.equal(loaded.encode_packed(PROMPTS).states, one.encode_packed(PROMPTS).states)
    assert (loaded.system_prompt, loaded.max_tokens, loaded.dim) == ("Look.", 64, CONFIG.hidden_size)


def test_a_folder_without_weights_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="encoder.path: .* holds no config.json"):
        open_qwen3_vl(tmp_path, system_prompt="Look.", max_tokens=64)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="encoder.path: .* cannot be loaded as Qwen3-VL"):
        open_qwen3_vl(tmp_path, system_prompt="Look.", max_tokens=64)
