"""A stage of the transformer's training, in one process: bad batches, spikes and divergence, and how it is laid out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model_core.context import StepContext
from model_core.data.folders import LocalFolder
from model_core.data.latents import PROMPTS, TRAIN, Bucket, LatentRow, LatentWriter, Origin
from model_core.documents import UserError
from model_core.models.condition import save_encoder
from model_core.progress import Progress
from model_core.recipe import Guard, parse_recipe
from model_core.site import LaunchProfile, parse_site
from model_core.steps.train_mmdit import roll_back, run
from model_core.storage import open_storage
from model_core.tracking.spool import open_tracker
from model_core.training.checkpoint import CheckpointStore
from model_core.training.curves import Curves
from model_core.training.distributed import Ranks
from model_core.training.guard import StepGuard, TrainingDiverged
from model_core.training.parallel import check_layout
from model_core.training.stopping import Stopped, Stopping
from tests.latent_sets import CHANNELS, MODEL, sample_id
from tests.tiny_encoders import PROMPTS as TEXTS
from tests.tiny_encoders import encoder

ENCODER, VAE = "e" * 64, "v" * 64
STAGE = {"kinds": ["image"], "edit_share": 0.0, "text_image_share": 0.0, "steps": 24, "batch_size": 4, "warmup_steps": 2}
GUARD = {"window": 8, "patience": 3, "max_rollbacks": 1}


class Given(LocalFolder):
    """An input as a step sees it."""

    manifest = SimpleNamespace(content_digest=ENCODER, stats={})

    def folder(self, name: str) -> Path:
        return self.root / name


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoder")
    save_encoder(encoder(), root / "encoder")
    return root


@pytest.fixture
def context_of(tmp_path: Path, encoder_folder: Path) -> Callable[..., StepContext]:
    """Makes contexts over 40 latents of small noise, of which some are multiplied; `said` of their progress is kept."""

    def context(*, planted: dict[int, float] | None = None, launch: dict[str, Any] | None = None, **mmdit: Any) -> StepContext:
        tiny = encoder()
        writer = LatentWriter(tmp_path / "latents", origin=Origin(VAE, ENCODER), channels=CHANNELS)
        for number in range(40):
            generator = torch.Generator().manual_seed(number)
            text = TEXTS[number % len(TEXTS)]
            writer.add(
                Bucket(TRAIN, "image", 2, 2, 0),
                LatentRow(
                    sample_id=sample_id("image", number),
                    latent=torch.randn(CHANNELS, 2, 2, generator=generator) * (planted or {}).get(number, 0.1),
                    references=[],
                    prompts=dict.fromkeys(PROMPTS, text),
                    prompt_tokens=dict.fromkeys(PROMPTS, tiny.num_tokens(text)),
                ),
            )
        writer.close()
        stage = STAGE | {name: mmdit.pop(name) for name in list(mmdit) if name in STAGE or name == "lr"}
        model = MODEL.model_dump(mode="json") | {"num_heads": 2}
        model |= {"head_dim": 8}
        document = {"model": model, "stages": {"S1": stage}, "guard": GUARD, "log_every_steps": 4, "checkpoint_every_steps": 4} | mmdit
        site = {"workspace": str(tmp_path), "launch": {"steps": {"train_mmdit": launch or {}}}}
        (tmp_path / "output").mkdir(exist_ok=True)
        storage = open_storage((tmp_path / "store").as_uri())
        return StepContext(
            recipe=parse_recipe({"name": "tiny", "mmdit": document}, "recipe"),
            site=parse_site(site, "site"),
            stage="S1",
            run="test",
            key="0" * 16,
            inputs={"latents": Given(tmp_path / "latents"), "encoder": Given(encoder_folder)},  # type: ignore[dict-item]
            output=tmp_path / "output",
            scratch=tmp_path / "scratch",
            checkpoints=CheckpointStore(storage, "checkpoints", say=print, scratch=tmp_path / "scratch"),
            tracker=open_tracker(tmp_path / "spool", run="test", step="train_mmdit", stage="S1", key="0" * 16, experiment="test"),
            progress=Progress("train_mmdit"),
        )

    return context


def losses(context: StepContext) -> list[float]:
    return [point["loss"] for point in json.loads((context.output / "curves.json").read_text())]


def test_a_quiet_run_skips_nothing(context_of: Callable[..., StepContext]) -> None:
    stats = run(context_of())
    assert (stats["skipped_steps"], stats["rollbacks"], stats["warnings"]) == (0, 0, [])


def test_a_batch_with_nan_is_skipped_told_and_harms_nothing(
    context_of: Callable[..., StepContext], capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(planted={7: float("nan")})
    stats = run(context)
    assert stats["skipped_steps"] == 2  # 24 steps of 4 are 2.4 epochs of 40
    assert stats["rollbacks"] == 0
    assert stats["warnings"] == ["2 steps were skipped, and the weights went back to a checkpoint 0 times"]
    assert capsys.readouterr().out.count("not finite; skip") == 2
    assert all(loss == loss for loss in losses(context))
    ledger = json.loads((context.output / "ledger.json").read_text())
    assert sum(step["count"] for step in ledger["steps"]) == 24 * 4  # the samples were drawn, though they taught nothing


def test_a_planted_spike_is_skipped(context_of: Callable[..., StepContext]) -> None:
    stats = run(context_of(planted={7: 300.0}))
    assert 1 <= stats["skipped_steps"] <= 3  # before half a window is known, nothing is a spike
    assert stats["rollbacks"] == 0


def test_bad_batches_in_a_row_lead_back_to_a_checkpoint_and_the_data_go_on(
    context_of: Callable[..., StepContext], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    guard = GUARD | {"patience": 1, "max_rollbacks": 9}
    stats = run(context_of(planted={number: float("nan") for number in (30, 31)}, guard=guard, checkpoint_every_steps=1))
    told = capsys.readouterr().out
    assert stats["rollbacks"] == stats["skipped_steps"] == told.count("not finite; roll back") > 1
    assert told.count("resumed after step") == stats["rollbacks"]
    ledger = json.loads((tmp_path / "output/ledger.json").read_text())
    assert [step["count"] for step in ledger["steps"]] == [4] * 24
    weights = load_file(tmp_path / "output/mmdit/model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_rollback_gives_back_weights_and_leaves_what_the_curves_have_counted(tmp_path: Path) -> None:
    store = CheckpointStore(open_storage(tmp_path.as_uri()), "x", say=print, scratch=tmp_path / "scratch")
    model, curves, guard = torch.nn.Linear(2, 2), Curves("loss"), StepGuard(Guard())
    parts: dict[str, Any] = {"model": model, "curves": curves}
    curves.add(torch.tensor(1.0))
    kept = model.weight.detach().clone()
    store.save(1, parts, notes={})
    curves.add(torch.tensor(3.0))
    torch.nn.init.zeros_(model.weight)
    roll_back(store, parts, curves, guard)
    assert torch.equal(model.weight, kept)
    assert curves.close(2) == {"step": 2, "loss": 2.0}


def test_told_to_stop_among_bad_steps_nothing_is_saved(context_of: Callable[..., StepContext], monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(planted=dict.fromkeys(range(40), float("nan")), guard=GUARD | {"patience": 9})
    monkeypatch.setattr(Stopping, "agreed", lambda self, ranks: True)
    with pytest.raises(Stopped, match="told to stop after step 1, among bad ones, which is not saved"):
        run(context)
    assert list(context.checkpoints._storage.list("checkpoints/")) == []


def test_divergence_before_the_first_checkpoint_says_so(context_of: Callable[..., StepContext]) -> None:
    planted = dict.fromkeys(range(40), float("nan"))
    with pytest.raises(TrainingDiverged, match="there is no checkpoint to go back to yet; the loss does not come back"):
        run(context_of(planted=planted))


def test_a_learning_rate_that_diverges_ends_with_a_report(context_of: Callable[..., StepContext]) -> None:
    with pytest.raises(TrainingDiverged, match=r"the loss does not come back after 1 returns to a checkpoint.*lower learning rate"):
        run(context_of(lr=30.0, steps=60, grad_clip=1e9))


def test_bfloat16_without_a_gpu_and_heads_that_do_not_divide_are_refused(context_of: Callable[..., StepContext]) -> None:
    with pytest.raises(UserError, match=r"mmdit\.precision: found bf16 on a machine without a GPU"):
        run(context_of(precision="bf16"))
    three = LaunchProfile(processes=3, context_parallel=3)
    for size, told in ((3, "the 2 heads of the model"), (4, "the 4 ranks that were started")):
        with pytest.raises(UserError, match=rf"context_parallel: found 3; allowed are divisors of {told}"):
            check_layout(MODEL.model_copy(update={"num_heads": 2}), three, Ranks(0, size))
