"""Inputs of encode_latents for tests: a few pictures and edits with a tiny VAE and tiny condition encoders; and its latents."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model_core.data.folders import LocalFolder
from model_core.data.latents import CAPTIONS
from model_core.data.pixels import tensor_image
from model_core.data.shards import make_row, write_rows
from model_core.models.condition import save_encoder
from model_core.models.vae import ResidualVAE, save_vae
from model_core.recipe import Recipe, VAEModel
from model_core.steps import encode_latents
from tests.tiny_encoders import PROMPTS, encoder, picture

STAGE = {"resolution_px": 64, "kinds": ["image", "edit"]}


class Input(LocalFolder):
    """A folder that stands for a step's input."""

    def __init__(self, root: Path, **stats: Any) -> None:
        super().__init__(root)
        object.__setattr__(self, "manifest", SimpleNamespace(stats=stats, stage=None, content_digest=f"{root.name:<64}"))

    def folder(self, name: str) -> Path:
        return self.root / name


def write_inputs(root: Path) -> dict[str, Input]:
    """Six pictures, one of them without a text caption, and five edits with one or two references, one of them wide."""
    known = {"provenance": "test", "licence": "unknown"}
    pictures = [tensor_image(picture(number, 64, 64)) for number in range(12)]
    wide = [image.resize((128, 64)) for image in pictures]
    images = [
        make_row(image, kind="image", caption=f"noise {number}", annotation="{}", **known) for number, image in enumerate(pictures[:6])
    ]
    edits = [
        make_row(
            target,
            kind="edit",
            references=references,
            instruction=prompt,
            operation="style",
            caption="noise",
            annotation='{"source": null, "operation": "style", "change": {}}',
            **known,
        )
        for target, references, prompt in [
            (pictures[6], [pictures[7]], PROMPTS[0]),
            (pictures[8], [pictures[9]], "a longer instruction than the other one has"),
            (pictures[10], [pictures[11], pictures[0]], PROMPTS[1]),
            (wide[1], [wide[2]], PROMPTS[2]),
            (pictures[1], [pictures[2]], "x"),
        ]
    ]
    for name, rows in (("images", images), ("text_images", []), ("edits", edits)):
        (root / name).mkdir()
        write_rows(root / name, iter(rows))
    (root / "kept").mkdir()
    ids = [(one.sample_id, one.kind, name) for name, rows in (("images", images), ("edits", edits)) for one in rows]
    pq.write_table(
        pa.table(
            {
                "sample_id": pa.array([one[0] for one in ids], pa.binary(16)),
                "kind": [one[1] for one in ids],
                "input": [one[2] for one in ids],
            }
        ),
        root / "kept/kept.parquet",
    )
    (root / "captions").mkdir()
    captions = [
        {"sample_id": one[0], **{name: f"a {name} {number}" if (name, number) != ("text", 2) else "" for name in CAPTIONS}}
        for number, one in enumerate(ids)
    ]
    pq.write_table(pa.Table.from_pylist(captions), root / "captions/captions.parquet")
    torch.manual_seed(0)
    save_vae(
        ResidualVAE(VAEModel(latent_channels=4, stem_fold=16, encoder_widths=[8], decoder_widths=[8], mid_attention=False)),
        root / "vae/vae",
    )
    for sees_images in (False, True):
        save_encoder(encoder(sees_images=sees_images), root / f"encoder-{sees_images}/encoder")
    made = {name: Input(root / name) for name in ("images", "text_images", "edits", "captions", "vae", "encoder-False", "encoder-True")}
    return made | {"kept": Input(root / "kept", kinds={"image": 6, "edit": 5})}


def write_stage(inputs: dict[str, Input], output: Path, *, sees_images: bool, cache_states: bool) -> Path:
    """What encode_latents leaves of them in `output`."""
    recipe = Recipe.model_validate({"name": "tiny", "mmdit": {"stages": {"S1": {**STAGE, "cache_states": cache_states}}}})
    given = {**inputs, "encoder": inputs[f"encoder-{sees_images}"]}
    progress = SimpleNamespace(update=lambda *_: None)
    encode_latents.run(SimpleNamespace(recipe=recipe, stage="S1", inputs=given, output=output, progress=progress))  # type: ignore[arg-type]
    return output
