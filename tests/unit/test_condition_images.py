"""Condition images before the prompt: pixels, tokens, positions and states, against the public pipeline and by hand."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import QwenImage21Pipeline
from PIL import Image
from transformers import Qwen2VLImageProcessorPil, Qwen3VLProcessor

from model_core.data.pixels import image_tensor, tensor_image
from model_core.documents import UserError
from model_core.models.condition import ConditionEncoder, load_encoder, open_qwen3_vl, save_encoder
from model_core.models.vlm_input import rope_positions, slot_grid, vision_patches
from tests.tiny_encoders import PROMPTS, encoder, picture

SYSTEM = "Comprehend and analyze the provided prompt."
CHAT = "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content[0].text }}<|im_end|>\n{% endfor %}"
PICTURES = [picture(0, 64, 96), picture(1, 32, 32)]


def processor(tokenizer: Any, size: dict[str, int]) -> Qwen3VLProcessor:
    """The public processor, without its reader of films: that needs torchvision."""
    made = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    made.tokenizer, made.chat_template, made.video_processor = tokenizer, CHAT, None
    made.image_processor = Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=size)
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        kind = name.removesuffix("_pad")
        setattr(made, f"{kind}_token", f"<|{name}|>")
        setattr(made, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    return made


def public_states(one: Any, prompts: list[str], images: list[Image.Image] | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The pipeline's states of each prompt's text tokens, and where its image tokens are."""
    size = {"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096}  # the published bounds would resize pictures as small as ours
    pipeline = QwenImage21Pipeline(
        scheduler=None, vae=None, text_encoder=one.model, processor=processor(one.tokenizer, size), transformer=None
    )
    with torch.no_grad():
        states, mask, slots = pipeline._get_qwen_prompt_embeds(prompts, images, device=torch.device("cpu"))
    rows = zip(states, mask.bool(), slots.bool(), strict=True)
    return [row[real & ~slot] for row, real, slot in rows], [slot[real] for real, slot in zip(mask.bool(), slots.bool(), strict=True)]


def runs_of(slots: torch.Tensor) -> list[int | tuple[str, int]]:
    """Text tokens and slots in the order that a mask tells."""
    found: list[int | tuple[str, int]] = []
    edges = [0, *(1 + np.flatnonzero(np.diff(slots.int().numpy()))).tolist(), len(slots)]
    for begin, end in pairwise(edges):
        found.append(("image", end - begin) if slots[begin] else end - begin)
    return found


@pytest.mark.parametrize("images", [None, PICTURES[:1], PICTURES, PICTURES[::-1]], ids=["none", "one", "two", "turned"])
def test_tokens_and_states_are_those_of_the_public_pipeline(images):
    one = encoder(system_prompt=SYSTEM, sees_images=True)
    prompts = [PROMPTS[0], "", "a red circle, make it blue {0} \u4f60"]
    pictures = None if images is None else [tensor_image(image) for image in images]
    wanted, slots = public_states(one, prompts, pictures)
    packed = one.encode_packed(prompts, None if images is None else [images] * len(prompts))
    for found, expected in zip(packed.split(), wanted, strict=True):
        assert torch.allclose(found, expected, atol=2e-5)
    for segments, mask in zip(packed.segments, slots, strict=True):
        in_slots = [segment if isinstance(segment, int) else ("image", segment[0] * segment[1] // 4) for segment in segments]
        assert in_slots == runs_of(mask)
    assert [one.num_tokens(prompt, num_images=len(images or [])) for prompt in prompts] == packed.lengths


def test_prompts_with_and_without_images_and_of_any_length_share_a_batch():
    one = encoder(sees_images=True)
    prompts, images = [PROMPTS[0], "a", "a red circle " * 9, ""], [[], PICTURES, PICTURES[1:], PICTURES[:1]]
    packed = one.encode_packed(prompts, images)
    assert packed.segments[0] == [one.num_tokens(PROMPTS[0])]
    assert [segment for segment in packed.segments[1] if not isinstance(segment, int)] == [(4, 6), (2, 2)]
    for found, prompt, row in zip(packed.split(), prompts, images, strict=True):
        assert torch.allclose(found, one.encode_packed([prompt], [row]).states, atol=2e-5)


def test_states_with_images_are_those_of_the_layers_run_by_hand():
    one = encoder(sees_images=True)
    model = one.model.model
    chat = one._chat(PROMPTS[0], [slot_grid(image) for image in PICTURES])
    ids = torch.tensor([chat.ids])
    is_image = ids[0] == one.model.config.image_token_id
    # Positions by the rule as Qwen3-VL states it, token by token.
    places, start, grids = [], 0, iter([(2, 3), (1, 1)])
    runs = runs_of(is_image)
    for run in runs:
        if isinstance(run, int):
            places += [(start + k,) * 3 for k in range(run)]
            start += run
        else:
            rows, columns = next(grids)
            places += [(start, start + row, start + column) for row in range(rows) for column in range(columns)]
            start += max(rows, columns)
    positions = torch.tensor(places).T[:, None]
    with torch.no_grad():
        patches = torch.cat([vision_patches(image) for image in PICTURES])
        vision = model.visual(patches, grid_thw=torch.tensor([[1, 4, 6], [1, 2, 2]]))
        hidden = model.language_model.embed_tokens(ids)
        hidden[:, is_image] = vision.pooler_output
        rotary = model.language_model.rotary_emb(hidden, positions)
        causal = torch.full((len(ids[0]), len(ids[0])), -torch.inf).triu(1)[None, None]
        for number, layer in enumerate(model.language_model.layers):
            hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary)
            if number < len(vision.deepstack_features):
                hidden[:, is_image] += vision.deepstack_features[number]
    assert len(model.language_model.layers) > len(vision.deepstack_features) > 0
    wanted = hidden[0, ~is_image][one._system_length :]
    assert torch.allclose(one.encode_packed(PROMPTS[:1], [PICTURES]).states, wanted, atol=2e-5)


def test_positions_are_those_of_transformers():
    one = encoder(sees_images=True)
    chat = one._chat(PROMPTS[0], [slot_grid(image) for image in PICTURES])
    ids = torch.tensor([chat.ids])
    wanted, _ = one.model.model.get_rope_index(
        ids, (ids == one.model.config.image_token_id).int(), image_grid_thw=torch.tensor([[1, 4, 6], [1, 2, 2]])
    )
    assert torch.equal(rope_positions(chat.segments), wanted[:, 0])


def test_patches_are_those_cut_by_hand_and_those_of_the_public_processor():
    image = PICTURES[0]
    rows = []
    for block_row, block_column in np.ndindex(2, 3):
        for row, column in np.ndindex(2, 2):
            top, left = 32 * block_row + 16 * row, 32 * block_column + 16 * column
            patch = image[:, top : top + 16, left : left + 16].numpy()
            rows.append(np.concatenate([np.concatenate([channel.ravel()] * 2) for channel in patch]))
    assert np.array_equal(vision_patches(image).numpy(), np.stack(rows))
    public = Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=False)
    given = public(images=[tensor_image(image)], return_tensors="pt")
    assert given["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert torch.allclose(vision_patches(image), given["pixel_values"], atol=1e-6)


def test_transparent_pixels_lie_on_white_as_the_public_pipeline_lays_them():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    assert (image_tensor(image) - image_tensor(white)).abs().max() <= 1.01 / 127.5  # both round to 8 bits
    share = pixels[..., 3:] / 255
    assert np.abs(np.array(tensor_image(image_tensor(image))) - (pixels[..., :3] * share + 255 * (1 - share))).max() <= 1


def test_what_an_image_shows_changes_the_states_and_words_after_it_alone():
    one = encoder(sees_images=True)
    first, second = (one.encode_packed(PROMPTS[:1], [[image]]) for image in (PICTURES[0], picture(9, 64, 96)))
    before, _, after = first.segments[0]
    assert torch.equal(first.states[:before], second.states[:before])
    assert ((first.states - second.states)[before:].abs().amax(dim=1) > 1e-4).sum() > after // 2


def test_the_vision_tower_is_not_run_without_images(monkeypatch):
    one = encoder(sees_images=True)
    calls = []
    one.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    one.encode_packed(PROMPTS)
    assert not calls
    one.encode_packed(PROMPTS[:2], [[], PICTURES])
    assert calls == [1]


def test_what_cannot_be_a_condition_is_refused():
    with pytest.raises(ValueError, match=r"has 48 x 32 px; allowed are multiples of 32"):
        encoder(sees_images=True).encode_packed(["a"], [[picture(0, 48, 32)]])
    with pytest.raises(ValueError, match="is not shown images"):
        encoder().encode_packed(["a"], [[PICTURES[0]]])
    with pytest.raises(UserError, match=r"mark of an image slot in 'a <\|image_pad\|>'"):
        encoder().encode_packed(["a <|image_pad|>"])


def test_whether_it_sees_images_is_saved_and_other_vision_towers_are_refused(tmp_path):
    one = encoder(sees_images=True)
    save_encoder(one, tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.sees_images
    assert torch.equal(loaded.encode_packed(PROMPTS[:1], [PICTURES]).states, one.encode_packed(PROMPTS[:1], [PICTURES]).states)
    given: dict[str, Any] = {"system_prompt": "Look.", "max_tokens": 64, "sees_images": True}
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.48, 0.46, 0.41]}')
    with pytest.raises(UserError, match=r"image_mean \[0.48, 0.46, 0.41\]; allowed is \[0.5, 0.5, 0.5\]"):
        open_qwen3_vl(tmp_path, **given)
    config = one.model.config
    config.vision_config.patch_size = 8
    save_encoder(ConditionEncoder(type(one.model)(config), one.tokenizer, system_prompt="", max_tokens=64), tmp_path / "small")
    with pytest.raises(UserError, match="has image tokens of 16 px a side; allowed are 32"):
        open_qwen3_vl(tmp_path / "small", **given)
