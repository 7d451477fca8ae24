"""The step train_enhancer on a few scenes and edits: it learns, resumes bitwise, and its card counts what was answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model_core.context import StepContext
from model_core.data.degradation import Degraded, Step
from model_core.data.enhanced_prompt import EnhancedPrompt, answer_text, parse_answer
from model_core.data.enhancer_examples import Example, FinePrompt, example_of, read_fine_prompts, training_example
from model_core.data.folders import LocalFolder
from model_core.data.shards import make_row, read_rows, write_rows
from model_core.data.synthetic import Scene, describe, training_scenes
from model_core.documents import UserError
from model_core.evaluation.enhancer_card import enhancer_card, warnings_of
from model_core.models.enhancer import load_enhancer
from model_core.progress import Progress
from model_core.recipe import Scenes, parse_recipe
from model_core.recipe_enhancer import DEGRADATIONS, Enhancer
from model_core.site import Site
from model_core.steps.train_enhancer import answer_loss, run
from model_core.storage import open_storage
from model_core.tracking.spool import open_tracker
from model_core.training.checkpoint import CheckpointStore
from model_core.training.stopping import Stopped
from tests.interruptions import contents, tell_to_stop

SCENES = Scenes(num_images=40, letters="ABCDEFHKLT", text_share=0.9)
SETTINGS: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 400,
    "steps": 6,
    "batch_size": 4,
    "lr": 1e-2,
    "warmup_steps": 2,
    "max_new_tokens": 16,
    "num_checked": 4,
    "log_every_steps": 2,
    "checkpoint_every_steps": 3,
}
INSTRUCTIONS = ("make the circle blue", "change the text to K7", "use the color of the second image in the first image", "remove the blur")


@pytest.fixture
def context_of(tmp_path: Path) -> Callable[..., StepContext]:
    """Makes contexts over the same inputs; those of one name share their checkpoints."""
    known = {"provenance": "test", "licence": "unknown"}
    picture = Image.new("RGB", (8, 8))
    rows = [
        make_row(picture, kind="image", caption=f"{n}", annotation=s.to_json(), **known)
        for n, s in enumerate(training_scenes(SCENES, seed=0))
    ]
    rows.append(make_row(Image.new("RGB", (16, 9)), kind="image", caption="a boat, with soft light", annotation="{}", **known))
    edits = [
        make_row(
            picture, kind="edit", references=[picture] * (1 + ("second" in told)), instruction=told, operation="x", caption="", **known
        )
        for told in INSTRUCTIONS
    ]
    edits = [replace(row, held_out=row.instruction == INSTRUCTIONS[0]) for row in edits]
    write_rows(tmp_path / "images", rows)
    write_rows(tmp_path / "edits", edits)
    (tmp_path / "captions").mkdir()
    table = pa.table({"sample_id": pa.array([row.sample_id for row in rows], pa.binary(16)), "general": [row.caption for row in rows]})
    pq.write_table(table, tmp_path / "captions/captions.parquet")

    def context(name: str, **enhancer: object) -> StepContext:
        folder = tmp_path / name
        (folder / "output").mkdir(parents=True, exist_ok=True)
        recipe = {"name": "tiny", "data": {"scenes": SCENES.model_dump()}, "mmdit": {"stages": {"S1": {}}}, "enhancer": SETTINGS | enhancer}
        return StepContext(
            recipe=parse_recipe(recipe, "recipe"),
            site=Site(workspace=str(tmp_path)),
            stage=None,
            run="test",
            key="0" * 16,
            inputs={name: LocalFolder(tmp_path / name) for name in ("images", "edits", "captions")},  # type: ignore[misc]
            output=folder / "output",
            scratch=folder / "scratch",
            checkpoints=CheckpointStore(open_storage(folder.as_uri()), "checkpoints", say=print, scratch=folder / "scratch"),
            tracker=open_tracker(folder / "spool", run="test", step="train_enhancer", stage=None, key="0" * 16, experiment="test"),
            progress=Progress("train_enhancer"),
        )

    return context


def test_it_learns_the_answers_and_publishes_a_model_that_gives_them(context_of: Callable[..., StepContext]):
    context = context_of("run", steps=60, batch_size=8, checkpoint_every_steps=100, max_new_tokens=90, hidden_size=64, num_heads=4)
    stats = run(context)
    points = json.loads((context.output / "curves.json").read_text())
    assert stats["loss"] == points[-1]["loss"] < 0.3 * points[0]["loss"]
    assert stats["valid_json"] >= 0.5
    assert (stats["checked"], stats["edits_checked"]) == (4, 1)
    assert stats["captions"] == sum(not row.held_out for row in read_rows(context.inputs["images"], ("held_out",)))
    assert stats["instructions"] == len(INSTRUCTIONS) - 1
    card = json.loads((context.output / "enhancer_card.json").read_text())
    assert card["valid_json"] == stats["valid_json"]
    shown = next(example for example in card["examples"] if example["prompt"])
    model = load_enhancer(context.output / "enhancer")
    ids = model.generate([shown["request"]], num_images=[0], max_new_tokens=90)[0]
    assert parse_answer(model.text(ids), 0).prompt == shown["prompt"]


def test_a_run_that_is_interrupted_ends_with_the_same_bytes(context_of: Callable[..., StepContext]):
    whole, broken = context_of("whole"), context_of("broken")
    run(whole)
    tell_to_stop(broken, when_done=4)
    with pytest.raises(Stopped, match="after step 5, which is saved"):
        run(broken)
    assert contents(broken.output) == {}
    run(context_of("broken"))
    assert contents(whole.output) == contents(broken.output)
    assert {"enhancer/model.safetensors", "enhancer/tokenizer.json", "enhancer_card.json", "curves.json"} <= set(contents(whole.output))


def test_only_answers_are_learned(context_of: Callable[..., StepContext]):
    """The loss is the mean over the answers' tokens of whole forward passes, one sequence at a time."""
    context = context_of("run", steps=1)
    run(context)
    model = load_enhancer(context.output / "enhancer")
    examples = [example_of(FinePrompt(fine=text, num_images=1), {}, 0) for text in INSTRUCTIONS[:2]]
    values = [
        model.log_probs([model.prompt_ids(one.request, num_images=1)], [model.answer_ids(one.answer)])[0].tolist() for one in examples
    ]
    expected = -sum(map(sum, values)) / sum(map(len, values))
    assert answer_loss(model, examples).item() == pytest.approx(expected, rel=1e-4)


def test_examples_are_a_function_of_their_number_and_each_epoch_degrades_anew(context_of: Callable[..., StepContext]):
    context = context_of("run")
    folders = [context.inputs[name] for name in ("images", "edits", "captions")]
    prompts = read_fine_prompts(*folders, held_out=False, seed=0)
    config = Enhancer(edit_share=0.25)
    examples = [training_example(prompts, number, config, seed=0) for number in range(200)]
    assert examples == [training_example(prompts, number, config, seed=0) for number in range(200)]
    assert sum(bool(example.num_images) for example in examples) == 50
    assert {example.num_images for example in examples} == {0, 1, 2}
    pictures = [example for example in examples if not example.num_images]
    num = len(prompts["image"])
    first, second = pictures[:num], pictures[num : 2 * num]
    assert {example.fine for example in first} != {example.request for example in first}
    assert {example.request for example in first} != {example.request for example in second}
    assert all(parse_answer(example.answer, example.num_images).prompt == example.fine for example in examples)
    assert not {example.fine for example in examples} & {INSTRUCTIONS[0]}


def test_nothing_to_learn_from_or_no_section_is_refused(context_of: Callable[..., StepContext], tmp_path: Path):
    context, empty = context_of("run"), LocalFolder(tmp_path / "none")
    with pytest.raises(UserError, match="enhancer: found none"):
        run(replace(context, recipe=context.recipe.model_copy(update={"enhancer": None})))
    write_rows(tmp_path / "none", [])
    with pytest.raises(UserError, match="no caption or instruction that is not held out"):
        run(replace(context, inputs=dict(context.inputs) | {"images": empty, "edits": empty}))  # type: ignore[arg-type]


SCENE = Scene("red", "circle", "left", "white", "K7")
DEGRADED = Degraded(
    'crimson disc with "K7"',
    (Step("subject", "color", "red", "crimson"), Step("subject", "shape", "circle", "disc"), Step("layout", "position", "left", "")),
)


def example(degraded: Degraded = DEGRADED) -> Example:
    return Example(request=degraded.short, num_images=0, fine=describe(SCENE, 1), degraded=degraded, answer="")


def said(prompt: str) -> str:
    return answer_text(EnhancedPrompt(prompt=prompt, aspect_ratio="1:1"))


def test_the_card_counts_what_came_back_what_was_filled_and_what_was_kept():
    card = enhancer_card(
        [example()] * 3,
        [
            said("a red star on the right of a white background with the text K7"),
            said("a red circle, K 7, on a black background"),
            "red circle K7",
        ],
    )
    assert card["num"] == 3
    assert card["valid_json"] == pytest.approx(2 / 3)
    assert card["quoted_kept"] == pytest.approx(1 / 3)
    assert card["restored"] == pytest.approx(3 / 6)
    assert card["restored_by_attribute"]["color"] == {"value": pytest.approx(2 / 3), "num": 3}
    assert card["restored_by_attribute"]["shape"] == {"value": pytest.approx(1 / 3), "num": 3}
    assert card["restored_by_attribute"]["position"] == {"value": None, "num": 0}
    assert card["open_filled"] == pytest.approx(1 / 3)
    assert card["kept"] == pytest.approx(1 / 3)
    assert card["examples"][2]["answer"] == "red circle K7"
    assert card["edits"]["num"] == 0
    assert card["edits"]["exact"] is None
    assert [line.split(" is ")[0] for line in warnings_of(card)] == [
        f"prompt enhancer: {name}" for name in ("restored", "quoted_kept", "valid_json")
    ]


def test_the_answers_that_are_to_be_learned_have_a_perfect_card():
    examples = [
        example_of(FinePrompt(scene=scene), dict.fromkeys(DEGRADATIONS, 0.5), n) for n, scene in enumerate(training_scenes(SCENES, seed=0))
    ]
    examples += [example_of(FinePrompt(fine=text, num_images=2), {}, 0) for text in INSTRUCTIONS]
    card = enhancer_card(examples, [example.answer for example in examples])
    for name in ("valid_json", "quoted_kept", "constraints_kept", "restored", "open_filled", "kept", "fine_words", "exact"):
        assert card[name] == 1.0, name
    assert card["edits"]["constraints_kept"] == card["edits"]["exact"] == 1.0
    assert warnings_of(card) == []
