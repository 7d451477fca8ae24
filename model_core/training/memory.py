"""How much memory of a GPU training the MMDiT takes, part by part, when its state is sharded by FSDP2 or HSDP.

The state is what the optimizer works on, in fp32; blocks are gathered in bf16 to compute, and activations are bf16. Activations are
derived term by term from what autograd keeps of a block (docs/reference/throughput.md); what is measured of them stands there too.
Legend: D width of the stream, H hidden width of the SwiGLU, n heads, d head dim, e bytes an element; all a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_core.recipe import MMDiTModel, VAEModel
from model_core.training.parameters import EncoderSizes, hidden_width, mmdit_parameters, vae_parameters
from model_core.training.throughput import Checkpointing

FP32, BF16 = 4, 2
# What no formula below counts (ours, not measured): CUDA context, cuBLAS and NCCL buffers; and what the allocator cannot fit together.
FIXED_WORKSPACE_BYTES = 3 * 2**30
FRAGMENTED_SHARE = 0.05


def block_activations(config: MMDiTModel, *, element_bytes: int = BF16, fused_norm: bool = True) -> dict[str, int]:
    """Bytes a token that autograd keeps of one block, by what they are.

    Of a stream whose attention needs no gathering: one sample, samples of one length, or the variable-length kernel of CUDA. `fused_norm`:
    RMSNorm as one kernel, which keeps its input and a scale a head (CUDA); else as a composite (CPU), which also keeps the normed value
    in fp32 and, below fp32, its input in fp32; and a complex rotation, which keeps its table.
    """
    stream, hidden = config.width * element_bytes, hidden_width(config) * element_bytes
    head, normed = config.num_heads * FP32, config.width * FP32
    own_input = normed if element_bytes < FP32 else 0
    return {
        "input": stream,  # of the first LayerNorm
        "first norm": stream + 2 * element_bytes,  # its output, of which the modulation's gradient is taken; mean and deviation
        "qkv input": stream,
        "qkv": 3 * stream,  # one tensor: input of both QK norms, and the values of attention
        "qk norms": 2 * head + (0 if fused_norm else 2 * (normed + own_input)),
        "rotated queries and keys": 2 * stream + (0 if fused_norm else 2 * config.head_dim * FP32),
        "attention": stream + head,  # its output; log-sum-exp
        "attention branch": stream,  # of which the gate's gradient is taken
        "middle": stream,  # input of the second LayerNorm
        "second norm": stream + 2 * element_bytes,
        "mlp input": stream,
        "gate and value": 2 * hidden,  # one tensor
        "silu of the gate": hidden,
        "mlp output's input": hidden,  # product of that and the value
        "mlp branch": stream,
    }


MATMULS = ("qkv", "attention", "attention branch", "mlp branch", "gate and value")  # what matrix products and attention gave


def kept_activations(config: MMDiTModel, policy: Checkpointing, *, element_bytes: int = BF16, fused_norm: bool = True) -> int:
    """Bytes a token that one block keeps from its forward to its backward pass.

    none: all that autograd asks for. selective: the block's input, and what matrix products and attention gave; norms, rotations and
    SwiGLU are computed again. full: the block's input, from which the whole block is computed again.
    """
    terms = block_activations(config, element_bytes=element_bytes, fused_norm=fused_norm)
    match policy:
        case "none":
            return sum(terms.values())
        case "selective":
            return terms["input"] + sum(terms[name] for name in MATMULS)
        case "full":
            return terms["input"]


def outer_activations(config: MMDiTModel, *, element_bytes: int = BF16) -> int:
    """Bytes a token kept outside the blocks: the last stream, the final norm, its scale and its scaled output, the rotary table in
    fp32, and what multiplies norms and branches of all blocks.

    Charged to every token as to one of the target: the projection of a text token keeps about as much.
    """
    return 8 * config.width * element_bytes + config.head_dim * FP32


def backward_activations(config: MMDiTModel, *, element_bytes: int = BF16) -> int:
    """Bytes a token by which a backward pass exceeds what was kept: at SwiGLU's product, 3 H of gradients after H was let go."""
    return 2 * hidden_width(config) * element_bytes


def activation_peak(config: MMDiTModel, policy: Checkpointing, *, element_bytes: int = BF16, fused_norm: bool = True) -> int:
    """Bytes a token at the peak of a step: what every block keeps, what one block has computed again, and its gradients."""
    whole = kept_activations(config, "none", element_bytes=element_bytes, fused_norm=fused_norm)
    kept = kept_activations(config, policy, element_bytes=element_bytes, fused_norm=fused_norm)
    outer = outer_activations(config, element_bytes=element_bytes)
    return config.num_layers * kept + (whole - kept) + outer + backward_activations(config, element_bytes=element_bytes)


@dataclass(frozen=True)
class StateMemory:
    """Bytes of a GPU that do not depend on the batch, by part."""

    parameters: int  # fp32, a shard of them
    gradients: int  # fp32, a shard
    optimizer: int  # AdamW's two moments, fp32, a shard
    ema: int  # fp32, a shard
    gathered: int  # bf16 parameters of the blocks at work and of all outside blocks, and a block's gradients on their way
    encoder: int  # the frozen encoder, bf16, whole
    vae: int  # bf16, whole; 0 where latents come from shards
    workspace: int  # an allowance: CUDA, libraries, fragments

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def state_memory(
    config: MMDiTModel,
    *,
    latent_channels: int,
    encoder: EncoderSizes,
    shards: int,
    memory_bytes: int,
    vae: VAEModel | None = None,
) -> StateMemory:
    """Memory of one GPU of `shards` that share one copy of the state: all of them for FSDP2, those of a replica for HSDP.

    FSDP2 gathers a block while the one before it computes, and reduces a block's gradients in fp32 while the next are computed.
    """
    parts = mmdit_parameters(config, latent_channels=latent_channels, text_dim=encoder.hidden_size)
    total, block = sum(parts.values()), parts["blocks"] // config.num_layers
    shard = FP32 * -(-total // shards)
    outside = total - parts["blocks"]
    return StateMemory(
        parameters=shard,
        gradients=shard,
        optimizer=2 * shard,
        ema=shard,
        gathered=BF16 * (outside + 2 * block) + (BF16 + FP32) * block,
        encoder=BF16 * sum(encoder.parameters.values()),
        vae=0 if vae is None else BF16 * sum(vae_parameters(vae).values()),
        workspace=FIXED_WORKSPACE_BYTES + round(FRAGMENTED_SHARE * memory_bytes),
    )


def largest_micro_batch(config: MMDiTModel, policy: Checkpointing, *, state: StateMemory, memory_bytes: int) -> int:
    """Most tokens of one pass of a GPU; 0 when the state alone does not fit."""
    return max(0, memory_bytes - state.total) // activation_peak(config, policy)
