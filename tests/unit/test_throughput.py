"""FLOPs and parameters from the configuration alone are those of the modules: counted by PyTorch, by brute force, and as published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model_core.documents import UserError
from model_core.models.condition import last_states
from model_core.models.mmdit import MMDiT
from model_core.models.segments import Sample, num_tokens
from model_core.models.stream import pack
from model_core.models.tiny_vlm import tiny_qwen3_vl
from model_core.models.vae import ResidualVAE
from model_core.recipe import Encoder, MMDiTModel, VAEModel
from model_core.training.parameters import (
    QWEN3_VL_8B,
    EncoderSizes,
    VisionSizes,
    encoder_sizes,
    mmdit_parameters,
    vae_parameters,
)
from model_core.training.throughput import (
    GPUS,
    attention_pairs,
    flops_utilisation,
    goodput,
    mmdit_forward_flops,
    text_encoder_flops,
    training_flops,
    vae_decoder_flops,
    vae_encoder_flops,
)

TINY = MMDiTModel(num_layers=2, num_heads=2, head_dim=16, rope_axes=(4, 6, 6))
SAMPLE = (5, (2, 2), (2, 3))
TINY_VAE = VAEModel(stem_fold=8, encoder_widths=[16, 24], decoder_widths=[24, 16], encoder_blocks=1, decoder_blocks=2)
PUBLIC_VAE = VAEModel(shortcut="local", mixers=False, post_quant_conv=True)
TINY_ENCODER = Encoder(hidden_size=32, num_layers=2, num_heads=2, vocab_size=400)


def counted(run: Any) -> int:
    """FLOPs that PyTorch counts, with attention as matrix products, which it can count on any device."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def tiny_run(config: MMDiTModel) -> tuple[MMDiT, tuple[Any, ...]]:
    model = MMDiT(config, latent_channels=8, text_dim=12)
    return model, (torch.randn(10, 8), torch.randn(5, 12), torch.rand(1), pack([SAMPLE], config))


@pytest.mark.parametrize("changes", [{}, {"condition_at_t0": True}, {"mlp_ratio": 2.5}])
def test_forward_flops_of_the_transformer_are_those_that_pytorch_counts(changes: dict[str, Any]) -> None:
    config = TINY.model_copy(update=changes)
    model, inputs = tiny_run(config)
    assert mmdit_forward_flops(config, [SAMPLE], latent_channels=8, text_dim=12) == counted(lambda: model(*inputs))


def test_training_is_three_times_the_forward_pass_but_for_inputs_that_need_no_gradient() -> None:
    model, inputs = tiny_run(TINY)
    measured = counted(lambda: model(*inputs).sum().backward())
    predicted = training_flops(mmdit_forward_flops(TINY, [SAMPLE], latent_channels=8, text_dim=12))
    assert measured == pytest.approx(predicted, rel=0.02)
    assert measured <= predicted


def test_a_packed_batch_is_the_sum_of_its_samples() -> None:
    samples = [SAMPLE, (3, (3, 3)), (7, (1, 2), 1, (2, 1), (2, 2))]
    alone = sum(mmdit_forward_flops(TINY, [sample], latent_channels=8, text_dim=12) for sample in samples)
    assert mmdit_forward_flops(TINY, samples, latent_channels=8, text_dim=12) == alone


@pytest.mark.parametrize("sample", [(5, (2, 3)), (3, (1, 2), (2, 2)), (1, (2, 1), 4, (1, 5), (1, 3))])
def test_block_causal_pairs_are_those_of_the_mask_counted_one_by_one(sample: Sample) -> None:
    owner = []
    for number, (segment, length) in enumerate((segment, num_tokens(segment)) for segment in sample):
        owner += ["text" if isinstance(segment, int) else f"image {number}"] * length
    seen = [
        (query, key)
        for query in range(len(owner))
        for key in range(len(owner))
        if key <= query or (owner[query] == owner[key] and owner[query] != "text")
    ]
    assert attention_pairs(sample, attention="block_causal") == len(seen)
    assert attention_pairs(sample, attention="full") == len(owner) ** 2


@pytest.mark.parametrize(
    ("side_px", "references", "attention", "teraflops"),
    [  # computed by hand from the published structure, 256 tokens of text; the last two are an edit of one reference
        (256, 0, "full", 21.9),
        (512, 0, "full", 56.2),
        (1024, 0, "full", 212),
        (2048, 0, "full", 1132),
        (1024, 1, "full", 466),
        (1024, 1, "block_causal", 437),
    ],
)
def test_a_sample_of_the_published_model_takes_known_flops(side_px: int, references: int, attention: Any, teraflops: float) -> None:
    image = (side_px // 16, side_px // 16)
    config = MMDiTModel(attention=attention)
    forward = mmdit_forward_flops(config, [(256, *[image] * (references + 1))], latent_channels=64, text_dim=4096)
    # By hand all tokens go through the whole last block; here its feed-forward is run on targets alone, which saves up to 1.3 %.
    assert teraflops * 0.985 <= training_flops(forward) / 1e12 <= teraflops * 1.005


def test_full_checkpointing_adds_a_forward_pass_and_selective_adds_nothing_that_counts() -> None:
    assert [training_flops(7, checkpointing=policy) for policy in ("none", "selective", "full")] == [21, 21, 28]


@pytest.mark.parametrize("config", [VAEModel(), VAEModel(mid_attention=False), VAEModel(shortcut="local"), PUBLIC_VAE])
def test_flops_of_the_autoencoder_are_those_that_pytorch_counts(config: VAEModel) -> None:
    with torch.device("meta"):
        vae, images = ResidualVAE(config), torch.empty(1, 3, 128, 256)
    assert vae_encoder_flops(config, height=128, width=256) == counted(lambda: vae.encode(images))
    latents = torch.empty(1, 64, 8, 16, device="meta")
    assert vae_decoder_flops(config, height=128, width=256) == counted(lambda: vae.decode(latents))


def test_flops_of_the_cosine_shortcut_count() -> None:
    config = TINY_VAE.model_copy(update={"shortcut": "cosine"})
    vae, images = ResidualVAE(config), torch.randn(1, 3, 32, 48)
    assert vae_encoder_flops(config, height=32, width=48) == counted(lambda: vae.encode(images))
    assert vae_decoder_flops(config, height=32, width=48) == counted(lambda: vae.decode(torch.randn(1, 64, 2, 3)))


def test_flops_of_the_condition_encoder_are_those_that_pytorch_counts() -> None:
    model = tiny_qwen3_vl(TINY_ENCODER, num_tokens=400, seed=0)
    ids = torch.ones(1, 7, dtype=torch.long)
    places = torch.arange(7).expand(3, 1, 7)
    assert text_encoder_flops(encoder_sizes(TINY_ENCODER), tokens=7) == counted(lambda: last_states(model, ids, places))


@pytest.mark.parametrize("config", [MMDiTModel(), TINY])
def test_parameters_of_the_transformer_are_those_of_the_module(config: MMDiTModel) -> None:
    with torch.device("meta"):
        model = MMDiT(config, latent_channels=64, text_dim=4096)
    parts = mmdit_parameters(config, latent_channels=64, text_dim=4096)
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert parts["blocks"] == sum(parameter.numel() for parameter in model.blocks.parameters())


@pytest.mark.parametrize("config", [VAEModel(), VAEModel(mid_attention=False), TINY_VAE, PUBLIC_VAE])
def test_parameters_of_the_autoencoder_are_those_of_the_module(config: VAEModel) -> None:
    with torch.device("meta"):
        vae = ResidualVAE(config)
    of_modules = {part: sum(parameter.numel() for parameter in getattr(vae, part).parameters()) for part in ("encoder", "decoder")}
    assert vae_parameters(config) == of_modules


def test_parameters_of_the_condition_encoder_are_those_of_the_module() -> None:
    model = tiny_qwen3_vl(TINY_ENCODER, num_tokens=400, seed=0)
    assert sum(encoder_sizes(TINY_ENCODER).parameters.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_the_published_encoder_has_its_published_size() -> None:
    assert sum(QWEN3_VL_8B.parameters.values()) == 8_767_123_696  # as counted from the headers of its weights


def test_sizes_are_read_from_a_folder_where_there_is_one(tmp_path: Any) -> None:
    tiny_qwen3_vl(TINY_ENCODER, num_tokens=400, seed=0).config.save_pretrained(tmp_path)
    read: EncoderSizes = encoder_sizes(TINY_ENCODER.model_copy(update={"path": str(tmp_path)}))
    assert isinstance(read.vision, VisionSizes)
    assert read == encoder_sizes(TINY_ENCODER)


def test_an_encoder_of_unknown_size_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="holds no config.json to read sizes from"):
        encoder_sizes(TINY_ENCODER.model_copy(update={"path": str(tmp_path)}))
    (tmp_path / "config.json").write_text('{"text_config": {}}')
    with pytest.raises(UserError, match="has no vision_config"):
        encoder_sizes(TINY_ENCODER.model_copy(update={"path": str(tmp_path)}))


def test_utilisation_is_what_was_done_of_what_could_have_been() -> None:
    assert flops_utilisation(8 * 989e12, seconds=2.0, peak_flops=989e12, gpus=8) == pytest.approx(0.5)
    assert GPUS["h200"].peak_flops == 989e12


def test_goodput_leaves_out_repeated_and_skipped_steps_and_all_waiting() -> None:
    assert goodput(steps=100, repeated_steps=0, skipped_steps=0, step_seconds=2.0, wall_seconds=200.0) == 1.0
    assert goodput(steps=100, repeated_steps=15, skipped_steps=5, step_seconds=2.0, wall_seconds=320.0) == 0.5
