"""From a model's files to a pipeline, whichever layout they are in. Called by `runtime.apply`."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from step1x_edit.checkpoints.folder import (
    empty_vae,
    load_component,
    load_components,
    load_vae,
    text_encoder_class,
)
from step1x_edit.checkpoints.official import empty_vae as empty_official_vae
from step1x_edit.checkpoints.official import load_transformer
from step1x_edit.checkpoints.official import load_vae as load_official_vae
from step1x_edit.checkpoints.resolve import ModelFiles
from step1x_edit.checkpoints.tensor_files import check_finite
from step1x_edit.model.instruction_config import InstructionConfig
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.model.processor import PictureProcessor


def load_networks(files: ModelFiles, dtype: torch.dtype) -> dict[str, Any]:
    """Read a model's networks strictly.

    Args:
        files: From `resolve`, checked.
        dtype: Precision of the transformer and the text encoder; the autoencoder stays in float32.

    Returns:
        Component → module, on the CPU.

    Raises:
        CheckpointError: A tensor is missing, unexpected, of another shape, or not a number.
    """
    parts = files.components
    if files.layout == "diffusers":
        networks = load_components(files.place, dtype)
    else:
        networks = {
            "transformer": load_transformer(parts["transformer"], torch_dtype=dtype),
            "vae": load_autoencoder(files),
            "text_encoder": load_component(text_encoder_class(), parts["text_encoder"], dtype),
        }
    for name, network in networks.items():
        check_numbers(network, str(parts[name]))
    return networks


def load_autoencoder(files: ModelFiles) -> Any:
    """A model's autoencoder, in float32.

    Raises:
        CheckpointError: As of `load_networks`.
    """
    if files.layout == "diffusers":
        return load_vae(files.place, files.index)
    return load_official_vae(files.components["vae"], torch_dtype=torch.float32)


def empty_autoencoder(files: ModelFiles) -> Any:
    """A model's autoencoder without its weights.

    Raises:
        CheckpointError: Its configuration cannot be read or is impossible.
    """
    if files.layout == "diffusers":
        return empty_vae(files.place, files.index)
    return empty_official_vae(files.components["vae"])


def build_pipeline(
    files: ModelFiles, networks: Mapping[str, Any], instruction: InstructionConfig
) -> Step1XEditPipeline:
    """A pipeline of networks and of what else the model's files hold.

    Args:
        files: From `resolve`, checked.
        networks: Component → module.
        instruction: With its prefix.
    """
    if files.layout == "diffusers":
        return Step1XEditPipeline.from_pretrained(files.place, instruction=instruction, **networks)
    return Step1XEditPipeline(
        processor=PictureProcessor.from_pretrained(files.components["processor"]),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        instruction=instruction,
        **networks,
    )


def check_numbers(network: nn.Module, origin: str) -> None:
    """Refuse weights that are not finite; see `tensor_files.check_finite`.

    Args:
        network: Its parameters are read once.
        origin: The file or folder that it was read from.

    Raises:
        CheckpointError: The first such tensor, by name.
    """
    for name, parameter in network.named_parameters():
        check_finite(name, parameter, origin)
