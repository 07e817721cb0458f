"""Everything about sampling that is a formula: positions, time steps, guidance, the Euler walk.

Plain functions of tensors; the pipeline and the trainer's previews put them together. None of them
knows what a picture or an instruction is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ModelVersion = Literal["v1.0", "v1.1"]

NORMALISED_ABOVE = 0.93
"""Time above which the release normalises guidance."""


def prepare_ids(
    num_text_tokens: int,
    target_size: tuple[int, int],
    reference_size: tuple[int, int] | None = None,
    version: ModelVersion = "v1.1",
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, "image 3"], Float[Tensor, "text 3"]]:
    """Positions of all tokens, as the transformer's rotary embedding wants them.

    Args:
        num_text_tokens: Instruction tokens, padding included. Their positions are zeros.
        target_size: Rows and columns of the target's token grid (16 pixels per token).
        reference_size: The same of the reference picture; None for text to image.
        version: Release whose positions to use (`Step1XEditTransformer2DModel.version`). v1.0 puts
            the reference where the target is; v1.1 sets it apart on all three axes.
        device: Where to make them.

    Returns:
        Picture positions (target, then reference) and text positions, float32, for one row; the
        transformer uses them for every row of a batch.
    """
    image = [_grid(*target_size, device)]
    if reference_size is not None:
        offset = 1.0 if version == "v1.1" else 0.0
        image.append(_grid(*reference_size, device) + offset)
    return torch.cat(image), torch.zeros(num_text_tokens, 3, device=device)


def _grid(rows: int, columns: int, device: torch.device | str | None) -> Tensor:
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32, device=device),
        torch.arange(columns, dtype=torch.float32, device=device),
        indexing="ij",
    )
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1)


def schedule(
    num_steps: int, num_target_tokens: int, shift: float | None = None
) -> Float[Tensor, " steps_and_end"]:
    """Times from pure noise to the picture, later ones closer together for larger pictures.

    Flow-matching timestep shift of Esser et al. 2024 (SD3, section 5.3.2) with FLUX's linear rule
    for its strength; equal to diffusers' `FlowMatchEulerDiscreteScheduler` with dynamic shifting.

    Args:
        num_steps: Number of Euler steps, at least 1.
        num_target_tokens: Tokens of the target picture alone, without the reference.
        shift: A strength instead of the rule's, above 0; larger ones stay longer near noise.

    Returns:
        `num_steps + 1` float32 times on the CPU, falling from 1 to 0.
    """
    if shift is None:
        shift = resolution_shift(num_target_tokens)
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float32)
    # 1/0 at the end is infinity, which the formula turns into the zero that is wanted.
    return shift / (shift + (1 / times - 1))


def resolution_shift(num_target_tokens: int) -> float:
    """How strongly times are pushed towards noise for a picture of so many tokens, at least 1.

    FLUX's rule: the logarithm is linear in the number of tokens.
    """
    low_tokens, low_mu, high_tokens, high_mu = 256, 0.5, 4096, 1.15
    slope = (high_mu - low_mu) / (high_tokens - low_tokens)
    return math.exp(slope * num_target_tokens + (low_mu - slope * low_tokens))


def guided_velocity(
    conditional: Float[Tensor, "batch tokens channels"],
    unconditional: Float[Tensor, "batch tokens channels"],
    scale: float,
    time: float,
    normalised_above: float = NORMALISED_ABOVE,
) -> Float[Tensor, "batch tokens channels"]:
    """Classifier-free guidance (Ho & Salimans 2022), tamed early on as in the release.

    Args:
        conditional: Velocity under the instruction.
        unconditional: Velocity under the negative instruction.
        scale: 1 gives back `conditional`; larger values follow the instruction more strongly.
        time: Time of the step, in [0, 1].
        normalised_above: While `time` is above it, a token's guidance vector of length n > 1 is
            divided by n^0.4, which keeps colours from burning. 1.0 never normalises.
    """
    difference = conditional - unconditional
    if time > normalised_above:
        length = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
        difference = difference / length.pow(0.4).where(length > 1, 1)
    return torch.add(unconditional, difference, alpha=scale)


def is_guided(scale: float | None) -> bool:
    """Whether `scale` asks for an unconditional row at all: None and -1 do not."""
    return scale is not None and scale != -1


def euler_sample(
    velocity: Callable[[Tensor, float], Tensor],
    latents: Float[Tensor, "batch tokens channels"],
    times: Float[Tensor, " steps_and_end"],
    on_step: Callable[[int, float, Tensor], Tensor | None] | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """Walk along a velocity field from the first time to the last in straight steps.

    Args:
        velocity: Called with the latents and the time in [0, 1]; gives the velocity at them.
        latents: Where to start: noise, at the first time.
        times: Falling times, as `schedule` makes them.
        on_step: Called after every step with its index, the time reached and the latents. What it
            returns, if anything, takes the latents' place.

    Returns:
        Latents at the last time, in the dtype of `latents`.
    """
    for step, (time, next_time) in enumerate(pairwise(times.tolist())):
        slope = velocity(latents, time).to(latents.dtype)
        latents = torch.add(latents, slope, alpha=next_time - time)
        if on_step is not None:
            replacement = on_step(step, next_time, latents)
            latents = latents if replacement is None else replacement
    return latents
