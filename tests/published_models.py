"""A model as register_model leaves it, of tiny random parts, without training any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model_core.evaluation.drawing import Painter
from model_core.manifest import Code
from model_core.models.condition import save_encoder
from model_core.models.enhancer import PromptEnhancer, save_enhancer
from model_core.models.mmdit import MMDiT, save_mmdit
from model_core.models.vae import ResidualVAE, save_vae
from model_core.recipe import MMDiTModel, Sampling, VAEModel
from model_core.sampling.few_step import FewStep, save_sampler
from model_core.site import Site
from model_core.steps.registry import STEPS
from model_core.workspace import Address, StepResult, Workspace
from pipelines.documents import find_recipe
from tests.tiny_encoders import CONFIG, encoder

KEY = "0123456789abcdef"
SYSTEM = "Comprehend and analyze the provided prompt."
MMDIT = {
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "rope_axes": (4, 6, 6),
    "rope_positions": "running",
    "attention": "block_causal",
    "condition_at_t0": True,
}
PUBLIC_VAE = {
    "shortcut": "local",
    "pixel_channels": 4,
    "mixers": False,
    "post_quant_conv": True,
    "temporal_folds": [False, True, True, True],
    "norm_eps": 1e-24,
}
VAE = PUBLIC_VAE | {
    "latent_channels": 4,
    "encoder_widths": [4, 8, 8, 16, 16],
    "decoder_widths": [16, 16, 8, 8, 4],
    "encoder_blocks": 1,
    "decoder_blocks": 2,
}


@torch.no_grad()
def painter(
    *, mmdit: dict[str, Any] | None = None, vae: dict[str, Any] | None = None, system_prompt: str = SYSTEM, sees_images: bool = True
) -> Painter:
    """Parts whose weights let velocities be about one, and the same each time; `mmdit` and `vae` change single settings."""
    torch.manual_seed(0)
    autoencoder = ResidualVAE(VAEModel.model_validate(VAE | (vae or {})))
    autoencoder.latent_mean.normal_()
    autoencoder.latent_std.uniform_(0.5, 1.5)
    transformer = MMDiT(
        MMDiTModel.model_validate(MMDIT | (mmdit or {})),
        latent_channels=autoencoder.config.latent_channels,
        text_dim=CONFIG.hidden_size,
    )
    for parameter in transformer.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.6, 1.4)
        else:
            parameter.normal_(std=0.7 / parameter.shape[1] ** 0.5)
    sampling = Sampling(steps=4, guidance_scale=3.0, rescale_norm=False)
    return Painter(transformer.eval(), autoencoder.eval(), encoder(system_prompt=system_prompt, sees_images=sees_images), sampling)


def publish(site: Site, model: Painter, *, student: tuple[MMDiT, FewStep] | None = None, enhancer: PromptEnhancer | None = None) -> str:
    """Writes the parts and their registration into the site's workspace; returns the folder by which the model is named."""
    parts = {
        name: _commit(site, step, stage, save)
        for name, step, stage, save in (
            ("mmdit", "train_mmdit", "S6", lambda folder: save_mmdit(model.mmdit, folder / "mmdit")),
            ("vae", "train_vae", None, lambda folder: save_vae(model.vae, folder / "vae")),
            ("encoder", "prepare_encoder", None, lambda folder: save_encoder(model.encoder, folder / "encoder")),
        )
    }
    if student is not None:

        def save_student(folder: Path) -> None:
            save_mmdit(student[0], folder / "mmdit")
            save_sampler(student[1], folder / "mmdit")

        parts["student"] = _commit(site, "distill_dmd", None, save_student)
    if enhancer is not None:
        parts["enhancer"] = _commit(site, "train_enhancer", None, lambda folder: save_enhancer(enhancer, folder / "enhancer"))
    document = {"parts": parts, "sampling": model.sampling.model_dump(mode="json"), "resolution_px": 64}
    _commit(site, "register_model", None, lambda folder: (folder / "model.json").write_text(json.dumps(document)))
    return str(Path(site.workspace) / "register_model" / KEY)


def _commit(site: Site, step: str, stage: str | None, save: Callable[[Path], object]) -> dict[str, str | None]:
    workspace, address = Workspace(site), Address(step, stage, KEY)
    result = StepResult(stats={}, code=Code(version="0", git_sha=None, image_digest=None))
    with workspace.attempt(address, "0") as folder:
        save(folder)
        manifest = workspace.commit(
            address, folder, spec=STEPS[step], recipe=find_recipe("smoke"), inputs={}, result=result, confirm=lambda: None
        )
    return {"step": step, "stage": stage, "key": KEY, "content_digest": manifest.content_digest}
