"""Forward and backward passes of one optimizer step of flow matching, over packed streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_core.data.loader import Batch, MicroBatch
from model_core.models.condition import ConditionEncoder
from model_core.models.mmdit import MMDiT
from model_core.models.stream import pack
from model_core.objectives.flow import flow_loss, interpolate, velocity_target
from model_core.training.distributed import is_sharded, max_over_ranks, sum_gradients, sum_over_ranks
from model_core.training.parallel import Layout
from model_core.training.throughput import mmdit_forward_flops, training_flops


@dataclass(frozen=True)
class BatchResult:
    """What the passes of a global batch gave: its mean loss, detached; its tokens and model FLOPs."""

    loss: Tensor
    num_tokens: int
    flops: float


@dataclass(frozen=True)
class Passes:
    """How a batch goes through the model: frozen `encoder`, layout over ranks, and whether passes run in bfloat16.

    Where all text states are stored, there need be no encoder.
    """

    encoder: ConditionEncoder | None
    layout: Layout
    bfloat16: bool = False

    def backward(self, model: MMDiT, batch: Batch) -> BatchResult:
        """Adds up the gradients of the global batch's mean loss, over all ranks; the result is the same on every rank."""
        ranks = self.layout.ranks
        counts = torch.tensor([batch.num_elements, batch.num_tokens, self._flops(model, batch)], dtype=torch.float64)
        counts *= self.layout.context.is_first  # ranks that share streams have the same batch
        num_elements, num_tokens, flops = sum_over_ranks(counts, ranks).tolist()
        # Weights that are gathered for each pass need all ranks in every pass.
        num_passes = int(max_over_ranks(torch.tensor(len(batch.micro_batches)), ranks))
        loss = torch.zeros((), device=next(model.parameters()).device)
        for micro in batch.micro_batches:
            part = self._loss(model, micro, int(num_elements))
            part.backward()
            loss += part.detach()
        if is_sharded(model):
            for _ in range(num_passes - len(batch.micro_batches)):
                idle_pass(model)
        sum_gradients(model.parameters(), ranks)
        return BatchResult(sum_over_ranks(loss, ranks), int(num_tokens), flops)

    def _flops(self, model: MMDiT, batch: Batch) -> float:
        samples = [sample for micro in batch.micro_batches for sample in micro.samples]
        return training_flops(mmdit_forward_flops(model.config, samples, latent_channels=model.latent_channels, text_dim=model.text_dim))

    def _loss(self, model: MMDiT, micro: MicroBatch, num_elements: int) -> Tensor:
        weight = next(model.parameters())
        device = weight.device
        text = text_states(self.encoder, micro.prompts, micro.states, like=weight)
        if len(text) + len(micro.pictures) != len(micro.stream):
            raise ValueError(f"found {len(text)} text states; the latents were stored for {len(micro.stream) - len(micro.pictures)}")
        micro = micro.to(device)
        x0 = micro.pictures[micro.is_target]
        t = micro.t[micro.stream.sample[micro.stream.is_target]]
        noisy = micro.pictures.masked_scatter(micro.is_target[:, None], interpolate(x0, micro.noise, t))
        stream, mine = self.layout.part(micro.stream)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16 and not is_sharded(model)):
            velocity = model(noisy, text, micro.t, stream, attend=self.layout.attend)
        return flow_loss(velocity, velocity_target(x0, micro.noise)[mine], num_elements=num_elements)


def text_states(encoder: ConditionEncoder | None, prompts: Sequence[str], stored: Sequence[Tensor | None], *, like: Tensor) -> Tensor:
    """Text states (T, dim) of B samples in their order, in the dtype and on the device of `like`: stored ones, or the encoder's.

    Raises ValueError where neither are at hand.
    """
    online = [prompt for prompt, states in zip(prompts, stored, strict=True) if states is None]
    if online and encoder is None:
        raise ValueError(f"found no text states of {len(online)} prompts, and there is no condition encoder")
    encoded = encoder.encode_packed(online) if encoder is not None and online else None
    known = [states for states in stored if states is not None]
    if not known:
        assert encoded is not None, "a pass has samples"
        return encoded.states.to(like.device, like.dtype)
    # All stored states of a pass are moved and cast at once.
    moved = torch.cat(known).to(like.device, like.dtype, non_blocking=True)
    if encoded is None:
        return moved
    kept = iter(moved.split([len(states) for states in known]))
    computed = iter(encoded.states.to(like.device, like.dtype).split(encoded.lengths))
    return torch.cat([next(computed) if states is None else next(kept) for states in stored])


def idle_pass(model: MMDiT) -> None:
    """A pass over one token whose gradients are zero: for a rank that has no more work while others have."""
    weight = next(model.parameters())
    stream = pack([((1, 1),)], model.config).to(weight.device)
    picture, text = (
        torch.zeros(num, channels, device=weight.device) for num, channels in ((1, model.latent_channels), (0, model.text_dim))
    )
    (model(picture, text, torch.zeros(1, device=weight.device), stream).sum() * 0.0).backward()
