"""How large activations grow, and how many units have shut: the published reason for SwiGLU is massive activations (R1 3.2).

Measured by hooks from outside, in the few passes that are logged; the rest of the training pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model_core.models.mmdit import MMDiT

SHUT = -4.0  # gate below which SiLU passes less than 2 % of its input: sigma(-4) = 0.018


@contextmanager
def activation_statistics(model: MMDiT, *, active: bool = True) -> Iterator[dict[str, Tensor]]:
    """Fills the dict, at the end, with what the passes inside have shown: tensors, so that nothing waits for them.

    Not `active`, it does nothing. `stream_max`: largest magnitude of the stream after any block; `gate_max`: of SwiGLU's gates
    before SiLU; `shut_share`: share of gates below -4. Of compiled blocks the stream alone is seen.
    """
    if not active:
        yield {}
        return
    streams: list[Tensor] = []
    gates: list[Tensor] = []
    shut: list[Tensor] = []
    num_gates = 0

    def see_stream(_block: nn.Module, _inputs: object, output: Tensor) -> None:
        if len(output):
            streams.append(output.detach().abs().amax())

    def see_gate(_linear: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal num_gates
        gate = output.detach().chunk(2, dim=-1)[0]
        if len(gate):
            gates.append(gate.abs().amax())
            shut.append((gate < SHUT).sum())
            num_gates += gate.numel()

    handles = [block.register_forward_hook(see_stream) for block in model.blocks]
    linears = [
        module for block in model.blocks if "merge" not in vars(block) for name, module in block.named_children() if name == "mlp_in"
    ]
    handles += [linear.register_forward_hook(see_gate) for linear in linears]
    statistics: dict[str, Tensor] = {}
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
    if streams:
        statistics["stream_max"] = torch.stack(streams).amax().float()
    if gates:
        statistics |= {"gate_max": torch.stack(gates).amax().float(), "shut_share": torch.stack(shut).sum() / num_gates}
