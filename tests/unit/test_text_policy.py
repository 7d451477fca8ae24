"""The objective of reinforcement learning on text, against closed forms and a brute force in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model_core.objectives.text_policy import text_kl, text_policy_loss

LENGTHS = (1, 4, 9)


def log_probs(seed: int, *, grad: bool = False) -> list[torch.Tensor]:
    """Log-probabilities of answers of LENGTHS tokens, fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [(-torch.rand(length, generator=generator, dtype=torch.float64) * 3 - 0.01).requires_grad_(grad) for length in LENGTHS]


def test_the_ratio_is_exactly_one_where_the_old_policy_is_the_new_one() -> None:
    new = [value.float() for value in log_probs(0)]
    found = text_policy_loss(new, [value.detach() for value in new], torch.tensor([1.5, -2.0, 0.0]), clip=0.2)
    assert torch.equal(found.ratio, torch.ones(3))
    assert torch.equal(found.loss, torch.tensor([-1.5, 2.0, -0.0]))
    assert not found.at_upper.any()
    assert not found.at_lower.any()


def test_the_first_gradient_is_that_of_the_mean_log_probability_times_minus_the_advantage() -> None:
    advantages = torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64)
    new = log_probs(0, grad=True)
    text_policy_loss(new, new, advantages, clip=0.2).loss.mean().backward()
    for value, advantage, length in zip(new, advantages, LENGTHS, strict=True):
        assert value.grad is not None
        assert torch.allclose(value.grad, torch.full((length,), -advantage.item() / length / 3, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient", "held"),
    [
        (1.1, 1.0, -1.1, True, None),
        (1.5, 1.0, -1.2, False, "upper"),  # good and already likelier: no further
        (1.5, -1.0, 1.5, True, None),  # bad and likelier: back
        (0.9, -1.0, 0.9, True, None),
        (0.5, -1.0, 0.8, False, "lower"),
        (0.5, 1.0, -0.5, True, None),
    ],
)
def test_a_token_is_held_only_where_it_would_go_further(
    ratio: float, advantage: float, loss: float, has_gradient: bool, held: str | None
) -> None:
    new = torch.tensor([np.log(ratio)], requires_grad=True)
    found = text_policy_loss([new], [torch.zeros(1, dtype=torch.float64)], torch.tensor([advantage], dtype=torch.float64), clip=0.2)
    found.loss.sum().backward()
    assert found.loss.item() == pytest.approx(loss)
    assert new.grad is not None
    assert bool(new.grad != 0) == has_gradient
    assert (found.at_upper.item(), found.at_lower.item()) == (float(held == "upper"), float(held == "lower"))


def test_losses_are_means_over_an_answers_tokens() -> None:
    new, old, advantages = log_probs(1), log_probs(2), np.array([1.0, -1.0, 0.3])
    found = text_policy_loss(new, old, torch.from_numpy(advantages), clip=0.3)
    for number, advantage in enumerate(advantages):
        ratio = np.exp(new[number].numpy() - old[number].numpy())
        expected = np.mean([-min(advantage * r, advantage * min(max(r, 0.7), 1.3)) for r in ratio])
        assert found.loss[number].item() == pytest.approx(expected, rel=1e-12)
        assert found.ratio[number].item() == pytest.approx(ratio.mean(), rel=1e-12)


def test_what_wrote_the_answers_gets_no_gradient() -> None:
    old = log_probs(3, grad=True)
    text_policy_loss(log_probs(4, grad=True), old, torch.ones(3, dtype=torch.float64), clip=0.2).loss.sum().backward()
    assert all(value.grad is None for value in old)


def test_kl_is_never_negative_and_zero_just_where_both_agree() -> None:
    new, reference = log_probs(5), log_probs(6)
    assert bool((text_kl(new, reference) > 0).all())
    assert torch.equal(text_kl(new, new), torch.zeros(3, dtype=torch.float64))


def test_kl_has_the_mean_of_the_true_one() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    true = (policy * (policy / reference).log()).sum()
    each = torch.stack([text_kl([policy[token : token + 1].log()], [reference[token : token + 1].log()])[0] for token in range(3)])
    assert torch.isclose((policy * each).sum(), true, rtol=1e-12)


def test_kl_draws_the_policy_to_the_reference() -> None:
    logits, reference = torch.zeros(3, requires_grad=True), torch.tensor([2.0, 0.0, -1.0])
    before = text_kl([logits.log_softmax(0)], [reference.log_softmax(0)]).sum()
    before.backward()
    assert logits.grad is not None
    after = text_kl([(logits - 0.1 * logits.grad).log_softmax(0)], [reference.log_softmax(0)]).sum()
    assert after < before


def test_an_answer_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="answer 0: found no tokens"):
        text_policy_loss([torch.zeros(0)], [torch.zeros(0)], torch.ones(1), clip=0.2)
