"""Models written for diffusers: its own classes load them, draw the same, and give the same weights back."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLProcessor
from typer.testing import CliRunner

from model_core.data.pixels import tensor_image
from model_core.documents import UserError
from model_core.evaluation.drawing import Painter
from model_core.models.condition import open_qwen3_vl
from model_core.models.mmdit import save_mmdit
from model_core.models.mmdit_diffusers import read_diffusers
from model_core.recipe import parse_recipe
from model_core.site import Site
from model_core.steps.train_mmdit import _initial_model
from pipelines import cli
from pipelines.run import check_inputs
from tests.diffusers_oracle import latents_of, public_latents
from tests.published_models import KEY, MMDIT, SYSTEM, painter, publish
from tests.tiny_encoders import PROMPTS, picture

DOCUMENT = (Path(__file__).parents[2] / "docs" / "reference" / "export.md").read_text()
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^darkroom export .*", DOCUMENT, re.MULTILINE)]
SIZE = (64, 96)
SIDES = tuple(side // 16 for side in SIZE)
TEXTS = PROMPTS[:2]


@pytest.fixture(scope="module")
def model() -> Painter:
    return painter()


@pytest.fixture(scope="module")
def exported(model: Painter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    name = publish(Site(workspace=str(place / "workspace")), model)
    assert "wrote" in invoke("export", name, str(place / "model"))
    return place / "model"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_diffusers_transformer_and_scheduler_give_the_samplers_latents(num_images, exported, model, monkeypatch):
    references = [torch.stack([picture(number, 32, 64) for number in range(2)])] * num_images
    noise, found = latents_of(monkeypatch, model, references, prompts=TEXTS, size_px=SIZE)
    expected = public_latents(exported, model, noise, references, prompts=TEXTS, size_px=SIZE)
    assert found.abs().mean() > 0.3
    assert (found - noise).abs().mean() > 0.3
    assert (found - expected).abs().max() <= 1e-4


def open_pipeline(folder: Path, **parts: Any) -> QwenImage21Pipeline:
    """The whole folder. The processor's parts are put together by hand: transformers wants torchvision to do so."""
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    processor.tokenizer = AutoTokenizer.from_pretrained(folder / "processor", local_files_only=True)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor", local_files_only=True)
    processor.video_processor, processor.chat_template = None, (folder / "processor" / "chat_template.jinja").read_text()
    for kind, name in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")):
        setattr(processor, f"{kind}_token", f"<|{name}|>")
        setattr(processor, f"{kind}_token_id", processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    opened = QwenImage21Pipeline.from_pretrained(folder, local_files_only=True, processor=processor, **parts)
    opened.set_progress_bar_config(disable=True)
    return opened


def test_diffusers_pipeline_draws_from_the_folder_what_the_sampler_draws(exported, model, monkeypatch):
    noise, latents = latents_of(monkeypatch, model, [], prompts=TEXTS, size_px=SIZE)
    arguments = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 4, "latents": noise}
    opened = open_pipeline(exported)
    drawn = opened(TEXTS, negative_prompt=[" "] * 2, true_cfg_scale=3.0, output_type="pt", **arguments).images
    with torch.inference_mode():
        grid = latents.transpose(1, 2).unflatten(2, SIDES)
        expected = model.vae.decode(model.vae.unstandardise(grid)).clamp(-1, 1) / 2 + 0.5
    assert drawn.shape == expected.shape == (2, 4, *SIZE)
    assert expected.std() > 0.05
    assert (drawn - expected).abs().max() <= 1e-4


def test_diffusers_pipeline_edits_from_the_folder(exported):
    opened = open_pipeline(exported)
    edited = opened(TEXTS[0], image=tensor_image(picture(0, 64, 64)), output_resolution=64, num_inference_steps=2).images[0]
    assert edited.size == (64, 64)


def test_weights_come_back_bitwise(exported, model):
    back = read_diffusers(exported / "transformer")
    assert back.config == model.mmdit.config
    assert back.state_dict().keys() == model.mmdit.state_dict().keys()
    for name, value in model.mmdit.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_the_encoder_opens_from_the_folder_and_gives_the_same_states(exported, model):
    opened = open_qwen3_vl(exported / "text_encoder", system_prompt=SYSTEM, max_tokens=64, sees_images=True)
    images = [[picture(0, 32, 64)], []]
    assert torch.equal(opened.encode_packed(TEXTS, images).states, model.encoder.encode_packed(TEXTS, images).states)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_documented_commands_write_what_they_say(words, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke(*(str(exported.parent / "workspace" / "register_model" / KEY) if word == "RUN" else word for word in words[1:]))
    assert (tmp_path / "my-model" / "model_index.json").is_file()


def recipe_from(path: Path, **changes: Any) -> Any:
    document = {"name": "tuned", "mmdit": {"path": str(path), "model": MMDIT | changes, "stages": {"S1": {"resolution_px": 64}}}}
    return parse_recipe(json.loads(json.dumps(document)), "test")


def initial(recipe: Any, **channels: int) -> Any:
    context = SimpleNamespace(inputs={}, recipe=recipe)
    return _initial_model(context, **({"latent_channels": 4, "text_dim": 32} | channels))


@pytest.mark.parametrize("layout", ["diffusers", "ours"])
def test_training_starts_from_earlier_weights_of_either_layout(layout, exported, model, tmp_path):
    save_mmdit(model.mmdit, tmp_path)
    recipe = recipe_from(tmp_path if layout == "ours" else exported / "transformer")
    check_inputs(recipe, Site(workspace=str(tmp_path)))
    started = initial(recipe)
    assert all(torch.equal(value, started.state_dict()[name]) for name, value in model.mmdit.state_dict().items())
    assert all(parameter.requires_grad for parameter in started.parameters())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_layers": 3}, "mmdit.model.num_layers: found 3; the weights at .* allow 2"),
        ({"attention": "full"}, "mmdit.model.attention: found full; the weights at .* allow block_causal"),
        ({"rope_axes": [2, 6, 8]}, r"mmdit.model.rope_axes: found \(2, 6, 8\); the weights at .* allow \(4, 6, 6\)"),
        ({"condition_at_t0": False}, "mmdit.model.condition_at_t0: found False"),
    ],
)
@pytest.mark.parametrize("layout", ["diffusers", "ours"])
def test_a_recipe_that_disagrees_with_its_weights_is_refused_before_a_run_begins(layout, changes, sentence, exported, model, tmp_path):
    save_mmdit(model.mmdit, tmp_path)
    recipe = recipe_from(tmp_path if layout == "ours" else exported / "transformer", **changes)
    with pytest.raises(UserError, match=sentence):
        check_inputs(recipe, Site(workspace=str(tmp_path)))
    with pytest.raises(UserError, match=sentence):
        initial(recipe)


def test_weights_for_other_latents_or_states_are_refused(exported):
    with pytest.raises(UserError, match="found latents of 64 channels; the weights at .* allow 4"):
        initial(recipe_from(exported / "transformer"), latent_channels=64)
    with pytest.raises(UserError, match="found text states of 16 channels; the weights at .* allow 32"):
        initial(recipe_from(exported / "transformer"), text_dim=16)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "holds no config.json"),
        ({"config.json": "{"}, "config.json is not JSON"),
        ({"config.json": "[]"}, "none of a transformer"),
        ({"config.json": '{"_class_name": "FluxTransformer2DModel"}'}, "none of a transformer"),
        ({"config.json": '{"_class_name": "QwenImage21Transformer2DModel"}'}, "lacks attention_head_dim"),
    ],
)
def test_a_folder_of_something_else_is_refused_before_a_run_begins(files, sentence, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        check_inputs(recipe_from(tmp_path), Site(workspace=str(tmp_path)))


def test_weights_that_do_not_fit_their_config_are_refused(exported, tmp_path):
    config = json.loads((exported / "transformer" / "config.json").read_text())
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes((exported / "transformer" / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(UserError, match=r"lack transformer_blocks\.2\."):
        initial(recipe_from(tmp_path, num_layers=3))
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_ratio": 2}))
    with pytest.raises(UserError, match=r"img_mlp\.\S+ has shape"):
        initial(recipe_from(tmp_path, mlp_ratio=2))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        initial(recipe_from(tmp_path, mlp_ratio=2))


def test_parts_that_cannot_be_told_are_left_out_with_the_reason(tmp_path):
    other = painter(vae={"mixers": True}, system_prompt="Look.", sees_images=False)
    name = publish(Site(workspace=str(tmp_path / "workspace")), other)
    told = json.loads(invoke("export", name, str(tmp_path / "model"), "--json"))
    assert told["parts"] == ["transformer", "scheduler"]
    assert told["left_out"].keys() == {"vae", "text_encoder", "processor"}
    assert "mixers" in told["left_out"]["vae"]
    assert "'Look.'" in told["left_out"]["text_encoder"]
    assert any("text encoder" in line for line in told["differences"])
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model_index.json", "scheduler", "transformer"]
    opened = QwenImage21Transformer2DModel.from_pretrained(tmp_path / "model" / "transformer", local_files_only=True)
    assert opened.config.num_layers == 2
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["vae"] == [None, None]


def test_parts_are_chosen_by_name(model, tmp_path):
    name = publish(Site(workspace=str(tmp_path / "workspace")), model)
    (tmp_path / "model").mkdir()
    assert "vae, scheduler" in invoke("export", name, str(tmp_path / "model"), "--parts", "scheduler,vae")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model_index.json", "scheduler", "vae"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A published model that diffusers has neither a transformer nor an autoencoder for."""
    other = painter(mmdit={"attention": "full", "condition_at_t0": False}, vae={"mixers": True})
    return publish(Site(workspace=str(tmp_path_factory.mktemp("foreign") / "workspace")), other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model"], ("transformer", "mmdit.model.attention: found full", "block_causal")),
        (["model", "--parts", "vae"], ("vae", "mixers")),
        (["model", "--parts", "scheduler,lora"], ("--parts", "'lora'", "transformer, vae, text_encoder, processor, scheduler")),
        (["full"], ("FOLDER", "full", "not empty")),
        (["full/file"], ("FOLDER", "full/file", "a file")),
        (["full/file/model"], ("FOLDER", "cannot be written")),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(arguments, words, foreign, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    monkeypatch.setattr("sys.argv", ["darkroom", "export", foreign, *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(said.strip().splitlines()) == 1
    assert said.startswith("darkroom: export: ")
    assert all(word in said for word in words), said
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


def test_a_model_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["darkroom", "export", str(tmp_path / "nothing"), "model"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "there is no manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
