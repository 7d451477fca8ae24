"""The multimodal diffusion transformer: text, condition images and the noisy target in one stream (R1 3.2).

Legend: B batch, N tokens of the target, M tokens of a condition image, L text tokens, S all tokens, C latent channels,
D width. No biases anywhere; RMSNorm on queries and keys, LayerNorm without affine elsewhere; one multiplicative modulation
for all blocks, h (1 + scale), and tanh gates on the residual branches (public code of Qwen-Image-2.1); SwiGLU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model_core.models.rope import image_positions, rotary_table, rotate, text_positions
from model_core.recipe import MMDiTModel

TIME_CHANNELS = 256
NORM_EPS = 1e-6
SILU_MEAN, SILU_SECOND_MOMENT = 0.2066, 0.3557  # of SiLU at a standard normal variable


class MMDiT(nn.Module):
    """Predicts the flow's velocity eps - x0 for the target tokens."""

    def __init__(self, config: MMDiTModel, *, latent_channels: int, text_dim: int) -> None:
        super().__init__()
        self.config, self.latent_channels, self.text_dim = config, latent_channels, text_dim
        width = config.width
        self.image_in = nn.Linear(latent_channels, width, bias=False)
        self.place_in = nn.Linear(config.head_dim, width, bias=False) if config.place_input else None
        self.text_in = TextProjection(text_dim, width)
        self.time_in, self.time_out = nn.Linear(TIME_CHANNELS, width, bias=False), nn.Linear(width, width, bias=False)
        self.modulation = nn.Linear(width, 4 * width, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_scale = nn.Linear(width, width, bias=False)
        self.image_out = nn.Linear(width, latent_channels, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Velocity zero, scales one, gates open: at first each block adds its branches at tanh(1), scaled for depth.

        Without biases a gate can only start open through the time embedding: that has unit variance here, so the mean of
        its SiLU is 0.207, and equal weights of 1 / (0.207 D) make every gate about one at all times. Gates that start
        shut learn far more slowly in short runs (docs/decisions/0005-open-gates.md).
        """
        width = self.config.width
        nn.init.normal_(self.time_in.weight, std=math.sqrt(2 / TIME_CHANNELS))
        nn.init.normal_(self.time_out.weight, std=1 / math.sqrt(SILU_SECOND_MOMENT * width))
        nn.init.zeros_(self.modulation.weight)
        for gate in (1, 3):
            self.modulation.weight[gate * width : (gate + 1) * width] = 1 / (SILU_MEAN * width)
        nn.init.zeros_(self.final_scale.weight)
        nn.init.zeros_(self.image_out.weight)
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                weight.div_(math.sqrt(2 * len(self.blocks)))

    def forward(
        self,
        target: Tensor,
        t: Tensor,
        text: Tensor,
        text_mask: Tensor,
        shape: tuple[int, int],
        references: Sequence[tuple[Tensor, tuple[int, int]]] = (),
    ) -> Tensor:
        """Velocity (B, N, C) of the noisy `target` (B, N, C) at times `t` (B,) in [0, 1].

        `text` (B, L, text_dim) with `text_mask` (B, L), true where there is a token; `shape` (h, w) with h w = N;
        `references`: condition latents (B, M, C), each with its (h, w). Raises ValueError when sizes do not fit.
        """
        for tokens, (height, width) in ((target, shape), *references):
            if tokens.shape[1] != height * width or tokens.shape[2] != self.latent_channels:
                found = (tokens.shape[1], tokens.shape[2])
                raise ValueError(f"tokens and channels {found} do not fit a {height} x {width} grid of {self.latent_channels} channels")
        images = [reference for reference, _ in references]
        rotary = self._rotary(text.shape[1], shape, [size for _, size in references], target.device)
        pictures = self.image_in(torch.cat([*images, target], dim=1))
        if self.place_in is not None:
            pictures = pictures + self.place_in(torch.cat(rotary, dim=1)[text.shape[1] :].to(pictures.dtype))
        stream = torch.cat([self.text_in(text), pictures], dim=1)
        mask = self._mask(text_mask, [image.shape[1] for image in images], target.shape[1])

        clean = stream.shape[1] - target.shape[1]
        time = self._time(t, stream.dtype)
        modulation, final_scale = self.modulation(time)[:, None], self.final_scale(time)[:, None]
        if self.config.condition_at_t0:
            at_t0 = self.modulation(self._time(torch.zeros_like(t[:1]), stream.dtype))[:, None].expand(len(t), clean, -1)
            modulation = torch.cat((at_t0, modulation.expand(-1, target.shape[1], -1)), dim=1)
        for block in self.blocks:
            stream = block(stream, modulation, rotary, mask)
        return self.image_out(layer_norm(stream[:, clean:]) * (1 + final_scale))

    def _time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """SiLU of the time embedding (B, D), which all modulation is linear in."""
        return F.silu(self.time_out(F.silu(self.time_in(timestep_embedding(t).to(dtype)))))

    def _rotary(
        self, length: int, shape: tuple[int, int], references: list[tuple[int, int]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(cos, sin) tables of the stream: text, condition images, target."""
        parts = [text_positions(length, [shape, *references])]
        parts += [image_positions(ordinal, *size) for ordinal, size in enumerate(references, start=1)]
        positions = torch.cat([*parts, image_positions(0, *shape)]).to(device)
        return rotary_table(positions, axes=self.config.rope_axes, theta=self.config.rope_theta)

    def _mask(self, text_mask: Tensor, reference_lengths: list[int], target_length: int) -> Tensor | None:
        """Attention mask, true where a query may look at a key: (B, 1, 1 or S, S), or None when nothing is masked.

        Full attention hides padding alone. Block-causal attention also hides later tokens, but for those of one's own image.
        """
        images = [*reference_lengths, target_length]
        if self.config.attention == "full" and bool(text_mask.all()):
            return None
        keys = F.pad(text_mask, (0, sum(images)), value=True)[:, None, None]
        if self.config.attention == "full":
            return keys
        block = torch.tensor(
            [-1] * text_mask.shape[1] + [index for index, count in enumerate(images) for _ in range(count)], device=text_mask.device
        )
        same_image = (block[:, None] == block[None]) & (block[:, None] >= 0)
        causal = torch.ones(len(block), len(block), dtype=torch.bool, device=text_mask.device).tril()
        # A padded query looks at itself, so that no row of the softmax is empty.
        own = torch.eye(len(block), dtype=torch.bool, device=text_mask.device)
        return ((causal | same_image) & keys) | own


class Block(nn.Module):
    """Attention and SwiGLU, each behind a modulated norm and a gated residual."""

    def __init__(self, config: MMDiTModel) -> None:
        super().__init__()
        width, hidden = config.width, round(config.mlp_ratio * config.width)
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.RMSNorm(config.head_dim, eps=NORM_EPS)
        self.key_norm = nn.RMSNorm(config.head_dim, eps=NORM_EPS)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, modulation: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x (B, S, D); modulation (B, 1 or S, 4 D) holds scale and gate of attention, then of the MLP."""
        scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
        x = x + gate1.tanh() * self._attend(layer_norm(x) * (1 + scale1), rotary, mask)
        gate, value = self.mlp_in(layer_norm(x) * (1 + scale2)).chunk(2, dim=-1)
        return x + gate2.tanh() * self.mlp_out(F.silu(gate) * value)

    def _attend(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotate(self.query_norm(query), *rotary), rotate(self.key_norm(key), *rotary)
        return self.attention_out(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2))


class TextProjection(nn.Module):
    """Text states to the stream's width: RMSNorm, Linear, GELU, Linear (public code of Qwen-Image-2.1)."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(text_dim, eps=NORM_EPS)
        self.layers = nn.Sequential(
            nn.Linear(text_dim, width, bias=False), nn.GELU(approximate="tanh"), nn.Linear(width, width, bias=False)
        )

    def forward(self, text: Tensor) -> Tensor:
        """(B, L, text_dim) to (B, L, D)."""
        projected: Tensor = self.layers(self.norm(text))
        return projected


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over channels without scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def timestep_embedding(t: Tensor) -> Tensor:
    """(B,) times in [0, 1] to (B, 256): cosines, then sines, of 1000 t at periods up to 10^4 (Vaswani et al., 3.5)."""
    half = TIME_CHANNELS // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def save_mmdit(model: MMDiT, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": model.config.model_dump(mode="json"), "latent_channels": model.latent_channels, "text_dim": model.text_dim}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")


def load_mmdit(folder: Path) -> MMDiT:
    """The model that `save_mmdit` wrote."""
    config = json.loads((folder / "config.json").read_text())
    model = MMDiT(MMDiTModel.model_validate(config["model"]), latent_channels=config["latent_channels"], text_dim=config["text_dim"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model
