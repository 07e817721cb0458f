"""Between pictures and picture tokens: the autoencoder's scale and the 2×2 packing.

Serves any diffusers autoencoder with a spatial factor of 8: `AutoencoderKL` (the released models;
the posterior's mean is taken, so results repeat) and deterministic ones such as `AutoencoderDC`
(the mini). Called by pipeline and trainer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from step1x_edit.errors import InvalidRequest

PIXELS_PER_TOKEN = 16
"""Side of the square of pixels behind one token: 8 of the autoencoder times 2 of the packing."""


def encode_pictures(
    vae: Any, pictures: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch tokens channels"]:
    """Pictures in [-1, 1] → scaled latents, packed into tokens.

    Args:
        vae: A diffusers autoencoder.
        pictures: Sides are multiples of 16 pixels.
    """
    encoded = vae.encode(pictures)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return pack((latents - shift) * vae.config.scaling_factor)


def decode_tokens(
    vae: Any, tokens: Float[Tensor, "batch tokens channels"], height: int, width: int
) -> Float[Tensor, "batch 3 height width"]:
    """Tokens → pictures of `height` × `width` pixels, about [-1, 1], in the autoencoder's dtype."""
    latents = unpack(tokens, height // PIXELS_PER_TOKEN).to(vae.dtype)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    pictures = vae.decode(latents / vae.config.scaling_factor + shift).sample
    assert pictures.shape[-2:] == (height, width)
    return pictures


def pack(
    latents: Float[Tensor, "batch channels rows columns"],
) -> Float[Tensor, "batch tokens packed"]:
    """2×2 latent pixels into one token, as FLUX does."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(
    tokens: Float[Tensor, "batch tokens packed"], rows: int
) -> Float[Tensor, "batch channels height width"]:
    """The inverse of `pack`; `rows` counts token rows."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)


FAR = 4.0
"""A token has clearly changed from so many times the threshold of `keep_reference` on."""
MOST_BETWEEN, LEAST_FAR = 0.2, 0.02
"""Shares of a picture's tokens. An edit of a part leaves few tokens between kept and changed."""


def keep_reference(
    tokens: Float[Tensor, "batch tokens packed"],
    reference: Float[Tensor, "batch tokens packed"],
    threshold: float,
) -> Float[Tensor, "batch tokens packed"]:
    """The reference's own tokens where an edit of a part of the picture left it alone.

    A small model repeats what stays with an error of its own. Where that is all the difference
    there is, the reference is nearer to what was asked for. A tone changes everything, much of it a
    little: such pictures are left as they are.

    Args:
        tokens: Of the result.
        reference: Of the picture that was edited.
        threshold: Mean square over a token's channels below which it is taken to be unchanged.
    """
    change = (tokens - reference).square().mean(-1, keepdim=True)
    near, far = change < threshold, change > FAR * threshold
    between = ~(near | far)
    in_parts = (between.float().mean(1, keepdim=True) <= MOST_BETWEEN) & (
        far.float().mean(1, keepdim=True) >= LEAST_FAR
    )
    return torch.where(near & in_parts, reference, tokens)


def row_noise(
    size: tuple[int, int],
    channels: int,
    index: int,
    num_rows: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Float[Tensor, "batch tokens channels"] | None,
) -> Float[Tensor, "1 tokens channels"]:
    """The noise of one row of a batch, the same whatever else is in the batch.

    Args:
        size: Width and height of its picture in pixels.
        channels: Values of a token.
        index: Which row it is.
        num_rows: How many there are.
        generator: For all rows, or one each.
        latents: The noise itself, packed, of all rows; then nothing is drawn.

    Raises:
        InvalidRequest: Generators or latents do not fit the rows.
    """
    if latents is not None:
        shape = (num_rows, size[0] * size[1] // PIXELS_PER_TOKEN**2, channels)
        if latents.shape != shape:
            raise InvalidRequest(f"latents of shape {tuple(latents.shape)}: must be {shape}")
        return latents[index : index + 1].float()
    if isinstance(generator, Sequence):
        if len(generator) != num_rows:
            raise InvalidRequest(
                f"{len(generator)} generators for {num_rows} results: give one, or one for each"
            )
        generator = generator[index]
    return draw_noise((1, channels // 4, size[1] // 8, size[0] // 8), generator)


def draw_noise(
    shape: tuple[int, ...], generator: torch.Generator | None
) -> Float[Tensor, "batch tokens packed"]:
    """Unit noise of latents of `shape`, packed; on the CPU in float32, so no device changes it.

    Args:
        shape: (batch, channels, rows, columns).
        generator: A CPU generator; None takes torch's own.
    """
    return pack(torch.randn(shape, generator=generator))


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Run a module in float32 and give it its precision back."""
    dtype = next(module.parameters()).dtype
    if dtype == torch.float32:
        yield
        return
    # Of nn.Module, as diffusers' own `to` warns at each change of precision.
    nn.Module.to(module, torch.float32)
    try:
        yield
    finally:
        nn.Module.to(module, dtype)
