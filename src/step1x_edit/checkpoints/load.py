"""From a model's files to a pipeline, whichever layout they are in. Called by `Editor.load`."""

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from step1x_edit.checkpoints.folder import load_component, load_components, text_encoder_class
from step1x_edit.checkpoints.official import load_transformer, load_vae
from step1x_edit.checkpoints.resolve import ModelFiles
from step1x_edit.errors import CheckpointError
from step1x_edit.model.instruction_config import InstructionConfig
from step1x_edit.model.pipeline import Step1XEditPipeline
from step1x_edit.model.processor import PictureProcessor


def load_pipeline(
    files: ModelFiles, dtype: torch.dtype, instruction: InstructionConfig
) -> Step1XEditPipeline:
    """Read a model strictly.

    Args:
        files: From `resolve`, checked.
        dtype: Precision of the transformer and the text encoder; the autoencoder stays in float32.
        instruction: With its prefix.

    Returns:
        On the CPU.

    Raises:
        CheckpointError: A tensor is missing, unexpected, of another shape, or not a number.
    """
    parts = files.components
    if files.layout == "diffusers":
        networks = load_components(files.place, dtype)
        pipeline = Step1XEditPipeline.from_pretrained(
            files.place, instruction=instruction, **networks
        )
    else:
        networks = {
            "transformer": load_transformer(parts["transformer"], torch_dtype=dtype),
            "vae": load_vae(parts["vae"], torch_dtype=torch.float32),
            "text_encoder": load_component(text_encoder_class(), parts["text_encoder"], dtype),
        }
        pipeline = Step1XEditPipeline(
            processor=PictureProcessor.from_pretrained(parts["processor"]),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            instruction=instruction,
            **networks,
        )
    for name, network in networks.items():
        check_numbers(network, str(parts[name]))
    return pipeline


@torch.no_grad()
def check_numbers(network: nn.Module, origin: str) -> None:
    """Refuse weights that are not finite: a picture made with them is black, and nothing says why.

    Args:
        network: Its parameters are read once.
        origin: The file or folder that it was read from.

    Raises:
        CheckpointError: The first such tensor, by name.
    """
    for name, parameter in network.named_parameters():
        # The extremes show both in one pass without a copy; fp8 has no such kernel.
        values = parameter if parameter.element_size() > 1 else parameter.to(torch.bfloat16)
        if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
            raise CheckpointError(
                f"{origin}: the tensor {name} holds NaN or infinite values: the file is damaged, "
                "get it again"
            )
