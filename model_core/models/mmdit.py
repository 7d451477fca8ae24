"""The multimodal diffusion transformer: text, condition images and the noisy target in one stream (R1 3.2).

Legend: B samples, N target tokens, T text tokens, I picture tokens (conditions and targets), S = T + I, C latent channels,
D width, H heads of d channels. No biases anywhere; RMSNorm on queries and keys, LayerNorm without affine elsewhere; one
multiplicative modulation for all blocks, h (1 + scale), and tanh gates on the residual branches (public code of Qwen-Image-2.1);
SwiGLU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model_core.documents import UserError
from model_core.models.attention import AttentionPlan, attend
from model_core.models.rope import rotary_table, rotate
from model_core.models.stream import Stream
from model_core.recipe import MMDiTModel
from model_core.sampling.few_step import FewStep, load_sampler

KeyValue = tuple[Tensor, Tensor]  # keys and values (S, H, d)
Modulation = tuple[Tensor, Tensor, Tensor, Tensor]  # factors (S or 1, D) of norm and branch of attention, then of the MLP
Attend = Callable[[Tensor, Tensor, Tensor, AttentionPlan], Tensor]

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
        pictures: Tensor,
        text: Tensor,
        t: Tensor,
        stream: Stream,
        *,
        prefix: Sequence[KeyValue] | None = None,
        attend: Attend = attend,
    ) -> Tensor:
        """Velocity (N, C) of the target tokens of a packed stream of B samples.

        `pictures` (I, C): condition images clean, targets noisy; `text` (T, text_dim); both in the order of the stream. `t` (B,):
        times in [0, 1]. With a `prefix` (`read_prefix`), `stream` is that of the targets alone (`pack_targets`).
        Raises ValueError when the tensors do not fit the stream.
        """
        time = self._time(t)
        final_scale = self.final_scale(time)
        rows = stream.sample
        if self.config.condition_at_t0 and prefix is None:  # with a prefix the stream has targets alone
            time = torch.cat((time, self._time(torch.zeros_like(t[:1]))))
            rows = torch.where(stream.is_target, rows, len(t))
        modulation = self._modulation(time, rows)
        x, rotary = self._embed(pictures, text, stream)
        targets = stream.is_target.nonzero().squeeze(1)
        for index, block in enumerate(self.blocks):
            # What the last block makes of text and condition images nobody asks for.
            asked = targets if index == len(self.blocks) - 1 else None
            look = attend if prefix is None else _after(prefix[index], attend)
            x = block(x, modulation, rotary, stream.plan, look, asked)
        velocity: Tensor = self.image_out(layer_norm(x) * (1 + final_scale[stream.sample[targets]]))
        return velocity

    def read_prefix(self, conditions: Tensor, text: Tensor, stream: Stream) -> list[KeyValue]:
        """Keys and values of text and condition images, a block, which the targets' passes at all times share.

        `stream` is that of `pack_prefix`. Raises ValueError where `reads_prefix_once` is false.
        """
        if not reads_prefix_once(self.config):
            raise ValueError("a prefix can be read once only with block_causal attention and condition_at_t0")
        kept: list[KeyValue] = []

        def keep(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
            kept.append((key, value))
            return attend(query, key, value, plan)

        x, rotary = self._embed(conditions, text, stream)
        modulation = self._modulation(self._time(text.new_zeros(1)), stream.sample.new_zeros(1))
        nothing = stream.sample.new_zeros(0)
        for index, block in enumerate(self.blocks):
            # Of the last block, keys and values alone are asked for.
            x = block(x, modulation, rotary, stream.plan, keep, nothing if index == len(self.blocks) - 1 else None)
        return kept

    def _embed(self, pictures: Tensor, text: Tensor, stream: Stream) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The stream's tokens (S, D) and its rotary table."""
        if pictures.shape[1] != self.latent_channels or text.shape[1] != self.text_dim:
            found, expected = (pictures.shape[1], text.shape[1]), (self.latent_channels, self.text_dim)
            raise ValueError(f"found {found} channels of pictures and text; this model takes {expected}")
        x = torch.cat((self.text_in(text), self.image_in(pictures)))[stream.order]
        rotary = rotary_table(stream.positions, axes=self.config.rope_axes, theta=self.config.rope_theta)
        return x, rotary

    def _modulation(self, time: Tensor, rows: Tensor) -> Modulation:
        """What multiplies normed streams, 1 + scale, and branches, tanh(gate), of times (B, D) for tokens of `rows` (S,).

        Four tensors and not slices of one, whose gradients would be as wide as the whole, once a use.
        """
        scale1, gate1, scale2, gate2 = self.modulation(time).chunk(4, dim=-1)
        factors = (1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh())
        attention_scale, attention_gate, mlp_scale, mlp_gate = (factor.index_select(0, rows) for factor in factors)
        return attention_scale, attention_gate, mlp_scale, mlp_gate

    def _time(self, t: Tensor) -> Tensor:
        """SiLU of the time embedding (B, D), which all modulation is linear in."""
        embedding = timestep_embedding(t).to(self.time_in.weight.dtype)
        return F.silu(self.time_out(F.silu(self.time_in(embedding))))


def reads_prefix_once(config: MMDiTModel) -> bool:
    """Whether text and condition images depend neither on the target nor on the time, so that a sampler reads them once (S)."""
    return config.attention == "block_causal" and config.condition_at_t0


def _after(prefix: KeyValue, attend: Attend) -> Attend:
    """Attention that also looks at the prefix's keys and values, which come first."""

    def attend_both(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        return attend(query, torch.cat((prefix[0], key)), torch.cat((prefix[1], value)), plan)

    return attend_both


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

    def forward(
        self,
        x: Tensor,
        modulation: Modulation,
        rotary: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        attend: Attend,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The stream (S, D) after attention and the MLP; of tokens at `rows` (N,) alone where these are given."""
        attended = attend(*self.project(x, modulation, rotary), plan)
        if rows is not None:
            x, attended = x.index_select(0, rows), attended.index_select(0, rows)
            scale1, gate1, scale2, gate2 = (factor if len(factor) == 1 else factor.index_select(0, rows) for factor in modulation)
            modulation = (scale1, gate1, scale2, gate2)
        return self.merge(x, attended, modulation)

    def project(self, x: Tensor, modulation: Modulation, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each (S, H, d)."""
        scale, *_ = modulation
        query, key, value = self.qkv(layer_norm(x) * scale).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        # Where passes are in bfloat16, the norms' fp32 weights make their results fp32, which no fast attention takes.
        return rotate(self.query_norm(query), *rotary).type_as(value), rotate(self.key_norm(key), *rotary).type_as(value), value

    def merge(self, x: Tensor, attended: Tensor, modulation: Modulation) -> Tensor:
        """The stream after what attention found (S, H, d), and the feed-forward."""
        _, gate1, scale2, gate2 = modulation
        x = torch.addcmul(x, gate1, self.attention_out(attended.flatten(1)))
        gate, value = self.mlp_in(layer_norm(x) * scale2).chunk(2, dim=-1)
        return torch.addcmul(x, gate2, self.mlp_out(F.silu(gate) * value))


class TextProjection(nn.Module):
    """Text states to the stream's width: RMSNorm, Linear, GELU, Linear (public code of Qwen-Image-2.1)."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(text_dim, eps=NORM_EPS)
        self.layers = nn.Sequential(
            nn.Linear(text_dim, width, bias=False), nn.GELU(approximate="tanh"), nn.Linear(width, width, bias=False)
        )

    def forward(self, text: Tensor) -> Tensor:
        """(T, text_dim) to (T, D)."""
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
    """The flow that `save_mmdit` wrote; raises UserError for a student of few steps, whose velocities are none of a flow."""
    if load_sampler(folder) is not None:
        raise UserError(f"{folder}: found a student of few steps, which its own sampler alone can draw with; allowed are weights of a flow")
    return _read_weights(folder)


def load_student(folder: Path) -> tuple[MMDiT, FewStep]:
    """A student of few steps and the sampler that was saved beside it; raises UserError for weights of a flow."""
    sampler = load_sampler(folder)
    if sampler is None:
        raise UserError(f"{folder}: found weights of a flow; allowed is a student of few steps, with its sampler beside it")
    return _read_weights(folder), sampler


def _read_weights(folder: Path) -> MMDiT:
    settings, latent_channels, text_dim = read_settings(folder)
    model = MMDiT(settings, latent_channels=latent_channels, text_dim=text_dim)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def read_settings(folder: Path) -> tuple[MMDiTModel, int, int]:
    """Settings, latent channels and text channels of the model that `save_mmdit` wrote."""
    config = json.loads((folder / "config.json").read_text())
    return MMDiTModel.model_validate(config["model"]), config["latent_channels"], config["text_dim"]
