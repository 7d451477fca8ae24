"""The step train_vae on a few drawn scenes: it resumes bitwise, scores rows it never saw, and its latents are standardised."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from model_core.context import StepContext
from model_core.data.folders import LocalFolder
from model_core.data.keys import keyed_generator
from model_core.data.shards import RawRow, encode_image, make_row, write_rows
from model_core.data.synthetic import render, training_scene
from model_core.documents import UserError
from model_core.evaluation.reconstruction import psnr
from model_core.models.lpips import load_lpips
from model_core.models.teacher import OrientedEdges
from model_core.models.vae import ResidualVAE, load_vae
from model_core.models.vae_diffusers import write_diffusers
from model_core.progress import Progress
from model_core.recipe import Recipe, Scenes, parse_recipe
from model_core.site import Site
from model_core.steps.train_vae import AlignedVAE, batch, batches, losses, run, score, set_statistics
from model_core.storage import open_storage
from model_core.tracking.spool import open_tracker
from model_core.training.checkpoint import CheckpointStore
from model_core.training.distributed import Ranks

VAE = {
    "model": {"stem_fold": 4, "encoder_widths": [8, 8, 8], "decoder_widths": [8, 8, 8], "encoder_blocks": 1, "decoder_blocks": 1},
    "crop_px": 32,
    "steps": 6,
    "batch_size": 2,
    "warmup_steps": 2,
    "checkpoint_every_steps": 2,
}


def recipe(**vae: object) -> Recipe:
    return parse_recipe({"name": "tiny", "vae": VAE | vae, "mmdit": {"stages": {"S1": {}}}}, "recipe")


def scene_rows(num: int, *, held_out: int) -> list[RawRow]:
    pictures = [render(training_scene(Scenes(), 0, "scene", index), 64, 0, index) for index in range(num)]
    rows = [make_row(picture, kind="image") for picture in pictures]
    return [replace(row, held_out=index < held_out) for index, row in enumerate(rows)]


@pytest.fixture
def context_of(tmp_path: Path) -> Callable[..., StepContext]:
    """Makes contexts; those of one name share their checkpoints."""

    def context(name: str, rows: list[RawRow], **vae: object) -> StepContext:
        inputs = {}
        for source, content in (("images", rows), ("text_images", []), ("edits", [])):
            inputs[source] = LocalFolder(tmp_path / name / source)
            write_rows(inputs[source].root, content)
        inputs["kept"] = LocalFolder(tmp_path / name)
        entries = [{"sample_id": row.sample_id, "kind": row.kind, "input": "images"} for row in rows]
        schema = pa.schema([("sample_id", pa.binary(16)), ("kind", pa.string()), ("input", pa.string())])
        pq.write_table(pa.Table.from_pylist(entries, schema=schema), tmp_path / name / "kept.parquet")
        output = tmp_path / name / "output"
        output.mkdir(exist_ok=True)
        return StepContext(
            recipe=recipe(**vae),
            site=Site(workspace=str(tmp_path)),
            stage=None,
            run="test",
            key="0" * 16,
            inputs=inputs,  # type: ignore[arg-type]
            output=output,
            scratch=tmp_path / name / "scratch",
            checkpoints=CheckpointStore(
                open_storage((tmp_path / name).as_uri()), "checkpoints", say=print, scratch=tmp_path / name / "scratch"
            ),
            tracker=open_tracker(tmp_path / name / "spool", run="test", step="train_vae", stage=None, key="0" * 16, experiment="test"),
            progress=Progress("train_vae"),
        )

    return context


def test_a_run_that_is_interrupted_ends_with_the_same_bytes(context_of: Callable[..., StepContext]) -> None:
    rows = scene_rows(6, held_out=2)
    whole, broken = context_of("whole", rows), context_of("broken", rows)
    run(whole)

    saved = broken.checkpoints.save

    def save_then_stop(step: int, parts: dict[str, Any], *, notes: dict[str, Any]) -> None:
        saved(step, parts, notes=notes)
        if step == 4:
            broken.checkpoints.wait()
            raise KeyboardInterrupt

    broken.checkpoints.save = save_then_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    run(context_of("broken", rows))
    for name in ("vae/model.safetensors", "vae/config.json", "curves.json", "reconstructions.png"):
        assert (whole.output / name).read_bytes() == (broken.output / name).read_bytes(), name


def test_scores_are_of_held_out_rows_by_the_published_weights(context_of: Callable[..., StepContext]) -> None:
    rows = scene_rows(6, held_out=2)
    context = context_of("run", rows)
    stats = run(context)
    vae = load_vae(context.output / "vae")
    images = torch.stack([tensor_of(row) for row in rows[:2]])
    with torch.inference_mode():
        expected = psnr(vae(images), images).mean().item()
    assert stats["psnr"] == pytest.approx(expected, abs=1e-3)
    assert stats["psnr_image"] == stats["psnr"]
    assert (stats["scored_pictures"], stats["scored_on"], stats["pictures"]) == (2, "held out", 4)


def tensor_of(row: RawRow) -> torch.Tensor:
    picture = Image.open(io.BytesIO(row.image)).resize((32, 32), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def test_where_nothing_is_held_out_the_scores_say_so(context_of: Callable[..., StepContext]) -> None:
    assert run(context_of("run", scene_rows(3, held_out=0)))["scored_on"] == "trained"


def test_without_a_picture_to_train_on_there_is_one_sentence(context_of: Callable[..., StepContext]) -> None:
    with pytest.raises(UserError, match="no picture to train on"):
        run(context_of("run", scene_rows(2, held_out=2)))


def test_training_goes_on_from_the_weights_at_path(context_of: Callable[..., StepContext]) -> None:
    rows = scene_rows(4, held_out=1)
    first = context_of("first", rows)
    run(first)
    second = context_of("second", rows, path=str(first.output / "vae"), steps=1, lr=1e-12, warmup_steps=0)
    run(second)
    before, after = load_vae(first.output / "vae"), load_vae(second.output / "vae")
    for mine, theirs in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


def test_without_steps_the_weights_at_path_go_through_with_their_statistics(context_of: Callable[..., StepContext]) -> None:
    first = context_of("first", scene_rows(4, held_out=1))
    run(first)
    second = context_of("second", scene_rows(3, held_out=1)[::-1], path=str(first.output / "vae"), steps=0)
    stats = run(second)
    before, after = load_vae(first.output / "vae").state_dict(), load_vae(second.output / "vae").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert stats["psnr"] > 0
    assert json.loads((second.output / "curves.json").read_text()) == []


def test_an_edit_gives_its_target_and_its_references(context_of: Callable[..., StepContext]) -> None:
    target, source = (render(training_scene(Scenes(), 0, "scene", index), 64, 0, index) for index in range(2))
    edit = replace(make_row(target, kind="edit", references=[source, source], instruction="make it another"), held_out=False)
    assert run(context_of("run", [edit], steps=1))["pictures"] == 3


def test_curves_hold_a_point_for_the_end(context_of: Callable[..., StepContext]) -> None:
    context = context_of("run", scene_rows(3, held_out=1))
    run(context)
    points = json.loads((context.output / "curves.json").read_text())
    assert points[-1]["step"] == 6
    assert set(points[-1]) == {"step", "loss", "l1", "mse", "edge", "align", "grad_norm"}


def test_a_batch_of_pictures_as_high_as_the_crop_holds_their_own_pixels_at_keyed_places() -> None:
    noise = Image.fromarray(keyed_generator("noise").integers(256, size=(32, 160, 3), dtype=np.uint8))
    config = recipe(batch_size=8).vae
    drawn = batch([encode_image(noise)], range(config.batch_size), step=3, config=config, seed=0)
    assert drawn.shape == (8, 3, 32, 32)
    assert torch.equal(drawn, batch([encode_image(noise)], range(config.batch_size), step=3, config=config, seed=0))
    windows = np.lib.stride_tricks.sliding_window_view(np.array(noise), (32, 32, 3))[:, :, 0].reshape(-1, 32, 32, 3)
    crops = ((drawn + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    places = [np.flatnonzero((windows == crop).all(axis=(1, 2, 3))) for crop in crops]
    assert all(len(place) == 1 for place in places)
    assert len({int(place[0]) for place in places}) > 4


@pytest.mark.parametrize("workers", [0, 1, 3, 9])
def test_batches_made_ahead_are_those_of_their_steps(workers: int) -> None:
    noise = Image.fromarray(keyed_generator("noise").integers(256, size=(32, 160, 3), dtype=np.uint8))
    config, pictures = recipe(batch_size=2, steps=7).vae, [encode_image(noise)]
    made = list(batches(pictures, range(2), first=2, config=config, seed=0, workers=workers))
    assert len(made) == 5
    for step, images in enumerate(made, 2):
        assert torch.equal(images, batch(pictures, range(2), step=step, config=config, seed=0))


def test_large_pictures_are_seen_at_scales_between_the_whole_and_their_own_pixels() -> None:
    ramp = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    drawn = batch([encode_image(ramp)], range(64), step=0, config=recipe(batch_size=64).vae, seed=0)
    spans = (drawn.amax(dim=(1, 2, 3)) - drawn.amin(dim=(1, 2, 3))) / 2
    assert 0.2 < spans.min() < 0.35
    assert 0.8 < spans.max() <= 1.0


def test_small_pictures_are_scaled_to_cover_the_crop() -> None:
    picture = encode_image(Image.new("RGB", (20, 50), (255, 0, 0)))
    assert torch.equal(batch([picture], range(1), step=0, config=recipe().vae, seed=0)[0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_over_many_steps_ranks_weighed_by_their_pictures_train_as_one(ranks: int) -> None:
    """In double precision: in single, rounding decides on which side of a kink (L1, the hinges of alignment) a place falls."""
    config = recipe(batch_size=4, steps=25).vae
    pictures = [row.image for row in scene_rows(8, held_out=0)]

    def train(size: int) -> list[float]:
        torch.manual_seed(0)
        teacher = OrientedEdges().double()
        model = AlignedVAE(ResidualVAE(config.model), teacher_dim=teacher.dim).double()
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
        told = []
        for step in range(config.steps):
            total = 0.0
            for share in (Ranks(rank, size).share(config.batch_size) for rank in range(size)):
                images = batch(pictures, share, step=step, config=config, seed=0).double()
                part = losses(model, teacher, images, config=config, step=step, seed=0)[0] * len(share) / config.batch_size
                part.backward()
                total += part.item()
            adamw.step()
            adamw.zero_grad()
            told.append(total)
        return told

    alone = train(1)
    assert alone[-1] < 0.9 * alone[0]
    assert train(ranks) == pytest.approx(alone, abs=1e-10)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    config = recipe(l1_weight=2.0, mse_weight=3.0, edge_weight=5.0, align_weight=7.0).vae
    torch.manual_seed(0)
    teacher = OrientedEdges()
    model = AlignedVAE(ResidualVAE(config.model), teacher_dim=teacher.dim)
    loss, parts = losses(model, teacher, torch.rand(2, 3, 32, 32), config=config, step=0, seed=0)
    assert loss.item() == pytest.approx(sum(w * part.item() for w, part in zip((2.0, 3.0, 5.0, 7.0), parts, strict=True)), rel=1e-5)


def test_the_weight_of_alignment_relaxes_to_the_last_step() -> None:
    config = recipe(l1_weight=0.0, align_weight=0.5, align_weight_relaxed=0.1, align_margins_relaxed=[0.0, 0.0], steps=5).vae
    torch.manual_seed(0)
    teacher, images = OrientedEdges(), torch.rand(2, 3, 32, 32)
    model = AlignedVAE(ResidualVAE(config.model), teacher_dim=teacher.dim)
    weights = []
    for step in range(config.steps):
        loss, parts = losses(model, teacher, images, config=config, step=step, seed=0)
        weights.append((loss / parts[3]).item())
    assert weights == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1], rel=1e-5)


def test_above_32_by_32_places_pairs_are_drawn_by_seed_and_step() -> None:
    config = recipe(
        l1_weight=0.0,
        align_margins_relaxed=[0.0, 0.0],
        model=VAE["model"] | {"stem_fold": 16, "encoder_widths": [4], "decoder_widths": [4]},
    ).vae
    torch.manual_seed(0)
    teacher, images = OrientedEdges(), torch.rand(1, 3, 32 * 16, 33 * 16) * 2 - 1
    model = AlignedVAE(ResidualVAE(config.model), teacher_dim=teacher.dim)
    with torch.no_grad():
        drawn = [
            losses(model, teacher, images, config=config, step=step, seed=seed)[0].item() for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
        ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    assert drawn == pytest.approx([drawn[0]] * 4, rel=0.05)


def test_pictures_and_their_alpha_train_a_model_of_rgba(context_of: Callable[..., StepContext]) -> None:
    context = context_of("run", scene_rows(4, held_out=1), model=VAE["model"] | {"pixel_channels": 4}, steps=2)
    stats = run(context)
    vae = load_vae(context.output / "vae")
    assert vae.config.pixel_channels == 4
    assert stats["psnr"] > 5.0
    config = recipe(l1_weight=1.0, align_weight=0.0, model=VAE["model"] | {"pixel_channels": 4}).vae
    images = torch.rand(2, 3, 32, 32)
    pixels = torch.cat((images, torch.ones(2, 1, 32, 32)), dim=1)
    model = AlignedVAE(vae, teacher_dim=OrientedEdges.dim)
    loss, _ = losses(model, OrientedEdges(), images, config=config, step=0, seed=0)
    assert loss.item() == pytest.approx((vae(pixels) - pixels).abs().mean().item(), rel=1e-6)


def test_lpips_and_dinov2_from_their_paths_teach(context_of: Callable[..., StepContext], tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dinov2")
    save_file(narrow_lpips(), tmp_path / "lpips.safetensors")
    changes = {
        "lpips_weight": 0.5,
        "lpips_path": str(tmp_path / "lpips.safetensors"),
        "teacher_path": str(tmp_path / "dinov2"),
        "teacher_layer": 1,
        "steps": 2,
        "mse_weight": 0.0,
        "edge_weight": 0.0,
    }
    rows = scene_rows(4, held_out=1)
    context = context_of("run", rows, **changes)
    stats = run(context)
    vae, images = load_vae(context.output / "vae"), torch.stack([tensor_of(row) for row in rows[:1]])
    with torch.inference_mode():
        distance = load_lpips(tmp_path / "lpips.safetensors")(vae(images).clamp(-1, 1), images).item()
    assert stats["lpips_vgg16"] == pytest.approx(distance, abs=1e-4)
    point = json.loads((context.output / "curves.json").read_text())[-1]
    assert set(point) == {"step", "loss", "l1", "mse", "edge", "align", "lpips", "grad_norm"}
    assert point["loss"] == pytest.approx(point["l1"] + 0.1 * point["align"] + 0.5 * point["lpips"], rel=1e-5)
    assert point["lpips"] > 0


def narrow_lpips() -> dict[str, torch.Tensor]:
    weights, width = {}, 3
    for number, block in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))):
        for index in block:
            weights[f"features.{index}.weight"] = torch.randn(2, width, 3, 3)
            weights[f"features.{index}.bias"], width = torch.rand(2), 2
        weights[f"lin{number}.weight"] = torch.rand(1, 2, 1, 1)
    return weights


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lpips_weight": 1.0, "lpips_path": "/no/such/lpips"}, "lpips_path: /no/such/lpips cannot be read"),
        ({"teacher_path": "/no/such/teacher", "teacher_layer": 1}, "teacher_path: /no/such/teacher holds no config.json"),
        ({"path": "/no/such/vae"}, "vae.path: /no/such/vae holds no config.json"),
    ],
)
def test_a_network_that_is_not_there_is_refused_before_any_picture_is_read(
    context_of: Callable[..., StepContext], fields: dict[str, Any], words: str
) -> None:
    context = context_of("run", scene_rows(2, held_out=0), **fields)
    context.inputs.clear()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=words):
        run(context)


def test_training_goes_on_from_a_folder_of_diffusers(context_of: Callable[..., StepContext], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = {
        "encoder_widths": [4] * 5,
        "decoder_widths": [4] * 5,
        "encoder_blocks": 1,
        "decoder_blocks": 2,
        "shortcut": "local",
        "mixers": False,
        "norm_eps": 1e-24,
        "post_quant_conv": True,
        "pixel_channels": 4,
    }
    vae = ResidualVAE(recipe(model=model).vae.model)
    write_diffusers(vae, tmp_path / "theirs")
    context = context_of("run", scene_rows(3, held_out=1), path=str(tmp_path / "theirs"), steps=1, lr=1e-12, warmup_steps=0)
    run(context)
    after = load_vae(context.output / "vae")
    assert after.config == vae.config
    for mine, theirs in zip(vae.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


def test_standardised_latents_of_the_sample_have_mean_zero_and_deviation_one() -> None:
    torch.manual_seed(0)
    vae = ResidualVAE(recipe().vae.model)
    images = torch.rand(9, 3, 32, 32) * 2 - 1
    set_statistics(vae, images)
    latents = vae.standardise(vae.encode(images)).flatten(2)
    torch.testing.assert_close(latents.mean(dim=(0, 2)), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2), correction=0), torch.ones(64), atol=1e-4, rtol=0)


def test_scores_are_told_a_kind() -> None:
    vae = ResidualVAE(recipe().vae.model)
    flat, noise = torch.zeros(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    told = score(vae, torch.cat((flat, noise)), ["image", "edit"])
    assert told["psnr"] == pytest.approx((told["psnr_image"] + told["psnr_edit"]) / 2, abs=1e-3)
    assert told["psnr_image"] > told["psnr_edit"]
