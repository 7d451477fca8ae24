"""A whole model as the folder of diffusers' `QwenImage21Pipeline`: the parts that can be told there, and why others cannot.

Nothing of diffusers is imported. Text encoder and tokenizer are written as transformers does; the rest is diffusers' layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from model_core.documents import UserError
from model_core.evaluation.drawing import Painter
from model_core.models import mmdit_diffusers, vae_diffusers
from model_core.models.condition import ConditionEncoder
from model_core.models.vlm_input import SLOT_PX
from model_core.objectives.flow import MU_TOKENS
from model_core.recipe import Sampling

CLASS_NAME = "QwenImage21Pipeline"
SYSTEM_PROMPT = "Comprehend and analyze the provided prompt."  # fixed there
LARGEST_PX = 4096  # sides up to which the processor resizes nothing: it must show the encoder what the VAE is given
CHAT = "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content[0].text }}<|im_end|>\n{% endfor %}"
PARTS = {  # name and folder: library and class
    "transformer": ("diffusers", mmdit_diffusers.CLASS_NAME),
    "vae": ("diffusers", vae_diffusers.CLASS_NAME),
    "text_encoder": ("transformers", "Qwen3VLForConditionalGeneration"),
    "processor": ("transformers", "Qwen3VLProcessor"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}


def write_pipeline(painter: Painter, folder: Path, parts: Collection[str]) -> dict[str, str]:
    """Writes `parts` (names of PARTS) and `model_index.json` into `folder`; returns why others of them are left out, by name.

    Raises UserError for a student of few steps: diffusers would sample it as a flow.
    """
    sampling = painter.flow_sampling
    writers: dict[str, Callable[[Path], None]] = {
        "transformer": lambda place: mmdit_diffusers.write_diffusers(painter.mmdit, place),
        "vae": lambda place: vae_diffusers.write_diffusers(painter.vae, place),
        "text_encoder": lambda place: _write_text_encoder(painter.encoder, place),
        "processor": lambda place: _write_processor(painter.encoder, place),
        "scheduler": lambda place: _write_scheduler(sampling, place),
    }
    left_out = {}
    for name in parts:
        try:
            writers[name](folder / name)
        except UserError as error:
            left_out[name] = str(error)
    present = [name for name in parts if name not in left_out]
    # A part that is not there is named as null: diffusers then loads the others, and takes it as an argument.
    index = {name: [*PARTS[name]] if name in present else [None, None] for name in PARTS}
    _write_json(folder / "model_index.json", {"_class_name": CLASS_NAME, **index, "sample_sigmas": None})
    return left_out


def differences(painter: Painter) -> list[str]:
    """What the pipeline does otherwise than this project's sampler with the same weights, one sentence each."""
    told = []
    if painter.flow_sampling.guidance_scale > 1.0:
        scale = painter.flow_sampling.guidance_scale
        told.append(f"guidance is an argument there: true_cfg_scale={scale:g} with negative_prompt=' '")
        if painter.flow_sampling.rescale_norm:
            told.append("guided velocities do not get the norm of the conditional ones there, as sampling.rescale_norm has it here")
    if not painter.encoder.sees_images:
        told.append("condition images are shown to the text encoder there; this model was trained with one that is not")
    if painter.vae.config.pixel_channels == 3:
        told.append("condition images have four channels there; this model's autoencoder takes three")
    return told


def _write_text_encoder(encoder: ConditionEncoder, folder: Path) -> None:
    """As transformers' save_pretrained; raises UserError for an encoder whose system prompt is not the pipeline's."""
    _check_prompt(encoder)
    encoder.model.save_pretrained(folder)


def _write_processor(encoder: ConditionEncoder, folder: Path) -> None:
    """The tokenizer, its chat template, and how pictures are read; raises UserError as the text encoder does."""
    _check_prompt(encoder)
    encoder.tokenizer.save_pretrained(folder)
    if encoder.tokenizer.chat_template is None:
        (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    vision: Any = encoder.model.config.vision_config
    reading = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": SLOT_PX**2, "longest_edge": LARGEST_PX**2},  # areas, whatever their names say
        "processor_class": "Qwen3VLProcessor",
    }
    _write_json(folder / "preprocessor_config.json", reading | {"image_processor_type": "Qwen2VLImageProcessorFast"})
    _write_json(folder / "video_preprocessor_config.json", reading | {"video_processor_type": "Qwen3VLVideoProcessor"})


def _check_prompt(encoder: ConditionEncoder) -> None:
    if encoder.system_prompt != SYSTEM_PROMPT:
        raise UserError(f"encoder.system_prompt: found {encoder.system_prompt!r}; {CLASS_NAME} has {SYSTEM_PROMPT!r} alone")


def _write_scheduler(sampling: Sampling, folder: Path) -> None:
    """The sampler's times: mu linear in the picture's tokens, stretched to end at `final_sigma`."""
    (low, high), (fewest, most) = sampling.shift_mu, MU_TOKENS
    folder.mkdir(parents=True)
    _write_json(
        folder / "scheduler_config.json",
        {
            "_class_name": PARTS["scheduler"][1],
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
            "base_shift": low,
            "max_shift": high,
            "base_image_seq_len": fewest,
            "max_image_seq_len": most,
            "shift_terminal": sampling.final_sigma,
        },
    )


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
