"""Models on a GPU against the same on the CPU: attention, precision, FP8, the autoencoder, sampling."""

from __future__ import annotations

import copy

import pytest
import torch

from model_core.models.attention import attend
from model_core.models.mmdit import MMDiT
from model_core.models.stream import Sample, Stream, pack
from model_core.models.vae import ResidualVAE
from model_core.recipe import MMDiTModel, Sampling, VAEModel
from model_core.sampling.pipeline import sample
from model_core.training.float8 import Float8Linear, check_float8, use_float8
from tests.tiny_encoders import encoder

CONFIG = MMDiTModel(num_layers=2, num_heads=2, head_dim=64, rope_axes=(8, 28, 28))
SAMPLES: list[Sample] = [(5, (4, 6)), (17, (8, 8), (8, 8)), (1, (2, 2))]


def model(config: MMDiTModel = CONFIG, *, text_dim: int = 32) -> MMDiT:
    torch.manual_seed(0)
    made = MMDiT(config, latent_channels=16, text_dim=text_dim)
    torch.nn.init.normal_(made.image_out.weight, std=0.1)
    return made


def given(stream: Stream) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    num_text = sum(segment for each in SAMPLES for segment in each if isinstance(segment, int))
    pictures, text = (torch.randn(num, dim, generator=generator) for num, dim in ((len(stream) - num_text, 16), (num_text, 32)))
    return pictures, text, torch.tensor([0.1, 0.5, 0.9])


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float().cpu() - expected.float().cpu()).norm() / expected.float().norm()).item()


def test_variable_length_attention_gives_what_the_cpu_gives(device: torch.device) -> None:
    plan = pack(SAMPLES, CONFIG).plan
    num = int(plan.results.numel())
    query, key, value = (torch.randn(num, 2, 64, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3))
    gradient = torch.randn(num, 2, 64, generator=torch.Generator().manual_seed(3))
    found = [tensor.to(device).requires_grad_() for tensor in (query, key, value)]
    exact = [tensor.float().requires_grad_() for tensor in (query, key, value)]
    result, expected = attend(*found, plan.to(device)), attend(*exact, plan)
    assert result.dtype == torch.bfloat16
    assert off(result, expected.detach()) < 0.01
    result.backward(gradient.to(device, torch.bfloat16))
    expected.backward(gradient)
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert off(mine.grad, theirs.grad) < 0.02


@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_a_pass_in_fp32_gives_what_the_cpu_gives(device: torch.device, attention: str) -> None:
    config = CONFIG.model_copy(update={"attention": attention})
    on_cpu, stream = model(config), pack(SAMPLES, config)
    inputs = given(stream)
    with torch.no_grad():
        expected = on_cpu(*inputs, stream)
        found = copy.deepcopy(on_cpu).to(device)(*(tensor.to(device) for tensor in inputs), stream.to(device))
    assert torch.allclose(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_pass_in_bfloat16_takes_the_variable_length_kernel_and_is_near_fp32(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_core.models import attention

    calls = []
    kernel = attention._variable_length
    monkeypatch.setattr(attention, "_variable_length", lambda *arguments: calls.append(1) or kernel(*arguments))
    made, stream = model().to(device), pack(SAMPLES, CONFIG).to(device)
    inputs = [tensor.to(device) for tensor in given(stream)]
    with torch.no_grad():
        expected = made(*inputs, stream)
        assert calls == []
        with torch.autocast("cuda", torch.bfloat16):
            found = made(*inputs, stream)
    assert len(calls) == CONFIG.num_layers
    assert 0 < off(found, expected) < 0.03


@pytest.mark.parametrize("num_tokens", [256, 331])
def test_an_fp8_layer_is_near_bfloat16_forward_and_backward(device: torch.device, num_tokens: int) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(512, 768, bias=False, device=device)
    quantised = Float8Linear(512, 768, bias=False, device=device)
    quantised.weight = torch.nn.Parameter(plain.weight.detach().clone())
    x, gradient = torch.randn(num_tokens, 512, device=device), torch.randn(num_tokens, 768, device=device)
    results = []
    for layer in (plain, quantised):
        taken = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            result = layer(taken)
        result.backward(gradient.to(result.dtype))
        results.append((result.detach(), taken.grad, layer.weight.grad))
    for expected, found in zip(*results, strict=True):
        assert expected is not None
        assert found is not None
        assert 0 < off(found, expected) < 0.06


def test_an_fp8_layer_gives_what_the_cpus_emulation_gives(device: torch.device) -> None:
    torch.manual_seed(0)
    layer = Float8Linear(64, 48, bias=False)
    x = torch.randn(37, 64)
    assert off(copy.deepcopy(layer).to(device)(x.to(device)), layer(x).detach()) < 0.005


def test_a_model_in_fp8_is_near_bfloat16(device: torch.device) -> None:
    plain, stream = model().to(device), pack(SAMPLES, CONFIG).to(device)
    inputs = [tensor.to(device) for tensor in given(stream)]
    quantised = copy.deepcopy(plain)
    check_float8(quantised, device)
    use_float8(quantised)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert 0 < off(quantised(*inputs, stream), plain(*inputs, stream)) < 0.1


def test_the_autoencoder_takes_a_step_at_512_px(device: torch.device) -> None:
    torch.manual_seed(0)
    vae = ResidualVAE(VAEModel()).to(device)
    images = torch.rand(1, 3, 512, 512, device=device) * 2 - 1
    adamw = torch.optim.AdamW(vae.parameters(), lr=1e-4, fused=True)
    losses = []
    for _ in range(8):
        loss = (vae.decode(vae.encode(images)) - images).abs().mean()
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_autoencoder_gives_what_the_cpu_gives(device: torch.device) -> None:
    torch.manual_seed(0)
    on_cpu = ResidualVAE(VAEModel(stem_fold=8, encoder_widths=[32, 32], decoder_widths=[32, 32])).eval()
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.inference_mode():
        latents = on_cpu.encode(images)
        on_gpu = copy.deepcopy(on_cpu).to(device)
        # Convolutions in fp32 take their inputs as TF32, of 10 bits.
        assert off(on_gpu.encode(images.to(device)), latents) < 0.005
        assert off(on_gpu.decode(latents.to(device)), on_cpu.decode(latents)) < 0.005


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("once", [False, True])
def test_a_seed_draws_nearly_the_cpus_picture(device: torch.device, once: bool, edits: bool) -> None:
    reads = {"attention": "block_causal", "condition_at_t0": True} if once else {}
    torch.manual_seed(0)
    words = encoder()
    mmdit = model(CONFIG.model_copy(update=reads), text_dim=words.dim).eval()
    vae = ResidualVAE(VAEModel(latent_channels=16, stem_fold=8, encoder_widths=[32, 32], decoder_widths=[32, 32])).eval()
    references = [torch.rand(2, 3, 64, 96) * 2 - 1] if edits else []
    drawn = [
        sample(
            mmdit.to(place),
            vae.to(place),
            words.to(place),
            ["a red circle with the text A7", "a blue circle with the text K0"],
            size_px=(64, 96),
            seeds=[3, 4],
            sampling=Sampling(steps=4, guidance_scale=2.0),
            references=references,
        )
        for place in (torch.device("cpu"), device)
    ]
    assert drawn[1].device.type == "cpu"
    assert drawn[1].shape == (2, 3, 64, 96)
    assert drawn[1].isfinite().all()
    assert off(drawn[1], drawn[0]) < 0.1
