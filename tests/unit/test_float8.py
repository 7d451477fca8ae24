"""FP8 linear layers: the quantiser's closed forms, products against exact ones, and what stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from model_core.documents import UserError
from model_core.models.mmdit import MMDiT
from model_core.models.stream import pack
from model_core.recipe import MMDiTModel
from model_core.training import float8
from model_core.training.float8 import FLOAT8, LARGEST, Float8Linear, check_float8, quantise_rows, use_float8

CONFIG = MMDiTModel(num_layers=2, num_heads=2, head_dim=16, rope_axes=(4, 6, 6))


def dequantised(matrix: torch.Tensor) -> torch.Tensor:
    """Each row on e4m3's grid, by its own rounding: 3 mantissa bits, exponents from -6, subnormals below."""
    scale = matrix.abs().amax(1, keepdim=True).double() / 448
    values = matrix.double() / scale
    exponent = values.abs().clamp_min(2.0**-6).log2().floor()
    step = 2.0 ** (exponent - 3)
    return (values / step).round() * step * scale


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def test_a_rows_largest_magnitude_becomes_the_largest_value() -> None:
    values, scales = quantise_rows(torch.tensor([[1.0, -7.0, 3.5], [1e-20, 0.0, 0.0], [-3e38, 1.0, 3e38]]))
    assert values.dtype == FLOAT8
    assert values.float().abs().amax(1).tolist() == [448.0] * 3
    assert values[0].float().tolist() == [64.0, -448.0, 224.0]
    assert scales[0].item() == 7.0 / 448


def test_a_row_of_zeros_stays_zero() -> None:
    values, scales = quantise_rows(torch.zeros(2, 5))
    assert (values.float() * scales).tolist() == [[0.0] * 5] * 2


def test_a_value_is_off_by_a_sixteenth_or_half_the_least_step() -> None:
    matrix = random(64, 256).float() * torch.logspace(-6, 6, 64)[:, None]
    values, scales = quantise_rows(matrix)
    error = (values.float() * scales - matrix).abs()
    assert (error <= torch.maximum(matrix.abs() / 16, scales * 2**-10) * (1 + 1e-5)).all()


@pytest.mark.parametrize("num_tokens", [32, 37])
def test_forward_and_gradients_are_products_of_rounded_rows(num_tokens: int) -> None:
    x, gradient, weight = random(num_tokens, 48), random(num_tokens, 32, seed=1), random(32, 48, seed=2).float()
    linear = Float8Linear(48, 32, bias=False)
    linear.weight = torch.nn.Parameter(weight.clone())
    taken = x.clone().requires_grad_()
    result = linear(taken)
    result.backward(gradient)
    assert taken.grad is not None
    assert linear.weight.grad is not None
    products = {
        "forward": (result, dequantised(x) @ dequantised(weight).T),
        "of x": (taken.grad, dequantised(gradient) @ dequantised(weight.T).T),
        "of weight": (linear.weight.grad, dequantised(gradient.T) @ dequantised(x.T).T),
    }
    for name, (found, expected) in products.items():
        # Results are bfloat16: half a unit in the last place of 8 bits, of the largest.
        assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max(), name
    assert (result.dtype, taken.grad.dtype, linear.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_a_product_of_random_matrices_is_off_by_a_few_percent() -> None:
    x, weight = random(128, 512), random(256, 512, seed=1).float()
    linear = Float8Linear(512, 256, bias=False)
    linear.weight = torch.nn.Parameter(weight)
    exact = x.float() @ weight.T
    error = (linear(x).float() - exact).norm() / exact.norm()
    # Rounding to 3 bits is off by 1 / (sqrt(12) 8) = 3.6 % of a binade's beginning at most, on either side.
    assert 0.01 < error < 0.036 * 2**0.5


def model() -> MMDiT:
    torch.manual_seed(0)
    made = MMDiT(CONFIG, latent_channels=8, text_dim=16)
    torch.nn.init.normal_(made.image_out.weight, std=0.1)
    return made


def passes(made: MMDiT) -> torch.Tensor:
    stream = pack([(3, (4, 4)), (5, (2, 3))], CONFIG)
    generator = torch.Generator().manual_seed(1)
    picture, text = (torch.randn(num, channels, generator=generator) for num, channels in ((22, 8), (8, 16)))
    with torch.autocast("cpu", torch.bfloat16):
        return made(picture, text, torch.tensor([0.2, 0.7]), stream)


def test_parameters_keep_their_names_and_are_the_same_objects() -> None:
    made = model()
    before = dict(made.named_parameters())
    use_float8(made)
    after = dict(made.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert all(value.dtype == torch.float32 for value in after.values())


def test_only_the_blocks_linear_layers_are_in_fp8() -> None:
    made = model()
    use_float8(made)
    names = {name for name, module in made.named_modules() if isinstance(module, Float8Linear)}
    assert names == {f"blocks.{block}.{name}" for block in range(2) for name in ("qkv", "attention_out", "mlp_in", "mlp_out")}


def test_a_model_in_fp8_says_nearly_what_it_says_in_bfloat16_and_learns() -> None:
    plain, quantised = model(), model()
    use_float8(quantised)
    expected, found = passes(plain), passes(quantised)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1
    expected.square().mean().backward()
    found.square().mean().backward()
    for (name, mine), theirs in zip(quantised.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None
        similarity = torch.cosine_similarity(mine.grad.flatten(), theirs.grad.flatten(), dim=0)
        assert similarity > 0.95, name


def test_compiled_blocks_in_fp8_give_what_they_give_uncompiled() -> None:
    from model_core.training.parallel import compile_blocks

    plain = model()
    use_float8(plain)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend="aot_eager")
    assert torch.allclose(passes(compiled), passes(plain), atol=0.02)


@pytest.mark.parametrize(("capability", "said"), [((8, 0), "8.0"), ((7, 5), "7.5")])
def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], said: str) -> None:
    monkeypatch.setattr(float8.torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=f"float8 on a GPU of compute capability {said}; allowed are bf16, or a GPU of 8.9 or more"):
        check_float8(model(), torch.device("cuda", 0))


def test_widths_that_the_kernels_do_not_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8.torch.cuda, "get_device_capability", lambda device: (9, 0))
    odd = MMDiT(MMDiTModel(num_layers=1, num_heads=1, head_dim=24, rope_axes=(8, 8, 8)), latent_channels=8, text_dim=16)
    check_float8(model(), torch.device("cuda", 0))
    with pytest.raises(UserError, match="float8 with qkv of 72 x 24; allowed are multiples of 16"):
        check_float8(odd, torch.device("cuda", 0))


def test_largest_is_that_of_the_format() -> None:
    assert LARGEST == 448.0
