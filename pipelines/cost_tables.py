"""The cost of a run as tables for people; each is narrow enough for a pod's log of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from pipelines.cost import POLICIES, Cost

GB = 1e9  # as data sheets count


def cost_tables(cost: Cost) -> RenderableType:
    """Parameters, memory, the curriculum, and what it reads and writes."""
    hardware = cost.hardware
    each = f"{hardware.peak_flops / 1e12:g} TFLOP/s each, MFU {hardware.mfu:g}"
    title = f"{cost.recipe} on {hardware.gpus} {hardware.gpu.upper()}: {each}, {cost.caption_tokens} tokens a prompt"
    return Group(
        Text(title, style="bold"), parameter_table(cost), memory_table(cost), policy_table(cost), stage_table(cost), traffic_table(cost)
    )


def parameter_table(cost: Cost) -> Table:
    """Parameters by model and part."""
    table = Table("model", "part", _right("parameters"), title="parameters")
    for model, parts in cost.parameters.items():
        for part, num in parts.items():
            table.add_row(model, part, f"{num:,}")
        table.add_row(model, "all", f"{sum(parts.values()):,}", end_section=True)
    return table


def memory_table(cost: Cost) -> Table:
    """What a GPU holds beside activations."""
    state = cost.memory.state
    sharing = f"sharded over {cost.hardware.shards}"
    parts = {
        f"parameters, fp32, {sharing}": state.parameters,
        f"gradients, fp32, {sharing}": state.gradients,
        f"AdamW's moments, fp32, {sharing}": state.optimizer,
        f"EMA, fp32, {sharing}": state.ema,
        "gathered blocks, bf16": state.gathered,
        "frozen encoder, bf16": state.encoder,
        "VAE (latents come from shards)": state.vae,
        "workspace (allowance)": state.workspace,
    }
    table = Table("beside activations", _right("GB a GPU"), title="memory")
    for name, num in parts.items():
        table.add_row(name, f"{num / GB:.2f}")
    table.add_section()
    table.add_row(f"all, of {cost.hardware.memory_bytes / GB:.0f} GB", f"{state.total / GB:.2f}")
    return table


def policy_table(cost: Cost) -> Table:
    """Activations and what fits, by checkpointing policy."""
    longest = max(cost.stages, key=lambda stage: stage.longest_sample_tokens)
    table = Table("activation checkpointing", _right("kB a token"), _right("largest micro-batch, tokens"), "longest sample")
    for policy in POLICIES:
        largest = cost.memory.largest_micro_batch[policy]
        fits = largest >= longest.longest_sample_tokens
        table.add_row(
            policy,
            f"{cost.memory.activations_a_token[policy] / 1e3:,.0f}",
            f"{largest:,}",
            Text("fits", style="green") if fits else Text("does not fit", style="red"),
        )
    table.caption = f"the longest sample is of {longest.name}: {longest.longest_sample_tokens:,} tokens"
    return table


def stage_table(cost: Cost) -> Table:
    """Work and time of each entry of the curriculum."""
    table = Table("stage", *_all_right("px", "steps", "tokens/step", "tokens", "FLOP", "GPU hours", "days"), title="curriculum")
    table.add_row("VAE", "", "", "", "", _si(cost.vae_training_flops), _plain(cost.vae_gpu_hours), _plain(cost.vae_days))
    for stage in cost.stages:
        table.add_row(
            stage.name,
            str(stage.resolution_px),
            f"{stage.steps:,}",
            _si(stage.tokens_a_step),
            _si(stage.tokens),
            _si(stage.training_flops),
            _plain(stage.gpu_hours),
            _plain(stage.days),
        )
    totals = cost.totals
    table.add_section()
    flops = totals["training_flops"] + cost.vae_training_flops
    time = _plain(totals["gpu_hours"]), _plain(totals["days"])
    table.add_row("all", "", f"{totals['steps']:,}", "", _si(totals["tokens"]), _si(flops), *time)
    encoder = f"{_si(totals['encoder_flops'])}FLOP"
    table.caption = f"FLOP of training, nothing computed again; hours also count {encoder} of the frozen encoder"
    return table


def traffic_table(cost: Cost) -> Table:
    """What each entry fetches and stores."""
    table = Table("stage", *_all_right("latents read", "GETs", "checkpoints", "written", "PUTs"), title="object store")
    for stage in cost.stages:
        table.add_row(
            stage.name,
            f"{_si(stage.read_bytes)}B",
            _si(stage.read_requests),
            f"{stage.checkpoints:,}",
            f"{_si(stage.written_bytes)}B",
            _si(stage.write_requests),
        )
    totals = cost.totals
    table.add_section()
    table.add_row(
        "all",
        f"{_si(totals['read_bytes'])}B",
        _si(totals["read_requests"]),
        f"{totals['checkpoints']:,}",
        f"{_si(totals['written_bytes'])}B",
        _si(totals["write_requests"]),
    )
    return table


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _all_right(*names: str) -> Sequence[Column]:
    return [_right(name) for name in names]


def _plain(value: float) -> str:
    """An amount as people write it."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.01 else "<0.01"


def _si(value: float) -> str:
    """Three digits and a decimal prefix."""
    for prefix, scale in (("Y", 1e24), ("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "
