"""`darkroom sample`: who draws, what is drawn, what the PNG says of it, and what is refused before any model is loaded."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from model_core.evaluation.drawing import Request, draw, open_painter
from model_core.models.enhancer import tiny_enhancer
from model_core.recipe_enhancer import Enhancer
from model_core.sampling import enhancing
from model_core.sampling.few_step import FewStep
from model_core.sampling.published import PublishedModel, find_published
from model_core.site import Site
from pipelines import cli
from tests.published_models import painter, publish

DOCUMENT = (Path(__file__).parents[2] / "docs" / "reference" / "sample.md").read_text()
COMMANDS = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^darkroom sample .*", DOCUMENT, re.MULTILINE)]
BATCH_LINES = re.findall(r'^\{"prompt".*', DOCUMENT, re.MULTILINE)
SAMPLER = FewStep(3, (0.5, 0.9))
PROMPT = "a red circle with the text A7"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two published models: with student and enhancer, and without."""
    place = tmp_path_factory.mktemp("models")
    teacher, other = painter(), painter(mmdit={"num_layers": 1})
    enhancer = tiny_enhancer(Enhancer(hidden_size=32, num_layers=1, num_heads=2, vocab_size=300), [PROMPT], seed=0)
    whole = publish(Site(workspace=str(place / "whole")), teacher, student=(other.mmdit, SAMPLER), enhancer=enhancer)
    return {"whole": whole, "plain": publish(Site(workspace=str(place / "plain")), teacher)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def forgiving() -> Any:
    """The command keeps to deterministic operations for the rest of its process, which here is that of other tests, too."""
    yield
    torch.use_deterministic_algorithms(False)


class Answers:
    """A stand-in for the enhancer, which gives the answers that it was told to; keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), []

    def generate(self, requests: Sequence[str], *, num_images: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        self.asked += zip(requests, num_images, strict=True)
        first = len(self.asked) - len(requests)
        return [[first + index] for index in range(len(requests))]

    def text(self, ids: Sequence[int]) -> str:
        return self.answers[ids[0]]


def answering(monkeypatch: pytest.MonkeyPatch, *documents: dict[str, Any] | str) -> Answers:
    texts = [each if isinstance(each, str) else f"<think>\nso\n</think>\n\n{json.dumps(each)}" for each in documents]
    stub = Answers(*texts)
    monkeypatch.setattr(PublishedModel, "load_enhancer", lambda self: stub)
    return stub


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.app, ["sample", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that a command ends with, which loads no model and writes nothing."""
    monkeypatch.setattr("sys.argv", ["darkroom", "sample", *arguments])
    monkeypatch.setattr(PublishedModel, "load", lambda self: pytest.fail("a model is loaded"))
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert sorted(Path().rglob("*")) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


def chunks(path: str) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)  # type: ignore[attr-defined]


def test_png_says_how_it_was_drawn(here: Path, models: dict[str, str]) -> None:
    invoke(models["whole"], "ein roter Kreis, 红色 A7", "--seed", "5", "--steps", "2")
    parts = find_published(Site(workspace="unused"), models["whole"]).parts
    found = chunks("sample.png")
    sampler = json.loads(found.pop("sampler"))
    assert (sampler["steps"], sampler["guidance_scale"]) == (2, 3.0)
    assert found == {
        "prompt": "ein roter Kreis, 红色 A7",
        "seed": "5",
        "model": models["whole"],
        "model_digest": parts["mmdit"].manifest.content_digest,
        "software": f"darkroom {version('darkroom')}",
    }


def test_student_draws_with_its_own_weights_and_grid(here: Path, models: dict[str, str]) -> None:
    invoke(models["whole"], PROMPT, "--student", "--steps", "3", "--seed", "1")
    published = find_published(Site(workspace="unused"), models["whole"])
    folders = {part: published.parts[part].folder(name) for part, name in (("student", "mmdit"), ("vae", "vae"), ("encoder", "encoder"))}
    opened = open_painter(mmdit=folders["student"], vae=folders["vae"], encoder=folders["encoder"], sampling=published.sampling)  # type: ignore[arg-type]
    (expected,) = draw(opened, [Request(PROMPT, 1, (64, 64))], on_drawn=lambda _: None)
    with Image.open("sample.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    found = chunks("sample.png")
    assert found["model_digest"] == published.parts["student"].manifest.content_digest
    assert json.loads(found["sampler"]) == {"student": True, "steps": 3, "times": SAMPLER.times(16)}


def test_same_command_writes_the_same_bytes_and_another_seed_other_ones(here: Path, models: dict[str, str]) -> None:
    for arguments in ([], ["--student"]):
        drawn = []
        for seed in ("1", "1", "2"):
            invoke(models["whole"], PROMPT, "--seed", seed, *arguments)
            drawn.append(Path("sample.png").read_bytes())
        assert drawn[0] == drawn[1] != drawn[2]


def test_lines_of_a_batch_say_what_is_drawn_and_options_say_the_rest(here: Path, models: dict[str, str]) -> None:
    (here / "jobs").mkdir()
    Image.new("RGB", (96, 64), "red").save(here / "jobs" / "red.png")
    lines = [
        {"prompt": "a blue square", "seed": 7, "size": "96x64", "out": "wide/blue.png"},
        {"prompt": "make it green", "images": ["red.png"]},
        {"prompt": "a red circle", "size": 64},
    ]
    (here / "jobs" / "batch.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    result = invoke(models["whole"], "--file", "jobs/batch.jsonl", "--student", "--seed", "3", "--json", "--out", "drawn.png")
    told = {Path(line["path"]): line for line in map(json.loads, result.stdout.splitlines())}
    assert set(told) == {Path("jobs/wide/blue.png"), Path("drawn-2.png"), Path("drawn-3.png")}
    blue, edited, circle = (told[Path(name)] for name in ("jobs/wide/blue.png", "drawn-2.png", "drawn-3.png"))
    assert (blue["seed"], blue["size"], edited["size"], circle["seed"], circle["size"]) == (7, [96, 64], [96, 64], 3, [64, 64])
    assert chunks(blue["path"])["prompt"] == "a blue square"
    with Image.open(blue["path"]) as image:
        assert image.size == (96, 64)
    assert "3/3 pictures" in result.stderr
    # A line alone draws what it draws among others, to the rounding of batched sums.
    invoke(models["whole"], "a red circle", "--student", "--seed", "3", "--out", "alone.png")
    alone, among = (np.asarray(Image.open(name), dtype=int) for name in ("alone.png", "drawn-3.png"))
    assert np.abs(alone - among).max() <= 1


def test_plain_file_has_a_prompt_a_line(here: Path, models: dict[str, str]) -> None:
    Path("prompts.txt").write_text("a red circle\n\n  a blue square  \n")
    result = invoke(models["plain"], "--file", "prompts.txt", "--dry-run", "--json")
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["a red circle", "a blue square"]


WRONG_FILES: dict[str, tuple[str, str]] = {
    "not JSON": ('{"prompt": "a"}\n{"prompt": ', "batch.jsonl:2: not JSON"),
    "no prompt": ('{"seed": 1}', "batch.jsonl:1: prompt is missing"),
    "an empty prompt": ('{"prompt": ""}', "batch.jsonl:1: prompt: found"),
    "an unknown key": ('{"prompt": "a", "sead": 1}', "batch.jsonl:1: sead is not a known key"),
    "a list": ("[1]", "batch.jsonl:1: the document: found [1]"),
    "a negative seed": ('\n{"prompt": "a", "seed": -1}', "batch.jsonl:2: seed: found -1"),
    "a size that no latent fits": ('{"prompt": "a", "size": "100"}', "batch.jsonl:1: size: found '100'; allowed are multiples of 16"),
    "a picture that is not there": ('{"prompt": "a", "images": ["no.png"]}', "batch.jsonl:1: images: found no.png"),
    "an output that is no PNG": (
        '{"prompt": "a", "out": "x.jpg"}',
        "batch.jsonl:1: out: found 'x.jpg'; allowed is a file that ends in .png",
    ),
    "one file for two pictures": (
        '{"prompt": "a", "out": "x.png"}\n{"prompt": "b", "out": "x.png"}',
        "batch.jsonl:2: out: found x.png, as in line 1; allowed is a file a picture",
    ),
    "nothing": ("\n \n", "batch.jsonl holds no request"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_batch_is_refused_by_file_and_line(
    case: str, here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words = WRONG_FILES[case]
    Path("batch.jsonl").write_text(text)
    assert words in refused(monkeypatch, capsys, models["plain"], "--file", "batch.jsonl")


WRONG_MODELS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no student": ("plain", ("--student",), "it has no few-step student"),
    "no enhancer": ("plain", ("--enhance",), "it has no Prompt Enhancer"),
    "steps of another grid": ("whole", ("--student", "--steps", "4"), "found 4 steps; allowed for its student are 3, its own grid"),
    "a size that the model cannot draw": ("whole", ("--size", "48x64"), "found size 48x64; allowed are multiples of 32 pixels"),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_what_a_model_has_not_is_refused_before_it_is_loaded(
    case: str, here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, arguments, words = WRONG_MODELS[case]
    assert words in refused(monkeypatch, capsys, models[model], PROMPT, *arguments)


def test_dry_run_tells_what_would_be_drawn_and_draws_nothing(here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PublishedModel, "load", lambda self: pytest.fail("a model is loaded"))
    shown = invoke(models["whole"], "a cat", "a dog", "--student", "--enhance", "--dry-run").stdout
    assert shown.splitlines() == [
        f"would write sample-{number}.png: 'a {animal}', seed 0, a size that the enhanced prompt asks for, 3 steps"
        for number, animal in ((1, "cat"), (2, "dog"))
    ]
    assert "64x32, 2 steps" in invoke(models["whole"], "a cat", "--steps", "2", "--size", "64x32", "--dry-run").stdout
    assert list(here.iterdir()) == []


def test_enhanced_prompt_is_printed_drawn_and_kept_with_the_users_words(
    here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = 'a red circle on the left with the text "A7"'
    stub = answering(monkeypatch, {"prompt": full, "aspect_ratio": "2:1"})
    result = invoke(models["whole"], 'circle "A7"', "--enhance", "--student")
    assert stub.asked == [('circle "A7"', 0)]
    assert f"enhanced: {full}" in result.stdout
    found = chunks("sample.png")
    assert (found["prompt"], found["enhanced_prompt"]) == ('circle "A7"', full)
    with Image.open("sample.png") as image:
        assert image.width > image.height
        size = f"{image.width}x{image.height}"
        enhanced = np.asarray(image)
    invoke(models["whole"], full, "--student", "--size", size)
    assert np.array_equal(np.asarray(Image.open("sample.png")), enhanced)


def test_size_that_is_asked_for_wins_over_the_enhancers(here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {"prompt": "a red circle", "aspect_ratio": "2:1"})
    told = json.loads(invoke(models["whole"], "circle", "--enhance", "--student", "--size", "32x64", "--json").stdout)
    assert (told["enhanced"], told["size"]) == ("a red circle", [32, 64])


@pytest.mark.parametrize(("followed", "size"), [(1, [96, 64]), (2, [64, 64])])
def test_edit_takes_the_size_of_the_image_that_the_enhancer_follows(
    followed: int, size: list[int], here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, sides in (("one.png", (96, 64)), ("two.png", (128, 128))):
        Image.new("RGB", sides, "red").save(name)
    stub = answering(monkeypatch, {"prompt": "make the background pink", "follow_image": followed})
    told = json.loads(
        invoke(models["whole"], "pink", "--image", "one.png", "--image", "two.png", "--enhance", "--student", "--json").stdout
    )
    assert stub.asked == [("pink", 2)]
    assert (told["enhanced"], told["size"]) == ("make the background pink", size)


def test_answer_that_is_not_valid_leaves_the_users_own_words(here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {"prompt": 'a circle with the text "B3"', "aspect_ratio": "2:1"}, "what?")
    result = invoke(models["whole"], 'circle "A7"', "square", "--enhance", "--student")
    assert "the text 'A7' is not in the prompt" in result.stderr
    assert "'square' is drawn in its own words" in result.stderr
    assert "enhanced" not in result.stdout
    found = chunks("sample-1.png")
    assert (found["prompt"], "enhanced_prompt" in found) == ('circle "A7"', False)
    with Image.open("sample-1.png") as image:
        assert image.size == (64, 64)


def test_an_untrained_enhancer_is_loaded_and_its_answer_falls_back(
    here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enhancing, "MAX_NEW_TOKENS", 4)
    result = invoke(models["whole"], "circle", "--enhance", "--student")
    assert "note: 'circle' is drawn in its own words" in result.stderr
    invoke(models["whole"], "circle", "--student", "--out", "own.png")
    assert Path("own.png").read_bytes() == Path("sample.png").read_bytes()


def test_many_requests_are_enhanced_in_batches_and_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enhancing, "BATCH_REQUESTS", 2)
    requests = [f"circle {number}" for number in range(5)]
    stub = Answers(*(f'<think>\n</think>\n\n{{"prompt": "a red circle {number}", "aspect_ratio": "1:1"}}' for number in range(5)))
    found = enhancing.enhance(stub, requests, num_images=[0] * 5, reads=lambda _: True)  # type: ignore[arg-type]
    assert [each.prompt for each in found] == [f"a red circle {number}" for number in range(5)]
    assert [request for request, _ in stub.asked] == requests


def test_a_prompt_that_the_generator_cannot_read_is_drawn_in_the_users_own_words() -> None:
    stub = Answers('<think>\n</think>\n\n{"prompt": "a red circle", "aspect_ratio": "1:1"}')
    (found,) = enhancing.enhance(stub, ["circle"], num_images=[0], reads=lambda prompt: prompt == "circle")  # type: ignore[arg-type]
    assert found.prompt == "circle"
    assert found.fallback == enhancing.UNREADABLE


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_of_the_document_draw(words: list[str], here: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, *[{"prompt": "a red circle on the left with the text A7", "aspect_ratio": "1:1"}] * 3)
    Image.new("RGB", (64, 64), "red").save("photo.png")
    Path("batch.jsonl").write_text("\n".join(BATCH_LINES))
    assert (words[:2], bool(BATCH_LINES)) == (["sample", "RUN"], True)
    invoke(models["whole"], *words[2:])
