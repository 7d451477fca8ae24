"""Distribution-matching distillation: the gradient that draws a student's pictures to where a teacher finds them likely.

KL(student || teacher) of pictures noised to time t has the gradient (1 - t)(s_fake - s_real) (DMD2, arXiv 2405.14867; R1 eq. 4). With
s = -(x_t - (1 - t) x0) / t^2 the difference of scores is ((1 - t) / t^2)(x0_fake - x0_real): so the difference of clean predictions, over
the student's distance from the real one, is that gradient in a weighting that no scale of the latents changes. Tensors are (B, N, C).
"""

from __future__ import annotations

from torch import Tensor


def split_real(matched: Tensor, guided: Tensor, conditional: Tensor) -> Tensor:
    """The real clean prediction whose guidance is taken at a time of its own: `matched` + (`guided` - `conditional`).

    The fake prediction's distance from it is (fake - matched) - (guided - conditional): what matches distributions, and what guidance
    adds (Decoupled-DMD, arXiv 2511.22677). Without rescaling the latter is (w - 1)(conditional - unconditional).
    """
    return matched + (guided - conditional)


def matching_gradient(clean: Tensor, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """(x0_fake - x0_real) / mean |x - x0_real|, by each sample's own mean, and how many samples' mean was 0: those get 0.

    A mean of the whole batch would let one sample's distance weigh another's gradient.
    """
    scale = (clean - real).abs().mean(dim=(1, 2), keepdim=True)
    empty = scale == 0
    gradient = ((fake - real) / scale.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
    return gradient, empty.sum()


def distillation_loss(clean: Tensor, gradient: Tensor, *, num_elements: int) -> Tensor:
    """A loss whose gradient by `clean` is `gradient` / `num_elements`: half the squared distance to the constant clean - gradient."""
    return 0.5 * (clean - (clean - gradient).detach()).square().sum() / num_elements
