"""The transformer: published size, independence of packing and of other samples, prefixes that are read once, and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_core.models.mmdit import MMDiT, load_mmdit, save_mmdit, timestep_embedding
from model_core.models.rope import rotary_table, rotate
from model_core.models.segments import Sample, num_tokens
from model_core.models.stream import pack, pack_prefix, pack_targets
from model_core.recipe import MMDiTModel

TINY = MMDiTModel(num_layers=2, num_heads=2, head_dim=16, rope_axes=(4, 6, 6))
SAMPLES: list[Sample] = [(5, (2, 3)), (2, (2, 2), 3, (1, 4), (3, 3)), (0, (4, 1)), (7, (2, 2), (2, 2), (2, 3))]
VARIANTS = [
    {"attention": attention, "condition_at_t0": at_t0, "rope_positions": scheme}
    for attention in ("full", "block_causal")
    for at_t0 in (False, True)
    for scheme in ("ordinal", "running")
]


def tiny(**changes: object) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(MMDiTModel.model_validate(TINY.model_dump() | changes), latent_channels=8, text_dim=12)
    with torch.no_grad():
        for weight in (model.image_out.weight, model.modulation.weight, model.final_scale.weight):
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def inputs(sample: Sample, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (I, 8), text (T, 12) and a time of one sample."""
    generator = torch.Generator().manual_seed(seed)
    num_text = sum(segment for segment in sample if isinstance(segment, int))
    num_pictures = sum(num_tokens(segment) for segment in sample if not isinstance(segment, int))
    pictures, text = torch.randn(num_pictures, 8, generator=generator), torch.randn(num_text, 12, generator=generator)
    return pictures, text, torch.rand(1, generator=generator)


def packed(samples: list[Sample]) -> list[Tensor]:
    """The inputs of all samples, one after another."""
    return [torch.cat(parts) for parts in zip(*(inputs(sample, index) for index, sample in enumerate(samples)), strict=True)]


def test_the_default_configuration_has_the_published_size() -> None:
    with torch.device("meta"):
        model = MMDiT(MMDiTModel(), latent_channels=64, text_dim=4096)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(7.115e9, rel=1e-3)


def test_no_module_has_a_bias() -> None:
    assert not [name for name, _ in tiny().named_parameters() if "bias" in name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_samples_have_the_velocities_and_gradients_that_each_has_alone(variant: dict[str, object]) -> None:
    model = tiny(**variant)
    velocity = model(*packed(SAMPLES), pack(SAMPLES, model.config))
    velocity.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    alone = [model(*inputs(sample, index), pack([sample], model.config)) for index, sample in enumerate(SAMPLES)]
    torch.cat(alone).square().sum().backward()
    assert (torch.cat(alone) - velocity).abs().max() <= 1e-5
    for found, parameter in zip(gradients, (p for p in model.parameters() if p.grad is not None), strict=True):
        assert (found - parameter.grad).abs().max() <= 1e-5 * max(1.0, parameter.grad.abs().max().item())


@pytest.mark.parametrize("scheme", ["ordinal", "running"])
def test_a_prefix_that_is_read_once_gives_the_velocities_of_the_whole_pass(scheme: str) -> None:
    model = tiny(attention="block_causal", condition_at_t0=True, rope_positions=scheme)
    pictures, text, t = packed(SAMPLES)
    whole = pack(SAMPLES, model.config)
    is_target = whole.is_target[whole.order >= len(text)]
    prefix = model.read_prefix(pictures[~is_target], text, pack_prefix(SAMPLES, model.config))
    stream = pack_targets(SAMPLES, model.config)
    for times in (t, t * 0.3):
        expected = model(pictures, text, times, whole)
        found = model(pictures[is_target], text[:0], times, stream, prefix=prefix)
        assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("changes", [{"attention": "full", "condition_at_t0": True}, {"attention": "block_causal"}])
def test_a_prefix_that_depends_on_the_target_is_not_read_once(changes: dict[str, object]) -> None:
    model = tiny(**changes)
    with pytest.raises(ValueError, match="block_causal attention and condition_at_t0"):
        model.read_prefix(torch.zeros(0, 8), torch.zeros(5, 12), pack_prefix([(5, (2, 3))], model.config))


def test_the_condition_image_text_and_time_all_matter() -> None:
    model, sample = tiny(), SAMPLES[1]
    stream = pack([sample], model.config)
    pictures, text, t = inputs(sample)
    plain = model(pictures, text, t, stream)
    changed = pictures.clone()
    changed[0] += 1
    for other in (model(changed, text, t, stream), model(pictures, text + 1, t, stream), model(pictures, text, t * 0.5, stream)):
        assert (other - plain).abs().max() > 1e-3


def test_tensors_of_other_channels_are_refused_with_the_numbers() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"\(9, 12\) channels of pictures and text; this model takes \(8, 12\)"):
        model(torch.zeros(6, 9), torch.zeros(5, 12), torch.zeros(1), pack([(5, (2, 3))], model.config))


def test_saved_weights_load_to_the_same_model(tmp_path: Path) -> None:
    model = tiny()
    save_mmdit(model, tmp_path)
    stream = pack(SAMPLES, model.config)
    assert torch.equal(load_mmdit(tmp_path)(*packed(SAMPLES), stream), model(*packed(SAMPLES), stream))


def test_rotation_keeps_norms_and_makes_products_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def product(a: int, b: int) -> Tensor:
        tables = [rotary_table(torch.full((1, 3), place), axes=(4, 6, 6), theta=100.0) for place in (a, b)]
        return (rotate(query, *tables[0]) * rotate(key, *tables[1])).sum()

    assert torch.allclose(product(3, 1), product(9, 7), atol=1e-5)
    turned = rotate(query, *rotary_table(torch.full((1, 3), 5), axes=(4, 6, 6), theta=100.0))
    assert turned.norm() == pytest.approx(float(query.norm()), rel=1e-5)


def test_timestep_embedding_agrees_with_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.02, 0.5, 1.0])
    expected = get_timestep_embedding(t * 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(timestep_embedding(t), expected, atol=1e-4)
