"""Training on a GPU: a stage as the step runs it, compiled, in bf16 and FP8, and what a checkpoint gives back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model_core.context import StepContext
from model_core.models.mmdit import MMDiT
from model_core.models.stream import pack
from model_core.objectives.flow import flow_loss
from model_core.recipe import MMDiTModel
from model_core.steps.train_mmdit import run
from model_core.storage import open_storage
from model_core.training.checkpoint import CheckpointStore
from model_core.training.float8 import use_float8
from model_core.training.optim import Optimizer
from model_core.training.parallel import compile_blocks
from model_core.training.stopping import Stopped
from tests.unit.test_train_mmdit import context_of, encoder_folder  # noqa: F401 - fixtures

WIDE = {"num_layers": 2, "num_heads": 1, "head_dim": 16, "rope_axes": [4, 6, 6]}


def losses(context: StepContext) -> list[float]:
    return [point["loss"] for point in json.loads((context.output / "curves.json").read_text())]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "float8"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_stage_runs_to_its_end_and_publishes_fp32_weights(
    context_of: Callable[..., StepContext],  # noqa: F811
    precision: str,
    compiled: bool,
) -> None:
    context = context_of(precision=precision, model=WIDE, steps=24, launch={"compile": compiled})
    stats = run(context)
    assert (stats["steps"], stats["skipped_steps"]) == (24, 0)
    assert torch.tensor(losses(context)).isfinite().all()
    weights = load_file(context.output / "mmdit" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert "blocks.0.qkv.weight" in weights


@pytest.mark.parametrize("precision", ["bf16", "float8"])
def test_a_stopped_stage_goes_on_as_one_that_was_not(
    context_of: Callable[..., StepContext],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    from model_core.training import stopping

    whole = context_of(precision=precision, model=WIDE)
    run(whole)
    expected = losses(whole)
    parted = context_of(precision=precision, model=WIDE)
    parted.checkpoints.clear()
    asked = iter([False] * 9)
    monkeypatch.setattr(stopping.Stopping, "agreed", lambda self, ranks: next(asked, True))
    with pytest.raises(Stopped):
        run(parted)
    monkeypatch.undo()
    run(parted)
    # Kernels of a GPU may sum in another order each time.
    assert losses(parted) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("float8", [False, True])
def test_the_loss_falls_in_compiled_steps(device: torch.device, float8: bool) -> None:
    config = MMDiTModel(num_layers=2, num_heads=4, head_dim=64, rope_axes=(8, 28, 28))
    torch.manual_seed(0)
    model = MMDiT(config, latent_channels=16, text_dim=32).to(device)
    if float8:
        use_float8(model)
    compile_blocks(model)
    optimizer = Optimizer(model, lr=2e-3, warmup_steps=5, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0)
    taken = []
    for step in range(60):
        samples = [(3 + (step + number) % 5, (8, 8)) for number in range(4)]  # another number of tokens each time
        stream, num_text = pack(samples, config).to(device), sum(sample[0] for sample in samples)
        target = torch.linspace(-1, 1, 64 * 16, device=device).view(64, 16).repeat(4, 1)
        with torch.autocast("cuda", torch.bfloat16):
            velocity = model(target, torch.zeros(num_text, 32, device=device), torch.full((4,), 0.5, device=device), stream)
        loss = flow_loss(velocity, target, num_elements=target.numel())
        loss.backward()
        optimizer.clip()
        optimizer.step(step)
        taken.append(loss.item())
    assert taken[-1] < 0.2 * taken[0]


def test_a_checkpoint_is_of_the_moment_it_was_asked_for_and_comes_back_to_the_gpu(device: torch.device, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512)).to(device)
    optimizer = Optimizer(model, lr=1e-2, warmup_steps=0, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0)
    x = torch.randn(64, 512, device=device)

    def step(number: int) -> float:
        loss: torch.Tensor = (model(x) - x).square().mean()
        loss.backward()
        optimizer.clip()
        optimizer.step(number)
        return loss.item()

    step(0)
    store = CheckpointStore(open_storage(tmp_path.as_uri()), "checkpoints", say=print, scratch=tmp_path / "scratch")
    saved = {name: value.detach().clone() for name, value in model.state_dict().items()}
    store.save(1, {"model": model, "optimizer": optimizer}, notes={})
    following = [step(number) for number in range(1, 6)]  # while the copy is being written
    store.wait()
    restored = store.restore({"model": model, "optimizer": optimizer})
    assert restored is not None
    assert restored.step == 1
    assert all(torch.equal(value, saved[name]) and value.device == saved[name].device for name, value in model.state_dict().items())
    assert [step(number) for number in range(1, 6)] == pytest.approx(following, rel=1e-4)
