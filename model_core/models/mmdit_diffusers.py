"""The transformer's weights in the layout of diffusers' `QwenImage21Transformer2DModel`, and back. Nothing of diffusers is imported.

Theirs keeps query, key and value apart, as well as the halves of SwiGLU, and stores the text norm's scale minus one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from model_core.documents import UserError, describe
from model_core.models.diffusers_folder import check_weights, class_name, read_config, read_folder, write_folder
from model_core.models.mmdit import MMDiT
from model_core.recipe import MMDiTModel

CLASS_NAME = "QwenImage21Transformer2DModel"
NORM = "txt_in.text_norm.weight"
ROPE_THETA = 10_000.0  # fixed there
READ = {  # fields of their configuration that must be there
    *("in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "context_in_dim"),
    *("mlp_ratio", "axes_dims_rope", "causal_condition"),
}
NAMES = {
    "image_in.weight": "img_in.weight",
    "text_in.layers.0.weight": "txt_in.in_layer.weight",
    "text_in.layers.2.weight": "txt_in.out_layer.weight",
    "time_in.weight": "time_text_embed.timestep_embedder.linear_1.weight",
    "time_out.weight": "time_text_embed.timestep_embedder.linear_2.weight",
    "modulation.weight": "modulation.1.weight",
    "final_scale.weight": "norm_out.linear.weight",
    "image_out.weight": "proj_out.weight",
}
BLOCK_NAMES = {
    "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "query_norm": ("attn.norm_q",),
    "key_norm": ("attn.norm_k",),
    "attention_out": ("attn.to_out.0",),
    "mlp_in": ("img_mlp.gate_layer", "img_mlp.proj"),
    "mlp_out": ("img_mlp.out",),
}


def to_diffusers(model: MMDiT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, weights) there. Raises UserError for a model that cannot be told in that layout."""
    config = model.config
    for name, found, allowed in (
        ("attention", config.attention, "block_causal"),
        ("rope_positions", config.rope_positions, "running"),
        ("rope_theta", config.rope_theta, ROPE_THETA),
        ("mlp_ratio", config.mlp_ratio, round(config.mlp_ratio)),
    ):
        if found != allowed:
            raise UserError(f"mmdit.model.{name}: found {found}; {CLASS_NAME} has {allowed} alone")
    state = {theirs: model.state_dict()[ours] for ours, theirs in NAMES.items()}
    state[NORM] = model.text_in.norm.weight.detach() - 1
    for layer, block in enumerate(model.blocks):
        weights = block.state_dict()
        for ours, parts in BLOCK_NAMES.items():
            for part, weight in zip(parts, weights[f"{ours}.weight"].chunk(len(parts)), strict=True):
                state[f"transformer_blocks.{layer}.{part}.weight"] = weight
    return {
        "_class_name": CLASS_NAME,
        "patch_size": 1,
        "in_channels": model.latent_channels,
        "out_channels": model.latent_channels,
        "num_layers": config.num_layers,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "context_in_dim": model.text_dim,
        "mlp_ratio": round(config.mlp_ratio),
        "axes_dims_rope": list(config.rope_axes),
        "eps": 1e-6,
        "causal_condition": config.condition_at_t0,
    }, {name: value.contiguous() for name, value in state.items()}


def from_diffusers(config: dict[str, Any], state: dict[str, Tensor]) -> MMDiT:
    """The same model here, in single precision or better: a scale minus one in bfloat16 has more places than the scale.

    Raises UserError for a configuration that this project has no transformer for, and for weights that do not fit it.
    """
    settings, channels, text_dim = our_settings(config)
    with torch.device("meta"):
        model = MMDiT(settings, latent_channels=channels, text_dim=text_dim)
    check_weights(state, to_diffusers(model)[1], what="transformer", name=CLASS_NAME)
    state = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in state.items()}
    weights = {ours: state[theirs] for ours, theirs in NAMES.items()} | {"text_in.norm.weight": state[NORM] + 1}
    for layer in range(settings.num_layers):
        for ours, parts in BLOCK_NAMES.items():
            weights[f"blocks.{layer}.{ours}.weight"] = torch.cat([state[f"transformer_blocks.{layer}.{part}.weight"] for part in parts])
    model.load_state_dict(weights, assign=True)
    return model


def our_settings(config: dict[str, Any]) -> tuple[MMDiTModel, int, int]:
    """The transformer of their configuration, its latent channels and text channels; raises UserError as `from_diffusers` does."""
    if missing := READ - config.keys():
        raise UserError(f"transformer: the config of {CLASS_NAME} lacks {min(missing)}; allowed is one that diffusers wrote")
    channels = config["in_channels"]
    for name, allowed in (("patch_size", 1), ("out_channels", channels), ("eps", 1e-6)):
        if config.get(name, allowed) not in (allowed, None):
            raise UserError(f"{CLASS_NAME}: found {name} {config[name]}; allowed is {allowed}")
    try:
        settings = MMDiTModel(
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            rope_axes=tuple(config["axes_dims_rope"]),
            rope_theta=ROPE_THETA,
            rope_positions="running",
            mlp_ratio=config["mlp_ratio"],
            attention="block_causal",
            condition_at_t0=config["causal_condition"],
        )
    except ValidationError as error:
        raise UserError(describe(error, f"transformer: the config of {CLASS_NAME}")) from error
    return settings, channels, config["context_in_dim"]


def write_diffusers(model: MMDiT, folder: Path) -> None:
    """Writes the folder that diffusers' `from_pretrained` reads; raises UserError for a model that cannot be told in that layout."""
    write_folder(folder, *to_diffusers(model))


def is_diffusers(folder: Path) -> bool:
    """Whether a folder's `config.json` is of their transformer; raises UserError where there is none that is JSON."""
    return class_name(folder, what="transformer") == CLASS_NAME


def read_diffusers(folder: Path) -> MMDiT:
    """The transformer in a folder of theirs, its weights whole or in shards; raises UserError when it is none."""
    return from_diffusers(*read_folder(folder, CLASS_NAME, what="transformer"))


def read_settings(folder: Path) -> tuple[MMDiTModel, int, int]:
    """Settings, latent channels and text channels of the transformer in a folder of theirs, without its weights."""
    return our_settings(read_config(folder, CLASS_NAME, what="transformer"))
