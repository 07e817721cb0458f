"""Official single files into models: the transformer with its connector, and the autoencoder.

`resolve` and the `convert` command call these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from step1x_edit.errors import CheckpointError
from step1x_edit.model.official_layout import read_into, vae_rows, write_file
from step1x_edit.model.official_sizes import vae_sizes
from step1x_edit.model.transformer import Step1XEditTransformer2DModel


def load_transformer(
    path: str | Path, *, torch_dtype: torch.dtype | None = None, **config: Any
) -> Step1XEditTransformer2DModel:
    """Load the official transformer file; see `Step1XEditTransformer2DModel.from_official`."""
    return Step1XEditTransformer2DModel.from_official(path, torch_dtype=torch_dtype, **config)


def load_vae(
    path: str | Path, *, torch_dtype: torch.dtype | None = None, **config: Any
) -> AutoencoderKL:
    """Load the official autoencoder file (FLUX.1's, under latent diffusion's names).

    Args:
        path: `vae.safetensors`.
        torch_dtype: Convert the weights to it; None keeps the file's.
        config: Arguments of `AutoencoderKL` that differ from what the shapes tell and from the
            release's scaling.

    Returns:
        The model in evaluation mode on the CPU.

    Raises:
        CheckpointError: Not such a file, or a tensor too few, too many or of another shape.
    """
    path = Path(path)
    vae = empty_vae(path, **config)
    read_into(vae, _rows(vae), path, torch_dtype)
    return vae.eval()


def empty_vae(path: Path, **config: Any) -> AutoencoderKL:
    """As `load_vae`, without the weights.

    Raises:
        CheckpointError: Not such a file, or its sizes are impossible.
    """
    sizes = vae_sizes(path, config)
    try:
        with torch.device("meta"):
            return AutoencoderKL(**sizes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def save_vae(vae: AutoencoderKL, path: str | Path) -> None:
    """Write an autoencoder as the official file.

    Args:
        vae: Its parameters keep their dtypes.
        path: Target; replaced if it exists.

    Raises:
        CheckpointError: The model is not a plain `AutoencoderKL`.
    """
    write_file(vae, _rows(vae), Path(path))


def _rows(vae: AutoencoderKL) -> list[Any]:
    names = [name for name, _ in vae.named_parameters()]
    return vae_rows(names, num_levels=len(vae.config["block_out_channels"]))
