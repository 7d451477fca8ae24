"""From prompts to pictures: what the sampler promises whatever the model's skill."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_core.models.condition import TextStates
from model_core.models.mmdit import MMDiT
from model_core.models.stream import Stream
from model_core.models.vae import ResidualVAE
from model_core.recipe import MMDiTModel, Sampling, VAEModel
from model_core.sampling import conditions
from model_core.sampling.pipeline import sample
from tests.tiny_encoders import encoder, picture

CHANNELS, TEXT_DIM, SIZE = 64, 8, (32, 48)
SAMPLING = Sampling(steps=3, guidance_scale=2.0)


class Letters:
    """A stand-in for the encoder, which sees no images: one token a letter, a fixed state for each."""

    sees_images, multiple_px = False, 16

    def encode_packed(self, prompts: Sequence[str], images: None = None) -> TextStates:
        letters = "".join(prompt or " " for prompt in prompts)
        states = [torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(ord(letter))) for letter in letters]
        return TextStates(torch.stack(states), [[len(prompt or " ")] for prompt in prompts])


class Straight(nn.Module):
    """A perfect model of one picture: its velocity leads from anywhere to the tokens `x0`."""

    latent_channels, config = CHANNELS, MMDiTModel(num_layers=1, num_heads=1, head_dim=8, rope_axes=(2, 4, 2))

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0, self.num_samples = x0, 0

    def forward(self, pictures: Tensor, text: Tensor, t: Tensor, stream: Stream) -> Tensor:
        self.num_samples += len(t)
        return (pictures.unflatten(0, (len(t), -1)) - self.x0).flatten(0, 1) / t.repeat_interleave(self.x0.shape[1])[:, None]


@pytest.fixture(scope="module")
def vae() -> ResidualVAE:
    torch.manual_seed(0)
    model = ResidualVAE(
        VAEModel(stem_fold=16, encoder_widths=[16], decoder_widths=[16], encoder_blocks=1, decoder_blocks=1, shortcut="cosine")
    )
    model.latent_mean.copy_(torch.randn(CHANNELS))
    model.latent_std.copy_(torch.rand(CHANNELS) + 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def mmdit() -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(MMDiTModel(num_layers=1, num_heads=2, head_dim=16, rope_axes=(4, 6, 6)), latent_channels=CHANNELS, text_dim=TEXT_DIM)
    nn.init.normal_(model.image_out.weight, std=0.2)
    return model.eval()


def draw(mmdit: Any, vae: ResidualVAE, prompts: list[str], seeds: list[int], **changes: Any) -> Tensor:
    arguments: dict[str, Any] = {"size_px": SIZE, "sampling": SAMPLING} | changes
    return sample(mmdit, vae, Letters(), prompts, seeds=seeds, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 7])
def test_a_model_that_knows_its_picture_draws_it_in_the_scale_of_the_autoencoder(vae, steps):
    x0 = 0.3 * torch.randn(1, 6, CHANNELS, generator=torch.Generator().manual_seed(3))
    drawn = draw(Straight(x0), vae, ["x"], [0], sampling=Sampling(steps=steps, guidance_scale=1.0))
    grid = x0.transpose(1, 2).unflatten(2, (2, 3))
    expected = vae.decode(grid * vae.latent_std[:, None, None] + vae.latent_mean[:, None, None]).clamp(-1, 1)
    assert drawn.shape == (1, 3, *SIZE)
    assert torch.allclose(drawn, expected, atol=1e-4)


def test_guidance_asks_twice_a_step_and_a_scale_of_one_once(vae):
    for scale, num_samples in ((1.0, 5), (3.0, 10)):
        model = Straight(torch.zeros(1, 6, CHANNELS))
        draw(model, vae, ["x"], [0], sampling=Sampling(steps=5, guidance_scale=scale))
        assert model.num_samples == num_samples


def test_the_same_seed_draws_the_same_bits_and_another_seed_another_picture(mmdit, vae):
    first, again, other = (draw(mmdit, vae, ["red"], [seed]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 1e-3


def test_a_picture_does_not_depend_on_the_rest_of_its_batch(mmdit, vae):
    together = draw(mmdit, vae, ["red", "a longer prompt", "red"], [1, 2, 3])
    assert torch.allclose(draw(mmdit, vae, ["red"], [1]), together[:1], atol=1e-4)
    assert torch.allclose(draw(mmdit, vae, ["a longer prompt"], [2]), together[1:2], atol=1e-4)


def test_prompt_guidance_and_condition_images_all_change_the_picture(mmdit, vae):
    plain = draw(mmdit, vae, ["red"], [1])
    images = torch.zeros(1, 3, 16, 32)
    for other in (
        draw(mmdit, vae, ["blue"], [1]),
        draw(mmdit, vae, ["red"], [1], sampling=SAMPLING.model_copy(update={"guidance_scale": 5.0})),
        draw(mmdit, vae, ["red"], [1], references=[images]),
        draw(mmdit, vae, ["red"], [1], references=[images, images + 0.5]),
    ):
        assert (other - plain).abs().max() > 1e-3


def test_a_prefix_that_is_read_once_draws_the_same_pictures(vae, monkeypatch):
    config = MMDiTModel(num_layers=2, num_heads=2, head_dim=16, rope_axes=(4, 6, 6), attention="block_causal", condition_at_t0=True)
    torch.manual_seed(0)
    model = MMDiT(config, latent_channels=CHANNELS, text_dim=TEXT_DIM).eval()
    nn.init.normal_(model.image_out.weight, std=0.2)
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 32).reshape(2, 3, 16, 32)

    def pictures() -> Tensor:
        return draw(model, vae, ["red", "a longer prompt"], [1, 2], references=[images, images.flip(2)])

    once = pictures()
    passes = []
    model.register_forward_pre_hook(lambda _module, arguments: passes.append(arguments))
    pictures()
    assert all(len(text) == 0 for _, text, *_ in passes)
    # Conditions modulated at the sampled time differ, so the whole pass is asked with the prefix's shortcut taken away.
    monkeypatch.setattr("model_core.sampling.conditions.reads_prefix_once", lambda config: False)
    assert torch.allclose(pictures(), once, atol=1e-4)


def test_the_order_of_two_condition_images_matters(mmdit, vae):
    first, second = torch.full((1, 3, 16, 16), -0.5), torch.full((1, 3, 16, 16), 0.5)
    pictures = [draw(mmdit, vae, ["red"], [1], references=order) for order in ([first, second], [second, first])]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3


class Shown:
    """An encoder that sees images, and is shown others than the sampler gives where `swapped` are set; keeps what it was given."""

    sees_images, multiple_px = True, 32

    def __init__(self, swapped: list[Tensor] | None = None) -> None:
        self.one, self.swapped, self.given = encoder(sees_images=True), swapped, []

    def encode_packed(self, prompts: Sequence[str], images: Sequence[Sequence[Tensor]]) -> TextStates:
        self.given.append((list(prompts), [list(row) for row in images]))
        return self.one.encode_packed(prompts, images if self.swapped is None else [self.swapped] * len(prompts))


@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_an_encoder_that_sees_images_is_shown_them_in_both_branches_and_they_lie_at_its_slots(vae, monkeypatch, attention):
    config = MMDiTModel(num_layers=1, num_heads=2, head_dim=16, rope_axes=(4, 6, 6), attention=attention, condition_at_t0=True)
    torch.manual_seed(0)
    model = MMDiT(config, latent_channels=CHANNELS, text_dim=32).eval()
    nn.init.normal_(model.image_out.weight, std=0.2)
    references = [torch.stack([picture(number, 32, 64), picture(9 - number, 32, 64)]) for number in (1, 2)]
    packed = []
    for name in ("pack", "pack_prefix", "pack_targets"):
        plain = getattr(conditions, name)
        monkeypatch.setattr(conditions, name, lambda samples, config, plain=plain: [packed.append(samples), plain(samples, config)][1])

    def drawn(encoder: Shown) -> Tensor:
        known: dict[str, Any] = {"size_px": (32, 64), "seeds": [0, 1], "sampling": SAMPLING, "references": references}
        return sample(model, vae, encoder, ["red", "a longer prompt"], **known)  # type: ignore[arg-type]

    one = Shown()
    seen = drawn(one)
    (((prompts, images)),) = one.given
    assert prompts == ["red", "a longer prompt", "", ""]
    for row, pictures in enumerate(images):
        assert all(torch.equal(found, given[row % 2]) for found, given in zip(pictures, references, strict=True))
    runs = [segments[::2] for segments in one.one.encode_packed(prompts, images).segments]
    assert all(samples == [(first, (2, 4), second, (2, 4), third, (2, 4)) for first, second, third in runs] for samples in packed)
    assert len(packed) == (1 if attention == "full" else 2)
    # The autoencoder is given the same pictures in both: only what the encoder is shown differs.
    swapped = drawn(Shown([torch.full((3, 32, 64), 0.9)] * 2))
    assert torch.equal(drawn(Shown()), seen)
    assert (swapped - seen).abs().max() > 1e-4


def test_without_references_an_encoder_that_sees_images_is_given_prompts_alone(vae):
    torch.manual_seed(0)
    model = MMDiT(MMDiTModel(num_layers=1, num_heads=2, head_dim=16, rope_axes=(4, 6, 6)), latent_channels=CHANNELS, text_dim=32).eval()
    one = Shown()
    sample(model, vae, one, ["red"], size_px=(32, 64), seeds=[0], sampling=SAMPLING)  # type: ignore[arg-type]
    assert one.given == [(["red", ""], [[], []])]
    with pytest.raises(ValueError, match=r"\(48, 64\) is not a multiple of 32"):
        sample(model, vae, one, ["red"], size_px=(48, 64), seeds=[0], sampling=SAMPLING)  # type: ignore[arg-type]


def test_a_size_that_16_does_not_divide_is_refused(mmdit, vae):
    with pytest.raises(ValueError, match=r"\(40, 48\) is not a multiple of 16"):
        draw(mmdit, vae, ["red"], [1], size_px=(40, 48))
