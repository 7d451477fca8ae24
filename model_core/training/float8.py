"""FP8 for the linear layers of the blocks, put on from outside: each product runs on e4m3 values with a scale a row.

Weights stay fp32 under their own names, so checkpoints and published models know nothing of it. e4m3 holds activations, weights and
gradients alike, as the row-wise recipe of torchao (Float8LinearRecipeName.ROWWISE) and DeepSeek-V3 (arXiv 2412.19437, 3.3.2) have
it; with a scale for each row the wider range of e5m2 buys nothing. The first and last layers, text and modulation stay as they are.
Legend: M tokens, K channels in, N channels out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.documents import UserError
from model_core.models.mmdit import MMDiT

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
LEAST_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
MULTIPLE = 16  # of both sides of the second matrix, which the kernels ask for
LINEAR_LAYERS = ("qkv", "attention_out", "mlp_in", "mlp_out")


class Float8Linear(nn.Linear):
    """A linear layer without bias whose forward and both backward products are in FP8; the result is bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        """(M, K) to (M, N)."""
        product: Tensor = _Product.apply(input.to(torch.bfloat16), self.weight)
        return product


class _Product(torch.autograd.Function):
    """x w' of x (M, K) in bfloat16 and w (N, K), and its gradients; each of the three sums over other channels, so each scales anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return scaled_product(*quantise_rows(x), *quantise_rows(weight), fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        of_x = scaled_product(*quantise_rows(gradient), *quantise_rows(weight.t()), fast=False)
        # This one sums over tokens, of which there may be any number: rows of zeros make it a multiple.
        padding = (0, 0, 0, -len(x) % MULTIPLE)
        of_weight = scaled_product(*quantise_rows(F.pad(gradient, padding).t()), *quantise_rows(F.pad(x, padding).t()), fast=False)
        return of_x, of_weight.to(weight.dtype)


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(values in e4m3, scales (rows, 1) in fp32) of a matrix; values times scales give it back, up to rounding.

    A row's largest magnitude becomes the largest e4m3 value; a row of zeros stays zero. Rounding is to nearest: at most 1 / 16 of a
    value, or half of e4m3's least step, 2^-10, times the scale.
    """
    values = matrix.float()
    largest = values.abs().amax(dim=1, keepdim=True)
    scales = largest.clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    # Division may round past the largest value, where a conversion would give NaN.
    return (values / scales).clamp(-LARGEST, LARGEST).to(FLOAT8).contiguous(), scales


def scaled_product(first: Tensor, first_scales: Tensor, second: Tensor, second_scales: Tensor, *, fast: bool) -> Tensor:
    """first (M, K) times second (N, K) transposed, both with a scale a row: (M, N) in bfloat16.

    `fast`: sums stay in the tensor cores' own registers, of some 14 bits; torchao does so forward, and not for gradients.
    """
    return torch._scaled_mm(
        first, second.t(), scale_a=first_scales, scale_b=second_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def use_float8(model: MMDiT) -> None:
    """Puts the blocks' linear layers into FP8, in place; parameters stay the same objects under the same names."""
    for block in model.blocks:
        for name in LINEAR_LAYERS:
            linear = getattr(block, name)
            float8 = Float8Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            float8.weight = linear.weight
            setattr(block, name, float8)


def check_float8(model: MMDiT, device: torch.device) -> None:
    """Raises UserError where the GPU `device`, or the model's widths, do not allow FP8."""
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        least, have = (".".join(map(str, capability)) for capability in (LEAST_CAPABILITY, found))
        raise UserError(
            f"mmdit.precision: found float8 on a GPU of compute capability {have}; allowed are bf16, or a GPU of {least} or more"
        )
    check_widths(model)


def check_widths(model: MMDiT) -> None:
    """Raises UserError where a side of a block's matrices is no multiple of 16."""
    for name in LINEAR_LAYERS:
        rows, columns = getattr(model.blocks[0], name).weight.shape
        if rows % MULTIPLE or columns % MULTIPLE:
            raise UserError(f"mmdit.precision: found float8 with {name} of {rows} x {columns}; allowed are multiples of {MULTIPLE}")
