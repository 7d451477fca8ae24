"""Checkpoints, averages and the optimizer: what a resumed run stands on."""

import pytest
import torch

from model_core.training.curves import Curves
from model_core.training.ema import ema_of, update_ema
from model_core.training.optim import Optimizer, decay_groups, warmup_lr


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


@pytest.mark.parametrize("shape", [(3,), (3, 3)])
def test_no_group_of_the_optimizer_is_empty(shape):
    assert len(decay_groups([torch.nn.Parameter(torch.zeros(shape))], weight_decay=0.1)) == 1


def test_an_optimizer_step_is_adamws_first_step_on_the_clipped_gradient():
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = Optimizer(model, lr=0.1, warmup_steps=0, betas=(0.9, 0.99), weight_decay=0.5, grad_clip=1.0)
    model.weight.grad = torch.tensor([[30.0, -40.0]])
    assert optimizer.clip().item() == pytest.approx(50.0)
    optimizer.step(0)
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


def trained(model, steps, *, optimizer=None, first=0):
    """The optimizer after some steps on gradients that are a function of the step."""
    optimizer = optimizer or Optimizer(model, lr=0.1, warmup_steps=3, betas=(0.9, 0.99), weight_decay=0.5, grad_clip=1.0)
    for step in range(first, first + steps):
        for index, parameter in enumerate(list(model.parameters())[:-1]):  # the last one never has a gradient
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) * (-1) ** index)
        optimizer.step(step)
    return optimizer


def three_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))


def test_an_optimizer_goes_on_bitwise_from_a_state_by_name():
    whole, broken, resumed = three_layers(), three_layers(), three_layers()
    trained(whole, 5)
    state = trained(broken, 3).state_dict()
    assert set(state["state"]) == {name for name, _ in broken.named_parameters() if name != "2.bias"}
    resumed.load_state_dict(broken.state_dict())
    optimizer = Optimizer(resumed, lr=0.1, warmup_steps=3, betas=(0.9, 0.99), weight_decay=0.5, grad_clip=1.0)
    optimizer.load_state_dict(state)
    trained(resumed, 2, optimizer=optimizer, first=3)
    for (name, expected), found in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name
