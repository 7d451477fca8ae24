"""The transformer: published size, invariances, masks, and the positions of text and pictures."""

import pytest
import torch

from model_core.models.mmdit import MMDiT, load_mmdit, save_mmdit, timestep_embedding
from model_core.models.rope import image_positions, rotary_table, rotate, text_positions
from model_core.recipe import MMDiTModel

TINY = MMDiTModel(num_layers=2, num_heads=2, head_dim=16, rope_axes=(4, 6, 6))


def tiny(**changes) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(TINY.model_copy(update=changes), latent_channels=8, text_dim=12)
    torch.nn.init.normal_(model.image_out.weight)
    return model.eval()


def inputs(batch: int = 2, length: int = 5):
    torch.manual_seed(1)
    target, reference, text = torch.randn(batch, 6, 8), torch.randn(batch, 4, 8), torch.randn(batch, length, 12)
    return target, torch.rand(batch), text, torch.ones(batch, length, dtype=torch.bool), (2, 3), [(reference, (2, 2))]


def test_the_default_configuration_has_the_published_size():
    with torch.device("meta"):
        model = MMDiT(MMDiTModel(), latent_channels=64, text_dim=4096)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(7.115e9, rel=1e-3)


def test_no_module_has_a_bias():
    assert not [name for name, _ in tiny().named_parameters() if "bias" in name]


@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_padding_of_the_text_changes_nothing(attention):
    model = tiny(attention=attention)
    target, t, text, mask, shape, references = inputs()
    plain = model(target, t, text, mask, shape, references)
    padded_text = torch.cat((text, torch.randn(2, 3, 12)), dim=1)
    padded_mask = torch.cat((mask, torch.zeros(2, 3, dtype=torch.bool)), dim=1)
    assert torch.allclose(model(target, t, padded_text, padded_mask, shape, references), plain, atol=1e-5)


def test_a_sample_does_not_depend_on_the_others_of_its_batch():
    model = tiny()
    target, t, text, mask, shape, references = inputs()
    both = model(target, t, text, mask, shape, references)
    for index in range(2):
        one = slice(index, index + 1)
        alone = model(target[one], t[one], text[one], mask[one], shape, [(references[0][0][one], (2, 2))])
        assert torch.allclose(alone, both[one], atol=1e-5)


def test_the_condition_image_text_and_time_all_matter():
    model = tiny()
    target, t, text, mask, shape, references = inputs()
    plain = model(target, t, text, mask, shape, references)
    changed = [(references[0][0] + 1, (2, 2))]
    for other in (
        model(target, t, text, mask, shape, changed),
        model(target, t, text + 1, mask, shape, references),
        model(target, t * 0.5, text, mask, shape, references),
    ):
        assert (other - plain).abs().max() > 1e-3


def test_block_causal_with_conditions_at_t0_keeps_the_prefix_independent_of_target_and_time():
    model = tiny(attention="block_causal", condition_at_t0=True)
    target, t, text, mask, shape, references = inputs()
    seen = []
    model.blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output[:, : 5 + 4]))
    model(target, t, text, mask, shape, references)
    model(target + 3, t * 0.1, text, mask, shape, references)
    assert torch.allclose(seen[0], seen[1], atol=1e-6)


def test_sizes_that_do_not_fit_are_refused_with_both_numbers():
    target, t, text, mask, _, references = inputs()
    with pytest.raises(ValueError, match=r"\(6, 8\) do not fit a 3 x 3 grid"):
        tiny()(target, t, text, mask, (3, 3), references)


def test_saved_weights_load_to_the_same_model(tmp_path):
    model = tiny()
    save_mmdit(model, tmp_path)
    loaded = load_mmdit(tmp_path)
    arguments = inputs()
    assert torch.equal(loaded(*arguments), model(*arguments))


def test_rope_agrees_with_the_predecessors_public_code():
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    oracle = QwenEmbedRope(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    vision, text = oracle([[(1, 4, 6), (1, 2, 2)]], max_txt_seq_len=7, device=torch.device("cpu"))
    positions = torch.cat((image_positions(0, 4, 6), image_positions(1, 2, 2), text_positions(7, [(4, 6), (2, 2)])))
    cos, sin = rotary_table(positions, axes=(16, 56, 56), theta=10000.0)
    expected = torch.cat((vision, text))
    assert torch.allclose(cos, expected.real, atol=1e-5)
    assert torch.allclose(sin, expected.imag, atol=1e-5)


def test_rotation_keeps_norms_and_makes_products_depend_on_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(a: int, b: int) -> torch.Tensor:
        tables = [rotary_table(torch.full((1, 3), place), axes=(4, 6, 6), theta=100.0) for place in (a, b)]
        return (rotate(query, *tables[0]) * rotate(key, *tables[1])).sum()

    assert torch.allclose(product(3, 1), product(9, 7), atol=1e-5)
    assert rotate(query, *rotary_table(torch.full((1, 3), 5), axes=(4, 6, 6), theta=100.0)).norm() == pytest.approx(
        float(query.norm()), rel=1e-5
    )


def test_timestep_embedding_agrees_with_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.02, 0.5, 1.0])
    expected = get_timestep_embedding(t * 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(timestep_embedding(t), expected, atol=1e-4)
