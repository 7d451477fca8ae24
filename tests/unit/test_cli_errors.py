"""A user's mistake is one sentence and exit code 2, before any work, with nothing written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import cli

STAGE: dict[str, Any] = {"resolution_px": 64, "kinds": ["image"], "steps": 1, "batch_size": 1}
RECIPE: dict[str, Any] = {
    "name": "wrong",
    "vae": {"model": {"stem_fold": 4, "encoder_widths": [8, 8, 8], "decoder_widths": [8, 8, 8]}},
    "mmdit": {"model": {"num_layers": 1, "num_heads": 1, "head_dim": 12, "rope_axes": [4, 4, 4]}, "stages": {"S1": STAGE}},
}


def recipe_with(path: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(RECIPE)
    *parents, leaf = path.split(".")
    node = document
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return document


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["darkroom", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    return 0 if code is None else int(code)


def assert_refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    said = capsys.readouterr()
    assert code == 2, said.err
    assert len(said.err.strip().splitlines()) == 1, f"not one sentence: {said.err}"
    assert said.err.startswith("darkroom: ")
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err, said.err


WRONG_RECIPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "unknown key": (recipe_with("vae.stepz", 3), ("vae.stepz", "not a known key")),
    "unknown key in a stage": (recipe_with("mmdit.stages.S1.filter", {"min_side": 3}), ("mmdit.stages.S1.filter.min_side",)),
    "no name": ({key: value for key, value in RECIPE.items() if key != "name"}, ("name is missing",)),
    "no stages": (recipe_with("mmdit", {}), ("mmdit.stages is missing",)),
    "empty stages": (recipe_with("mmdit.stages", {}), ("mmdit.stages",)),
    "a name with spaces": (recipe_with("name", "my recipe"), ("name", "my recipe")),
    "a stage name with a dash": (recipe_with("mmdit.stages", {"S-1": STAGE}), ("S-1", "letters and digits")),
    "a negative learning rate": (recipe_with("mmdit.stages.S1.lr", -1.0), ("mmdit.stages.S1.lr", "-1.0")),
    "no steps": (recipe_with("vae.steps", 0), ("vae.steps", "found 0")),
    "words for a number": (recipe_with("vae.steps", "many"), ("vae.steps", "many")),
    "a share above one": (recipe_with("mmdit.uncond_dropout", 1.5), ("mmdit.uncond_dropout", "1.5")),
    "shares that exceed one": (
        recipe_with("mmdit.stages.S1", {**STAGE, "kinds": ["image", "edit", "text_image"], "edit_share": 0.8, "text_image_share": 0.5}),
        ("edit_share 0.8", "text_image_share 0.5"),
    ),
    "an unknown kind": (recipe_with("mmdit.stages.S1.kinds", ["film"]), ("mmdit.stages.S1.kinds", "film")),
    "a resolution that no latent fits": (recipe_with("mmdit.stages.S1.resolution_px", 100), ("resolution_px", "multiples of 16")),
    "a crop that no latent fits": (recipe_with("vae.crop_px", 50), ("vae.crop_px", "multiples of 16")),
    "rotary axes that do not fill the head": (recipe_with("mmdit.model.rope_axes", [4, 4, 2]), ("rope_axes", "head_dim 12")),
    "heads that do not divide the width": (recipe_with("encoder.num_heads", 3), ("hidden_size 256", "num_heads 3")),
    "levels that do not compress by 16": (recipe_with("vae.model.encoder_widths", [8, 8]), ("encoder_widths has 2 levels",)),
    "an unknown source": (recipe_with("data.sources", ["ftp://host/photos"]), ("data.sources", "ftp://host/photos", "file:///FOLDER")),
    "an unknown synthetic source": (recipe_with("data.sources", ["synthetic://cats"]), ("synthetic://cats",)),
    "no source": (recipe_with("data.sources", []), ("data.sources",)),
    "a folder that is not there": (recipe_with("data.sources", ["file:///no/such/folder"]), ("data.sources", "/no/such/folder")),
    "an encoder that is not there": (recipe_with("encoder.path", "/no/such/encoder"), ("encoder.path", "/no/such/encoder")),
    "a VAE that is not there": (recipe_with("vae.path", "/no/such/vae"), ("vae.path", "/no/such/vae")),
    "a file of LPIPS that is not there": (
        recipe_with("vae", RECIPE["vae"] | {"lpips_weight": 1.0, "lpips_path": "/no/such/lpips"}),
        ("vae.lpips_path", "/no/such/lpips", "a safetensors file"),
    ),
    "a teacher that is not there": (
        recipe_with("vae", RECIPE["vae"] | {"teacher_path": "/no/such/teacher", "teacher_layer": 1}),
        ("vae.teacher_path", "/no/such/teacher"),
    ),
    "a weight of LPIPS without its file": (recipe_with("vae.lpips_weight", 1.0), ("lpips_weight 1.0", "lpips_path")),
    "an unknown language": (recipe_with("text_images.languages", ["xx"]), ("text_images.languages", "xx")),
    "a list": ([1, 2], ("found list", "a mapping")),
    "nothing": (None, ("a mapping",)),
}


@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_wrong_recipe_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    document, words = WRONG_RECIPES[case]
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(document))
    assert_refused(capsys, call(monkeypatch, "run", "recipe.yaml"), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


WRONG_FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "not YAML": (b"name: [x\nvae: {", ("recipe.yaml", "not YAML", "line")),
    "not text": (b"\x89PNG\xff\xfe", ("recipe.yaml", "not UTF-8")),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_unreadable_recipe_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, words = WRONG_FILES[case]
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_bytes(data)
    assert_refused(capsys, call(monkeypatch, "run", "recipe.yaml"), *words)


WRONG_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "an unknown recipe": (("run", "demmo"), ("demmo", "demo", "smoke")),
    "a recipe that is not there": (("run", "my/recipe.yaml"), ("my/recipe.yaml",)),
    "an unknown site": (("run", "smoke", "--site", "mars"), ("mars", "local")),
    "an assignment without a value": (("run", "smoke", "--set", "vae.steps"), ("vae.steps", "a.b=value")),
    "an assignment to an unknown field": (("run", "smoke", "--set", "vae.stepz=3"), ("vae.stepz",)),
    "an assignment below a value": (("run", "smoke", "--set", "name.x=3"), ("name.x", "not a section")),
    "an assignment that is not YAML": (("run", "smoke", "--set", "data.sources=[a"), ("data.sources", "not YAML")),
    "an assignment to an unknown stage's field": (("run", "smoke", "--set", "mmdit.stages.S1.lrr=1"), ("mmdit.stages.S1.lrr",)),
    "a run name with a slash": (("run", "smoke", "--name", "a/b"), ("run name", "a/b")),
    "an unknown run": (("report", "nobody"), ("nobody",)),
    "a size that no latent fits": (("sample", "r", "a cat", "--size", "100"), ("--size", "'100'", "multiples of 16")),
    "a size that is none": (("sample", "r", "a cat", "--size", "big"), ("--size", "'big'")),
    "a picture that is not there": (("sample", "r", "a cat", "--image", "none.png"), ("--image", "none.png", "no such file")),
    "a picture that is none": (("sample", "r", "a cat", "--image", "/dev/null"), ("--image", "/dev/null")),
    "an output that is no PNG": (("sample", "r", "a cat", "--out", "x.jpg"), ("--out", "x.jpg", ".png")),
    "an output below a file": (("sample", "r", "a cat", "--out", "/dev/null/x.png"), ("--out", "/dev/null/x.png", "not /dev/null")),
    "nothing to draw": (("sample", "r"), ("neither a prompt nor --file",)),
    "prompts and a batch": (("sample", "r", "a cat", "--file", "batch.txt"), ("both prompts and --file",)),
    "a batch that is not there": (("sample", "r", "--file", "batch.txt"), ("--file", "batch.txt", "No such file")),
    "a reward that nothing gives": (("run", "smoke", "--set", "grpo.gold=beauty"), ("grpo", "beauty", "alignment", "check_text")),
    "a reward trunk that is not there": (("run", "smoke", "--set", "reward.trunk.path=/nope"), ("reward.trunk.path", "/nope", "folder")),
    "votes that are not there": (("run", "smoke", "--set", 'preferences.votes=["/nope.jsonl"]'), ("preferences.votes", "/nope.jsonl")),
    "labelling for an unknown run": (("label", "nobody"), ("nobody", "no run yet")),
    "labelling for a folder that holds no result": (("label", "./nothing"), ("./nothing", "manifest.json", "build_preferences")),
    "labelling in an unknown dimension": (("label", "r", "--dimension", "charm"), ("--dimension", "'charm'", "aesthetics")),
    "labelling as nobody": (("label", "r", "--annotator", " "), ("--annotator", "' '")),
    "no run yet": (("report",), ("no run yet",)),
    "an output in a folder that cannot be": (("compile", "smoke", "-o", "/dev/null/x.yaml"), ("/dev/null/x.yaml", "cannot be written")),
    "no GPU": (("plan", "smoke", "--gpus", "0"), ("--gpus", "found 0")),
    "a GPU that is not known": (("plan", "smoke", "--gpu", "abacus"), ("--gpu", "'abacus'", "h200")),
    "more than the peak": (("plan", "smoke", "--mfu", "1.5"), ("--mfu", "1.5")),
    "no use of the peak": (("plan", "smoke", "--mfu", "0"), ("--mfu", "0.0")),
    "a peak below nothing": (("plan", "smoke", "--peak-tflops", "-1"), ("--peak-tflops", "-1")),
    "shards that do not divide the GPUs": (("plan", "smoke", "--gpus", "12", "--shards", "8"), ("--shards", "found 8", "12")),
    "prompts that are too long": (("plan", "smoke", "--caption-tokens", "1025"), ("--caption-tokens", "1025", "1 to 1024")),
    "a plan for an unknown encoder": (
        ("plan", "qwen_image_2", "--set", "encoder.num_layers=37"),
        ("encoder.path", "weights/Qwen3-VL-8B-Instruct", "config.json"),
    ),
    "fine-tuning without weights": (("run", "finetune"), ("encoder.path", "weights/Qwen-Image-2.1/text_encoder", "folder")),
    "the paper's recipe without weights": (("run", "qwen_image_2"), ("encoder.path", "weights/Qwen3-VL-8B-Instruct", "folder")),
    "nothing to verify": (("verify", "."), ("no manifest",)),
    "a history that is not there": (("ui",), ("does not exist yet",)),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_argument_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = WRONG_ARGUMENTS[case]
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, call(monkeypatch, *arguments), *words)
    assert list(tmp_path.iterdir()) == []


WRONG_SITES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown key": ({"wrkspace": "./w"}, ("wrkspace", "not a known key")),
    "an unknown store": ({"workspace": "gs://bucket/x"}, ("workspace", "gs://bucket/x", "s3://BUCKET/PREFIX")),
    "a workspace without a name": ({"workspace": ""}, ("workspace",)),
    "a bucket that cannot be": ({"workspace": "s3://No_Bucket/x"}, ("No_Bucket",)),
    "a workspace below a file": ({"workspace": "site.yaml/w"}, ("workspace", "cannot be written to")),
    "an unknown tracking server": ({"tracking": {"uri": "ftp://host"}}, ("tracking.uri", "ftp://host")),
    "an unknown scheduler": ({"launch": {"default": {"scheduler": "cron"}}}, ("launch.default.scheduler", "cron")),
    "no threads": ({"launch": {"steps": {"train_vae": {"threads": 0}}}}, ("launch.steps.train_vae.threads",)),
    "no process": ({"launch": {"steps": {"train_vae": {"processes": 0}}}}, ("launch.steps.train_vae.processes",)),
    "fewer than no workers": ({"launch": {"default": {"loader_workers": -1}}}, ("launch.default.loader_workers", "found -1")),
    "several processes for every step": ({"launch": {"default": {"processes": 3}}}, ("default: found 3 processes", "train_mmdit")),
    "several processes for a step of one": ({"launch": {"steps": {"render_text": {"processes": 2}}}}, ("steps.render_text", "found 2")),
    "a profile of no step": ({"launch": {"steps": {"train_vea": {"threads": 1}}}}, ("found 'train_vea'", "train_vae")),
    "a store that is never tried again for less than no time": ({"s3": {"retry_seconds": -1}}, ("s3.retry_seconds",)),
    "an endpoint that is no address": ({"s3": {"endpoint_url": "here"}}, ("s3.endpoint_url", "here")),
    "an endpoint where nobody listens": (
        {
            "workspace": "s3://bucket/x",
            "scratch": "/nonexistent/scratch",
            "s3": {"endpoint_url": "http://127.0.0.1:9", "retry_seconds": 0, "connect_timeout_seconds": 1.0},
        },
        ("s3://bucket/x",),
    ),
}


@pytest.mark.parametrize("case", WRONG_SITES)
def test_wrong_site_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    document, words = WRONG_SITES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    Path("site.yaml").write_text(yaml.safe_dump(document))
    assert_refused(capsys, call(monkeypatch, "run", "smoke", "--site", "site.yaml"), "site", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["site.yaml"]


def test_source_folder_without_pictures_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    code = call(monkeypatch, "run", "smoke", "--set", f"data.sources=['{(tmp_path / 'photos').as_uri()}']")
    assert_refused(capsys, code, str(tmp_path / "photos"))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
