"""Recipes: mistakes are one sentence that names the field; overrides reach any depth; digests see every value."""

from pathlib import Path

import pytest

from model_core.documents import UserError, override
from model_core.recipe import load_recipe, parse_recipe, section

MINIMAL = {"name": "tiny", "mmdit": {"stages": {"S1": {}}}}


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("nam=x", "nam is not a known key"),
        ("name=Bad Name", 'name: found "Bad Name"'),
        ("seed=-1", "seed: found -1"),
        ("mmdit.stages={}", "mmdit.stages"),
        ("mmdit.stages.S1.lr=0", "mmdit.stages.S1.lr: found 0"),
        ("mmdit.stages.S1.lr=fast", 'mmdit.stages.S1.lr: found "fast"'),
        ("mmdit.stages.S1.edit_share=1.5", "mmdit.stages.S1.edit_share"),
        ("mmdit.stages.S1.resolution_px=100", "multiples of 16"),
        ("mmdit.stages.S1.kinds=[edit]", "leave the share"),
        ("mmdit.stages.S-1={}", "letters and digits"),
        ("mmdit.model.rope_axes=[16, 56, 50]", "sum to head_dim 128"),
        ("vae.model.stem_fold=4", "needs 3 to compress by 16"),
        ("vae.crop_px=50", "multiples of 16"),
        ("vae.model.temporal_folds=[true]", "temporal_folds has 1 levels with a global shortcut"),
        ("vae.model={shortcut: cosine, pixel_channels: 4}", "needs pixel_channels 3"),
        ("vae.lpips_weight=1", "a weight above 0 needs a file"),
        ("vae.lpips_path=vgg.safetensors", "and a file one"),
        ("vae.teacher_path=dinov2", "set both or none"),
        ("vae.teacher_layer=12", "set both or none"),
        ("vae={teacher_path: dinov2, teacher_layer: 12, align_weight: 0}", "teaches nothing with an align_weight of 0"),
        ("data.sources=[]", "data.sources"),
        ("data.sources=[ftp://x/y]", "allowed are synthetic://scenes, file:///FOLDER and s3://BUCKET/PREFIX"),
        ("data.sources=[synthetic://cats]", "the one synthetic source is synthetic://scenes"),
        ("data.scenes.held_out_share=0.9", "data.scenes.held_out_share"),
        ("encoder.num_heads=3", "must be an even multiple of num_heads 3"),
        ("sampling.guidance_scale=0.5", "sampling.guidance_scale"),
        ("registry.alias=V 1", "registry.alias"),
        ("edits.operations=[paint]", "edits.operations.0"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_field(assignment, sentence):
    with pytest.raises(UserError) as error:
        parse_recipe(override(MINIMAL, [assignment]), "recipe here.yaml")
    message = str(error.value)
    assert message.startswith("recipe here.yaml: ")
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize("content", ["", "- a", "a: [", "\tname: x", "name: !!python/object:os.system x"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="bad.yaml"):
        load_recipe(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_the_recipes_that_ship_are_valid():
    for path in sorted(Path("pipelines/recipes").glob("*.yaml")):
        assert load_recipe(path).name == path.stem


def test_overrides_set_one_leaf_and_leave_the_rest():
    recipe = parse_recipe(override(MINIMAL, ["mmdit.stages.S1.lr=1e-5", 'data.sources=["file:///a"]']), "r")
    assert recipe.mmdit.stages["S1"].lr == 1e-5
    assert recipe.data.sources == ["file:///a"]
    assert section(recipe, "mmdit.stages.S1.lr") == 1e-5


@pytest.mark.parametrize("assignment", ["lr", "=1", "a..b=1", "name.x=1"])
def test_an_assignment_that_is_none_is_refused(assignment):
    with pytest.raises(UserError, match="--set"):
        override(MINIMAL, [assignment])


def test_the_digest_sees_values_and_not_their_order():
    first = parse_recipe({"name": "a", "seed": 1, "mmdit": {"stages": {"S1": {"lr": 1e-4}}}}, "r")
    second = parse_recipe({"mmdit": {"stages": {"S1": {"lr": 0.0001}}}, "seed": 1, "name": "a"}, "r")
    assert first.digest() == second.digest()
    assert first.digest() != parse_recipe({"name": "a", "seed": 2, "mmdit": {"stages": {"S1": {}}}}, "r").digest()
