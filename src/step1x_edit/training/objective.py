"""Rectified flow: how a training sample is noised and what the transformer should answer.

Liu et al. 2022 (rectified flow), Esser et al. 2024 (logit-normal times, shift), with the constants
of the released trainer.
"""

import math
from collections.abc import Sequence

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


def draw_examples(
    shape: torch.Size, shift: tuple[float, float], generators: Sequence[torch.Generator]
) -> tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, " batch"]]:
    """Noise and times of a batch, each example's from its own source of chance.

    Args:
        shape: Of the batch.
        shift: As of `sample_times`.
        generators: One for each example.
    """
    noise = torch.stack([torch.randn(shape[1:], generator=g) for g in generators])
    return noise, torch.cat([sample_times(1, shift, g) for g in generators])


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
        weight: Weight of each token beside the others of its sample; None weighs them alike.
    """
    error = (predicted.float() - (noise - clean)).square().mean(-1)  # (B, N)
    if weight is not None:
        error = error * (weight / weight.mean(-1, keepdim=True))
    return error.mean()


def token_weights(
    changed: Float[Tensor, "batch tokens"], changed_weight: float, outline_weight: float
) -> Float[Tensor, "batch tokens"]:
    """How much each token's error counts: 1, and more where the edit changes something.

    Args:
        changed: Changed share of each token's pixels, 0 to 1.
        changed_weight: Added to a token that changes altogether, in proportion to one in part.
        outline_weight: Added to every token that changes in part. Such a token holds new and old
            pixels; it is learnt last and is most of what is wrong outside the change.
    """
    partly = (changed > 0) & (changed < 1)
    return 1 + changed_weight * changed + outline_weight * partly
