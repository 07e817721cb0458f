"""Rectified flow: how a training sample is noised and what the transformer should answer.

Liu et al. 2022 (rectified flow), Esser et al. 2024 (logit-normal times, shift), with the constants
of the released trainer.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def sample_times(
    batch_size: int, shift: tuple[float, float], generator: torch.Generator | None = None
) -> Float[Tensor, " batch"]:
    """Times in (0, 1): the sigmoid of unit noise, pushed towards 1 by a shift.

    Args:
        batch_size: How many.
        shift: Range, from which each sample's own shift is drawn log-uniformly. A shift of 1
            leaves the times alone; the release has 3.1582.
        generator: Source of chance.
    """
    times = torch.sigmoid(torch.randn(batch_size, generator=generator))
    low, high = (math.log(end) for end in shift)
    shifts = torch.empty(batch_size).uniform_(low, high, generator=generator).exp()
    return shifts * times / (1 + (shifts - 1) * times)


def add_noise(
    clean: Float[Tensor, "batch tokens channels"],
    noise: Float[Tensor, "batch tokens channels"],
    times: Float[Tensor, " batch"],
) -> Float[Tensor, "batch tokens channels"]:
    """The point at `times` on the straight way from the clean tokens (0) to the noise (1)."""
    return torch.lerp(clean, noise, times[:, None, None])


def velocity_loss(
    predicted: Float[Tensor, "batch tokens channels"],
    clean: Float[Tensor, "batch tokens channels"],
    noise: Float[Tensor, "batch tokens channels"],
    weight: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error against the velocity ``noise - clean``.

    Args:
        predicted: The transformer's answer at the target tokens.
        clean: Target tokens.
        noise: The noise that was mixed in.
        weight: Weight of each token; None weighs them alike. The weights' mean is divided out.
    """
    error = (predicted.float() - (noise - clean)).square().mean(-1)  # (B, N)
    return error.mean() if weight is None else (error * weight).sum() / weight.sum()
