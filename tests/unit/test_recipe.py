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
        ("encoder.sees_images=maybe", "encoder.sees_images"),
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


def test_an_encoder_that_sees_images_needs_sides_of_whole_image_tokens():
    shown = ["encoder.sees_images=true", "mmdit.stages.S1.resolution_px=80"]
    with pytest.raises(UserError, match=r"mmdit.stages.S1.resolution_px is 80; an encoder that sees images needs multiples of 32"):
        parse_recipe(override(MINIMAL, shown), "r")
    assert parse_recipe(override(MINIMAL, [shown[0], "mmdit.stages.S1.resolution_px=96"]), "r").encoder.sees_images
    assert not parse_recipe(override(MINIMAL, shown[1:]), "r").encoder.sees_images


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


# R1 Table 2, typed from the paper: steps; batch size by resolution; share of edits; learning rate.
TABLE_2 = {
    "pre-training": (700_000, {256: 32 * 1024, 512: 16 * 1024}, 0.1, 1e-4),
    "continual": (250_000, {512: 16 * 1024, 1024: 8 * 1024, 2048: 4 * 1024}, 0.3, 2e-5),
    "SFT": (10_000, {512: 16 * 1024, 1024: 8 * 1024, 2048: 4 * 1024}, 0.3, 1e-5),
}
PHASES = {"S1": "pre-training", "S2": "pre-training", "S3": "pre-training", "S4": "continual", "S5": "continual", "S6": "SFT"}


@pytest.mark.parametrize("phase", TABLE_2)
def test_the_papers_recipe_is_its_table_2(phase):
    steps, batch_sizes, edit_share, lr = TABLE_2[phase]
    recipe = load_recipe(Path("pipelines/recipes/qwen_image_2.yaml"))
    stages = {name: stage for name, stage in recipe.mmdit.stages.items() if PHASES[name[:2]] == phase}
    assert sum(stage.steps for stage in stages.values()) == steps
    assert {stage.resolution_px: stage.batch_size for stage in stages.values()} == batch_sizes
    assert {stage.lr for stage in stages.values()} == {lr}
    assert {stage.edit_share for stage in stages.values() if "edit" in stage.kinds} == {edit_share}
    assert all(name == name[:2] or name == f"{name[:2]}x{stage.resolution_px}" for name, stage in stages.items())


def test_the_papers_recipe_has_its_stages_in_order_and_its_common_numbers():
    recipe = load_recipe(Path("pipelines/recipes/qwen_image_2.yaml"))
    assert list(dict.fromkeys(name[:2] for name in recipe.stages)) == list(PHASES)
    assert sum(stage.steps for stage in recipe.mmdit.stages.values()) == 960_000
    assert (recipe.mmdit.weight_decay, recipe.mmdit.grad_clip, recipe.mmdit.uncond_dropout) == (0.001, 1.0, 0.1)
    assert recipe.mmdit.stages["S1"].kinds == ["image"]  # R1 Fig. 6: edits join in S2, synthetic text in S3
    assert "edit" in recipe.mmdit.stages["S2"].kinds
    assert "text_image" in recipe.mmdit.stages["S3"].kinds


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
