"""Checkpoints, averages and the optimizer: what a resumed run stands on."""

import pytest
import torch

from model_core.storage import open_storage
from model_core.training.checkpoint import CheckpointStore
from model_core.training.curves import Curves
from model_core.training.ema import ema_of, update_ema
from model_core.training.optim import Optimizer, decay_groups, warmup_lr


def store(tmp_path, said=None) -> CheckpointStore:
    return CheckpointStore(open_storage(tmp_path.as_uri()), "train_vae/0/checkpoints", (said if said is not None else []).append)


def test_the_newest_checkpoint_comes_back_with_tensors_numbers_and_strings(tmp_path):
    for step in (100, 200):
        store(tmp_path).save(step, {"model": {"w": torch.full((3,), float(step))}, "curve": [{"step": step, "name": "x"}]})
    step, state = store(tmp_path).latest()
    assert step == 200
    assert state["curve"] == [{"step": 200, "name": "x"}]
    assert torch.equal(state["model"]["w"], torch.full((3,), 200.0))


def test_only_the_two_newest_are_kept_and_clearing_leaves_none(tmp_path):
    checkpoints = store(tmp_path)
    for step in (100, 200, 300, 1000):
        checkpoints.save(step, {"step": step})
    assert sorted(path.name for path in (tmp_path / "train_vae/0/checkpoints").iterdir() if any(path.iterdir())) == [
        "step-00000300",
        "step-00001000",
    ]
    checkpoints.clear()
    assert checkpoints.latest() is None


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "no state"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, damage):
    said: list[str] = []
    for step in (100, 200):
        store(tmp_path).save(step, {"step": step})
    path = tmp_path / "train_vae/0/checkpoints/step-00000200/state.pt"
    data = bytearray(path.read_bytes())
    if damage == "no state":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data) if damage == "flipped byte" else bytes(data[:-10]))
    assert store(tmp_path, said).latest() == (100, {"step": 100})
    assert "step 200 is damaged" in said[0]


def test_a_checkpoint_without_its_commit_does_not_exist(tmp_path):
    store(tmp_path).save(100, {"step": 100})
    (tmp_path / "train_vae/0/checkpoints/step-00000100/COMMIT.json").unlink()
    assert store(tmp_path).latest() is None


def test_the_average_follows_its_recurrence():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = ema_of(model)
    expected = model.weight.item()
    for step in range(30):
        with torch.no_grad():
            model.weight.fill_(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        update_ema(ema, model, step=step, decay=0.9)
    assert ema.weight.item() == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_warms_up_linearly_and_stays():
    assert [warmup_lr(step, lr=1.0, warmup_steps=4) for step in (0, 1, 4, 400)] == pytest.approx([0.2, 0.4, 1.0, 1.0])


def test_vectors_do_not_decay():
    groups = decay_groups(torch.nn.Linear(3, 2).parameters(), weight_decay=0.1)
    assert [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups] == [(0.1, [(2, 3)]), (0.0, [(2,)])]


def test_an_optimizer_step_is_adamws_first_step_on_the_clipped_gradient():
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = Optimizer(model, lr=0.1, warmup_steps=0, betas=(0.9, 0.99), weight_decay=0.5, grad_clip=1.0)
    model.weight.grad = torch.tensor([[30.0, -40.0]])
    assert optimizer.step(0).item() == pytest.approx(50.0)
    # The first AdamW step is lr times the gradient's sign, after the weights have decayed by lr times weight_decay.
    assert torch.allclose(model.weight, before * (1 - 0.05) - 0.1 * torch.tensor([[1.0, -1.0]]), atol=1e-5)
    assert model.weight.grad is None


def test_curves_are_means_since_the_last_point_and_survive_a_restart():
    curves = Curves("loss", "norm")
    for value in (1.0, 3.0):
        curves.add(torch.tensor(value), torch.tensor(10 * value))
    assert curves.close(2) == {"step": 2, "loss": 2.0, "norm": 20.0}
    curves.add(torch.tensor(5.0), torch.tensor(0.0))
    other = Curves("loss", "norm")
    other.load_state_dict(curves.state_dict())
    other.add(torch.tensor(7.0), torch.tensor(0.0))
    assert other.close(4)["loss"] == 6.0
    assert [point["step"] for point in other.points] == [2, 4]
